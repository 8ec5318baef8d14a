"""A plain progress line for mapped steps, on a terminal or in a log, and how long each took."""

from __future__ import annotations

import time
from typing import NamedTuple, TextIO

from hypernodes import CallbackContext, PipelineCallback

__all__ = ["MapProgress", "MapTime"]

_REDRAW_S = 0.1
_LOG_S = 5.0
_ERASE_LINE = "\r\x1b[K"


class MapTime(NamedTuple):
    """A finished mapped step: how many items it had, how many of them a cache had, and its seconds in all."""

    step: str
    items: int
    cached: int
    seconds: float


class MapProgress(PipelineCallback):
    """Writes how far each mapped step is, such as ``encode_passages 12,000/23,206``; use a new one for a run.

    On a terminal this is one line that is redrawn ten times a second. Elsewhere it is a line every five
    seconds, so that a short run writes nothing. ``finished`` holds the steps that are done.

    Args:
        stream: where to write; not closed.
        interval_s: seconds between two updates, if not the above.
    """

    def __init__(self, stream: TextIO, *, interval_s: float | None = None) -> None:
        self.finished: list[MapTime] = []
        self._stream = stream
        self._on_terminal = stream.isatty()
        self._interval_s = (_REDRAW_S if self._on_terminal else _LOG_S) if interval_s is None else interval_s
        self._shown_at = time.monotonic()
        self._running: dict[str, list[int]] = {}  # pipeline id: items done, items in all, items from a cache

    def on_map_start(self, total_items: int | None, ctx: CallbackContext) -> None:
        """Begin to count a step."""
        self._running[ctx.current_pipeline_id] = [0, total_items or 0, 0]

    def on_map_item_end(self, item_index: int, duration: float, ctx: CallbackContext) -> None:
        """Count an item, and write if it is time."""
        self._count(ctx)[0] += 1
        self._show_in_time()

    def on_map_item_cached(self, item_index: int, signature: str, ctx: CallbackContext) -> None:
        """Count an item that need not be computed, and write if it is time."""
        counts = self._count(ctx)
        counts[0] += 1
        counts[2] += 1
        self._show_in_time()

    def on_map_end(self, total_duration: float, ctx: CallbackContext) -> None:
        """Keep how long the step took."""
        done, _, cached = self._running.pop(ctx.current_pipeline_id)
        self.finished.append(MapTime(_step_name(ctx.current_pipeline_id), done, cached, total_duration))

    def close(self) -> None:
        """Erase the line on a terminal, so that what is printed next starts on a clean one."""
        if self._on_terminal:
            self._write(_ERASE_LINE)

    def _count(self, ctx: CallbackContext) -> list[int]:
        assert ctx.parent_pipeline_id is not None, "an item is inside its map"
        return self._running[ctx.parent_pipeline_id]

    def _show_in_time(self) -> None:
        now = time.monotonic()
        if now - self._shown_at >= self._interval_s:
            self._shown_at = now
            self._show()

    def _show(self) -> None:
        steps = self._running.items()
        line = "  ".join(f"{_step_name(map_id)} {done:,}/{total:,}" for map_id, (done, total, _) in steps)
        self._write(f"{_ERASE_LINE}{line}" if self._on_terminal else f"{line}\n")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def _step_name(pipeline_id: str) -> str:
    """``encode_passages`` of ``retrieval / encode_passages``."""
    return pipeline_id.rpartition(" / ")[2]

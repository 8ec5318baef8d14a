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
    """A finished mapped step: how many items it had, and the seconds from its first item to its last."""

    step: str
    items: int
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
        self._running: dict[str, list[int]] = {}  # pipeline id: items done, items in all

    def on_map_start(self, total_items: int | None, ctx: CallbackContext) -> None:
        """Begin to count a step."""
        self._running[ctx.current_pipeline_id] = [0, total_items or 0]

    def on_map_item_end(self, item_index: int, duration: float, ctx: CallbackContext) -> None:
        """Count an item, and write if it is time."""
        assert ctx.parent_pipeline_id is not None, "an item is inside its map"
        self._running[ctx.parent_pipeline_id][0] += 1
        now = time.monotonic()
        if now - self._shown_at >= self._interval_s:
            self._shown_at = now
            self._show()

    def on_map_end(self, total_duration: float, ctx: CallbackContext) -> None:
        """Keep how long the step took."""
        done, _ = self._running.pop(ctx.current_pipeline_id)
        self.finished.append(MapTime(_step_name(ctx.current_pipeline_id), done, total_duration))

    def close(self) -> None:
        """Erase the line on a terminal, so that what is printed next starts on a clean one."""
        if self._on_terminal:
            self._write(_ERASE_LINE)

    def _show(self) -> None:
        line = "  ".join(f"{_step_name(map_id)} {done:,}/{total:,}" for map_id, (done, total) in self._running.items())
        self._write(f"{_ERASE_LINE}{line}" if self._on_terminal else f"{line}\n")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def _step_name(pipeline_id: str) -> str:
    """``encode_passages`` of ``retrieval / encode_passages``."""
    return pipeline_id.rpartition(" / ")[2]

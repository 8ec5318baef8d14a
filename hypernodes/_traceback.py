"""Tracebacks of a user's errors, without the frames of what runs the user's functions."""

from __future__ import annotations

import os
from types import TracebackType

_HERE = os.path.dirname(__file__) + os.sep
_DEMO = os.path.join(_HERE, "demo") + os.sep
_MACHINERY = ("anyio", "asyncio", "concurrent", "tenacity", "threading", "contextlib", "trio", "outcome")
FULL = "HYPERNODES_FULL_TRACEBACKS"
"""Set in the environment, tracebacks keep every frame."""


class _UserFrames:
    """A block out of which errors leave with the user's frames, and that of the block."""

    __slots__ = ()

    def __enter__(self) -> None:
        """Nothing is prepared."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception | KeyboardInterrupt) and trace is not None:
            error.with_traceback(trimmed(trace))
        if isinstance(error, KeyboardInterrupt) and not os.environ.get(FULL):
            error.__suppress_context__ = True  # how the event loop was cancelled


user_frames = _UserFrames()


def bare(error: Exception) -> Exception:
    """Return an error of a client that we use, to be shown as a cause in one line, without that client's frames."""
    return error if os.environ.get(FULL) else error.with_traceback(None)


def trimmed(trace: TracebackType) -> TracebackType:
    """Return a traceback with its first frame and those of the user's code."""
    if os.environ.get(FULL):
        return trace
    kept: TracebackType | None = None
    rest = []
    each: TracebackType | None = trace.tb_next
    while each is not None:
        if not _is_machinery(each.tb_frame.f_code.co_filename, each.tb_frame.f_globals.get("__name__", "")):
            rest.append(each)
        each = each.tb_next
    for each in reversed(rest):
        kept = TracebackType(kept, each.tb_frame, each.tb_lasti, each.tb_lineno)
    return TracebackType(kept, trace.tb_frame, trace.tb_lasti, trace.tb_lineno)


def _is_machinery(filename: str, module: str) -> bool:
    if filename.startswith(_HERE):
        return not filename.startswith(_DEMO)
    return module.partition(".")[0] in _MACHINERY

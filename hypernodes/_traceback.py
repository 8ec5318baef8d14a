"""Tracebacks of a user's errors, without the frames of what runs the user's functions."""

from __future__ import annotations

import os
from traceback import StackSummary, TracebackException, walk_tb
from types import FrameType, TracebackType

_HERE = os.path.dirname(__file__) + os.sep
_DEMO = os.path.join(_HERE, "demo") + os.sep
_MACHINERY = (
    "anyio",
    "asyncio",
    "concurrent",
    "tenacity",
    "threading",
    "contextlib",
    "trio",
    "outcome",
    "synchronicity",
)
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
        if error is not None and trace is not None:
            error.with_traceback(trimmed(trace))
        if error is not None and _is_interruption(error) and not os.environ.get(FULL):
            error.__suppress_context__ = True  # how all that was under way was cancelled


user_frames = _UserFrames()


def _is_interruption(error: BaseException) -> bool:
    """Say whether it is Ctrl-C, or an event loop's own cancellation."""
    if isinstance(error, Exception):
        return False
    return isinstance(error, KeyboardInterrupt) or type(error).__module__.partition(".")[0] in _MACHINERY


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
        if not _is_machinery(each.tb_frame.f_code.co_filename, _module(each.tb_frame)):
            rest.append(each)
        each = each.tb_next
    for each in reversed(rest):
        kept = TracebackType(kept, each.tb_frame, each.tb_lasti, each.tb_lineno)
    return TracebackType(kept, trace.tb_frame, trace.tb_lasti, trace.tb_lineno)


def trimmed_text(error: BaseException) -> str:
    """Return how an error is shown, with the frames of the user's code, and without those of what ran it."""
    shown = TracebackException.from_exception(error)
    if not os.environ.get(FULL):
        _trim(shown, error)
    return "".join(shown.format())


def _trim(shown: TracebackException, error: BaseException) -> None:
    """Leave the user's frames, or the last one, of an error and of all that it came from."""
    left: list[tuple[TracebackException | None, BaseException | None]] = [(shown, error)]
    while left:
        each, of = left.pop()
        if each is None or of is None:
            continue
        both = zip(each.stack, walk_tb(of.__traceback__), strict=False)  # sys.tracebacklimit may have cut the first
        kept = [entry for entry, (frame, _) in both if not _is_machinery(frame.f_code.co_filename, _module(frame))]
        each.stack = StackSummary.from_list(kept or each.stack[-1:])
        left += [(each.__cause__, of.__cause__), (each.__context__, of.__context__)]
        if isinstance(of, BaseExceptionGroup):
            left += zip(each.exceptions or (), of.exceptions, strict=False)


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _is_machinery(filename: str, module: str) -> bool:
    if filename.startswith(_HERE):
        return not filename.startswith(_DEMO)
    return module.partition(".")[0] in _MACHINERY

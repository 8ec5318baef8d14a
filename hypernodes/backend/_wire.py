"""What crosses to another process: frames of pickled values, with large buffers beside the pickle.

Both ends are this library on the two ends of one socket pair, so what is unpickled is what we wrote.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

from hypernodes._mapping import Path
from hypernodes._node import Node
from hypernodes._traceback import trimmed_text
from hypernodes.errors import RemoteExecutionError, SerializationError
from hypernodes.events import Event

Parts = list[Any]
"""A pickle and the buffers beside it, each bytes-like."""
COUNT = struct.Struct("!I")
LENGTH = struct.Struct("!Q")
_DEEPEST = 8


def dumps(value: Any) -> Parts:
    """Pickle a value, closures and notebook classes included; large arrays stay where they are."""
    import cloudpickle

    buffers: list[pickle.PickleBuffer] = []
    data = cloudpickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return [data, *(buffer.raw() for buffer in buffers)]


def loads(parts: Parts) -> Any:
    """Return the value that :func:`dumps` pickled."""
    return pickle.loads(parts[0], buffers=parts[1:])


def packed(value: Any) -> list[pickle.PickleBuffer]:
    """Pickle a value for use inside a message, where it travels as it is."""
    return [pickle.PickleBuffer(part) for part in dumps(value)]


def packed_checked(value: Any, named: dict[str, Any], what: str) -> list[pickle.PickleBuffer]:
    """Pickle a value that a user gave; ``named`` are its parts as the user knows them.

    Raises:
        SerializationError: with the path of the object that cannot be pickled, and why.
    """
    try:
        return packed(value)
    except SerializationError:
        raise  # of one of ours, which says what to do
    except Exception as error:  # pickling runs the user's code
        found = next((found for name, part in named.items() if (found := find_unpicklable(part, name))), None)
        where, culprit, reason = found or (what, value, error)
        raise SerializationError(
            f"{what} cannot be sent to a worker process: {where} is a {type(culprit).__name__} ({reason}). "
            f"Make it inside the node, or give its class __getstate__/__reduce__"
        ) from error


def find_unpicklable(value: Any, name: str, depth: int = 0) -> tuple[str, Any, Exception] | None:
    """Return the innermost part of a value that cannot be pickled: its path, itself, and the reason."""
    try:
        dumps(value)
    except Exception as error:  # noqa: BLE001 - pickling runs the user's code
        if depth < _DEEPEST:
            for part_name, part in _parts(value, name):
                found = find_unpicklable(part, part_name, depth + 1)
                if found is not None:
                    return found
        return name, value, error
    return None


def _parts(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((f"{name}[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, list | tuple | set | frozenset):
        yield from ((f"{name}[{position}]", part) for position, part in enumerate(value))
    elif isinstance(value, Node):
        yield from _parts(value.func, name)
    elif isinstance(value, FunctionType):
        for variable, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            yield f"{name}'s closure variable {variable!r}", cell.cell_contents
        for variable in _global_names(value.__code__):
            if variable in value.__globals__:
                yield f"{name}'s global {variable!r}", value.__globals__[variable]
    else:
        held = getattr(value, "__self__", None)
        if held is not None:
            yield f"{name}.__self__", held
        for attribute, part in getattr(value, "__dict__", {}).items():
            yield f"{name}.{attribute}", part


def _global_names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _global_names(constant)


class RemoteTraceback(Exception):  # noqa: N818 - it is shown as the cause of an error, and is none itself
    """The traceback of an error in the process where it was raised, as text."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


Travelling = tuple[list[Any], str, Path | None]
"""An error on its way: itself pickled, its traceback as text, and the path of the node where it began."""


def dump_error(error: BaseException, path: Path | None) -> Travelling:
    """Return an error as it travels: itself where it can be rebuilt, its traceback, and where it began."""
    text = _shown(error)
    for form in (error, _RebuiltGroup(error) if isinstance(error, BaseExceptionGroup) else _Rebuilt(error)):
        try:
            parts = packed(form)
            if isinstance(loads(parts), BaseException):
                return parts, text, path
        except Exception:  # noqa: BLE001 - pickling and unpickling run the user's code
            continue
    stand_in = RemoteExecutionError(
        f"{type(error).__name__}: {_said(error)} (the error itself cannot be pickled, so it stays in the worker)"
    )
    for note in getattr(error, "__notes__", ()):
        stand_in.add_note(note)
    return packed(stand_in), text, path


def _shown(error: BaseException) -> str:
    try:
        return trimmed_text(error)
    except Exception:  # noqa: BLE001 - it is the user's own, and may refuse to be looked at
        return f"{type(error).__name__}: {_said(error)}"


class _Rebuilt:
    """An exception whose own pickling fails, mostly as its ``__init__`` takes other arguments than ``args``."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_error, (type(self._error), self._error.args, self._error.__dict__)


def _rebuild_error(kind: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]) -> BaseException:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class _RebuiltGroup:
    """A group of exceptions whose own pickling fails, mostly as that of one of them does."""

    def __init__(self, group: BaseExceptionGroup) -> None:
        self._group = group

    def __reduce__(self) -> tuple[Any, ...]:
        group = self._group
        members = [dump_error(each, None)[0] for each in group.exceptions]
        return _rebuild_group, (type(group), group.message, members, group.__dict__)


def _rebuild_group(
    kind: type[BaseExceptionGroup], message: str, members: list[Parts], state: dict[str, Any]
) -> BaseExceptionGroup:
    group = BaseExceptionGroup.__new__(kind, message, [loads(parts) for parts in members])
    group.__dict__.update(state)
    return group


def _said(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - it is the user's own
        return "its str() failed"


def load_error(travelled: Travelling, blame: Callable[[BaseException, Path], Any] | None = None) -> BaseException:
    """Rebuild an error in the caller's process, with the traceback it had as its cause."""
    parts, text, path = travelled
    error: BaseException
    try:
        error = loads(parts)
    except Exception as failure:  # noqa: BLE001 - unpickling runs the user's code, and may need what only the worker has
        error = RemoteExecutionError(f"an error in a worker process cannot be rebuilt here ({failure!r})")
    error.__cause__ = RemoteTraceback(text)
    if path is not None and blame is not None:
        blame(error, path)
    return error


def with_error(event: Event, change: Callable[[Any], Any]) -> Event:
    """Return an event with its error, if it has one, changed: packed to travel, or rebuilt."""
    error = getattr(event, "error", None)
    return event if error is None else event._replace(error=change(error))  # type: ignore[call-arg]


def frame(parts: Parts) -> Parts:
    """Return the pieces to write for one frame."""
    head = COUNT.pack(len(parts)) + b"".join(LENGTH.pack(memoryview(part).nbytes) for part in parts)
    if len(parts) == 1 and len(parts[0]) < 65536:
        return [head + bytes(parts[0])]
    return [head, *parts]

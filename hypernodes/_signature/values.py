"""Hashing values: the same bytes for equal values, in every process, and other bytes for all that differ.

What counts is the exact type and the content. A dict counts as its items in any order, as it compares; an OrderedDict
and every sequence count in their order. An object says what it is by ``__cache_key__()``, or counts by its class's
name and its public state; nothing else of its own is called, and how it is pickled has no say.

An object that is met twice counts as two equal ones: sharing makes no difference. Only within a structure that
contains itself do objects refer to each other.
"""

from __future__ import annotations

import sys
from contextvars import ContextVar
from typing import Any

from hypernodes._signature.builtin import hash_of_code
from hypernodes._signature.kinds import Kind, handler_of
from hypernodes._signature.stream import ALGORITHM, FLUSH, SCALARS, Composite, Encoded, digest_of, head
from hypernodes.errors import UncacheableError

__all__ = ["ALGORITHM", "hash_value"]


def hash_value(value: Any, name: str = "value", *, classes: set[type] | None = None) -> bytes:
    """Return the SHA-256 of a value's canonical stream: 32 bytes, the same in every process.

    Linear in the size of the value; large buffers are read in place, with the GIL released. Safe in any thread, as
    long as no other changes the value meanwhile. Iterators are never consumed.

    Args:
        value: What to hash.
        name: What messages call the value, such as the name of an input.
        classes: Gets the classes of objects that count by their state, for a caller to whom their code matters too.

    Raises:
        UncacheableError: Something in the value has no identity that holds in another process. The message begins
            with its path, such as ``encoder.client`` or ``docs[3]['lock']``.
    """
    scalar = SCALARS.get(type(value))
    return digest_of(scalar(value) if scalar is not None else _walk(value, name, classes))


def _walk(root: Any, name: str, classes: set[type] | None) -> bytes:
    """Write a value and all that it contains, without recursion: values may be nested to any depth.

    A reference to an object that is still being written counts as how many levels up that is. An object with such
    references to above itself has no encoding of its own. While what it refers to is being written, it is known by
    its number among objects like it; after that, it is written anew. All others are known by their encodings.

    Code is hashed elsewhere, and comes back here with the values that it captured, such as the object that is being
    written, where one of its attributes is its own method.
    """
    around = _around.get()
    base = around.level if around else 0
    stack: list[Composite] = []
    active = around.active.copy() if around else {}  # the level of each object that is being written
    looping: dict[int, tuple[int, int, Any]] = {}  # its number, the highest level it refers to, and the object
    finished: dict[int, tuple[bytes, Any]] = {}  # with the object: an address names it only while it lives

    def opened(value: Any) -> Encoded:
        handler = handler_of(type(value))
        level = base + len(stack)
        if handler is hash_of_code:
            inner = _Around(active, level)
            token = _around.set(inner)
            try:
                return handler(value)
            finally:
                _around.reset(token)
                if stack:
                    stack[-1].low = min(stack[-1].low, inner.low)
        if classes is not None and type(handler) is Kind and handler.own:
            classes.add(type(value))
        written = handler(value)
        if isinstance(written, Composite):
            written.value = value
            written.low = active[id(value)] = level
            written.looping = len(looping)
        return written

    try:
        if around and id(root) in active:
            around.low = min(around.low, active[id(root)])
            return head(b"^", base - active[id(root)])
        written = opened(root)
        if isinstance(written, bytes):
            return written
        frame = written
        while True:
            append = frame.parts.append
            for child in frame.children:
                scalar = SCALARS.get(type(child))
                if scalar is not None:
                    append(scalar(child))
                    continue
                key = id(child)
                if key in finished:
                    append(finished[key][0])
                elif key in active:
                    append(head(b"^", base + len(stack) - active[key]))
                    frame.low = min(frame.low, active[key])
                elif key in looping:
                    number, low, _ = looping[key]
                    append(head(b"&", len(looping) - number))
                    frame.low = min(frame.low, low)
                else:
                    stack.append(frame)
                    written = opened(child)
                    if isinstance(written, Composite):
                        frame = written
                        break
                    del stack[-1]
                    append(written)
                    if written[0] == _DIGEST and sys.getrefcount(child) > _ALONE + 1:
                        finished[key] = written, child
                if len(frame.parts) >= FLUSH and not frame.unordered:
                    frame.flush()
            else:
                encoding = frame.finish()
                key = id(frame.value)
                del active[key]
                if frame.low < base + len(stack):
                    looping[key] = len(looping), frame.low, frame.value
                else:
                    _forget(looping, frame.looping)
                    if encoding[0] == _DIGEST and sys.getrefcount(frame.value) > _ALONE:
                        finished[key] = encoding, frame.value
                if not stack:
                    if around:
                        around.low = min(around.low, frame.low)
                    return encoding
                low = frame.low
                frame = stack.pop()
                frame.low = min(frame.low, low)
                frame.parts.append(encoding)
                if frame.unordered:
                    _forget(looping, frame.looping)  # the next part knows nothing of this one: their order is nothing
                elif len(frame.parts) >= FLUSH:
                    frame.flush()
    except Exception as error:
        path = name + "".join([each.label() for each in stack])
        if isinstance(error, UncacheableError):
            raise UncacheableError(f"{path}: {error}") from error.__cause__
        raise UncacheableError(f"{path}: it cannot be hashed: {type(error).__name__}: {error}") from error


class _Around:
    """What is being written while code is hashed: objects by level, the code's level, and the highest referred to."""

    __slots__ = ("active", "level", "low")

    def __init__(self, active: dict[int, int], level: int) -> None:
        self.active = active
        self.level = self.low = level


_around: ContextVar[_Around | None] = ContextVar("around", default=None)


def _forget(looping: dict[int, tuple[int, int, Any]], keep: int) -> None:
    while len(looping) > keep:
        looping.popitem()


_DIGEST = ord("#")


def _references_of_one() -> int:
    """Return what `getrefcount` says of a part that stands in one container, and in the walk's own frame."""
    frame = Composite(b"", ())
    frame.value = object()
    container = [frame.value]
    return sys.getrefcount(frame.value) if container else 0


_ALONE = _references_of_one()

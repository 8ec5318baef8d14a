"""The canonical stream: how values are written as bytes, so that two are equal where their bytes are.

An encoding is a one-byte tag, then parts of fixed or stated length: no encoding is the beginning of another. One that
is longer than ``INLINE`` bytes stands in whatever contains it as its digest (tag ``#``), so a large value is read
once, in place, and a shared one needs no second reading.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from struct import Struct, error
from typing import Any, TypeAlias

ALGORITHM = "sha256-1"
"""Names the digest and the canonical stream; a change to either gives it another number, so that no key is shared."""

INLINE = 256
"""Bytes up to which an encoding stands in its container as it is."""

BULK = 16
"""From this many items on, a list of one scalar type is written as one block."""

FLUSH = 4096
"""Parts that a long sequence holds before they are digested."""

head = Struct("<cQ").pack
_SHORT = INLINE - len(head(b"s", 0))
_short_int = Struct("<cq").pack
_float = Struct("<cd").pack
_complex = Struct("<cdd").pack


def sealed(encoding: bytes) -> bytes:
    """Return an encoding as it stands in its container: itself, or its digest where it is long."""
    return encoding if len(encoding) <= INLINE else b"#" + sha256(encoding).digest()


def block(header: bytes, *buffers: Any) -> bytes:
    """Return the sealed encoding of a header and of flat buffers of bytes, which are not copied where they are long."""
    if len(header) + sum(map(len, buffers)) <= INLINE:
        return header + b"".join(buffers)
    digest = sha256(header)
    for buffer in buffers:
        digest.update(buffer)
    return b"#" + digest.digest()


def digest_of(encoding: bytes) -> bytes:
    """Return the SHA-256 of an encoding, also where it is sealed already."""
    return encoding[1:] if encoding[:1] == b"#" else sha256(encoding).digest()


class Composite:
    """A value that is made of others: a header, the parts, and how a message names each of them.

    ``labels`` name the parts, by position where there are none, in the format ``style``. Parts that are
    ``unordered`` count as a set. The other attributes belong to the walk that writes it.
    """

    __slots__ = (
        "children",
        "digest",
        "done",
        "header",
        "labels",
        "looping",
        "low",
        "parts",
        "style",
        "unordered",
        "value",
    )

    def __init__(
        self,
        header: bytes,
        children: Iterable[Any],
        labels: Sequence[Any] | None = None,
        style: str = "[{}]",
        *,
        unordered: bool = False,
    ) -> None:
        self.header = header
        self.children = iter(children)
        self.labels = labels
        self.style = style
        self.unordered = unordered
        self.parts: list[bytes] = []
        self.digest: Any = None
        self.done = 0
        self.value: Any = None
        self.low = self.looping = 0

    def label(self) -> str:
        """Return how a message names the part that is being written."""
        at = self.done + len(self.parts)
        if self.labels is None:
            return self.style.format(at)
        return self.style.format(self.labels[at]) if at < len(self.labels) else ""

    def flush(self) -> None:
        """Digest what has been written, to hold no more of a long sequence than a stretch."""
        if self.digest is None:
            self.digest = sha256(self.header)
        self.done += len(self.parts)
        self.digest.update(b"".join(self.parts))
        self.parts.clear()

    def finish(self) -> bytes:
        """Return the sealed encoding, once all parts are written."""
        if self.digest is not None:
            self.flush()
            return b"#" + self.digest.digest()  # type: ignore[no-any-return]
        if self.unordered:
            self.parts.sort()
        return sealed(self.header + b"".join(self.parts))


Encoded: TypeAlias = bytes | Composite


def text(value: str) -> bytes:
    """Write a str: code points, so NFC and NFD differ, and lone surrogates are as good as others."""
    data = value.encode("utf-8", "surrogatepass")
    header = head(b"s", len(data))
    return header + data if len(data) <= _SHORT else block(header, data)


def whole(value: int) -> bytes:
    """Write an int of any size."""
    try:
        return _short_int(b"i", value)
    except error:
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return block(head(b"I", len(data)), data)


def raw(value: bytes | bytearray) -> bytes:
    """Write bytes."""
    return block(head(b"b", len(value)), value)


SCALARS: dict[type, Callable[[Any], bytes]] = {
    type(None): lambda _: b"N",
    bool: lambda value: b"T" if value else b"F",
    int: whole,
    float: lambda value: _float(b"f", value),  # every bit: -0.0 is not 0.0, and a NaN is itself
    complex: lambda value: _complex(b"c", value.real, value.imag),
    str: text,
    bytes: raw,
    type(Ellipsis): lambda _: b"E",
    type(NotImplemented): lambda _: b"!",
}


def bulk(header: bytes, items: Sequence[Any]) -> bytes | None:
    """Write many scalars of one type as one block; None if they are not that.

    The block tells its length and its type, and a list always takes the same way, so one value has one encoding.
    """
    kind = type(items[0])
    if kind not in (str, int, float, bool, bytes) or set(map(type, items)) != {kind}:
        return None
    if kind is int:
        try:
            return block(header + b"i", _little("q", items))
        except OverflowError:
            return None
    if kind is float:
        return block(header + b"f", _little("d", items))
    if kind is bool:
        return block(header + b"T", bytes(items))
    lengths = _little("Q", map(len, items))
    if kind is str:
        return block(header + b"s", lengths, "".join(items).encode("utf-8", "surrogatepass"))
    return block(header + b"b", lengths, b"".join(items))


def sequence(tag: bytes, items: Sequence[Any]) -> Encoded:
    """Write items in their order, in bulk where they are many of one scalar type."""
    size = len(items)
    if size >= BULK:
        written = bulk(b"*" + head(tag, size), items)
        if written is not None:
            return written
    return Composite(head(tag, size), items)


def fields(*read: str) -> Callable[[Any], Composite]:
    """Return what writes these attributes of a value."""
    return lambda value: Composite(head(b"a", len(read)), [getattr(value, name) for name in read], read, ".{}")


def names(values: Iterable[str]) -> bytes:
    """Write short strings one after another, for headers."""
    return b"".join(map(text, values))


def identity(cls: type) -> bytes:
    """Write a class by its module and qualified name, by which two processes know it; never by an address."""
    return b"k" + names((_MODULES.get(cls.__module__, cls.__module__), cls.__qualname__))


# `__mp_main__` is what multiprocessing calls the main module in a child; Python 3.13 moved the classes of paths.
_MODULES = {"__mp_main__": "__main__", "pathlib._local": "pathlib"}


def _little(code: str, items: Iterable[Any]) -> bytes:
    numbers = array(code, items)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()

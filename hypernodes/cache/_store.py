"""What a store must do: keep bytes under keys. Users may bring their own."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from typing import TypeAlias

    from typing_extensions import Buffer

    Entry: TypeAlias = Buffer | Sequence[Buffer]


@runtime_checkable
class Store(Protocol):
    """Bytes in, bytes out, in batches: what ``cache=`` takes.

    Keys are 64 hexadecimal digits, or ``ledger-`` and 64 hexadecimal digits. Values are sealed envelopes: a store
    neither looks into them nor checks them; whoever reads finds a damaged one out, and takes it for a miss. A store
    may lose entries whenever it likes, and may raise: a run then goes on without it, with one warning.
    """

    async def get_many(self, keys: Sequence[str], /) -> Mapping[str, Buffer]:
        """Return the values of those keys that are there; the others are left out."""
        ...

    async def set_many(self, entries: Mapping[str, Entry], /) -> None:
        """Keep each value, bytes, under its key, in place of an earlier one.

        A store that says ``takes_parts = True`` is given large values as a list of buffers, to be kept as if they
        were joined.
        """
        ...


@runtime_checkable
class FindingStore(Store, Protocol):
    """A store that can say what it holds without reading it."""

    async def find_many(self, keys: Sequence[str], /) -> Collection[str]:
        """Return those of the keys that are there."""
        ...


def buffers(entry: Entry) -> Sequence[Buffer]:
    """Return the buffers that an entry is made of, in order."""
    if isinstance(entry, bytes | bytearray | memoryview):
        return (entry,)
    return entry if isinstance(entry, list | tuple) else (entry,)  # an array is a buffer and a sequence


def size(buffer: Buffer) -> int:
    """Return the bytes in a buffer, whatever its items are."""
    return len(buffer) if type(buffer) is bytes else memoryview(buffer).nbytes


def total(entry: Entry) -> int:
    """Return the bytes in an entry."""
    return len(entry) if type(entry) is bytes else sum(map(size, buffers(entry)))


def joined(entry: Entry) -> bytes:
    """Return an entry as one piece; only what is in several pieces is copied."""
    parts = buffers(entry)
    return parts[0] if len(parts) == 1 and type(parts[0]) is bytes else b"".join(parts)

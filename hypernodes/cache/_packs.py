"""A pack: one immutable file with many small entries, and an index in front that says where each of them is.

The file: a header of 24 bytes; three columns of fixed width, one item an entry (fingerprints, times, lengths);
the entries' keys as text; the entries, in the same order. An entry of no length is a tombstone: it says that its key
is not in any pack, whatever an earlier one holds.
"""

from __future__ import annotations

import os
import re
import struct
import sys
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from zlib import crc32

from hypernodes.cache._root import KEY

SUFFIX = ".pack"
LARGEST_ENTRY = 1 << 16
"""Bytes; entries of this size or more are files of their own."""

_MAGIC = b"hnp\x01"
# Magic, checksum of all that follows in the header and of the columns, entries, bytes of keys, checksum of keys, 0.
_HEADER = struct.Struct("<4sIIIII")
_CHECKED_FROM = 8
_COLUMNS_SIZE = 8 + 8 + 4
_KEYS = re.compile(rf"{KEY.pattern}(?:\n{KEY.pattern})*".encode())
_READ_AT_ONCE = 1 << 16


class DamagedPackError(Exception):
    """A pack of which nothing can be read; the message says why."""


class Pack:
    """What memory holds of a pack: where its entries are. Keys are there by their fingerprints."""

    __slots__ = (
        "fingerprints",
        "keys_at",
        "keys_checksum",
        "lengths",
        "lost",
        "name",
        "shadowed",
        "size",
        "starts",
        "times",
        "used_at",
    )

    def __init__(
        self,
        name: str,
        fingerprints: array[int],
        times: array[int],
        lengths: array[int],
        keys_size: int,
        keys_checksum: int,
    ) -> None:
        self.name = name
        self.fingerprints = fingerprints
        self.times = times
        """When each entry was stored, in nanoseconds since 1970: of two entries for a key, the later one counts."""
        self.lengths = lengths
        self.keys_at = _HEADER.size + len(fingerprints) * _COLUMNS_SIZE
        self.keys_checksum = keys_checksum
        data_at = self.keys_at + keys_size
        self.starts = array("Q", accumulate(lengths, initial=data_at))
        """Where each entry begins, and where the last one ends."""
        self.size = self.starts[-1]
        self.used_at = 0.0
        """The file's mtime as last known, in unix seconds."""
        self.lost = 0
        """Entries behind the end of a file that was cut short."""
        self.shadowed: set[int] = set()
        """Fingerprints for which another pack has a later entry."""

    def cut(self, size: int) -> None:
        """Forget the entries that a file of this size does not hold whole."""
        if size >= self.size:
            return
        whole = max(bisect_right(self.starts, size) - 1, 0)
        self.lost = len(self.fingerprints) - whole
        del self.fingerprints[whole:], self.times[whole:], self.lengths[whole:], self.starts[whole + 1 :]
        self.size = size


def fingerprint(key: str) -> int:
    """Return 64 bits of a key, which is a digest or ends in one: what an index in memory can afford.

    Should two keys ever share them, the later entry hides the earlier, and its envelope refuses the wrong key.
    """
    bits = int(key[-16:], 16)
    return bits if len(key) == 64 else bits ^ crc32(key.encode())


def encode(name: str, keys: Sequence[str], times: array[int], lengths: array[int]) -> tuple[Pack, bytes]:
    """Return a pack to be, and the front of its file: everything but the entries."""
    fingerprints = array("Q", map(fingerprint, keys))
    text = "\n".join(keys).encode()
    columns = _little(fingerprints) + _little(times) + _little(lengths)
    counts = _HEADER.pack(_MAGIC, 0, len(keys), len(text), crc32(text), 0)[_CHECKED_FROM:]
    checksum = crc32(columns, crc32(counts))
    pack = Pack(name, fingerprints, times, lengths, len(text), crc32(text))
    return pack, b"".join((_MAGIC, checksum.to_bytes(4, "little"), counts, columns, text))


def load(folder: str, name: str) -> Pack:
    """Read a pack's index; raise ``DamagedPackError`` where that is impossible."""
    file = os.open(os.path.join(folder, name), os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = os.fstat(file)
        front = os.pread(file, _READ_AT_ONCE, 0)
        try:
            magic, checksum, count, keys_size, keys_checksum, _ = _HEADER.unpack_from(front)
        except struct.error:
            raise DamagedPackError(f"torn: {found.st_size} bytes") from None
        if magic != _MAGIC:
            raise DamagedPackError("not a pack, or one of another version")
        end = _HEADER.size + count * _COLUMNS_SIZE
        if end > found.st_size:
            raise DamagedPackError(f"torn: {found.st_size} bytes")
        if end > len(front):
            front += read_at(file, end - len(front), len(front))
    finally:
        os.close(file)
    if crc32(memoryview(front)[_CHECKED_FROM:end]) != checksum:
        raise DamagedPackError("damaged: the checksum of its index is wrong")
    at = _HEADER.size
    fingerprints, at = _column("Q", front, at, count)
    times, at = _column("Q", front, at, count)
    lengths, _ = _column("I", front, at, count)
    pack = Pack(name, fingerprints, times, lengths, keys_size, keys_checksum)
    pack.used_at = found.st_mtime
    pack.cut(found.st_size)
    return pack


def read_keys(folder: str, pack: Pack) -> list[str]:
    """Read the keys of a pack's entries from its file; raise ``DamagedPackError`` if they cannot be trusted."""
    size = pack.starts[0] - pack.keys_at
    file = os.open(os.path.join(folder, pack.name), os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = read_at(file, size, pack.keys_at)
    finally:
        os.close(file)
    keys = text.decode("ascii", "replace").split("\n")
    if crc32(text) != pack.keys_checksum or len(keys) != len(pack.fingerprints) + pack.lost:
        raise DamagedPackError("damaged: the checksum of its keys is wrong")
    if not _KEYS.fullmatch(text):
        raise DamagedPackError("damaged: it holds keys that are none")
    return keys[: len(pack.fingerprints)]


def read_range(folder: str, pack: Pack, first: int, behind: int) -> bytes:
    """Read the entries from one number up to another, joined; raise ``DamagedPackError`` if they are not all there."""
    file = os.open(os.path.join(folder, pack.name), os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = pack.starts[behind] - pack.starts[first]
        data = read_at(file, size, pack.starts[first])
    finally:
        os.close(file)
    if len(data) != size:
        raise DamagedPackError("torn while it was read")
    return data


def read_at(file: int, size: int, at: int) -> bytes:
    """Read up to the end of the file, or this many bytes; one call reads 2 GB at most."""
    parts = []
    while size and (part := os.pread(file, size, at)):
        parts.append(part)
        size -= len(part)
        at += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _column(kind: str, front: bytes, at: int, count: int) -> tuple[array[int], int]:
    column: array[int] = array(kind)
    end = at + count * column.itemsize
    column.frombytes(memoryview(front)[at:end])
    if sys.byteorder == "big":
        column.byteswap()
    return column, end


def _little(column: array[int]) -> bytes:
    if sys.byteorder == "big":
        column = column[:]
        column.byteswap()
    return column.tobytes()

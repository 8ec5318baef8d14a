"""Large entries: a file each, in folders by the last two digits of the key."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hypernodes.cache._root import ENTRIES, KEY, Root, is_stale, remove, scan, touch

if TYPE_CHECKING:
    from typing_extensions import Buffer

LOOK_AGAIN_S = 0.5
"""What other processes add or delete is noticed after this time at the latest."""

_SETTLED_S = 3.0
"""A folder that changed this long before it was listed has not changed again since with the same mtime."""


@dataclass(slots=True)
class _Listing:
    """The names in a folder, as they were when it was last looked at."""

    names: set[str]
    mtime_ns: int
    changed: float
    """When its present mtime was first seen; this and the others by the monotonic clock, in seconds."""
    listed: float
    looked: float


class EntryFiles:
    """The files of large entries.

    What is there is known from listings: to learn that a thousand keys are missing takes a look at the folders, not
    at a thousand paths, each of which is a message to a server where the directory is a shared volume.
    """

    def __init__(self, root: Root) -> None:
        self._root = root
        self._listings: dict[str, _Listing] = {}

    def find(self, keys: Iterable[str]) -> set[str]:
        """Return the keys that have a file."""
        folders = self._names("")
        return {key for key in keys if key[-2:] in folders and key in self._names(key[-2:])}

    def read(self, keys: Iterable[str], into: dict[str, bytes | bytearray]) -> None:
        """Read those that have a file."""
        for key in self.find(keys):
            with contextlib.suppress(FileNotFoundError):
                into[key] = self.read_one(key)

    def read_one(self, key: str) -> bytearray:
        """Read an entry, as bytes that may be written to: arrays in it then need no copy of their own."""
        path = self.path(key)
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            found = os.fstat(file)
            data = bytearray(found.st_size)
            rest = memoryview(data)
            while rest and (count := os.readv(file, [rest])):
                rest = rest[count:]
        finally:
            os.close(file)
        if is_stale(found.st_mtime, time.time()):
            touch(path)
        if rest:  # cut short meanwhile
            missing = len(rest)
            rest.release()
            del data[-missing:]
        return data

    def write(self, key: str, buffers: Sequence[Buffer]) -> None:
        """Write an entry, in place of an earlier one."""
        temporary = self._root.write(buffers)
        self._root.put_in_place(temporary, ENTRIES, key[-2:], key)
        for name, folder in ((key[-2:], ""), (key, key[-2:])):
            listing = self._listings.get(folder)
            if listing is not None:
                listing.names.add(name)

    def remove(self, key: str) -> bool:
        """Delete an entry; say whether it was there."""
        listing = self._listings.get(key[-2:])
        if listing is not None:
            listing.names.discard(key)
        return remove(self.path(key))

    def walk(self) -> Iterator[os.DirEntry[str]]:
        """Yield the files there are."""
        for folder in scan(self._root.inside(ENTRIES)):
            if folder.is_dir(follow_symlinks=False) and len(folder.name) == 2:
                for file in scan(folder.path):
                    if KEY.fullmatch(file.name) and file.name.endswith(folder.name):
                        yield file

    def path(self, key: str) -> str:
        """Return where a key's file is, if it has one."""
        return self._root.inside(ENTRIES, key[-2:], key)

    def _names(self, folder: str) -> set[str]:
        now = time.monotonic()
        known = self._listings.get(folder)
        if known is not None and now - known.looked < LOOK_AGAIN_S:
            return known.names
        path = self._root.inside(ENTRIES, folder)
        try:
            mtime_ns = os.stat(path).st_mtime_ns
            if known is not None and known.mtime_ns == mtime_ns:
                if known.listed - known.changed > _SETTLED_S:
                    known.looked = now
                    return known.names
                changed = known.changed
            else:
                changed = now
            listing = _Listing(set(os.listdir(path)), mtime_ns, changed, listed=now, looked=now)
        except FileNotFoundError:
            listing = _Listing(set(), -1, now, listed=now, looked=now)
        self._listings[folder] = listing
        return listing.names

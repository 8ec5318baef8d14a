"""Large entries: a file each, in folders by the last two digits of the key."""

from __future__ import annotations

import os
import re
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

_NAME = re.compile(rf"({KEY.pattern})-([0-9a-f]{{16}})")


@dataclass(slots=True)
class _Listing:
    """What is in a folder, as it was when it was last looked at."""

    times: dict[str, int]
    """When each key's newest entry was stored, in nanoseconds since 1970."""
    mtime_ns: int
    changed: float
    """When its present mtime was first seen; this and the others by the monotonic clock, in seconds."""
    listed: float
    looked: float


def _unseen() -> _Listing:
    return _Listing({}, mtime_ns=-1, changed=0.0, listed=0.0, looked=float("-inf"))


class EntryFiles:
    """The files of large entries.

    A file's name is its key and the time when it was stored, so none is ever changed, and what has been replaced is
    deleted without any danger for what is replacing it at the same moment.

    What is there is known from listings: to learn that a thousand keys are missing takes a look at the folders, not
    at a thousand paths, each of which is a message to a server where the directory is a shared volume.
    """

    def __init__(self, root: Root) -> None:
        self._root = root
        self._listings: dict[str, _Listing] = {}
        self.lost = float("-inf")
        """When files were last found to have been deleted by another process, in monotonic seconds."""

    def find(self, keys: Iterable[str], since: float) -> dict[str, int]:
        """Return the keys that have a file, with its time, by listings made after ``since`` (monotonic seconds)."""
        folders = self._times("", since)
        found = {}
        for key in keys:
            if key[-2:] in folders:
                stored_at = self._times(key[-2:], since).get(key)
                if stored_at is not None:
                    found[key] = stored_at
        return found

    def read(self, keys: Iterable[str], into: dict[str, bytes | bytearray], since: float) -> list[str]:
        """Read those that have a file; return the keys whose file has gone."""
        gone = []
        for key, stored_at in self.find(keys, since).items():
            try:
                into[key] = read_file(self.path(key, stored_at))
            except FileNotFoundError:
                gone.append(key)
        return gone

    def write(self, key: str, buffers: Sequence[Buffer], stored_at: int) -> int:
        """Write an entry, in place of an earlier one; return its time, which is behind that of the earlier one."""
        earlier = self.find([key], float("-inf")).get(key)
        if earlier is not None:
            stored_at = max(stored_at, earlier + 1)
        temporary = self._root.write(buffers)
        self._root.put_in_place(temporary, ENTRIES, key[-2:], f"{key}-{stored_at:016x}")
        for name, folder in ((key[-2:], ""), (key, key[-2:])):
            self._listings.setdefault(folder, _unseen()).times[name] = stored_at
        if earlier is not None:
            remove(self.path(key, earlier))
        return stored_at

    def remove(self, key: str, stored_at: int) -> bool:
        """Delete an entry; say whether it was there."""
        listing = self._listings.get(key[-2:])
        if listing is not None and listing.times.get(key) == stored_at:
            listing.times.pop(key, None)
        return remove(self.path(key, stored_at))

    def walk(self) -> Iterator[tuple[str, int, os.DirEntry[str]]]:
        """Yield the key and time of each file, those that have been replaced included."""
        for folder in scan(self._root.inside(ENTRIES)):
            if folder.is_dir(follow_symlinks=False):
                for file in scan(folder.path):
                    match = _NAME.fullmatch(file.name)
                    if match and match[1].endswith(folder.name):
                        yield match[1], int(match[2], 16), file

    def path(self, key: str, stored_at: int) -> str:
        """Return where an entry's file is."""
        return self._root.inside(ENTRIES, key[-2:], f"{key}-{stored_at:016x}")

    def _times(self, folder: str, since: float) -> dict[str, int]:
        now = time.monotonic()
        known = self._listings.get(folder)
        if known is not None and known.looked > since and now - known.looked < LOOK_AGAIN_S:
            return known.times
        path = self._root.inside(ENTRIES, folder)
        try:
            mtime_ns = os.stat(path).st_mtime_ns
            if known is not None and known.mtime_ns == mtime_ns:
                if known.listed - known.changed > _SETTLED_S:
                    known.looked = now
                    return known.times
                changed = known.changed
            else:
                changed = now
            # In order, so that of several files for a key the newest one counts.
            names = (name.rpartition("-") for name in sorted(os.listdir(path)))
            times = {key or name: int(name, 16) for key, _, name in names if _is_hex(name)}
        except FileNotFoundError:
            mtime_ns, changed, times = -1, now, {}
        if known is not None and not known.times.keys() <= times.keys():
            self.lost = time.monotonic()
        self._listings[folder] = _Listing(times, mtime_ns, changed, listed=now, looked=now)
        return times


def read_file(path: str) -> bytearray:
    """Read an entry's file, as bytes that may be written to: arrays in it then need no copy of their own."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = os.fstat(file)
        data = bytearray(found.st_size)
        rest = memoryview(data)
        while rest and (count := os.readv(file, [rest])):  # 2 GB at most
            rest = rest[count:]
    finally:
        os.close(file)
    if is_stale(found.st_mtime, time.time()):
        touch(path)
    missing = len(rest)
    rest.release()
    return data[:-missing] if missing else data  # cut short meanwhile


def _is_hex(name: str) -> bool:
    return re.fullmatch(r"[0-9a-f]+", name) is not None

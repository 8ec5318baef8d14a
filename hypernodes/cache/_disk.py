"""A cache in a directory: no server, no locks, any number of tasks, threads, processes and machines at once."""

from __future__ import annotations

import os
import re
import time
import weakref
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from hypernodes._threads import default_threads, in_thread
from hypernodes.cache._envelope import checked_key
from hypernodes.cache._files import EntryFiles
from hypernodes.cache._index import LARGEST_MERGED, MERGE_AT, PackIndex
from hypernodes.cache._packs import LARGEST_ENTRY
from hypernodes.cache._root import KEY, PRUNED, Root, touch
from hypernodes.cache._store import buffers, total
from hypernodes.errors import CacheError

if TYPE_CHECKING:
    from hypernodes.cache._reports import CacheStats, EntryInfo, PruneReport, VerifyReport
    from hypernodes.cache._store import Entry

_T = TypeVar("_T")

PRUNED_EVERY_S = 86400.0
_ATTEMPTS = 5
_TIDIED_EVERY_S = 3600.0
_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


class DiskCache:
    """Results in a directory, for as long as its files are left there.

    Any number of tasks, threads, processes and containers may use one directory at the same time, also on a shared
    volume: files are written under temporary names and then put in place whole, and nothing is ever locked. Small
    results share files. Nothing is created before the first result is stored.

    Args:
        path: The directory; ``~`` is the user's home. It belongs to the cache alone.
        key: With a key, results are signed (HMAC-SHA256), and only those signed with it are ever loaded: loading
            runs code, so set one where others may write. By default the environment variable
            ``HYPERNODES_CACHE_KEY``, if it is set.
        max_size: Bytes, or text such as ``"10GB"`` or ``"512 MiB"``. Once a day, and on ``prune()``, the files that
            were used longest ago are deleted until no more than that is left. By default nothing is deleted.
        allow_shared_directory: Accept a directory that other users may write, or that belongs to another.

    Raises:
        CacheError: the directory cannot be a cache (it holds other files, others may write it, it is a file), or an
            option is wrong.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> cache = DiskCache(folder.name + "/cache", max_size="10GB")
    >>> cache.write({"0" * 64: b"a result"})
    >>> cache.read(["0" * 64, "1" * 64]).keys() == {"0" * 64}
    True
    >>> cache.stats().entries
    1
    >>> folder.cleanup()
    """

    takes_parts = True
    """Values in several pieces are written without being joined."""

    deadline_s: float | None = None
    """Reading files takes as long as it takes: a thread that does so cannot be stopped."""

    travels = True
    """Worker processes and containers that a run uses may open it too."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        key: bytes | str | None = None,
        max_size: int | str | None = None,
        allow_shared_directory: bool = False,
    ) -> None:
        self.path: str = os.path.abspath(os.path.expanduser(os.fspath(path)))
        self.key: bytes | None = checked_key(key)
        self.max_size: int | None = None if max_size is None else _bytes(max_size)
        self.allow_shared_directory: bool = allow_shared_directory
        self._start()
        self._root.check()

    def _start(self) -> None:
        self._root = Root(self.path, allow_shared=self.allow_shared_directory)
        self._packs = PackIndex(self._root)
        self._files = EntryFiles(self._root)
        self._checked = False
        self._tidied = float("-inf")
        _LIVING[id(self)] = self

    # In batches, from any thread

    def read(self, keys: Sequence[str]) -> dict[str, bytes | bytearray]:
        """Return the values of those keys that are there; blocks."""
        found: dict[str, Any] = {}
        if not self._is_there():
            return found
        missing: Sequence[str] = keys
        since = float("-inf")
        for _ in range(_ATTEMPTS):
            absent = self._packs.read(missing, found)
            if not absent:
                break
            gone = self._files.read(absent, found, max(since, self._packs.changed))
            if not gone and self._files.lost < self._packs.looked:
                break
            # What has gone may have been replaced, by a file or in a pack that were not there a moment ago.
            missing = [key for key in absent if key not in found]
            since = time.monotonic()
            self._packs.refresh(now=True)
        return found

    def find(self, keys: Sequence[str]) -> set[str]:
        """Return those of the keys that are there, without reading them; blocks."""
        if not self._is_there():
            return set()
        found, absent = self._packs.find(keys)
        if absent:
            found.update(self._files.find(absent, self._packs.changed))
            if self._files.lost >= self._packs.looked:
                self._packs.refresh(now=True)
                found |= self._packs.find(absent)[0]
        return found

    def write(self, entries: Mapping[str, Entry]) -> None:
        """Keep each value (a buffer of bytes, or several) under its key, in place of an earlier one; blocks.

        Raises:
            OSError: the disk is full or cannot be written; nothing partial is left.
            CacheError: the directory must not be used, see the class.
            ValueError: a key is not 64 hexadecimal digits, with ``ledger-`` in front or without.
        """
        small: dict[str, Sequence[Any]] = {}
        lengths = array("I")
        large: dict[str, Sequence[Any]] = {}
        for key, entry in entries.items():
            if not KEY.fullmatch(key):
                raise ValueError(f"{key!r} cannot be a key: keys are 64 hexadecimal digits")
            length = total(entry)
            if length < LARGEST_ENTRY:
                small[key] = (entry,) if type(entry) is bytes else buffers(entry)
                lengths.append(length)
            else:
                large[key] = buffers(entry)
        if not self._is_there():
            self._root.prepare()
            self._checked = True
        for key, parts in large.items():
            stored_at = self._files.write(key, parts, self._packs.later_than([key]))
            if self._packs.find([key])[0]:
                self._packs.bury([key], stored_at)
        if small:
            stored_at = self._packs.add(small, lengths)
            for key, replaced_at in self._files.find(small, self._packs.changed).items():
                if replaced_at < stored_at:
                    self._files.remove(key, replaced_at)
        with suppress(OSError):  # what was asked for is done
            self._tidy()

    def _is_there(self) -> bool:
        """Say whether there is a cache to look into, and that it is safe the first time that there is."""
        if self._checked:
            return True
        there = self._root.check()
        self._checked = self._checked or there
        return there

    def _tidy(self) -> None:
        self._packs.merge_small(MERGE_AT * LARGEST_MERGED if self.max_size is None else self.max_size // 8)
        if time.monotonic() - self._tidied < _TIDIED_EVERY_S:
            return
        self._tidied = time.monotonic()
        self._root.sweep()
        stamp = self._root.inside(PRUNED)
        try:
            age = time.time() - os.stat(stamp).st_mtime
        except FileNotFoundError:
            age = PRUNED_EVERY_S
        if self.max_size is not None and not 0 <= age < PRUNED_EVERY_S:
            self.prune()

    # As a store

    async def get_many(self, keys: Sequence[str], /) -> dict[str, bytes | bytearray]:
        """Return the values of those keys that are there, read in a worker thread."""
        return await _in_thread(partial(self.read, keys))

    async def find_many(self, keys: Sequence[str], /) -> set[str]:
        """Return those of the keys that are there, without reading them, from a worker thread."""
        return await _in_thread(partial(self.find, keys))

    async def set_many(self, entries: Mapping[str, Entry], /) -> None:
        """Keep each value under its key, in place of an earlier one, from a worker thread."""
        await _in_thread(partial(self.write, entries))

    # Care

    def entries(self) -> Iterator[EntryInfo]:
        """Yield what is known of each entry without reading its value; blocks."""
        from hypernodes.cache._inspect import entries

        return entries(self._packs, self._files) if self._is_there() else iter(())

    def stats(self) -> CacheStats:
        """Count entries and bytes; blocks."""
        from hypernodes.cache._inspect import stats

        self._is_there()
        return stats(self._packs, self._files)

    def verify(self, *, repair: bool = False) -> VerifyReport:
        """Check every entry's checksum and, with a key, its signature; blocks while it reads all there is.

        With ``repair`` what is damaged is dropped; never what is signed with another key or written by another
        version.
        """
        from hypernodes.cache._inspect import verify

        self._is_there()
        return verify(self._packs, self._files, self.key, repair=repair)

    def prune(self, max_size: int | str | None = None) -> PruneReport:
        """Delete the files used longest ago until ``max_size`` is kept, by default the cache's own; blocks.

        Entries in one file go together. Without any ``max_size`` only what killed processes left is deleted.
        """
        from hypernodes.cache._inspect import prune

        if self._is_there():
            self._root.sweep()
            stamp = self._root.inside(PRUNED)
            os.close(os.open(stamp, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
            touch(stamp)
        return prune(self._packs, self._files, self.max_size if max_size is None else _bytes(max_size))

    def clear(self) -> PruneReport:
        """Delete every entry, at once for all who use the directory; blocks."""
        from hypernodes.cache._inspect import clear

        self._is_there()
        report = clear(self._root, self._packs, self._files)
        self.close()
        return report

    def look_again(self) -> None:
        """Notice at the next lookup what other processes have stored; otherwise that may take half a second."""
        self._packs.look_again()

    def close(self) -> None:
        """Forget what is known of the directory's files; the cache can be used again. No file is ever held open."""
        self._start()

    # As a value

    def __repr__(self) -> str:
        told = [repr(self.path)]
        if self.key is not None:
            told.append("key=...")
        if self.max_size is not None:
            told.append(f"max_size={self.max_size}")
        if self.allow_shared_directory:
            told.append("allow_shared_directory=True")
        return f"DiskCache({', '.join(told)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DiskCache) and (self.path, self.key) == (other.path, other.key)

    def __hash__(self) -> int:
        return hash((self.path, self.key))

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self.path, self.key, self.max_size, self.allow_shared_directory)


def _restored(
    kind: type[DiskCache], path: str, key: bytes | None, max_size: int | None, allow_shared: bool
) -> DiskCache:
    """Make a cache again in another process, whose environment has no say in its key."""
    cache = kind.__new__(kind)
    cache.path, cache.key, cache.max_size, cache.allow_shared_directory = path, key, max_size, allow_shared
    cache._start()
    return cache


async def _in_thread(call: Callable[[], _T]) -> _T:
    result: _T = (await in_thread(call, default_threads()))[0]
    return result


def _bytes(max_size: int | str) -> int:
    """Return a size in bytes, of a number or of text such as "10GB"."""
    count = -1
    if isinstance(max_size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", max_size.lower())
        if match:
            count = int(float(match[1]) * (1024 if match[3] else 1000) ** _UNITS[match[2]])
    elif isinstance(max_size, int) and not isinstance(max_size, bool):
        count = max_size
    if count <= 0:
        raise CacheError(
            f'max_size= is a number of bytes above 0, or text such as "10GB" or "512 MiB"; got {max_size!r}'
        )
    return count


_LIVING: weakref.WeakValueDictionary[int, DiskCache] = weakref.WeakValueDictionary()


def _start_again() -> None:
    """In a forked child: another thread may have held a lock, or have been in the middle of a change."""
    for cache in list(_LIVING.values()):
        cache._start()


os.register_at_fork(after_in_child=_start_again)

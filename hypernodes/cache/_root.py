"""The directory of a cache: whether it may be used, what is in it, and how a file comes into it whole."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from hypernodes.errors import CacheError

if TYPE_CHECKING:
    from typing_extensions import Buffer

PACKS = "packs"
ENTRIES = "entries"
INCOMING = "incoming"
PRUNED = "pruned"
TRASH = "trash-"
MARKER_PREFIX = "hypernodes-cache-"
MARKER = MARKER_PREFIX + "1"

KEY = re.compile(r"(?:ledger-)?[0-9a-f]{64}")

ORPHANED_S = 3600.0
"""A temporary file that is older belongs to a writer that was killed."""

TOUCHED_EVERY_S = 3600.0
"""Reading marks a file as used (by its mtime) no more often than this."""

_ATTEMPTS = 10
_MARKER_TEXT = b"The cache of a hypernodes pipeline. All of it may be deleted; results are then computed anew.\n"
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


class Root:
    """The directory that a cache lives in; nothing is created before the first write.

    Every file appears whole: it is written under a temporary name and then put in place by ``os.replace``. Nothing is
    synced: after a power cut a file may be torn, which its checksum tells.
    """

    def __init__(self, path: str, *, allow_shared: bool) -> None:
        self.path = path
        self.allow_shared = allow_shared

    def inside(self, *names: str) -> str:
        """Return the path of something in the directory."""
        return os.path.join(self.path, *names)

    def check(self) -> bool:
        """Say whether the directory is there and a cache; raise ``CacheError`` if it must not be used as one."""
        try:
            found = os.stat(self.path)
            names = os.listdir(self.path) if stat.S_ISDIR(found.st_mode) else None
        except FileNotFoundError:
            return False
        except (PermissionError, NotADirectoryError) as error:
            raise CacheError(f"the cache directory {self.path} cannot be read: {error.strerror}") from error
        if names is None:
            raise CacheError(f"{self.path} is not a directory, so it cannot hold a cache")
        self._check_writers(found)
        markers = [name for name in names if name.startswith(MARKER_PREFIX)]
        if MARKER in markers:
            return True
        if markers:
            raise CacheError(
                f"{self.path} is a cache in another format ({markers[0]}; this version of hypernodes writes {MARKER}): "
                "give the cache another directory, or delete that one"
            )
        if any(not name.startswith(".") and name != "lost+found" for name in names):
            raise CacheError(
                f"{self.path} holds other files and is not a hypernodes cache: give the cache a directory of its own, "
                f"such as {os.path.join(self.path, 'cache')}"
            )
        return False

    def _check_writers(self, found: os.stat_result) -> None:
        """Cached values are unpickled: whoever may write the directory may run code in this process."""
        if self.allow_shared:
            return
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            who, cure = "other users may write it", f"`chmod go-w {self.path}`"
        elif found.st_uid not in (os.geteuid(), 0):
            who, cure = f"it belongs to another user (uid {found.st_uid})", "a directory of your own"
        else:
            return
        raise CacheError(
            f"the cache directory {self.path} is not safe, {who}, and what is in a cache can run code: {cure} helps; "
            "or set key= and allow_shared_directory=True, with a key that only those you trust have"
        )

    def prepare(self) -> None:
        """Create what is missing: the directory and its parents, the marker, the rooms inside."""
        self.check()
        make_directories(self.path)
        with contextlib.suppress(FileExistsError):
            marker = os.open(self.inside(MARKER), _CREATE, 0o600)
            try:
                os.write(marker, _MARKER_TEXT)
            finally:
                os.close(marker)
        for name in (PACKS, ENTRIES, INCOMING):
            make_directories(self.inside(name))

    def write(self, buffers: Iterable[Buffer]) -> str:
        """Write a new file under a temporary name, which is returned; nothing is left of it on failure."""
        temporary = self.inside(INCOMING, unique_name())
        try:
            file = os.open(temporary, _CREATE, 0o600)
        except FileNotFoundError:
            self.prepare()
            file = os.open(temporary, _CREATE, 0o600)
        try:
            with contextlib.closing(_Descriptor(file)):
                for buffer in buffers:
                    write_all(file, buffer)
        except BaseException:
            remove(temporary)
            raise
        return temporary

    def put_in_place(self, temporary: str, *names: str) -> None:
        """Give a temporary file its name, in place of what had it; on failure nothing is left of the former."""
        target = self.inside(*names)
        try:
            for attempt in range(_ATTEMPTS):
                try:
                    return os.replace(temporary, target)
                except FileNotFoundError:  # no such folder yet; or the cache has been cleared just now, and again
                    if attempt == _ATTEMPTS - 1 or not os.path.exists(temporary):
                        raise
                self.prepare()
                with contextlib.suppress(FileNotFoundError):
                    make_directories(os.path.dirname(target))
        except BaseException:
            remove(temporary)
            raise

    def sweep(self) -> None:
        """Delete what killed processes left: temporary files, and what was being cleared."""
        for file in scan(self.inside(INCOMING)):
            if _is_orphan(file):
                remove(file.path)
        for file in scan(self.path):
            if file.name.startswith(TRASH) and _is_orphan(file):
                self.delete_trash(file.path)

    def delete_trash(self, path: str) -> None:
        """Delete a folder that was taken out of sight, in which a late writer may still create something."""
        from shutil import rmtree

        for _ in range(_ATTEMPTS):
            rmtree(path, ignore_errors=True)
            if not os.path.lexists(path):
                return
        rmtree(path)


def _is_orphan(file: os.DirEntry[str]) -> bool:
    age = time.time() - file.stat(follow_symlinks=False).st_mtime
    if age < -ORPHANED_S:
        touch(file.path)  # from a clock that was ahead: let it age from now on
    return age > ORPHANED_S


class _Descriptor:
    def __init__(self, file: int) -> None:
        self._file = file

    def close(self) -> None:
        os.close(self._file)


def unique_name() -> str:
    """Return a file name that no process on any machine makes twice; later ones sort behind earlier ones."""
    return f"{time.time_ns():016x}-{os.urandom(8).hex()}"


def write_all(file: int, buffer: Buffer) -> None:
    """Write a buffer of any size: a single call writes 2 GB at most."""
    view = memoryview(buffer).cast("B")
    while view:
        view = view[os.write(file, view) :]


def make_directories(path: str) -> None:
    """Create a directory and its missing parents, for this user alone."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return
    except FileNotFoundError:
        make_directories(os.path.dirname(path))
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)


def scan(path: str) -> Iterator[os.DirEntry[str]]:
    """Yield what a directory holds; nothing if it is not there, and not what vanishes meanwhile."""
    try:
        with os.scandir(path) as files:
            found = list(files)
    except FileNotFoundError:
        return
    for file in found:
        with contextlib.suppress(FileNotFoundError):
            file.stat(follow_symlinks=False)  # kept in the entry for whoever asks again
            yield file


def remove(path: str) -> bool:
    """Delete a file; say whether it was there."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True


def touch(path: str) -> None:
    """Mark a file as used now, if that can be."""
    with contextlib.suppress(OSError):
        os.utime(path)


def is_stale(used_at: float, now: float) -> bool:
    """Say whether a file's mtime (unix seconds) is old enough, or far enough ahead, to be set anew."""
    return abs(now - used_at) > TOUCHED_EVERY_S

"""What a node was told to depend on besides its code and its inputs: ``@node(..., depends_on=...)``."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from typing import Any

from hypernodes._signature.values import hash_value
from hypernodes.errors import UncacheableError

_files: dict[str, tuple[tuple[int, ...], bytes]] = {}
"""Digests of files by their paths, with what says that a file was changed."""


def hash_dependencies(depends_on: Iterable[str | os.PathLike[str] | Any]) -> dict[str, bytes]:
    """Return the digests of files, folders and values, by names such as ``depends_on 'data.json'``.

    A str or path counts by the content of the file, read again when its time or size has changed, or of all files
    in the folder, with their names, through links as well; anything else counts by value, and a function by its
    fingerprint. Paths are relative to the working directory.

    Raises:
        UncacheableError: There is no such file, it cannot be read, or a value cannot be hashed.
    """
    found = {}
    for number, each in enumerate(depends_on, start=1):
        if isinstance(each, str | os.PathLike):
            name = f"depends_on {os.fspath(each)!r}"
            found[name] = _path_digest(os.fspath(each), name)
        else:
            called = getattr(each, "__qualname__", None)
            name = f"depends_on {called!r}" if isinstance(called, str) else f"depends_on[{number - 1}]"
            while name in found:
                name += "'"
            found[name] = hash_value(each, name)
    return found


def _path_digest(path: str, name: str) -> bytes:
    try:
        return _folder_digest(path) if os.path.isdir(path) else _file_digest(path)
    except OSError as error:
        where = "" if os.path.isabs(path) else f" (in {os.getcwd()!r})"
        raise UncacheableError(
            f"{name}{where}: {error.strerror or error}; give the path of a file or folder"
        ) from error


def _folder_digest(path: str) -> bytes:
    digest = hashlib.sha256(b"folder")
    seen: dict[tuple[int, int], str] = {}  # links may lead to a folder twice, or back to one that they are in
    for folder, inner, files in os.walk(path, onerror=_raise, followlinks=True):
        status = os.stat(folder)
        relative = os.path.relpath(folder, path).replace(os.sep, "/")
        first = seen.setdefault((status.st_dev, status.st_ino), relative)
        if first != relative:
            inner.clear()
            digest.update(f"{relative} is {first}".encode("utf-8", "surrogateescape"))
            continue
        inner.sort()
        for file in sorted(files):
            full = os.path.join(folder, file)
            encoded = os.fsencode(os.path.relpath(full, path).replace(os.sep, "/"))
            digest.update(b"%d:%b" % (len(encoded), encoded))
            digest.update(_file_digest(full))
    return digest.digest()


def _file_digest(path: str) -> bytes:
    path = os.path.abspath(path)
    status = os.stat(path)
    stamp = status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino
    known = _files.get(path)
    if known is not None and known[0] == stamp:
        return known[1]
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    _files[path] = stamp, digest
    return digest


def _raise(error: OSError) -> None:
    raise error

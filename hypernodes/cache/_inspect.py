"""What is in a cache directory, whether it is whole, and what may go."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress

from hypernodes.cache._envelope import HEADER_SIZE, Refused, read_header, unseal
from hypernodes.cache._files import EntryFiles, read_file
from hypernodes.cache._index import PackIndex
from hypernodes.cache._packs import SUFFIX, DamagedPackError, Pack
from hypernodes.cache._reports import CacheStats, EntryInfo, Finding, PruneReport, VerifyReport
from hypernodes.cache._root import ENTRIES, PACKS, TRASH, Root, make_directories, scan, touch, unique_name

_NS = 1e-9
_FRONT = 1 << 10
"""Bytes in which most meta blocks end."""


def entries(packs: PackIndex, files: EntryFiles) -> Iterator[EntryInfo]:
    """Yield what is known of each entry from its front."""
    packs.refresh(now=True)
    for pack in packs.packs:
        with suppress(FileNotFoundError, DamagedPackError):  # what cannot be read is no entry
            keys = packs.keys(pack)
            with open(packs.path(pack), "rb", buffering=0) as file:
                for place in packs.living(pack):
                    length = pack.lengths[place]
                    if length:
                        meta = _meta(file.fileno(), pack.starts[place], length)
                        stored_at = pack.times[place] * _NS
                        yield EntryInfo(key=keys[place], size=length, stored_at=stored_at, place="pack", meta=meta)
    for key, at, found in _living_files(packs, files):
        with suppress(FileNotFoundError), open(found.path, "rb", buffering=0) as file:
            length = found.stat().st_size
            meta = _meta(file.fileno(), 0, length)
            yield EntryInfo(key=key, size=length, stored_at=at * _NS, place="file", meta=meta)


def _living_files(packs: PackIndex, files: EntryFiles) -> Iterator[tuple[str, int, os.DirEntry[str]]]:
    """Yield the files that no later entry replaces."""
    newest: dict[str, tuple[str, int, os.DirEntry[str]]] = {}
    for key, at, file in files.walk():
        if not packs.replaces(key, at) and (key not in newest or at > newest[key][1]):
            newest[key] = key, at, file
    yield from newest.values()


def _meta(file: int, at: int, length: int) -> bytes:
    """Read the meta block of an envelope; nothing where that is impossible."""
    data = os.pread(file, min(_FRONT, length), at)
    try:
        end = HEADER_SIZE + read_header(data).meta_size
    except Refused:
        return b""
    if end > length:
        return b""
    if end > len(data):
        data += os.pread(file, end - len(data), at + len(data))
    return data[HEADER_SIZE:end]


def stats(packs: PackIndex, files: EntryFiles) -> CacheStats:
    """Count."""
    packs.refresh(now=True)
    count = entry_bytes = unreadable = 0
    times: list[int] = []
    for pack in packs.packs:
        living = [place for place in packs.living(pack) if pack.lengths[place]]
        count += len(living)
        entry_bytes += sum(pack.lengths[place] for place in living)
        if living:
            stored = [pack.times[place] for place in living]
            times += (min(stored), max(stored))
    for _, at, found in _living_files(packs, files):
        count += 1
        entry_bytes += found.stat().st_size
        times.append(at)
    sizes = [file.stat().st_size for _, _, file in files.walk()]
    for file in scan(packs.folder):
        if file.name.endswith(SUFFIX):
            sizes.append(file.stat().st_size)
            unreadable += file.name in packs.damaged
    return CacheStats(
        entries=count,
        entry_bytes=entry_bytes,
        files=len(sizes),
        file_bytes=sum(sizes),
        unreadable=unreadable,
        oldest=min(times) * _NS if times else None,
        newest=max(times) * _NS if times else None,
    )


def verify(packs: PackIndex, files: EntryFiles, secret: bytes | None, *, repair: bool) -> VerifyReport:
    """Open every envelope."""
    packs.refresh(now=True)
    checked = repaired = 0
    findings: list[Finding] = []
    for name, reason in sorted(packs.damaged.items()):
        findings.append(Finding(key=None, file=f"{PACKS}/{name}", reason=reason, damaged=True))
        if repair:
            repaired += packs.delete_damaged(name)
    for pack in packs.packs:
        with suppress(FileNotFoundError):
            found = list(_verify_pack(packs, pack, secret))
            checked += sum(1 for place in packs.living(pack) if pack.lengths[place])
            findings += [finding for _, finding in found]
            damaged = [place for place, finding in found if finding.damaged]
            if repair and damaged:
                _repair_pack(packs, pack, damaged)
                repaired += len(damaged)
    for key, at, file in _living_files(packs, files):
        with suppress(FileNotFoundError):
            try:
                unseal(key, read_file(file.path), secret)
            except Refused as refused:
                where = f"{ENTRIES}/{key[-2:]}/{file.name}"
                findings.append(Finding(key=key, file=where, reason=refused.reason, damaged=refused.damaged))
                if repair and refused.damaged:
                    repaired += files.remove(key, at)
            checked += 1
    return VerifyReport(entries=checked, findings=tuple(findings), repaired=repaired)


def _verify_pack(packs: PackIndex, pack: Pack, secret: bytes | None) -> Iterator[tuple[int, Finding]]:
    """Yield what is wrong, and where in the pack; -1 for the pack as a whole."""
    where = f"{PACKS}/{pack.name}"
    if pack.lost:
        yield -1, Finding(key=None, file=where, reason=f"cut short: {pack.lost} entries are lost", damaged=True)
    try:
        keys = packs.keys(pack)
    except DamagedPackError as error:
        yield -1, Finding(key=None, file=where, reason=str(error), damaged=True)
        return
    for place in packs.living(pack):
        if pack.lengths[place]:
            try:
                unseal(keys[place], packs.data(pack, place), secret)
            except (Refused, DamagedPackError) as error:
                damaged = getattr(error, "damaged", True)
                yield place, Finding(key=keys[place], file=where, reason=str(error), damaged=damaged)


def _repair_pack(packs: PackIndex, pack: Pack, damaged: list[int]) -> None:
    try:
        packs.rewrite([pack], frozenset(pack.fingerprints[place] for place in damaged if place >= 0))
    except DamagedPackError:
        packs.delete([pack])


def prune(packs: PackIndex, files: EntryFiles, most_bytes: int | None) -> PruneReport:
    """Delete what has been replaced, and what was used longest ago until no more than this is left."""
    packs.refresh(now=True)
    by_name = {pack.name: pack for pack in packs.packs}
    candidates = [_Candidate(file) for file in scan(packs.folder) if file.name.endswith(SUFFIX)]
    living = {file.name for _, _, file in _living_files(packs, files)}
    for key, at, file in files.walk():
        candidates.append(_Candidate(file, entry=(key, at), replaced=file.name not in living))
    left = sum(each.size for each in candidates)
    doomed: list[_Candidate] = []
    for each in sorted(candidates, key=lambda each: (not each.replaced, each.used_at)):
        if each.replaced or (most_bytes is not None and left > most_bytes):
            doomed.append(each)
            left -= each.size
    going = [by_name[each.file.name] for each in doomed if each.file.name in by_name]
    count = sum(1 for pack in going for place in packs.living(pack) if pack.lengths[place])
    _bury(packs, going)
    packs.delete(going)
    for each in doomed:
        if each.entry is not None:
            count += files.remove(*each.entry) and not each.replaced
        elif each.file.name not in by_name:
            packs.delete_damaged(each.file.name)
    return PruneReport(entries=count, files=len(doomed), file_bytes=sum(each.size for each in doomed), bytes_left=left)


class _Candidate:
    """A file that may go."""

    def __init__(self, file: os.DirEntry[str], *, entry: tuple[str, int] | None = None, replaced: bool = False) -> None:
        found = file.stat(follow_symlinks=False)
        now = time.time()
        if found.st_mtime > now:
            touch(file.path)  # from a clock that is ahead: it would never grow old
        self.file = file
        self.entry = entry
        self.replaced = replaced
        self.size = found.st_size
        self.used_at = min(found.st_mtime, now)


def _bury(packs: PackIndex, going: list[Pack]) -> None:
    """Keep earlier entries of other packs from coming back when those that replaced them go."""
    earlier = packs.shadowed_outside(going) if going else set()
    buried: set[str] = set()
    for pack in going:
        with suppress(FileNotFoundError, DamagedPackError):
            places = [place for place in packs.living(pack) if pack.fingerprints[place] in earlier]
            keys = packs.keys(pack) if places else []
            buried.update(keys[place] for place in places)
    if buried:
        packs.bury(buried)


def clear(root: Root, packs: PackIndex, files: EntryFiles) -> PruneReport:
    """Take all entries out of sight, then delete them."""
    before = stats(packs, files)
    if root.check():
        trash = root.inside(TRASH + unique_name())
        make_directories(trash)
        for name in (PACKS, ENTRIES):
            with suppress(FileNotFoundError):
                os.rename(root.inside(name), os.path.join(trash, name))
        root.delete_trash(trash)
        root.sweep()
    return PruneReport(entries=before.entries, files=before.files, file_bytes=before.file_bytes, bytes_left=0)

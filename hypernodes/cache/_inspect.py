"""What is in a cache directory, whether it is whole, and what may go."""

from __future__ import annotations

import os
import shutil
import time
from array import array
from collections.abc import Iterable, Iterator
from contextlib import suppress

from hypernodes.cache._envelope import HEADER_SIZE, Refused, read_header, unseal
from hypernodes.cache._files import EntryFiles
from hypernodes.cache._index import PackIndex
from hypernodes.cache._packs import DamagedPackError, Pack
from hypernodes.cache._reports import CacheStats, EntryInfo, Finding, PruneReport, VerifyReport
from hypernodes.cache._root import ENTRIES, PACKS, TRASH, Root, make_directories, scan, touch, unique_name

_NS = 1e-9
_FRONT = 1 << 10


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
                        front = _front(file.fileno(), pack.starts[place], length)
                        stored_at = pack.times[place] * _NS
                        yield EntryInfo(key=keys[place], size=length, stored_at=stored_at, place="pack", meta=front[0])
    for found in files.walk():
        with suppress(FileNotFoundError), open(found.path, "rb", buffering=0) as file:
            length = os.fstat(file.fileno()).st_size
            meta, stored_at = _front(file.fileno(), 0, length)
            stored_at = stored_at or found.stat().st_mtime
            yield EntryInfo(key=found.name, size=length, stored_at=stored_at, place="file", meta=meta)


def _front(file: int, at: int, length: int) -> tuple[bytes, float]:
    """Read the meta block of an envelope and when it was sealed; nothing and 0 where that is impossible."""
    data = os.pread(file, min(_FRONT, length), at)
    try:
        header = read_header(data)
    except Refused:
        return b"", 0.0
    end = HEADER_SIZE + header.meta_size
    if end > length:
        return b"", 0.0
    if end > len(data):
        data += os.pread(file, end - len(data), at + len(data))
    return data[HEADER_SIZE:end], float(header.stored_at)


def stats(packs: PackIndex, files: EntryFiles) -> CacheStats:
    """Count."""
    packs.refresh(now=True)
    count = entry_bytes = file_count = file_bytes = unreadable = 0
    times: list[float] = []
    for pack in packs.packs:
        living = [place for place in packs.living(pack) if pack.lengths[place]]
        count += len(living)
        entry_bytes += sum(pack.lengths[place] for place in living)
        if living:
            stamps = [pack.times[place] for place in living]
            times += (min(stamps) * _NS, max(stamps) * _NS)
        file_count += 1
        file_bytes += pack.size
    for name in packs.damaged:
        with suppress(FileNotFoundError):
            file_bytes += os.stat(os.path.join(packs.folder, name)).st_size
            unreadable += 1
    for found in files.walk():
        length = found.stat().st_size
        with suppress(FileNotFoundError), open(found.path, "rb", buffering=0) as file:
            times.append(_front(file.fileno(), 0, length)[1] or found.stat().st_mtime)
            count += 1
            entry_bytes += length
            file_count += 1
            file_bytes += length
    return CacheStats(
        entries=count,
        entry_bytes=entry_bytes,
        files=file_count + unreadable,
        file_bytes=file_bytes,
        unreadable=unreadable,
        oldest=min(times, default=None),
        newest=max(times, default=None),
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
    for file in files.walk():
        with suppress(FileNotFoundError):
            checked += 1
            try:
                unseal(file.name, files.read_one(file.name), secret)
            except Refused as refused:
                path = f"{ENTRIES}/{file.name[-2:]}/{file.name}"
                findings.append(Finding(key=file.name, file=path, reason=refused.reason, damaged=refused.damaged))
                if repair and refused.damaged:
                    repaired += files.remove(file.name)
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
    """Delete what was used longest ago until no more than this is left."""
    packs.refresh(now=True)
    now = time.time()
    by_name = {pack.name: pack for pack in packs.packs}
    candidates: list[tuple[float, int, os.DirEntry[str]]] = []
    for file in [*scan(packs.folder), *files.walk()]:
        if file.name not in by_name and file.name not in packs.damaged and file.path != files.path(file.name):
            continue
        found = file.stat(follow_symlinks=False)
        used_at = found.st_mtime
        if used_at > now:
            touch(file.path)  # from a clock that is ahead: it would never grow old
            used_at = now
        candidates.append((used_at, found.st_size, file))
    left = sum(length for _, length, _ in candidates)
    doomed: list[tuple[int, os.DirEntry[str]]] = []
    for _, length, file in sorted(candidates, key=lambda each: each[:2]):
        if most_bytes is None or left <= most_bytes:
            break
        doomed.append((length, file))
        left -= length
    going = [by_name[file.name] for _, file in doomed if file.name in by_name]
    count = sum(1 for pack in going for place in packs.living(pack) if pack.lengths[place])
    _bury(packs, going)
    packs.delete(going)
    for _, file in doomed:
        if file.name in packs.damaged:
            packs.delete_damaged(file.name)
        elif file.name not in by_name:
            count += files.remove(file.name)
    return PruneReport(
        entries=count, files=len(doomed), file_bytes=sum(length for length, _ in doomed), bytes_left=left
    )


def _bury(packs: PackIndex, going: Iterable[Pack]) -> None:
    """Keep earlier entries of other packs from coming back when those that replaced them go."""
    going = list(going)
    earlier = packs.shadowed_outside(going) if going else set()
    buried: dict[str, tuple[()]] = {}
    for pack in going:
        with suppress(FileNotFoundError, DamagedPackError):
            places = [place for place in packs.living(pack) if pack.fingerprints[place] in earlier]
            keys = packs.keys(pack) if places else []
            buried |= {keys[place]: () for place in places}
    if buried:
        packs.add(buried, array("I", [0]) * len(buried))


def clear(root: Root, packs: PackIndex, files: EntryFiles) -> PruneReport:
    """Take all entries out of sight, then delete them."""
    before = stats(packs, files)
    if root.check():
        trash = root.inside(TRASH + unique_name())
        make_directories(trash)
        for name in (PACKS, ENTRIES):
            with suppress(FileNotFoundError):
                os.rename(root.inside(name), os.path.join(trash, name))
        shutil.rmtree(trash)
        root.sweep()
    return PruneReport(entries=before.entries, files=before.files, file_bytes=before.file_bytes, bytes_left=0)

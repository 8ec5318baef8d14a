"""All packs of a cache: which of them has an entry, those that other processes add, and merging small ones."""

from __future__ import annotations

import os
import threading
import time
from array import array
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING

from hypernodes.cache._packs import (
    SUFFIX,
    DamagedPackError,
    Pack,
    encode,
    fingerprint,
    load,
    read_at,
    read_keys,
    read_range,
)
from hypernodes.cache._root import PACKS, Root, is_stale, remove, touch, unique_name

if TYPE_CHECKING:
    from typing_extensions import Buffer

LOOK_AGAIN_S = 0.5
"""What other processes add or delete is noticed after this time at the latest."""

MERGE_AT = 16
"""This many packs of about the same size become one."""

LARGEST_MERGED = 1 << 21
"""Bytes; a pack of this size is merged no more, so an entry is copied a few times at most, or never in a busy run."""

_SLOT = 32
_NUMBER_IN_PACK = (1 << _SLOT) - 1
_ATTEMPTS = 5
_JOINED_AT_ONCE = 1 << 22
_READ_AT_ONCE = 1 << 18
_GAP = 512
"""Bytes that are sooner read than passed over."""


class PackIndex:
    """Where the entries of all packs are: one dict from fingerprints to a pack's number and a place in it.

    Lookups take no lock: they read a dict whose every value is right, or was right a moment ago; a pack that is gone
    when it is opened is looked up again. Changes are made under one.
    """

    def __init__(self, root: Root) -> None:
        self._root = root
        self.folder = root.inside(PACKS)
        self._where: dict[int, int] = {}
        self._packs: dict[int, Pack] = {}
        self._numbers: dict[str, int] = {}
        self._next = 0
        self.looked = float("-inf")
        """When the folder was last looked at, in monotonic seconds."""
        self._lock = threading.Lock()
        self._merging = threading.Lock()
        self.changed = float("-inf")
        """When another process was last found to have changed something, in monotonic seconds."""
        self._asked = self._answered = 0
        """How often it was told to look again, and which of these times a look has answered."""
        self.damaged: dict[str, str] = {}
        """Packs that cannot be read, and why."""

    # Looking up

    def look_again(self) -> None:
        """Have the next call look into the folder, however soon it comes."""
        self._asked += 1
        self.changed = time.monotonic()

    def refresh(self, *, now: bool = False) -> None:
        """Take note of packs that other processes have added or deleted, unless that was done just now."""
        if not now and self._is_fresh():
            return
        with self._lock:
            if not now and self._is_fresh():
                return  # another thread has just looked
            asked, began = self._asked, time.monotonic()
            before = set(self._numbers) if self.looked > 0 else None
            names, changed = self._load_new(before)
            gone = self._numbers.keys() - names
            for name in gone:
                self._forget(name)
            self.damaged = {name: reason for name, reason in self.damaged.items() if name in names}
            if changed or gone:
                self.changed = time.monotonic()
            # Only now: until all is loaded, other threads have to wait for it.
            self.looked, self._answered = began, asked

    def _is_fresh(self) -> bool:
        return self._asked == self._answered and time.monotonic() - self.looked < LOOK_AGAIN_S

    def _load_new(self, before: set[str] | None) -> tuple[set[str], bool]:
        """Load what is not known yet; return the packs there are, and whether there were any to load.

        What is gone has perhaps been merged, into a pack that a listing made at that moment need not show. So it lists
        until nothing more has gone; only then may anything be forgotten, which a merged pack has taken over by now.
        """
        names: set[str] = set()
        changed = False
        for _ in range(_ATTEMPTS):
            try:
                names = {name for name in os.listdir(self.folder) if name.endswith(SUFFIX)}
            except FileNotFoundError:
                return set(), changed
            vanished = False
            for name in sorted(names - self._numbers.keys() - self.damaged.keys()):
                changed = True
                try:
                    self._adopt(load(self.folder, name))
                except FileNotFoundError:
                    vanished = True
                except DamagedPackError as error:
                    self.damaged[name] = str(error)
            if before is not None and before <= names and not vanished:
                break
            before = names
        return names, changed

    def find(self, keys: Iterable[str]) -> tuple[set[str], list[str]]:
        """Return the keys that packs hold, and the others."""
        self.refresh()
        found, absent = set(), []
        for key in keys:
            slot = self._where.get(fingerprint(key))
            pack = None if slot is None else self._packs.get(slot >> _SLOT)
            if slot is not None and pack is not None and pack.lengths[slot & _NUMBER_IN_PACK]:
                found.add(key)
            else:
                absent.append(key)
        return found, absent

    def read(self, keys: Iterable[str], into: dict[str, bytes]) -> list[str]:
        """Read what packs hold; return the keys that they don't."""
        absent: list[str] = []
        for attempt in range(_ATTEMPTS):
            self.refresh(now=attempt > 0)
            keys = self._read(keys, into, absent)
            if not keys:
                break
        return absent + list(keys)

    def _read(self, keys: Iterable[str], into: dict[str, bytes], absent: list[str]) -> list[str]:
        """Read from the packs that there seem to be; return the keys of those that are gone."""
        wanted: defaultdict[int, list[tuple[int, str]]] = defaultdict(list)
        keys = list(keys)
        for key, slot in zip(keys, map(self._where.get, map(fingerprint, keys)), strict=True):
            if slot is None:
                absent.append(key)
            else:
                wanted[slot >> _SLOT].append((slot & _NUMBER_IN_PACK, key))
        gone = []
        for number, places in wanted.items():
            pack = self._packs.get(number)
            try:
                if pack is None:
                    raise FileNotFoundError
                self._read_pack(pack, places, into, absent)
            except FileNotFoundError:
                gone += [key for _, key in places]
        return gone

    def _read_pack(self, pack: Pack, places: list[tuple[int, str]], into: dict[str, bytes], absent: list[str]) -> None:
        # Opened anew for every batch: 5 µs, and no descriptor to bound, to close, to share with a forked child.
        path = os.path.join(self.folder, pack.name)
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        starts = pack.starts
        places.sort()
        read_from = read_to = 0
        data = b""
        try:
            for position, (number, key) in enumerate(places):
                start, end = starts[number], starts[number + 1]
                if end > read_to:
                    read_from, read_to = start, _end_of_stretch(starts, places, position)
                    data = read_at(file, read_to - start, start)
                entry = data[start - read_from : end - read_from]
                if entry and len(entry) == end - start:
                    into[key] = entry
                else:
                    absent.append(key)
        finally:
            os.close(file)
        now = time.time()
        if is_stale(pack.used_at, now):
            pack.used_at = now
            touch(path)

    # Adding

    def add(self, entries: Mapping[str, Sequence[Buffer]], lengths: array[int], stored_at: int | None = None) -> int:
        """Write entries into a new pack; return the time that they got, in nanoseconds since 1970."""
        self.refresh()
        keys = list(entries)
        if stored_at is None:
            stored_at = self.later_than(keys)
        pack, front = encode(unique_name() + SUFFIX, keys, array("Q", [stored_at]) * len(keys), lengths)
        self._place(pack, self._root.write(_batched(front, entries, lengths)))
        return stored_at

    def bury(self, keys: Collection[str], stored_at: int | None = None) -> None:
        """Write tombstones: what packs have stored for these keys before counts no more."""
        self.add(dict.fromkeys(keys, ()), array("I", [0]) * len(keys), stored_at)

    def later_than(self, keys: Iterable[str]) -> int:
        """Return a time for new entries that is behind those of the ones they replace, also where clocks disagree."""
        stored_at = time.time_ns()
        for each in self._where.keys() & map(fingerprint, keys):
            stored_at = max(stored_at, self._stored_at(each) + 1)
        return stored_at

    def _stored_at(self, each: int) -> int:
        slot = self._where.get(each, -1)
        pack = self._packs.get(slot >> _SLOT)
        return 0 if pack is None else pack.times[slot & _NUMBER_IN_PACK]

    def replaces(self, key: str, stored_at: int) -> bool:
        """Say whether packs have something later for a key."""
        return self._stored_at(fingerprint(key)) > stored_at

    def _place(self, pack: Pack, temporary: str) -> None:
        pack.used_at = pack.used_at or time.time()
        with self._lock:  # or another thread may find it, merge it and delete it before it is adopted here
            self._root.put_in_place(temporary, PACKS, pack.name)
            self._adopt(pack)

    def _adopt(self, pack: Pack) -> None:
        if pack.name in self._numbers:
            return
        number = self._next
        self._next += 1
        self._packs[number] = pack
        self._numbers[pack.name] = number
        first = number << _SLOT
        if self._where.keys() & pack.fingerprints:
            for slot, each in enumerate(pack.fingerprints, first):
                self._claim(each, slot, pack)
        else:
            self._where.update(zip(pack.fingerprints, range(first, first + len(pack.fingerprints)), strict=True))

    def _claim(self, each: int, slot: int, pack: Pack) -> None:
        """Let an entry count unless there is a later one; of two that are the same, the one found last."""
        held = self._where.get(each)
        if held is not None:
            holder = self._packs[held >> _SLOT]
            if holder.times[held & _NUMBER_IN_PACK] > pack.times[slot & _NUMBER_IN_PACK]:
                pack.shadowed.add(each)
                return
            holder.shadowed.add(each)
        self._where[each] = slot

    def _forget(self, name: str) -> None:
        number = self._numbers.pop(name)
        gone = {each for each in self._packs[number].fingerprints if self._where.get(each, -1) >> _SLOT == number}
        for each in gone:
            del self._where[each]
        del self._packs[number]
        if gone:  # two processes may have merged the same packs: what one of them has made is as good as the other
            for other, pack in self._packs.items():
                again = gone & pack.shadowed
                pack.shadowed -= again
                for slot, each in enumerate(pack.fingerprints if again else (), other << _SLOT):
                    if each in again:
                        self._claim(each, slot, pack)

    # Merging

    def merge_small(self, most_bytes: int) -> None:
        """Make one pack of many small ones if there are many; of at most ``most_bytes``."""
        if not self._merging.acquire(blocking=False):
            return
        try:
            chosen = self._small_packs(most_bytes)
            if chosen:
                self.rewrite(chosen)
        except (FileNotFoundError, DamagedPackError):
            self.refresh(now=True)  # another process was quicker, or a pack has been cut short
        finally:
            self._merging.release()

    def _small_packs(self, most_bytes: int) -> list[Pack]:
        by_size: defaultdict[int, list[Pack]] = defaultdict(list)
        for pack in sorted(self.packs, key=lambda pack: pack.name):
            if pack.size < LARGEST_MERGED:
                by_size[pack.size.bit_length() // 4].append(pack)
        for _, alike in sorted(by_size.items()):
            if len(alike) >= MERGE_AT and sum(pack.size for pack in alike[:MERGE_AT]) <= most_bytes:
                return alike[:MERGE_AT]
        return []

    def rewrite(self, packs: Sequence[Pack], buried: frozenset[int] = frozenset()) -> None:
        """Put what counts in some packs into one new pack and delete them; ``buried`` fingerprints become tombstones.

        Safe at any moment: until the new pack is in place nothing has changed, and from then on the old ones are
        repetitions. ``FileNotFoundError`` if one of them is gone already: what is in it must not come back.
        """
        merged = _Merge(self, packs, buried)
        if merged.keys:
            pack, front = encode(unique_name() + SUFFIX, merged.keys, merged.times, merged.lengths)
            pack.used_at = max(pack.used_at for pack in packs)
            temporary = self._root.write(chain([front], merged.data()))
            try:
                os.utime(temporary, (pack.used_at, pack.used_at))
                for old in packs:
                    os.stat(self.path(old))
            except BaseException:
                remove(temporary)
                raise
            self._place(pack, temporary)
        self.delete(packs)

    def delete_damaged(self, name: str) -> bool:
        """Delete a pack that cannot be read; say whether it was there."""
        self.damaged.pop(name, None)
        return remove(os.path.join(self.folder, name))

    def delete(self, packs: Iterable[Pack]) -> None:
        """Delete packs, and forget them."""
        for pack in packs:
            remove(self.path(pack))
            with self._lock:
                if pack.name in self._numbers:
                    self._forget(pack.name)

    # Inspection

    @property
    def packs(self) -> list[Pack]:
        """The packs that can be read, in the order they were found."""
        return list(self._packs.values())

    def path(self, pack: Pack) -> str:
        """Return where a pack's file is."""
        return os.path.join(self.folder, pack.name)

    def living(self, pack: Pack) -> Iterator[int]:
        """Yield the places of the entries of a pack that no later one replaces, tombstones included."""
        number = self._numbers.get(pack.name)
        if number is None:
            return
        where, first = self._where, number << _SLOT
        for place, each in enumerate(pack.fingerprints):
            if where.get(each) == first + place:
                yield place

    def shadowed_outside(self, packs: Iterable[Pack]) -> set[int]:
        """Return the fingerprints of which any other pack holds an earlier entry."""
        names = {pack.name for pack in packs}
        return set().union(*(pack.shadowed for pack in self.packs if pack.name not in names))

    def keys(self, pack: Pack) -> list[str]:
        """Read a pack's keys."""
        return read_keys(self.folder, pack)

    def data(self, pack: Pack, place: int, behind: int | None = None) -> bytes:
        """Read one entry of a pack, or those up to another."""
        return read_range(self.folder, pack, place, place + 1 if behind is None else behind)


def _end_of_stretch(starts: Sequence[int], places: list[tuple[int, str]], position: int) -> int:
    """Return up to where to read from an entry's place on, so that one call reads those close behind it as well."""
    first = places[position][0]
    end, most = starts[first + 1], starts[first] + _READ_AT_ONCE
    for number, _ in islice(places, position + 1, None):
        start = starts[number]
        if start - end > _GAP or start > most:
            break
        end = starts[number + 1]
    return end


class _Merge:
    """What goes into a pack that is made of others."""

    def __init__(self, index: PackIndex, packs: Sequence[Pack], buried: frozenset[int]) -> None:
        self._index = index
        self._sources: list[tuple[Pack, list[int]]] = []
        self.keys: list[str] = []
        self.times = array("Q")
        self.lengths = array("I")
        earlier = index.shadowed_outside(packs)
        for pack in packs:
            keys = index.keys(pack)
            kept = list(index.living(pack))
            if len(kept) == len(keys) and not buried and 0 not in pack.lengths:  # the rule, and worth being quick at
                self.keys += keys
                self.times += pack.times
                self.lengths += pack.lengths
            else:
                kept = [place for place in kept if self._keep(pack, place, keys[place], earlier, buried)]
            self._sources.append((pack, kept))

    def _keep(self, pack: Pack, place: int, key: str, earlier: set[int], buried: frozenset[int]) -> bool:
        """Take one entry over; say whether its data go with it."""
        each = pack.fingerprints[place]
        length = 0 if each in buried else pack.lengths[place]
        if length or each in earlier:  # a tombstone with nothing under it goes
            self.keys.append(key)
            self.times.append(pack.times[place] + (each in buried))
            self.lengths.append(length)
        return length > 0

    def data(self) -> Iterator[bytes]:
        """Yield the entries, those that stand together joined."""
        for pack, places in self._sources:
            for first, behind in _runs(places, pack.starts):
                yield self._index.data(pack, first, behind)


def _runs(places: Sequence[int], starts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the first place and the one behind the last of those that follow each other, a few MB at a time."""
    first = behind = -1
    for place in places:
        if place != behind or starts[place] - starts[first] > _JOINED_AT_ONCE:
            if first >= 0:
                yield first, behind
            first = place
        behind = place + 1
    if first >= 0:
        yield first, behind


def _batched(front: bytes, entries: Mapping[str, Sequence[Buffer]], lengths: Iterable[int]) -> Iterator[bytes]:
    """Join small buffers into pieces of a few MB, each one call of the system to write."""
    parts: list[Buffer] = [front]
    size = 0
    for entry, length in zip(entries.values(), lengths, strict=True):
        parts.extend(entry)
        size += length
        if size > _JOINED_AT_ONCE:
            yield b"".join(parts)
            parts.clear()
            size = 0
    yield b"".join(parts)

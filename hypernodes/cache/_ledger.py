"""Why an entry is not there: what the entries of a node were made of, as far as they are remembered.

For each node a store keeps one small record beside its entries: the parts of the code that made them, and for each
entry the first bytes of its inputs' digests. Nothing but explanations depends on it, so writers do not coordinate:
of two that write at the same time, one is forgotten.
"""

from __future__ import annotations

import json
import math
import struct
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from itertools import islice
from typing import TYPE_CHECKING, Any

from hypernodes._threads import default_threads, in_thread
from hypernodes.cache._envelope import seal, unseal

if TYPE_CHECKING:
    from hypernodes.cache._guard import Guard

CODEC = 16
"""In an envelope's header: not a pickle."""
SHORT = 8
"""Bytes of a digest that are remembered."""
MOST_ROWS = 100_000
MOST_CODES = 32
OFTEN_S = 5.0
"""Seconds in which what adds little to a history is gathered: to write one is to read and write all of it."""
LITTLE = 0.01
"""Of the rows that a history has."""
_COUNT = struct.Struct("<I")
_CODE = struct.Struct("<H")


@dataclass(slots=True)
class CodeRecord:
    """One state of a node's code, and how its calls went."""

    parts: dict[str, str]
    """Digests of the parts of its code, its version and dependencies, by what to call them."""
    calls: int = 0
    seconds: float = 0.0
    """Of all these calls together."""
    at: float = 0.0
    """Unix time of the last one."""


@dataclass(slots=True)
class History:
    """What is remembered of one node."""

    names: tuple[str, ...]
    """Its inputs, in the order of a row's digests."""
    codes: list[CodeRecord] = field(default_factory=list)
    rows: dict[bytes, tuple[int, bytes]] = field(default_factory=dict)
    """By the first bytes of an entry's key: the index of its code, and its inputs' digests, one after another."""

    def note(self, parts: dict[str, str], key: str, seconds: float, digests: bytes) -> None:
        """Add an entry."""
        index = self.index_of(parts)
        record = self.codes[index]
        record.calls += 1
        record.seconds += seconds
        record.at = time.time()
        self.rows[bytes.fromhex(key)[:SHORT]] = index, digests
        if len(self.rows) > MOST_ROWS * 1.1:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        for key in list(islice(self.rows, max(len(self.rows) - MOST_ROWS, 0))):
            del self.rows[key]

    def index_of(self, parts: dict[str, str]) -> int:
        """Return the index of a state of the code, which is added if it is new."""
        if self.codes and self.codes[-1].parts is parts:
            return len(self.codes) - 1
        for index, record in enumerate(self.codes):
            if record.parts == parts:
                return index
        self.codes.append(CodeRecord(parts))
        return len(self.codes) - 1

    def merge(self, newer: History) -> None:
        """Add what another one knows; what is too old to keep is dropped."""
        if newer.names != self.names:
            self.names, self.codes, self.rows = newer.names, newer.codes.copy(), newer.rows.copy()
            return
        indexes = []
        for record in newer.codes:
            index = self.index_of(record.parts)
            mine = self.codes[index]
            mine.calls += record.calls
            mine.seconds += record.seconds
            mine.at = max(mine.at, record.at)
            indexes.append(index)
        for key, (index, digests) in newer.rows.items():
            self.rows.pop(key, None)
            self.rows[key] = indexes[index], digests
        self._forget_oldest()
        if len(self.codes) > MOST_CODES:
            kept = sorted(range(len(self.codes)), key=lambda index: self.codes[index].at)[-MOST_CODES:]
            moved = {old: new for new, old in enumerate(sorted(kept))}
            self.codes = [self.codes[old] for old in sorted(kept)]
            self.rows = {key: (moved[index], row) for key, (index, row) in self.rows.items() if index in moved}

    def packed(self) -> bytes:
        """Return it as bytes."""
        head = json.dumps(
            {
                "names": self.names,
                "codes": [
                    {
                        "parts": each.parts,
                        "calls": each.calls,
                        "seconds": round(each.seconds, 6),
                        "at": round(each.at, 3),
                    }
                    for each in self.codes
                ],
            }
        ).encode()
        rows = b"".join(key + _CODE.pack(index) + digests for key, (index, digests) in self.rows.items())
        return _COUNT.pack(len(head)) + head + rows

    @classmethod
    def unpacked(cls, data: memoryview) -> History:
        """Return what :meth:`packed` made.

        Raises:
            Exception: it is something else; deeply nested JSON, say, makes a ``RecursionError``.
        """
        (length,) = _COUNT.unpack_from(data)
        head = json.loads(bytes(data[_COUNT.size : _COUNT.size + length]))
        names = tuple(map(_text, head["names"]))
        codes = [
            CodeRecord(
                {_text(name): _text(digest) for name, digest in each["parts"].items()},
                int(_number(each["calls"])),
                _number(each["seconds"]),
                _number(each["at"]),
            )
            for each in head["codes"]
        ]
        width = SHORT + _CODE.size + SHORT * len(names)
        rows: dict[bytes, tuple[int, bytes]] = {}
        for start in range(_COUNT.size + length, len(data) - width + 1, width):
            row = bytes(data[start : start + width])
            (index,) = _CODE.unpack_from(row, SHORT)
            if index < len(codes):
                rows[row[:SHORT]] = index, row[SHORT + _CODE.size :]
        return cls(names, codes, rows)


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"{type(value).__name__} in place of text")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{type(value).__name__} in place of a number")
    return float(value)


class Ledger:
    """What one run adds to the histories of its nodes."""

    __slots__ = ("_noted",)

    def __init__(self) -> None:
        self._noted: dict[str, History] = {}

    def note(
        self,
        name: str,
        names: tuple[str, ...],
        parts: dict[str, str],
        key: str,
        seconds: float,
        digests: Iterable[bytes],
    ) -> None:
        """Remember an entry that was stored; ``name`` is that of the node's history."""
        history = self._noted.get(name)
        if history is None:
            history = self._noted[name] = History(names)
        history.note(parts, key, seconds, b"".join([digest[:SHORT] for digest in digests]))

    def add(self, noted: Mapping[str, History]) -> None:
        """Add what another ledger has noted."""
        for name, history in noted.items():
            if name in self._noted:
                self._noted[name].merge(history)
            else:
                self._noted[name] = history

    def __bool__(self) -> bool:
        return bool(self._noted)

    def take(self) -> dict[str, History]:
        """Return what was noted and forget it."""
        noted, self._noted = self._noted, {}
        return noted


def history_name(function: str, outputs: Iterable[str]) -> str:
    """Return the name under which a store keeps the history of a node."""
    return "ledger-" + sha256(f"{function} -> {','.join(outputs)}".encode()).hexdigest()


class Gathered:
    """What the runs of this process add to the histories of one store, until it is worth writing. For any thread."""

    __slots__ = ("_lock", "_noted", "_written")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._noted: dict[str, History] = {}
        self._written: dict[str, tuple[float, int]] = {}
        """By the name of a history, when it was last written, and how many rows it had."""

    def add(self, noted: Mapping[str, History]) -> dict[str, list[History]]:
        """Take what a run has noted; return what is to be written now, by name, older first."""
        now = time.monotonic()
        due: dict[str, list[History]] = {}
        with self._lock:
            for name in {**self._noted, **noted}:
                known = [each[name] for each in (self._noted, noted) if name in each]
                at, rows = self._written.get(name, (-math.inf, 0))
                if now - at >= OFTEN_S or sum(len(each.rows) for each in known) >= rows * LITTLE:
                    due[name] = known
                    self._noted.pop(name, None)
                    self._written[name] = now, rows
                else:
                    first, *later = known
                    for newer in later:
                        first.merge(newer)
                    self._noted[name] = first
        return due

    def written(self, rows: Mapping[str, int]) -> None:
        """Take note of how many rows histories have."""
        now = time.monotonic()
        with self._lock:
            self._written.update({name: (now, count) for name, count in rows.items()})

    def complete(self, histories: dict[str, History]) -> None:
        """Add what was gathered to histories as the store has them."""
        with self._lock:
            for name, history in histories.items():
                if name in self._noted:
                    history.merge(self._noted[name])


async def read_histories(
    guard: Guard, names: Iterable[str], secret: bytes | None, gathered: Gathered
) -> dict[str, History]:
    """Return what is remembered of nodes, by name; what a store has that is damaged or not signed is forgotten."""
    found = await guard.get_many(list(names))

    def opened() -> dict[str, History]:
        histories = {
            name: history for name, data in found.items() if (history := _opened(name, data, secret)) is not None
        }
        gathered.complete(histories)
        return histories

    histories: dict[str, History] = (await in_thread(opened, default_threads()))[0]
    return histories


async def write_histories(guard: Guard, noted: Mapping[str, History], secret: bytes | None, gathered: Gathered) -> None:
    """Add to what a store remembers, now or, if it is little, with what comes later."""
    due = gathered.add(noted)
    if due:
        found = await guard.get_many(list(due))
        (entries, rows), _ = await in_thread(partial(_merged, found, due, secret), default_threads())
        if await guard.set_many(entries):
            gathered.written(rows)


def _merged(
    found: Mapping[str, Any], due: Mapping[str, Sequence[History]], secret: bytes | None
) -> tuple[dict[str, Any], dict[str, int]]:
    """Return what a store is to have from now on, and how many rows each history has."""
    entries: dict[str, Any] = {}
    rows: dict[str, int] = {}
    for name, added in due.items():
        known = _opened(name, found[name], secret) if name in found else None
        first, *others = [known, *added] if known else added
        for newer in others:
            first.merge(newer)
        entries[name] = seal(name, CODEC, b"{}", [first.packed()], secret)
        rows[name] = len(first.rows)
    return entries, rows


def _opened(name: str, data: Any, secret: bytes | None) -> History | None:
    """Return a history of a store; None if anything is odd about it."""
    try:
        codec, payload = unseal(name, data, secret)
        return History.unpacked(payload) if codec == CODEC else None
    except Exception:  # noqa: BLE001 - whoever may write the store may have written anything
        return None

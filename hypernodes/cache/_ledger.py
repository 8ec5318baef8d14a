"""Why an entry is not there: what the entries of a node were made of, as far as they are remembered.

For each node a store keeps one small record beside its entries: the parts of the code that made them, and for each
entry the first bytes of its inputs' digests. Nothing but explanations depends on it, so writers do not coordinate:
of two that write at the same time, one is forgotten.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from hypernodes.cache._envelope import Refused, seal, unseal

if TYPE_CHECKING:
    from hypernodes.cache._guard import Guard

CODEC = 16
"""In an envelope's header: not a pickle."""
SHORT = 8
"""Bytes of a digest that are remembered."""
MOST_ROWS = 100_000
MOST_CODES = 32
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

    def index_of(self, parts: dict[str, str]) -> int:
        """Return the index of a state of the code, which is added if it is new."""
        for index, record in enumerate(self.codes):
            if record.parts is parts or record.parts == parts:
                return index
        self.codes.append(CodeRecord(parts))
        return len(self.codes) - 1

    def merge(self, newer: History) -> None:
        """Add what another one knows; what is too old to keep is dropped."""
        if newer.names != self.names:
            self.names, self.codes, self.rows = newer.names, newer.codes, newer.rows
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
        while len(self.rows) > MOST_ROWS:
            del self.rows[next(iter(self.rows))]
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
            ValueError: it is something else.
        """
        (length,) = _COUNT.unpack_from(data)
        head = json.loads(bytes(data[_COUNT.size : _COUNT.size + length]))
        names = tuple(head["names"])
        codes = [CodeRecord(each["parts"], each["calls"], each["seconds"], each["at"]) for each in head["codes"]]
        width = SHORT + _CODE.size + SHORT * len(names)
        rows: dict[bytes, tuple[int, bytes]] = {}
        for start in range(_COUNT.size + length, len(data) - width + 1, width):
            row = bytes(data[start : start + width])
            (index,) = _CODE.unpack_from(row, SHORT)
            if index < len(codes):
                rows[row[:SHORT]] = index, row[SHORT + _CODE.size :]
        return cls(names, codes, rows)


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


async def read_histories(guard: Guard, names: Iterable[str], secret: bytes | None) -> dict[str, History]:
    """Return what a store remembers of nodes, by name; what is damaged or not signed is forgotten."""
    histories = {}
    for name, data in (await guard.get_many(list(names))).items():
        try:
            codec, _, payload = unseal(name, data, secret)
            if codec == CODEC:
                histories[name] = History.unpacked(payload)
        except (Refused, ValueError, KeyError, TypeError, struct.error):
            continue
    return histories


async def write_histories(guard: Guard, noted: Mapping[str, History], secret: bytes | None) -> None:
    """Add to what a store remembers."""
    known = await read_histories(guard, noted, secret)
    entries: dict[str, Any] = {}
    for name, newer in noted.items():
        history = known.get(name)
        if history is None:
            history = newer
        else:
            history.merge(newer)
        entries[name] = seal(name, CODEC, b"{}", [history.packed()], secret)
    await guard.set_many(entries)

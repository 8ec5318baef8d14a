"""What ``explain`` answers: for each call a hit or a miss, and why; as data, as a table, as HTML."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from hypernodes._mapping import Path
from hypernodes.events import format_path

Status = Literal["hit", "miss", "uncached", "unneeded", "unknown"]
Why = Literal[
    "new",
    "code",
    "version",
    "depends_on",
    "input",
    "upstream",
    "gone",
    "refused",
    "refresh",
    "unneeded",
    "not cached",
    "uncacheable",
    "unknown",
]


class Reason(NamedTuple):
    """Why a node would run: what kind of thing changed since the nearest earlier entry, and its name."""

    why: Why
    name: str = ""

    def __str__(self) -> str:
        return _TEXTS[self.why].format(self.name)


_TEXTS: dict[str, str] = {
    "new": "nothing like it has been computed before",
    "code": "changed: {}",
    "version": "its version changed",
    "depends_on": "changed: {}",
    "input": "input {!r} is new",
    "upstream": "input {!r} will be computed anew",
    "gone": "it was stored once, and is no longer there",
    "refused": "its entry cannot be used: {}",
    "refresh": "it is to be recomputed",
    "unneeded": "it is not there, and nothing that runs needs it",
    "not cached": "{}",
    "uncacheable": "{}",
    "unknown": "it depends on {!r}, which is known once it has been computed",
}


class NodeExplanation(NamedTuple):
    """What would happen with one node, or with one item's: ``path`` leads there, as in events and errors."""

    path: Path
    status: Status
    """``"hit"``: not run; ``"miss"``: run and stored; ``"uncached"``: run and not stored; ``"unneeded"``: not run, as
    nothing that runs needs it; ``"unknown"``: that depends on a value which is known only once it has been computed."""
    reasons: tuple[Reason, ...] = ()
    seconds: float | None = None
    """How long such a call took before, on average."""
    opaque: tuple[str, ...] = ()
    """What its code refers to and could not be looked into, such as a client: it counts by its class alone."""


@dataclass(frozen=True, slots=True, repr=False)
class Explanation:
    """What a run would do; prints as a table, in a notebook as HTML."""

    name: str
    nodes: tuple[NodeExplanation, ...]

    def __iter__(self) -> Iterator[NodeExplanation]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)

    def count(self, status: Status) -> int:
        """Return how many calls have a status."""
        return sum(each.status == status for each in self.nodes)

    @property
    def hits(self) -> int:
        """How many calls would be answered by the cache."""
        return self.count("hit")

    @property
    def misses(self) -> int:
        """How many calls would run and be stored."""
        return self.count("miss")

    @property
    def seconds(self) -> float:
        """Seconds that the calls which would run took before, as far as that is known.

        Calls that overlapped shared the time: a thousand that waited a second together count as one second.
        """
        return sum(each.seconds or 0.0 for each in self.nodes if each.status not in ("hit", "unneeded"))

    def __getitem__(self, name: str) -> NodeExplanation:
        """Return what is said of the first node of this name, whatever pipeline it is in."""
        for each in self.nodes:
            if each.path[-1] == name:
                return each
        raise KeyError(name)

    def _rows(self) -> list[tuple[str, str, str, str]]:
        groups: dict[Path, list[NodeExplanation]] = {}
        for each in self.nodes:
            groups.setdefault(tuple(part for part in each.path[1:] if isinstance(part, str)), []).append(each)
        rows = []
        for path, members in groups.items():
            mapped = any(isinstance(part, int) for part in members[0].path)
            counts = Counter(each.status for each in members)
            states = ", ".join(f"{counts[each]:,} {each}" if mapped else each for each in _STATUSES if counts[each])
            reasons = Counter(reason for each in members for reason in each.reasons)
            most = reasons.most_common(_MOST_REASONS)
            listed = [f"{reason} ({count:,})" if mapped else str(reason) for reason, count in most]
            if len(reasons) > _MOST_REASONS:
                listed.append("...")
            opaque = sorted({name for each in members for name in each.opaque})
            if opaque:
                listed.append(f"not looked into: {', '.join(opaque)}")
            seconds = sum(each.seconds or 0.0 for each in members if each.status not in ("hit", "unneeded"))
            rows.append((format_path(path), states, _duration(seconds), "; ".join(listed)))
        return rows

    def __repr__(self) -> str:
        """Return the table: as data it may have many thousands of lines."""
        return str(self)

    def __str__(self) -> str:
        rows = [("node", "cache", "took", "why"), *self._rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [self._summary()]
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
            lines.append("  ".join([*cells, row[3]]).rstrip())
        return "\n".join(lines)

    def _summary(self) -> str:
        parts = [f"{self.count(status):,} {status}" for status in _STATUSES if self.count(status)]
        took = f"; what runs took {_duration(self.seconds)} before" if self.seconds else ""
        return f"{self.name}: {', '.join(parts) or 'nothing to run'}{took}"

    def _repr_html_(self) -> str:
        head = "".join(f"<th style='text-align:left'>{each}</th>" for each in ("node", "cache", "took", "why"))
        body = "".join(
            "<tr>" + "".join(f"<td style='text-align:left'>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self._rows()
        )
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return f"<div>{html.escape(self._summary())}</div>{table}"


_STATUSES: tuple[Status, ...] = ("hit", "miss", "uncached", "unneeded", "unknown")
_MOST_REASONS = 3


def _duration(seconds: float) -> str:
    if not seconds:
        return ""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"

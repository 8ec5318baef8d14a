"""What a cache directory tells about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryInfo:
    """One entry of a cache; ``size`` in bytes, ``stored_at`` in unix seconds."""

    key: str
    size: int
    stored_at: float
    place: Literal["pack", "file"]
    meta: bytes
    """The block that its writer put beside the value; empty where it cannot be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStats:
    """How much a cache holds.

    ``entry_bytes`` is what the entries take, ``file_bytes`` what their files take, those of entries that have been
    replaced included. ``oldest`` and ``newest`` are unix seconds, None for an empty cache. ``unreadable`` counts files
    that no entry can be read from.
    """

    entries: int
    entry_bytes: int
    files: int
    file_bytes: int
    unreadable: int
    oldest: float | None
    newest: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneReport:
    """What pruning or clearing removed, and the bytes in the files that are left."""

    entries: int
    files: int
    file_bytes: int
    bytes_left: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that cannot be read: an entry, or with ``key=None`` a whole pack.

    ``damaged`` is false for what another key, or another version, may still read.
    """

    key: str | None
    file: str
    reason: str
    damaged: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What a check of every entry found; ``repaired`` counts the damaged things that were dropped."""

    entries: int
    findings: tuple[Finding, ...]
    repaired: int

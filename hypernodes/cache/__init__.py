"""Where results are kept: a directory, any aiocache cache, or a store of one's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hypernodes.cache._aiocache import AiocacheStore
    from hypernodes.cache._disk import DiskCache
    from hypernodes.cache._reports import CacheStats, EntryInfo, Finding, PruneReport, VerifyReport
    from hypernodes.cache._store import Store

__all__ = [
    "AiocacheStore",
    "CacheStats",
    "DiskCache",
    "EntryInfo",
    "Finding",
    "PruneReport",
    "Store",
    "VerifyReport",
]

_HOMES = {
    "AiocacheStore": "_aiocache",
    "CacheStats": "_reports",
    "DiskCache": "_disk",
    "EntryInfo": "_reports",
    "Finding": "_reports",
    "PruneReport": "_reports",
    "Store": "_store",
    "VerifyReport": "_reports",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: ``import hypernodes`` pays for no store."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

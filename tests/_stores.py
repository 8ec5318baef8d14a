"""The stores that the contract suite (test_stores.py) runs against.

A new kind of store gets every test of the suite with one more `StoreCase` in `CASES`.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from hypernodes.cache import DiskCache, Store


@dataclass(frozen=True)
class StoreCase:
    """One kind of store."""

    name: str
    open: Callable[[Path], AbstractAsyncContextManager[Store]]
    """Opens a store whose entries live in (or are named after) a folder: the same one opens the same entries."""
    libraries: tuple[str, ...] = ("asyncio", "trio")
    """The event loops it works with."""
    largest: int = 8 << 20
    """Bytes that it must take as one entry."""

    def __str__(self) -> str:
        return self.name


@asynccontextmanager
async def disk(folder: Path) -> AsyncIterator[Store]:
    """A directory."""
    cache = DiskCache(folder / "cache")
    yield cache
    cache.close()


CASES = [StoreCase("DiskCache", disk)]

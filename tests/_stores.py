"""The stores that the contract suite (test_stores.py) runs against.

A new kind of store gets every test of the suite with one more `StoreCase` in `CASES`.
"""

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from aiocache import MemcachedCache, RedisCache, SimpleMemoryCache
from aiocache.serializers import PickleSerializer

from hypernodes.cache import AiocacheStore, DiskCache, Store
from tests._servers import SHARED


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
    server: str | None = None
    """The server that has to run, one of those in ``_servers.py``."""

    def __str__(self) -> str:
        return self.name


@asynccontextmanager
async def disk(folder: Path) -> AsyncIterator[Store]:
    """A directory."""
    cache = DiskCache(folder / "cache")
    yield cache
    cache.close()


MEMORIES: dict[Path, SimpleMemoryCache] = {}


@asynccontextmanager
async def memory(folder: Path) -> AsyncIterator[Store]:
    """aiocache in this process."""
    yield AiocacheStore(MEMORIES.setdefault(folder, SimpleMemoryCache(serializer=PickleSerializer())))


@asynccontextmanager
async def redis(folder: Path) -> AsyncIterator[Store]:
    """aiocache on Redis."""
    cache = RedisCache(port=SHARED.port("redis"), namespace=_namespace(folder), serializer=PickleSerializer())
    store = AiocacheStore(cache, key=b"secret")
    yield store
    await store.aclose()


@asynccontextmanager
async def memcached(folder: Path) -> AsyncIterator[Store]:
    """aiocache on memcached."""
    cache = MemcachedCache(port=SHARED.port("memcached"), namespace=_namespace(folder))
    store = AiocacheStore(cache, unsigned=True)
    yield store
    await store.aclose()


def _namespace(folder: Path) -> str:
    return hashlib.sha256(bytes(folder)).hexdigest()[:16]


CASES = [
    StoreCase("DiskCache", disk),
    StoreCase("aiocache-memory", memory, ("asyncio",)),
    StoreCase("aiocache-redis", redis, ("asyncio",), server="redis"),
    StoreCase("aiocache-memcached", memcached, ("asyncio",), largest=1_000_000, server="memcached"),
]

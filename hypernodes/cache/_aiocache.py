"""Any aiocache cache as a store, and what ``cache=`` takes."""

from __future__ import annotations

import logging
import os
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hypernodes._crew import Crew
from hypernodes._threads import current_async_library
from hypernodes.cache._connections import Connections, kind_of
from hypernodes.cache._envelope import KEY_VARIABLE, checked_key
from hypernodes.cache._store import Store, joined
from hypernodes.errors import CacheError, DefinitionError

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from hypernodes.cache._store import Entry

PREFIX = "hypernodes:"
"""Of every key: a server's keys are seldom all ours."""
SLICE = 100
"""Keys in one request."""
WRITERS = 8
"""Writes at the same time, of one batch."""

_log = logging.getLogger("hypernodes")


class AiocacheStore:
    """Results in an `aiocache` cache: in memory, in Redis, in memcached, or in a class of one's own.

    Of the cache it takes the server, the namespace, the plugins, the ``ttl``, and the ``timeout``: the seconds after
    which a run goes on without an answer. Not the serializer: results are stored as the bytes that they are. The
    cache itself is not changed, and each event loop has connections of its own, which are closed with it. On asyncio
    only.

    Args:
        cache: The aiocache cache.
        key: With a key, results are signed (HMAC-SHA256), and only those signed with it are ever loaded. By default
            the environment variable ``HYPERNODES_CACHE_KEY``. What lies outside this process has to have one, since
            loading a result runs code, and others may write there.
        unsigned: Do without a key: whoever reaches the server is trusted.

    Raises:
        CacheError: there is no key, or the namespace is so long that the server would refuse every key.
        DefinitionError: it is no aiocache cache, or both a key and ``unsigned`` are given.

    >>> from aiocache import SimpleMemoryCache
    >>> AiocacheStore(SimpleMemoryCache())
    AiocacheStore(SimpleMemoryCache)
    """

    def __init__(self, cache: Any, *, key: bytes | str | None = None, unsigned: bool = False) -> None:
        from aiocache.base import BaseCache

        if not isinstance(cache, BaseCache):
            raise DefinitionError(f"AiocacheStore takes an aiocache cache, such as RedisCache(...); {_got(cache)}")
        if unsigned and key is not None:
            raise DefinitionError("AiocacheStore takes key= or unsigned=True: results are signed, or they are not")
        self.cache: Any = cache
        self._kind = kind_of(cache)
        self.key: bytes | None = None
        if not unsigned and (key is not None or self._kind.shared):
            self.key = checked_key(key)
        if self._kind.shared and self.key is None and not unsigned:
            raise CacheError(
                f"others may write where {type(cache).__name__} keeps results, and loading a result runs code: give "
                f"AiocacheStore(cache, key=...), or the environment variable {KEY_VARIABLE}, a secret that only those "
                "have whom you trust; or say unsigned=True, if you trust everyone who reaches the server"
            )
        longest = cache.build_key(f"{PREFIX}ledger-{64 * '0'}", cache.namespace)
        if self._kind.key_bytes is not None and len(longest) > self._kind.key_bytes:
            raise CacheError(
                f"with this namespace {type(cache).__name__} would get keys of {len(longest)} bytes, and it takes "
                f"{self._kind.key_bytes}: choose a shorter namespace"
            )
        self.deadline_s: float | None = (cache.timeout or None) if self._kind.shared else None
        """Seconds for an answer; see :mod:`hypernodes.cache._guard`."""
        self._connections = Connections(cache, self._kind)
        self._told_too_large = False

    def check(self) -> None:
        """Raise ``CacheError`` on an event loop that aiocache cannot use."""
        if current_async_library() == "trio":
            raise CacheError("aiocache runs on asyncio only, and this run is on trio: use DiskCache, or run on asyncio")

    async def get_many(self, keys: Sequence[str], /) -> dict[str, Buffer]:
        """Return the values of those keys that are there."""
        self.check()
        found: dict[str, Buffer] = {}
        for wanted in _slices(list(dict.fromkeys(keys))):
            async with self._connections.one() as cache:
                # A value of None is what aiocache says for "not there"; ours are never None.
                if len(wanted) == 1:
                    values = [await cache.get(PREFIX + wanted[0], timeout=0, **self._kind.get_options)]
                else:
                    names = [PREFIX + key for key in wanted]
                    values = await cache.multi_get(names, timeout=0, **self._kind.get_options)
            # With aiocache switched off (AIOCACHE_DISABLE=1) there are no values at all.
            pairs = zip(wanted, values, strict=False)
            found.update((key, value) for key, value in pairs if isinstance(value, bytes | bytearray | memoryview))
        return found

    async def set_many(self, entries: Mapping[str, Entry], /) -> None:
        """Keep each value under its key; one that is too large for the server is left out, with one warning."""
        self.check()
        left = iter(entries.items())

        async def write(crew: Crew | None = None) -> None:
            for key, entry in left:
                await self._set(key, joined(entry))

        async def write_all(crew: Crew) -> None:
            for _ in range(min(len(entries), WRITERS) - 1):
                crew.start(write)
            await write(crew)

        await (write() if len(entries) == 1 or not self._kind.shared else Crew.run(write_all))

    async def aclose(self) -> None:
        """Close this event loop's connections now; the next use opens others. They are closed with the loop anyway."""
        await self._connections.aclose()

    async def _set(self, key: str, value: bytes) -> None:
        if self._kind.value_bytes is not None and len(value) > self._kind.value_bytes:
            self._tell_too_large(len(value))
            return
        async with self._connections.one() as cache:
            await cache.set(PREFIX + key, value, timeout=0, **self._kind.set_options)

    def _tell_too_large(self, length: int) -> None:
        if not self._told_too_large:
            self._told_too_large = True
            _log.warning(
                "%r takes values of %.1f MB at most: a result of %.1f MB is not kept, nor will others as large be",
                self,
                (self._kind.value_bytes or 0) / 1e6,
                length / 1e6,
            )

    def __repr__(self) -> str:
        cache = self.cache
        place = f" {cache.endpoint}:{cache.port}" if self._kind.shared and hasattr(cache, "endpoint") else ""
        return f"AiocacheStore({type(cache).__name__}{place}{'' if self.key is None else ', key=...'})"


def as_store(cache: Any) -> Store:
    """Return the store that is meant by what a user gave as ``cache=``.

    The same aiocache cache gives the same store for as long as anyone has it.

    Raises:
        DefinitionError: it is no cache; the message says what to write.
        CacheError: it is an aiocache cache that needs a key and has none.
    """
    if isinstance(cache, type):
        raise DefinitionError(f"cache= takes a cache, not a class: write {cache.__name__}(...)")
    if isinstance(cache, str | bytes | os.PathLike):
        raise DefinitionError(f"cache= takes a cache, not a path: write DiskCache({os.fspath(cache)!r})")
    # Whoever has made an aiocache cache has imported aiocache.
    aiocache = sys.modules.get("aiocache.base")
    if aiocache is not None and isinstance(cache, aiocache.BaseCache):
        with _adapters_lock:
            adapter = _adapters.get(id(cache))
            if adapter is None:
                adapter = _adapters[id(cache)] = AiocacheStore(cache)
            return adapter
    missing = [name for name in ("get_many", "set_many") if not callable(getattr(cache, name, None))]
    if missing:
        raise DefinitionError(
            "cache= takes a DiskCache(path), an aiocache cache, or an object with async methods get_many(keys) and "
            f"set_many(entries); {_got(cache)}, which has no {' and no '.join(missing)}"
        )
    if not isinstance(getattr(cache, "key", None), bytes | None):
        raise DefinitionError(
            f"the attribute key of a cache is what its entries are signed with, bytes or None: that of this "
            f"{type(cache).__name__} is a {type(cache.key).__name__}"
        )
    store: Store = cache
    return store


_adapters: weakref.WeakValueDictionary[int, AiocacheStore] = weakref.WeakValueDictionary()
"""By the identity of the aiocache cache, which its adapter keeps alive."""
_adapters_lock = threading.RLock()


def _got(value: Any) -> str:
    return f"got the class {value.__name__}" if isinstance(value, type) else f"got a {type(value).__name__}"


def _slices(keys: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(keys), SLICE):
        yield keys[start : start + SLICE]

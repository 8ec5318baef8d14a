"""An aiocache cache's connections: for each event loop its own, and each used by one call at a time.

A client belongs to the loop that it was first used on. And a call that is cancelled half-way may leave its answer on
the line for whoever comes next (memcached's client does); so a connection whose call did not come to its end is closed.
"""

from __future__ import annotations

import asyncio
import copy
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import anyio

MOST = 16
"""Connections for one event loop, if the cache's own pool allows as many."""
CLOSING_S = 1.0
"""How long one may take to close."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What differs between the caches that aiocache has."""

    shared: bool = True
    """Whether others can write there: not so for the memory of this process."""
    key_bytes: int | None = None
    value_bytes: int | None = None
    """The longest key and the largest value that the server takes."""
    connections: int = MOST
    client: Callable[[Any], Any] | None = None
    """Makes another client of a cache's server; None where there are none, or nothing is known of them."""
    close: Callable[[Any], Awaitable[None]] | None = None
    """Closes such a client."""
    get_options: Mapping[str, Any] = field(default_factory=dict)
    set_options: Mapping[str, Any] = field(default_factory=dict)


def kind_of(cache: Any) -> Kind:
    """Tell which kind of cache this is."""
    ancestors = {f"{each.__module__}.{each.__name__}" for each in type(cache).__mro__}
    if "aiocache.backends.memory.SimpleMemoryBackend" in ancestors:
        return Kind(shared=False, get_options={"loads_fn": _same}, set_options={"dumps_fn": _same})
    if "aiocache.backends.redis.RedisBackend" in ancestors and hasattr(cache.client, "connection_pool"):
        most = min(cache.client.connection_pool.max_connections, MOST)
        return Kind(value_bytes=512 << 20, connections=most, client=_redis_client, close=_close_redis)
    if "aiocache.backends.memcached.MemcachedBackend" in ancestors:
        # A server's limit is 1 MiB unless it was started with another, for a value with its key and the overhead.
        return Kind(
            key_bytes=250,
            value_bytes=1_000_000,
            connections=cache.pool_size,
            client=_memcached_client,
            close=_close_memcached,
        )
    return Kind()


def _same(value: Any) -> Any:
    return value


def _redis_client(cache: Any) -> Any:
    from redis.asyncio import Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff
    from redis.exceptions import ConnectionError as RedisConnectionError

    pool = cache.client.connection_pool
    # One connection, which is made anew when the server has closed it. Not tried again after a pause: if the server
    # is down, the run goes on without it.
    at_once = {"retry": Retry(NoBackoff(), 1), "retry_on_error": [RedisConnectionError]}
    options = {**pool.connection_kwargs, **at_once}
    return Redis(connection_pool=type(pool)(connection_class=pool.connection_class, max_connections=1, **options))


def _memcached_client(cache: Any) -> Any:
    return type(cache.client)(cache.endpoint, cache.port, pool_size=1, conn_args=cache.client._pool.conn_args)


async def _close_redis(client: Any) -> None:
    await client.connection_pool.disconnect()


async def _close_memcached(client: Any) -> None:
    await client.close()
    await asyncio.sleep(0)  # its transport closes in the loop's next turn


class Connections:
    """The connections of one cache in this process."""

    def __init__(self, cache: Any, kind: Kind) -> None:
        self._cache = cache
        self._kind = kind
        self._pools: dict[asyncio.AbstractEventLoop, _Pool] = {}

    @asynccontextmanager
    async def one(self) -> AsyncIterator[Any]:
        """Have a connection of this event loop, as an aiocache cache: waits while all are in use."""
        if not self._kind.shared:
            yield self._cache
            return
        pool = await self._pool()
        async with pool.tokens:
            connection = pool.free.pop() if pool.free else self._connect()
            try:
                yield connection
            except BaseException:
                await _close(connection, self._kind)
                raise
            pool.free.append(connection)

    async def aclose(self) -> None:
        """Close the connections of this event loop that are not in use."""
        pool = self._pools.get(asyncio.get_running_loop())
        if pool is not None:
            await pool.keeper.aclose()

    async def _pool(self) -> _Pool:
        loop = asyncio.get_running_loop()
        pool = self._pools.get(loop)
        if pool is None:
            free: list[Any] = []
            keeper = _closing(free, self._kind, weakref.WeakMethod(self._forget), loop)
            await anext(keeper)
            # Held from outside: collected as garbage together with the store, connections could not be closed.
            weakref.finalize(self, _let_go, keeper).atexit = False
            pool = self._pools[loop] = _Pool(asyncio.Semaphore(self._kind.connections), free, keeper)
        return pool

    def _forget(self, ended: asyncio.AbstractEventLoop) -> None:
        # Also those that were closed with generators left open.
        for loop in [each for each in list(self._pools) if each is ended or each.is_closed()]:
            self._pools.pop(loop, None)

    def _connect(self) -> Any:
        from aiocache.serializers import NullSerializer

        connection = copy.copy(self._cache)
        # What the user's serializer would make of our bytes, or of an attacker's, nobody wants to know.
        connection.serializer = NullSerializer(encoding=None)
        if self._kind.client is not None:
            connection.client = self._kind.client(self._cache)
        return connection


@dataclass(frozen=True, slots=True)
class _Pool:
    """The connections of one event loop."""

    tokens: asyncio.Semaphore
    free: list[Any]
    keeper: AsyncGenerator[None, None]


async def _closing(
    free: list[Any],
    kind: Kind,
    forget: weakref.WeakMethod[Callable[[asyncio.AbstractEventLoop], None]],
    loop: asyncio.AbstractEventLoop,
) -> AsyncGenerator[None, None]:
    """Close a loop's connections when the loop ends, or when nobody has them any more.

    An event loop closes the generators that began on it before it ends, and one that is let go of. This one refers to
    neither the store nor the pool, so that it does not keep them.
    """
    try:
        yield
    finally:
        forgotten = forget()
        if forgotten is not None:
            forgotten(loop)
        while free:
            await _close(free.pop(), kind)


def _let_go(keeper: AsyncGenerator[None, None]) -> None:
    """Have the last reference to a generator, and lose it."""


async def _close(connection: Any, kind: Kind) -> None:
    if kind.close is not None:
        with anyio.move_on_after(CLOSING_S, shield=True), suppress(Exception):
            await kind.close(connection.client)

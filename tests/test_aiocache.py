"""aiocache caches as stores: memory, Redis and memcached, also when they are down, frozen or written by others."""

import asyncio
import gc
import hashlib
import logging
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import aiocache
import anyio
import anyio.to_thread
import pytest
import redis
from aiocache import MemcachedCache, RedisCache, SimpleMemoryCache
from aiocache.plugins import BasePlugin
from aiocache.serializers import JsonSerializer, PickleSerializer, StringSerializer
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff

from hypernodes import CacheError, DefinitionError, DiskCache, Pipeline, node
from hypernodes.cache import AiocacheStore, _guard
from hypernodes.cache._aiocache import PREFIX, SLICE, as_store
from hypernodes.cache._connections import MOST
from hypernodes.cache._guard import guard_of

PATIENCE_S = 20  # only a hang takes this long
KINDS = ["memory", "redis", "memcached"]

on_asyncio = pytest.mark.parametrize(
    "anyio_backend",
    [pytest.param(("asyncio", {}), id="asyncio"), pytest.param(("asyncio", {"use_uvloop": True}), id="asyncio+uvloop")],
)
pytestmark = pytest.mark.usefixtures("no_leaks")


def key(of):
    return hashlib.sha256(repr(of).encode()).hexdigest()


def connected(kind, port, **options):
    """An aiocache cache, as a user makes one."""
    if kind == "memory":
        return SimpleMemoryCache(**options)
    return {"redis": RedisCache, "memcached": MemcachedCache}[kind](port=port, **options)


@pytest.fixture(scope="module", autouse=True)
def _running(servers):
    servers.start_installed()


@pytest.fixture
def shared(servers, tmp_path):
    """Makes caches on the session's servers, in a namespace of the test's own."""

    def make(kind, **options):
        port = None if kind == "memory" else servers.port(kind)
        options.setdefault("namespace", key(str(tmp_path))[:16])
        return connected(kind, port, **options)

    return make


@pytest.fixture
def log(caplog):
    """The levels and texts that were logged."""
    caplog.set_level(logging.INFO, "hypernodes")
    return lambda: [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "hypernodes"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Breakers that open for a moment only, and warnings for every outage."""
    monkeypatch.setattr(_guard, "OPEN_S", 0.05)
    monkeypatch.setattr(_guard, "LONGEST_OPEN_S", 0.1)
    monkeypatch.setattr(_guard, "QUIET_S", 0.0)
    monkeypatch.delenv("HYPERNODES_CACHE_KEY", raising=False)


# --- what the cache's own options do ----------------------------------------------------------------------


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@on_asyncio
@pytest.mark.anyio
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("serializer", [PickleSerializer, JsonSerializer, StringSerializer])
async def test_the_serializer_is_not_used(shared, kind, serializer, tmp_path, monkeypatch):
    """Neither for what is stored nor for what an attacker has put there; and the user's cache keeps its own."""
    cache = shared(kind, serializer=serializer())
    used = []
    for name in "dumps", "loads":
        monkeypatch.setattr(serializer, name, lambda self, value: used.append(value))
    store = AiocacheStore(cache, unsigned=True)
    sprung = tmp_path / "sprung"
    await store.set_many({key(1): b"\xff\x00\xfe", key(2): pickle.dumps(Trap(sprung))})
    found = await store.get_many([key(1), key(2)])
    alone = await store.get_many([key(2)])
    await store.aclose()
    assert found == {key(1): b"\xff\x00\xfe", key(2): pickle.dumps(Trap(sprung))}
    assert alone == {key(2): found[key(2)]}
    assert not sprung.exists()
    assert used == []
    assert type(cache.serializer) is serializer


@on_asyncio
@pytest.mark.anyio
@pytest.mark.parametrize("kind", KINDS)
async def test_what_is_no_bytes_is_not_there(shared, kind):
    """None, or what others have put under a key, counts as missing."""
    cache = shared(kind, serializer=aiocache.serializers.NullSerializer(encoding=None))
    if kind == "memory":
        await cache.set(PREFIX + key(1), ["a list"])
        await cache.set(PREFIX + key(2), None)
    store = AiocacheStore(cache, unsigned=True)
    await store.set_many({key(3): b""})
    assert await store.get_many([key(1), key(2), key(3)]) == {key(3): b""}
    assert await store.get_many([key(1)]) == {}
    await store.aclose()


@on_asyncio
@pytest.mark.anyio
async def test_namespace_and_ttl_are_the_users(shared, servers):
    """Keys are in the user's namespace, say whose they are, and live as long as the user wants."""
    cache = shared("redis", namespace="team", ttl=100)
    store = AiocacheStore(cache, unsigned=True)
    await store.set_many({key("ttl"): b"1"})
    name = f"team:hypernodes:{key('ttl')}"
    assert await cache.client.get(name) == b"1"
    assert 0 < await cache.client.ttl(name) <= 100
    await cache.client.delete(name)
    await store.aclose()
    await cache.client.connection_pool.disconnect()


@on_asyncio
@pytest.mark.anyio
async def test_plugins_are_called(shared):
    """The user's plugins see each operation."""
    seen = []

    class Watch(BasePlugin):
        async def post_set(self, client, key, *args, **kwargs):
            seen.append(("set", key))

        async def post_multi_get(self, client, keys, *args, **kwargs):
            seen.append(("multi_get", len(keys)))

    store = AiocacheStore(shared("redis", plugins=[Watch()]), unsigned=True)
    await store.set_many({key(1): b"1"})
    await store.get_many([key(1), key(2)])
    await store.aclose()
    assert seen == [("set", PREFIX + key(1)), ("multi_get", 2)]


@on_asyncio
@pytest.mark.anyio
async def test_a_timeout_of_the_cache_is_the_deadline(own_server, log):
    """The user's `timeout` is how long a run waits for a frozen server."""
    server = own_server("redis")
    assert AiocacheStore(connected("redis", server.port, timeout=None), unsigned=True).deadline_s is None
    store = AiocacheStore(connected("redis", server.port, timeout=0.1), unsigned=True)
    server.freeze()
    with anyio.fail_after(2):
        assert await guard_of(store).get_many([key(1)]) == {}
    assert "no answer in time" in log()[0][1]
    await store.aclose()


@on_asyncio
@pytest.mark.anyio
async def test_a_class_of_the_users_own(shared):
    """Any subclass of aiocache's base class works, with its own client."""

    class Mine(aiocache.base.BaseCache):
        def __init__(self, **options):
            super().__init__(serializer=PickleSerializer(), **options)
            self.held = {}

        async def _get(self, key, encoding="utf-8", _conn=None):
            assert encoding is None
            return self.held.get(key)

        async def _multi_get(self, keys, encoding="utf-8", _conn=None):
            return [self.held.get(key) for key in keys]

        async def _set(self, key, value, ttl=None, _cas_token=None, _conn=None):
            self.held[key] = value
            return True

    mine = Mine()
    store = AiocacheStore(mine, key=b"secret")
    await store.set_many({key(n): b"%d" % n for n in range(30)})
    assert await store.get_many([key(n) for n in range(30)]) == {key(n): b"%d" % n for n in range(30)}
    assert mine.held[PREFIX + key(1)] == b"1"
    with pytest.raises(CacheError, match="others may write"):
        AiocacheStore(mine)


@on_asyncio
@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["redis", "memcached"])
async def test_switched_off_it_has_nothing(shared, kind, monkeypatch):
    """With AIOCACHE_DISABLE=1 there is nothing, and nothing goes wrong."""
    store = AiocacheStore(shared(kind), unsigned=True)
    await store.set_many({key(1): b"1", key(2): b"2"})
    monkeypatch.setenv("AIOCACHE_DISABLE", "1")
    await store.set_many({key(3): b"3"})
    assert await store.get_many([key(1), key(2)]) == {}
    assert await store.get_many([key(1)]) == {}
    monkeypatch.delenv("AIOCACHE_DISABLE")
    assert await store.get_many([key(1), key(3)]) == {key(1): b"1"}
    await store.aclose()


# --- keys and trust ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["redis", "memcached"])
def test_a_shared_server_needs_a_key(kind, monkeypatch):
    """Given, in the environment, or expressly none."""
    cache = connected(kind, 1)
    with pytest.raises(CacheError, match=r"HYPERNODES_CACHE_KEY.*unsigned=True"):
        AiocacheStore(cache)
    with pytest.raises(CacheError, match="HYPERNODES_CACHE_KEY"):
        as_store(cache)
    assert AiocacheStore(cache, unsigned=True).key is None
    assert AiocacheStore(cache, key=b"given").key == b"given"
    monkeypatch.setenv("HYPERNODES_CACHE_KEY", "from outside")
    assert AiocacheStore(cache).key == b"from outside"
    assert AiocacheStore(cache, key=b"given").key == b"given"
    assert AiocacheStore(cache, unsigned=True).key is None
    with pytest.raises(DefinitionError, match="unsigned"):
        AiocacheStore(cache, key=b"given", unsigned=True)


def test_memory_needs_no_key(monkeypatch):
    """Nobody else writes in this process's memory, whatever the environment says."""
    monkeypatch.setenv("HYPERNODES_CACHE_KEY", "from outside")
    assert AiocacheStore(SimpleMemoryCache()).key is None
    assert AiocacheStore(SimpleMemoryCache(), key=b"given").key == b"given"


def test_its_repr_tells_the_place_and_no_secret():
    """A log line shows the server, not the key nor the password."""
    cache = RedisCache(endpoint="cache.local", port=7000, password="hidden")
    assert repr(AiocacheStore(cache, key=b"hidden")) == "AiocacheStore(RedisCache cache.local:7000, key=...)"
    assert repr(AiocacheStore(SimpleMemoryCache())) == "AiocacheStore(SimpleMemoryCache)"


def test_a_namespace_too_long_for_memcached_is_refused():
    """At once, since the server would refuse every key."""
    AiocacheStore(MemcachedCache(namespace="n" * 150), unsigned=True)
    with pytest.raises(CacheError, match=r"250.*shorter namespace"):
        AiocacheStore(MemcachedCache(namespace="n" * 200), unsigned=True)


@on_asyncio
@pytest.mark.anyio
async def test_entries_of_others_in_redis_are_never_run(shared, tmp_path, monkeypatch):
    """Tampered, swapped, foreign and planted entries: the node computes again, and nothing is unpickled."""
    monkeypatch.setenv("HYPERNODES_CACHE_KEY", "secret")
    cache = shared("redis")
    calls = []

    @node("y")
    def double(x):
        calls.append(x)
        return [x, x]

    pipeline = Pipeline([double], cache=cache)
    for x in range(4):
        assert await pipeline.arun(x=x) == {"y": [x, x]}
    client = cache.client
    names = [name async for name in client.scan_iter(f"{cache.namespace}:*")]
    entries = {}
    for name in names:
        value = await client.get(name)
        if b"ledger-" not in name:
            entries[name] = value
    assert len(entries) == 4
    for x in range(4):
        assert await pipeline.arun(x=x) == {"y": [x, x]}
    assert sorted(calls) == [0, 1, 2, 3]
    sprung = tmp_path / "sprung"
    first, second, third, fourth = entries
    planted = {
        first: entries[second],  # another entry, signed with the key
        second: pickle.dumps(Trap(sprung)),
        third: entries[third][:-1] + bytes([entries[third][-1] ^ 1]),
        fourth: entries[fourth].replace(entries[fourth][40:60], pickle.dumps(Trap(sprung))[:20]),
    }
    for name, value in planted.items():
        await client.set(name, value)
    calls.clear()
    for x in range(4):
        assert await pipeline.with_cache(AiocacheStore(cache, key=b"another")).arun(x=x) == {"y": [x, x]}
    assert sorted(calls) == [0, 1, 2, 3]
    for name, value in planted.items():
        await client.set(name, value)
    calls.clear()
    for x in range(4):
        assert await pipeline.arun(x=x) == {"y": [x, x]}
    assert sorted(calls) == [0, 1, 2, 3]
    assert not sprung.exists()
    await as_store(cache).aclose()
    await client.delete(*names)
    await client.connection_pool.disconnect()


# --- servers that are down, frozen, full ------------------------------------------------------------------


@on_asyncio
@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["redis", "memcached"])
async def test_a_server_that_was_killed_and_comes_back(own_server, log, kind):
    """Killed while it is in use, it costs misses and one warning; when it is back, caching resumes."""
    server = own_server(kind)
    store = AiocacheStore(connected(kind, server.port), unsigned=True)
    guard = guard_of(store)
    entries = {key(n): b"%d" % n for n in range(50)}
    assert await guard.set_many(entries)

    async def use():
        for n in range(200):
            found = await guard.get_many([key(n % 50)])
            assert found in ({}, {key(n % 50): entries[key(n % 50)]})
            await anyio.sleep(0)

    with anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(use)
            await anyio.sleep(0.02)
            await anyio.to_thread.run_sync(server.stop)
        assert await guard.get_many([key(1)]) == {}
        await guard.set_many(entries)
        assert [level for level, _ in log()] == ["WARNING"]
        assert f":{server.port}" in log()[0][1]
        await anyio.to_thread.run_sync(server.start)
        while not await guard.set_many(entries):
            await anyio.sleep(0.01)
        while await guard.get_many(list(entries)) != entries:
            await anyio.sleep(0.01)
    assert [level for level, _ in log()] == ["WARNING", "INFO"]
    await store.aclose()


@on_asyncio
@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["redis", "memcached"])
async def test_a_server_that_is_frozen_and_thaws(own_server, log, kind):
    """It costs one deadline, however many calls there are, and is used again when it answers."""
    server = own_server(kind)
    store = AiocacheStore(connected(kind, server.port, timeout=0.3), unsigned=True)
    guard = guard_of(store)
    entries = {key(n): b"%d" % n for n in range(50)}
    assert await guard.set_many(entries)
    server.freeze()
    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            for n in range(50):
                tasks.start_soon(guard.get_many, [key(n)])
            tasks.start_soon(guard.set_many, entries)
    assert guard.health.missed == 50
    assert [level for level, _ in log()] == ["WARNING"]
    server.thaw()
    with anyio.fail_after(PATIENCE_S):
        while not await guard.set_many(entries):
            await anyio.sleep(0.01)
        while await guard.get_many(list(entries)) != entries:
            await anyio.sleep(0.01)
    assert [level for level, _ in log()] == ["WARNING", "INFO"]
    await store.aclose()


@on_asyncio
@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["redis", "memcached"])
async def test_a_restart_between_two_calls_is_not_noticed(own_server, log, kind):
    """A connection that the server has closed meanwhile is made anew, without a miss or a warning."""
    server = own_server(kind)
    store = AiocacheStore(connected(kind, server.port), unsigned=True)
    guard = guard_of(store)
    for turn in range(3):
        assert await guard.set_many({key(turn): b"1"})
        assert await guard.get_many([key(turn)]) == {key(turn): b"1"}
        await anyio.to_thread.run_sync(server.stop)
        await anyio.to_thread.run_sync(server.start)
    assert log() == []
    await store.aclose()


@on_asyncio
@pytest.mark.anyio
async def test_redis_is_not_tried_for_long(own_server):
    """The user's own policy of trying again, with its pauses, is not for what a run can go on without."""
    slow = Retry(ConstantBackoff(PATIENCE_S), 3)
    server = own_server("redis")
    store = AiocacheStore(connected("redis", server.port, connection_pool_kwargs={"retry": slow}), unsigned=True)
    server.stop()
    with anyio.fail_after(2), pytest.raises(redis.ConnectionError):
        await store.get_many([key(1)])
    await store.aclose()


@on_asyncio
@pytest.mark.anyio
async def test_a_run_goes_on_while_redis_is_killed(own_server, log):
    """A map of a thousand items loses its Redis half-way: all are right, with one warning."""
    server = own_server("redis")
    store = AiocacheStore(connected("redis", server.port), key=b"secret")

    @node("y")
    async def double(x):
        if x == 500:
            await anyio.to_thread.run_sync(server.stop)
        await anyio.sleep(0)
        return 2 * x

    pipeline = Pipeline([double], cache=store)
    with anyio.fail_after(PATIENCE_S):
        result = await pipeline.amap({"x": list(range(1000))}, "x", max_concurrency=10)
    assert result["y"] == [2 * x for x in range(1000)]
    assert [level for level, _ in log()] == ["WARNING"]
    await store.aclose()


@on_asyncio
@pytest.mark.anyio
@pytest.mark.parametrize(("kind", "options"), [("redis", {"pool_max_size": 2}), ("redis", {}), ("memcached", {})])
async def test_five_hundred_at_once_on_a_small_pool(shared, kind, options):
    """They take turns; no more connections are made than the user's pool allows."""
    cache = shared(kind, **options)
    store = AiocacheStore(cache, unsigned=True)
    entries = {key(n): b"%d" % n for n in range(500)}
    await store.set_many(entries)
    found = {}

    async def get(one):
        found.update(await store.get_many([one]))

    async with anyio.create_task_group() as tasks:
        for one in entries:
            tasks.start_soon(get, one)
    assert found == entries
    pool = store._connections._pools[asyncio.get_running_loop()]
    assert 1 <= len(pool.free) <= {"redis": options.get("pool_max_size", MOST), "memcached": 2}[kind]
    await store.aclose()


@on_asyncio
@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["redis", "memcached"])
async def test_a_cancelled_call_never_answers_another(shared, kind):
    """An answer that comes too late for its own call is not taken for that of the next one."""
    store = AiocacheStore(shared(kind), unsigned=True)
    entries = {key(n): b"%d" % n for n in range(50)}
    await store.set_many(entries)
    cancelled = 0
    for n in range(400):
        task = asyncio.create_task(store.get_many([key(n % 50)]))
        for _ in range(n % 8):
            await anyio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        cancelled += task.cancelled()
        other = (n + 7) % 50
        assert await store.get_many([key(other)]) == {key(other): entries[key(other)]}
    assert cancelled > 20
    await store.aclose()


@on_asyncio
@pytest.mark.anyio
async def test_a_value_too_large_for_memcached_is_left_out(shared, log):
    """With one warning; the others of its batch are stored, and the store counts as well."""
    store = AiocacheStore(shared("memcached"), unsigned=True)
    guard = guard_of(store)
    large = bytes(3_000_000)
    assert await guard.set_many({key("large"): large, key("small"): b"1"})
    assert await guard.set_many({key("larger"): [large, large]})
    assert await store.get_many([key("large"), key("larger"), key("small")]) == {key("small"): b"1"}
    [(level, line)] = log()
    assert level == "WARNING"
    assert "1.0 MB at most: a result of 3.0 MB is not kept" in line
    await store.aclose()


@on_asyncio
@pytest.mark.anyio
async def test_batches_go_in_slices(shared, monkeypatch):
    """Two thousand keys are asked for in requests of a hundred."""
    asked = []

    class Watch(BasePlugin):
        async def pre_multi_get(self, client, keys, *args, **kwargs):
            asked.append(len(keys))

    store = AiocacheStore(shared("redis", plugins=[Watch()]), unsigned=True)
    assert await store.get_many([key(n) for n in range(2000)]) == {}
    assert asked == [SLICE] * (2000 // SLICE)
    await store.aclose()


# --- event loops ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_uvloop", [False, True])
def test_one_event_loop_after_another(shared, kind, use_uvloop):
    """Each has connections of its own, which are closed with it."""
    store = AiocacheStore(shared(kind), unsigned=True)

    async def use(turn):
        await store.set_many({key((turn, n)): b"%d" % n for n in range(20)})
        everything = [key((earlier, n)) for earlier in range(turn + 1) for n in range(20)]
        assert len(await store.get_many(everything)) == 20 * (turn + 1)

    for turn in range(3):
        anyio.run(use, turn, backend_options={"use_uvloop": use_uvloop})
        assert store._connections._pools == {}


@pytest.mark.parametrize("kind", KINDS)
def test_event_loops_at_the_same_time(shared, kind):
    """Loops in several threads use one store."""
    store = AiocacheStore(shared(kind), unsigned=True)
    wrong = []

    async def use(thread):
        entries = {key((thread, n)): b"%d" % n for n in range(50)}
        await store.set_many(entries)
        for one, value in entries.items():
            if await store.get_many([one]) != {one: value}:
                wrong.append(one)

    threads = [threading.Thread(target=anyio.run, args=[use, number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert wrong == []
    assert store._connections._pools == {}


def test_the_users_own_use_goes_on(shared):
    """The cache may be used, closed and used by its owner on one loop, while runs use it on others."""
    cache = shared("redis", serializer=JsonSerializer())
    store = AiocacheStore(cache, unsigned=True)

    async def owner():
        await cache.set("mine", {"a": 1})
        await anyio.to_thread.run_sync(lambda: anyio.run(store.set_many, {key(1): b"1"}))
        await store.set_many({key(2): b"2"})
        assert await cache.get("mine") == {"a": 1}
        assert await store.get_many([key(1), key(2)]) == {key(1): b"1", key(2): b"2"}
        await cache.client.connection_pool.disconnect()
        assert await store.get_many([key(1)]) == {key(1): b"1"}

    anyio.run(owner)


def test_a_store_that_is_dropped_closes_its_connections(shared):
    """Also while its loop goes on: no socket outlives it."""

    async def main():
        store = AiocacheStore(shared("redis"), unsigned=True)
        await store.set_many({key(1): b"1"})
        sockets = count_sockets()
        del store
        gc.collect()
        with anyio.fail_after(PATIENCE_S):
            while count_sockets() >= sockets:
                await anyio.sleep(0.01)

    def count_sockets():
        links = []
        for descriptor in os.listdir("/dev/fd"):
            try:
                links.append(os.readlink(f"/dev/fd/{descriptor}"))
            except OSError:
                continue
        return sum(link.startswith("socket:") for link in links)

    anyio.run(main)


@pytest.mark.parametrize("kind", KINDS)
def test_on_trio_it_says_so_at_the_start(kind):
    """A clear error before anything runs."""
    ran = []

    @node("y")
    def double(x):
        ran.append(x)

    pipeline = Pipeline([double], cache=AiocacheStore(connected(kind, 1), key=b"secret"))
    with pytest.raises(CacheError, match=r"asyncio only.*DiskCache"):
        anyio.run(lambda: pipeline.arun(x=1), backend="trio")
    assert ran == []


# --- what cache= takes ------------------------------------------------------------------------------------


class Own:
    """A store of the user's own."""

    def __init__(self, key=None):
        self.key = key

    async def get_many(self, keys):
        return {}

    async def set_many(self, entries):
        pass


def test_cache_takes_stores(tmp_path):
    """A directory, an adapter, and an object with the two methods are taken as they are."""
    for store in DiskCache(tmp_path / "cache"), AiocacheStore(SimpleMemoryCache()), Own(), Own(b"key"):
        assert as_store(store) is store


def test_cache_takes_a_bare_aiocache_cache():
    """It is adapted once, so that all pipelines with it know the same."""
    cache = SimpleMemoryCache()
    store = as_store(cache)
    assert isinstance(store, AiocacheStore)
    assert store.cache is cache
    assert as_store(cache) is store
    assert as_store(SimpleMemoryCache()) is not store


@pytest.mark.parametrize(
    ("given", "taught"),
    [
        ("results", r"write DiskCache\('results'\)"),
        (Path("results"), r"write DiskCache\('results'\)"),
        (DiskCache, r"not a class: write DiskCache\(...\)"),
        (SimpleMemoryCache, r"write SimpleMemoryCache\(...\)"),
        (Own, r"write Own\(...\)"),
        ({}, "got a dict, which has no get_many and no set_many"),
        (True, "got a bool"),
        (Own("text"), "bytes or None.*Own is a str"),
    ],
    ids=["str", "path", "DiskCache", "aiocache class", "own class", "dict", "bool", "key of text"],
)
def test_anything_else_is_an_error_that_teaches(given, taught):
    """What is meant by it is said."""
    with pytest.raises(DefinitionError, match=taught):
        as_store(given)


def test_an_adapter_takes_aiocache_caches_only():
    """Not a class, nor a store."""
    for wrong in RedisCache, Own(), None:
        with pytest.raises(DefinitionError, match="takes an aiocache cache"):
            AiocacheStore(wrong)


def test_aiocache_is_imported_by_its_users_only(tmp_path):
    """Asking what `cache=` means does not import it."""
    code = (
        "import sys, hypernodes; from hypernodes.cache._aiocache import as_store\n"
        "as_store(hypernodes.DiskCache(sys.argv[1])); print('aiocache' in sys.modules, 'redis' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "cache"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]

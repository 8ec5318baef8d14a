"""Worker processes share a run's cache: what they make is found here, and what is made here is found there."""

import asyncio
import threading
import time
from pathlib import Path

import anyio
import psutil
import pytest

from hypernodes import DiskCache, Pipeline, node
from hypernodes.backend import LocalBackend
from hypernodes.events import ItemCached, NodeCached, NodeStored
from tests import _caching
from tests._caching import PATIENCE_S, Telling, of, opened, tally, watched

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

cache, ran, picky = _caching.cache, _caching.ran, _caching.picky  # pytest finds fixtures among a module's names

ROOT = Path(__file__).parent.parent


# ---- worker processes


def fourfold(ran):
    """A pipeline for every mode: three nodes, the middle one sync."""

    @node("a")
    async def first(x):
        ran.note("first", x)
        return Telling(str(x))

    @node("b")
    def second(a):
        ran.note("second", a.name)
        return a.name * 2

    @node("c")
    async def third(a, b):
        ran.note("third", b)
        return (a.name, b)

    return Pipeline([first, second, third], name="fourfold")


MODES = {
    "sequential": {"node_execution": "sequential", "map_execution": "sequential"},
    "async": {},
    "threaded": {"node_execution": "threaded", "map_execution": "threaded", "max_workers": 2},
    "parallel": {"map_execution": "parallel", "max_workers": 2},
    "parallel nodes": {"node_execution": "parallel", "max_workers": 2},
}


async def test_every_mode_finds_what_another_has_made(tmp_path, ran):
    """All modes give the same keys: each finds the entries of each other, nested or not, and runs nothing."""
    pipeline = fourfold(ran)
    nested = Pipeline([pipeline.as_node({"xs": "x"}, {"c": "cs"}, map_over="xs", name="every")], name="nested")
    stored = {}
    for made_by, options in MODES.items():
        cache = DiskCache(tmp_path / made_by)
        async with LocalBackend(**options) as backend:
            _, seen = await watched(nested.with_backend(backend).with_cache(cache), {"xs": [1, 2, 3]})
        assert tally(seen)["stored"] == 9
        assert len(ran.take()) == 9
        stored[made_by] = {(each.path[-2:], each.signature) for each in seen if type(each) is NodeStored}
    assert all(each == stored["async"] for each in stored.values())
    for used_by, options in MODES.items():
        async with LocalBackend(**options) as backend:
            for made_by in MODES:
                cache = opened(tmp_path / made_by)
                answer, seen = await watched(nested.with_backend(backend).with_cache(cache), {"xs": [1, 2, 3]})
                assert answer["cs"] == [("1", "11"), ("2", "22"), ("3", "33")]
                assert (await pipeline.with_backend(backend).with_cache(cache).amap({"x": [3, 1]}, "x"))["b"] == [
                    "33",
                    "11",
                ]
                assert ran.take() == [], (used_by, made_by)
                assert sorted(of(seen, ItemCached)) == ["every.0", "every.1", "every.2"], used_by
                assert len([path for path in of(seen, NodeCached) if path.count(".") == 2]) == 9


async def test_worker_processes_compute_only_what_is_missing(cache, ran):
    """A map in worker processes looks up its items there, and runs those that no one has made."""
    pipeline = fourfold(ran).with_cache(cache)
    await pipeline.amap({"x": range(10)}, "x")
    ran.take()
    async with LocalBackend(map_execution="parallel", max_workers=2) as backend:
        parallel = pipeline.with_backend(backend)
        made = await parallel.amap({"x": range(12)}, "x")
        assert made["b"] == [str(x) * 2 for x in range(12)]
        assert ran.take() == ["first 10", "first 11", "second 10", "second 11", "third 1010", "third 1111"]
        assert (await parallel.amap({"x": [11]}, "x", refresh=["b"]))["b"] == ["1111"]
        assert ran.take() == ["second 11", "third 1111"]
        assert await parallel.amap({"x": range(12)}, "x") == made
    assert (await pipeline.amap({"x": range(12)}, "x"))["c"] == made["c"]
    assert ran.take() == []


async def test_failures_in_worker_processes_keep_successes(picky, cache, ran):
    """What other items have made in worker processes is kept when one fails, or when all is collected."""
    pipeline, mended = picky
    async with LocalBackend(map_execution="parallel", max_workers=2) as backend:
        cached = pipeline.with_cache(cache).with_backend(backend)
        result = await cached.amap({"x": range(6)}, "x", on_error="collect")
        assert [each.index for each in sorted(result.failures, key=lambda each: each.index)] == [1, 3, 5]
        ran.take()
        mended.touch()
        assert (await cached.amap({"x": range(6)}, "x"))["doubled"] == [0, 2, 4, 6, 8, 10]
    assert ran.take() == ["double 1", "double 3", "double 5"]


async def test_a_nested_map_in_worker_processes_feeds_what_follows(cache, ran):
    """What comes after a map in worker processes hits when the map does, and runs when one item is new."""

    @node("total")
    async def add(cs):
        ran.note("add")
        return len(cs)

    every = fourfold(ran).as_node({"xs": "x"}, {"c": "cs"}, map_over="xs", name="every")
    pipeline = Pipeline([every, add]).with_cache(cache)
    async with LocalBackend(map_execution="parallel", max_workers=2) as backend:
        assert await pipeline.with_backend(backend).arun(xs=[1, 2], output_name="total") == 2
        ran.take()
        assert await pipeline.arun(xs=[1, 2], output_name="total") == 2
        assert ran.take() == []
        assert await pipeline.arun(xs=[1, 2, 3], output_name="total") == 3
        assert ran.take() == ["add", "first 3", "second 3", "third 33"]
        assert await pipeline.with_backend(backend).arun(xs=[1, 2, 3], output_name="total") == 3
        assert ran.take() == []


async def test_functions_in_worker_processes_are_looked_up_first(cache, ran):
    """With node_execution="parallel" a hit needs no worker process, and a result comes back to be stored here."""
    pipeline = fourfold(ran).with_cache(cache)
    backend = LocalBackend(node_execution="parallel", max_workers=1)
    first = await pipeline.with_backend(backend).arun(x=1)
    assert len(ran.take()) == 3
    assert await pipeline.arun(x=1) == first
    assert await pipeline.with_backend(backend).arun(x=1) == first
    assert ran.take() == []


async def test_what_worker_processes_have_made_is_found_at_once(cache, ran):
    """A run that follows at once on one in worker processes finds small results of theirs, and large ones."""

    @node("large")
    async def make(x):
        ran.note(x)
        return bytes(200_000 if x % 2 else 10) + bytes([x])

    pipeline = Pipeline([make]).with_cache(cache)
    async with LocalBackend(map_execution="parallel", max_workers=2) as backend:
        for x in range(6):
            there = await pipeline.with_backend(backend).amap({"x": [x, x + 100]}, "x")
            assert ran.take() == sorted([str(x), str(x + 100)])
            assert await pipeline.amap({"x": [x, x + 100]}, "x") == there
            assert ran.take() == []


async def test_worker_processes_write_as_they_go_along(cache, ran):
    """What items of a chunk have made is on disk after about a second, while others of the same chunk go on."""

    @node("y")
    async def work(x):
        ran.note(x)
        await anyio.sleep(PATIENCE_S if x == 3 else 0)
        return x

    backend = LocalBackend(map_execution="parallel", max_workers=1)
    pipeline = Pipeline([work], backend=backend).with_cache(cache)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: pipeline.amap({"x": range(8)}, "x"))
        with anyio.fail_after(PATIENCE_S):
            while opened(cache.path).stats().entries < 7:
                await anyio.sleep(0.02)
        tasks.cancel_scope.cancel()
    assert ran.take() == [str(x) for x in range(8)]


class SlowToWrite(DiskCache):
    """A cache whose disk takes its time, and which says when it is written to."""

    begun = threading.Event()

    def write(self, entries):
        """Keep entries, at leisure."""
        self.begun.set()
        time.sleep(0.3)
        super().write(entries)


async def test_cancelled_while_it_writes_what_is_left(tmp_path, anyio_backend):
    """asyncio's task.cancel() during a run's last write leaves no worker process behind, and nothing unwritten."""
    if anyio_backend[0] != "asyncio":
        pytest.skip("asyncio's own")

    @node("doubled")
    def double(x):
        return 2 * x

    @node("total")
    def total(doubled):
        return sum(doubled)

    mapped = Pipeline([double], name="mapped").as_node(map_over="x")
    backend = LocalBackend(map_execution="parallel", max_workers=2)
    SlowToWrite.begun.clear()
    pipeline = Pipeline([mapped, total], cache=SlowToWrite(tmp_path / "cache"), backend=backend)
    task = asyncio.create_task(pipeline.arun(x=[1, 2, 3]))
    with anyio.fail_after(PATIENCE_S):
        while not SlowToWrite.begun.is_set():
            await anyio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert not psutil.Process().children()
    explained = await pipeline.with_cache(opened(tmp_path / "cache")).explain(x=[1, 2, 3])
    assert {each.status for each in explained} == {"hit"}

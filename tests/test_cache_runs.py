"""Runs with a cache that fail, are stopped, run at once, or recompute."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import anyio
import pytest

from hypernodes import DependencyError, Pipeline, node
from hypernodes.backend import LocalBackend
from hypernodes.events import NodeCached, NodeStarted, NodeStored
from tests import _caching
from tests._caching import PATIENCE_S, Telling, in_order, of, opened, until, waiting, watched

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

cache, ran, picky = _caching.cache, _caching.ran, _caching.picky  # pytest finds fixtures among a module's names

ROOT = Path(__file__).parent.parent


# ---- failures


async def test_a_map_that_collects_failures_keeps_its_successes(picky, cache, ran):
    """A rerun runs what has failed, and that alone; failures are not kept."""
    pipeline, mended = picky
    cached = pipeline.with_cache(cache)
    first = await cached.amap({"x": range(6)}, "x", on_error="collect")
    assert first["doubled"] == [0, None, 4, None, 8, None]
    assert [each.index for each in first.failures] == [1, 3, 5]
    ran.take()
    again = await cached.amap({"x": range(6)}, "x", on_error="collect")
    assert [(each.index, str(each.error), each.inputs) for each in again.failures] == [
        (index, f"odd: {index}", {"x": index}) for index in (1, 3, 5)
    ]
    assert ran.take() == ["double 1", "double 3", "double 5"]
    mended.touch()
    assert (await cached.amap({"x": range(6)}, "x"))["doubled"] == [0, 2, 4, 6, 8, 10]
    assert ran.take() == ["double 1", "double 3", "double 5"]


async def test_what_follows_a_map_with_failures_is_cached_by_what_failed(picky, cache, ran):
    """A list with failed items is another input than the list without, for the node that reads it."""
    pipeline, mended = picky

    @node("total")
    async def add(doubled):
        ran.note("add")
        return sum(each or 0 for each in doubled)

    every = pipeline.as_node(map_over="x", on_error="collect", name="every")
    whole = Pipeline([every, add]).with_cache(cache)
    for _ in range(2):
        assert await whole.arun(x=[0, 1, 2], output_name="total") == 4
    assert ran.take().count("add") == 1
    mended.touch()
    for _ in range(2):
        assert await whole.arun(x=[0, 1, 2], output_name="total") == 6
    assert ran.take() == ["add", "double 1"]


async def test_a_list_with_a_failed_item_is_not_the_list_without_that_item(picky, cache):
    """The place of a failed item holds None, which is an item like others for what follows."""
    pipeline, _ = picky

    @node("count")
    async def count(doubled):
        return len(doubled)

    every = pipeline.as_node(map_over="x", on_error="collect", name="every")
    whole = Pipeline([every, count]).with_cache(cache)
    for x in ([0, 1, 2], [0, 2], [0, 1, 2], [1, 0, 2]):
        assert await whole.arun(x=x, output_name="count") == len(x)


@pytest.mark.parametrize("way", ["map", "stream", "nested"])
async def test_a_map_that_fails_keeps_its_successes(way, picky, cache, ran):
    """The first failure ends the map, and what was made before it is not made again."""
    pipeline, mended = picky
    cached = pipeline.with_cache(cache).with_backend(in_order)

    async def run():
        if way == "map":
            return (await cached.amap({"x": [0, 2, 4, 5, 6]}, "x"))["doubled"]
        if way == "nested":
            return await Pipeline([pipeline.as_node(map_over="x")], backend=in_order, cache=cache).arun(
                x=[0, 2, 4, 5, 6], output_name="doubled"
            )
        async with cached.astream({"x": iter([0, 2, 4, 5, 6])}, "x") as items:
            return [item.outputs["doubled"] async for item in items]

    with pytest.raises(ValueError, match="odd: 5"):
        await run()
    assert {"double 0", "double 2", "double 4", "check 5"} <= set(ran.take())
    mended.touch()
    cached = cached.with_cache(opened(cache.path))
    assert await run() == [0, 4, 8, 10, 12]
    assert ran.take() == ["check 6", "double 5", "double 6"]


async def test_a_cancelled_map_keeps_what_it_has_made(cache, ran):
    """What was finished when the run was cancelled is on disk by the time that it is over."""
    reached = anyio.Event()

    @node("y")
    async def work(x):
        ran.note(x)
        if x == 5 and not reached.is_set():
            reached.set()
            await anyio.sleep(PATIENCE_S)
        return x

    pipeline = Pipeline([work], backend=in_order).with_cache(cache)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: pipeline.amap({"x": range(8)}, "x"))
        await reached.wait()
        tasks.cancel_scope.cancel()
    assert ran.take() == ["0", "1", "2", "3", "4", "5"]
    assert await pipeline.with_cache(opened(cache.path)).amap({"x": range(8)}, "x") == {"y": list(range(8))}
    assert ran.take() == ["5", "6", "7"]


INTERRUPTED = """
    import asyncio, sys
    from pathlib import Path
    from hypernodes import DiskCache, Pipeline, node
    from hypernodes.backend import LocalBackend

    @node("y")
    async def work(x):
        print(x, flush=True)
        await asyncio.sleep(60 if x == int(Path("stop").read_text()) else 0.001)
        return x * 2

    if __name__ == "__main__":
        places = {
            "here": LocalBackend(map_execution="sequential"),
            "there": LocalBackend(map_execution="parallel", max_workers=1),
        }
        pipeline = Pipeline([work], backend=places[sys.argv[1]], cache=DiskCache("cache"))
        print(pipeline.map({"x": range(10)}, "x", max_concurrency=1)["y"])
"""


@pytest.mark.parametrize("where", ["here", "there"])
def test_ctrl_c_keeps_what_was_made(where, tmp_path):
    """After Ctrl-C in a script everything that was finished is found by the next run."""
    (tmp_path / "script.py").write_text(textwrap.dedent(INTERRUPTED))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "script.py", where]
    (tmp_path / "stop").write_text("7")
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert [int(process.stdout.readline()) for _ in range(8)] == list(range(8))
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE_S)
    assert process.returncode != 0
    (tmp_path / "stop").write_text("-1")
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert again.stdout.splitlines() == ["7", "8", "9", str([x * 2 for x in range(10)])]


async def test_a_long_run_writes_as_it_goes_along(cache, ran):
    """Results are on disk after about a second, while the run goes on."""
    go_on = anyio.Event()

    @node("y")
    async def work(x):
        ran.note(x)
        if x == 2:
            await go_on.wait()
        return x

    pipeline = Pipeline([work], backend=in_order).with_cache(cache)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: pipeline.amap({"x": range(3)}, "x"))
        with anyio.fail_after(PATIENCE_S):
            while opened(cache.path).stats().entries < 2:
                await anyio.sleep(0.02)
        assert ran.take() == ["0", "1", "2"]
        go_on.set()


class Slow:
    """A store in memory that lets writing wait."""

    def __init__(self):
        self.entries = {}
        self.writing, self.go_on = anyio.Event(), anyio.Event()

    async def get_many(self, keys):
        return {key: self.entries[key] for key in keys if key in self.entries}

    async def set_many(self, entries):
        self.writing.set()
        await self.go_on.wait()
        self.entries |= {
            key: entry if isinstance(entry, bytes) else b"".join(map(bytes, entry)) for key, entry in entries.items()
        }


async def test_what_is_being_written_is_found(ran):
    """While a store takes its time to write, other runs find what it has not written yet."""

    @node("y")
    async def work(x):
        ran.note(x)
        if x == 2:
            await finish.wait()
        return x

    store, finish = Slow(), anyio.Event()
    pipeline = Pipeline([work], backend=in_order).with_cache(store)
    with anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: pipeline.amap({"x": [1, 2]}, "x"))
            await store.writing.wait()
            assert await pipeline.amap({"x": [1, 1]}, "x") == {"y": [1, 1]}
            store.go_on.set()
            finish.set()
    assert ran.take() == ["1", "2"]


async def test_a_large_result_that_is_being_written_is_kept_when_the_run_is_cancelled():
    """Cancelling waits for a write that has begun: what was computed is not lost."""

    @node("y")
    async def work(x):
        return bytes(100_000)

    store, running = Slow(), anyio.CancelScope()
    pipeline = Pipeline([work]).with_cache(store)

    async def run():
        with running:
            await pipeline.arun(x=1)

    with anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run)
            await store.writing.wait()
            running.cancel()
            await anyio.wait_all_tasks_blocked()
            store.go_on.set()
    assert running.cancelled_caught
    assert (await pipeline.explain(x=1)).hits == 1


# ---- single-flight


async def test_equal_items_of_a_map_are_computed_once(cache, ran):
    """Items with equal inputs run once, whether they are side by side or far apart."""

    @node("y")
    async def work(x):
        ran.note(x)
        await anyio.sleep(0.01)
        return Telling(str(x))

    for backend in (LocalBackend(), in_order):
        cache.clear()
        made = await Pipeline([work], backend=backend).with_cache(cache).amap({"x": [1, 2, 1, 1, 2]}, "x")
        assert [each.name for each in made["y"]] == ["1", "2", "1", "1", "2"]
        assert ran.take() == ["1", "2"]


async def test_who_waited_for_an_equal_item_is_told_as_cached(cache):
    """One of several equal items is started and stored; the others are told as hits."""

    @node("y")
    async def work(x):
        await anyio.sleep(0.01)
        return x

    inner = Pipeline([work], name="inner").as_node({"xs": "x"}, {"y": "ys"}, map_over="xs")
    _, seen = await watched(Pipeline([inner]).with_cache(cache), {"xs": [1] * 5})
    assert len(of(seen, NodeStored)) == 1
    assert len([path for path in of(seen, NodeStarted) if path.endswith("work")]) == 1
    assert len([path for path in of(seen, NodeCached) if path.endswith("work")]) == 4


async def test_equal_items_give_values_that_are_not_one_object(cache):
    """As without a cache, what is done to one item's result does not show in another's."""

    @node("y")
    async def make(x):
        await anyio.sleep(0.001)
        return [x]

    pipeline = Pipeline([make]).with_cache(cache)
    for _ in range(2):
        made = (await pipeline.amap({"x": [1, 1, 1]}, "x"))["y"]
        made[0].append("changed")
        assert made[1:] == [[1], [1]]


async def test_runs_at_once_compute_what_they_share_once(cache, ran):
    """Several runs at the same time, in one loop: one computes, and each gets a value of its own."""

    go_on = anyio.Event()

    @node("y")
    async def work(x):
        ran.note(x)
        await go_on.wait()
        return [x]

    pipeline = Pipeline([work]).with_cache(cache)
    made = []

    async def run():
        made.append(await pipeline.arun(x=1, output_name="y"))

    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(run)
        await until(lambda: waiting() == 4)
        go_on.set()
    assert made == [[1]] * 5
    assert ran.take() == ["1"]
    made[0].append("changed")
    assert made[1:] == [[1]] * 4


def test_sync_runs_in_threads_compute_what_they_share_once(cache, ran):
    """The same over threads, each with a loop of its own."""
    count = 6
    go_on = threading.Event()

    @node("y")
    async def work(x):
        ran.note(x)
        while not go_on.is_set():
            await anyio.sleep(0.001)
        return [x]

    pipeline = Pipeline([work]).with_cache(cache)
    made = []

    def run():
        made.append(pipeline.map({"x": [1, 2]}, "x")["y"])

    threads = [threading.Thread(target=run) for _ in range(count)]
    for each in threads:
        each.start()
    try:
        anyio.run(until, lambda: waiting() == 2 * (count - 1))
    finally:
        go_on.set()
    for each in threads:
        each.join(PATIENCE_S)
    assert made == [[[1], [2]]] * count
    assert ran.take() == ["1", "2"]


async def test_when_the_leader_is_cancelled_another_run_computes(cache, ran):
    """A run that waits for another's node takes over when that one is cancelled."""
    started = anyio.Event()
    go_on = anyio.Event()

    @node("y")
    async def work(x):
        ran.note(x)
        started.set()
        await go_on.wait()
        return x

    pipeline = Pipeline([work]).with_cache(cache)
    leading = anyio.CancelScope()
    made = []

    async def lead():
        with leading:
            await pipeline.arun(x=1)

    async def follow():
        made.append(await pipeline.arun(x=1))

    with anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lead)
            await started.wait()
            tasks.start_soon(follow)
            await until(waiting)
            assert ran.take() == ["1"]
            leading.cancel()
            await until(lambda: ran.take() == ["1"])
            go_on.set()
    assert made == [{"y": 1}]
    assert ran.take() == []


async def test_when_the_leader_fails_those_who_wait_fail_with_it(cache, ran):
    """One failure for all who need the value at that time, each noting its own place; then it is tried again."""

    @node("y")
    async def work(x):
        ran.note(x)
        await anyio.sleep(0.02)
        raise KeyError("no such thing")

    pipeline = Pipeline([work], name="p").with_cache(cache)
    result = await pipeline.amap({"x": [1, 1, 1]}, "x", on_error="collect")
    assert ran.take() == ["1"]
    assert [(each.index, type(each.error)) for each in result.failures] == [(n, KeyError) for n in range(3)]
    with pytest.raises(KeyError) as raised:
        await pipeline.arun(x=1)
    assert any("p / work" in note for note in raised.value.__notes__)
    assert ran.take() == ["1"]


async def test_a_pipeline_that_a_cached_node_runs_may_be_cached_too(cache, ran):
    """A node whose function runs another cached pipeline, in the same run of the same cache, gets its result."""

    @node("inner")
    async def inner(x):
        ran.note("inner")
        return x + 1

    below = Pipeline([inner]).with_cache(cache)

    @node("outer")
    def outer(x):
        ran.note("outer")
        return below.run(x=x)["inner"] * 10

    pipeline = Pipeline([outer]).with_cache(cache)
    for _ in range(2):
        assert await pipeline.arun(x=1) == {"outer": 20}
    assert ran.take() == ["inner", "outer"]


# ---- refresh


@pytest.fixture
def drawn(ran):
    """Three nodes in a row and one beside them; each gives another value each time that it runs."""
    count = iter(range(1000))

    @node("a")
    async def a(x):
        ran.note("a")
        return next(count)

    @node("b")
    async def b(a):
        ran.note("b")
        return [a, next(count)]

    @node("c")
    async def c(b):
        ran.note("c")
        return [*b, next(count)]

    @node("d")
    async def d(x):
        ran.note("d")
        return next(count)

    return Pipeline([a, b, c, d], name="drawn")


async def test_refresh_recomputes_everything_and_stores_it(drawn, cache, ran):
    """With refresh=True every node runs, once; later runs find the new values."""
    pipeline = drawn.with_cache(cache)
    first = await pipeline.arun(x=1)
    ran.take()
    second = await pipeline.arun(x=1, refresh=True)
    assert ran.take() == ["a", "b", "c", "d"]
    assert second["d"] != first["d"]
    assert second["c"][:2] == second["b"]
    assert second["b"][0] == second["a"]
    assert await pipeline.with_cache(opened(cache.path)).arun(x=1) == second
    assert ran.take() == []


@pytest.mark.parametrize(("refresh", "runs"), [("b", "bc"), (["a"], "abc"), (["c"], "c"), (["d", "c"], "cd"), ([], "")])
async def test_refreshing_outputs_recomputes_what_depends_on_them_too(refresh, runs, drawn, cache, ran):
    """What is computed from a refreshed output is computed anew; the rest is not."""
    pipeline = drawn.with_cache(cache)
    first = await pipeline.arun(x=1)
    ran.take()
    second = await pipeline.arun(x=1, refresh=refresh)
    assert ran.take() == list(runs)
    assert {name for name in first if second[name] != first[name]} == set(runs)
    assert second["c"][:2] == second["b"]
    assert second["b"][0] == second["a"]
    assert await pipeline.arun(x=1) == second
    assert ran.take() == []


@pytest.mark.parametrize("mapped", [False, True])
async def test_outputs_of_nested_pipelines_can_be_refreshed(mapped, drawn, cache, ran):
    """A nested output is named as it is inside or as it is outside; what comes after it is recomputed too."""

    @node("seen")
    async def see(e):
        ran.note("see")
        return repr(e)

    nested = drawn.as_node(output_mapping={"b": "e"}, map_over="x" if mapped else None, name="nested")
    pipeline = Pipeline([nested, see]).with_cache(cache)
    given = {"x": [1, 2] if mapped else 1}
    times = 2 if mapped else 1
    first = await pipeline.arun(given)
    ran.take()
    for name in ("b", "e"):
        second = await pipeline.arun(given, refresh=[name])
        assert ran.take() == [*["b"] * times, *["c"] * times, "see"], name
        assert second["a"] == first["a"]
        assert second["seen"] == repr(second["e"])
        assert await pipeline.arun(given) == second
        assert ran.take() == []
    await pipeline.arun(given, refresh=["d"])
    assert ran.take() == ["d"] * times
    await pipeline.arun(given, refresh=["seen"])
    assert ran.take() == ["see"]


async def test_maps_and_streams_can_be_refreshed(drawn, cache, ran):
    """refresh= is for every kind of call; equal items are still computed once."""
    pipeline = drawn.with_cache(cache)
    await pipeline.amap({"x": [1, 2]}, "x")
    ran.take()
    made = await pipeline.amap({"x": [1, 2, 1]}, "x", refresh=["c"])
    assert ran.take() == ["c", "c"]
    assert made["c"][0] == made["c"][2]
    async with pipeline.astream({"x": [1, 2]}, "x", refresh=True) as items:
        streamed = [item.outputs async for item in items]
    assert len(ran.take()) == 8
    again = await pipeline.amap({"x": [1, 2]}, "x")
    assert [dict(zip(again, row, strict=True)) for row in zip(*again.values(), strict=True)] == streamed
    assert ran.take() == []


async def test_refreshing_what_nothing_makes_is_refused_before_anything_runs(drawn, cache, ran):
    """An unknown name is an error that says what was meant; an input is not an output."""
    pipeline = Pipeline([drawn.as_node(output_mapping={"b": "encoded"})]).with_cache(cache)
    with pytest.raises(DependencyError, match=r"'encodde'.*'encoded'"):
        await pipeline.arun(x=1, refresh=["encodde"])
    with pytest.raises(DependencyError, match="'x'"):
        await pipeline.amap({"x": [1]}, "x", refresh="x")
    assert ran.take() == []

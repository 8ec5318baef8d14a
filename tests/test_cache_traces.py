"""What is known of values while steps run side by side, in nests and in maps: nothing stale, nothing done twice."""

import asyncio
import typing

import anyio
import numpy as np
import pytest

import hypernodes.cache._session as session
from hypernodes import OutputMismatchError, Pipeline, node
from hypernodes.backend import LocalBackend
from hypernodes.cache import _flight
from tests import _caching
from tests._caching import PATIENCE_S

pytestmark = pytest.mark.anyio

cache = _caching.cache  # pytest finds fixtures among a module's names


async def test_what_a_running_pipeline_inside_has_made_is_not_taken_for_nothing(cache):
    """Steps outside look their keys up while an uncached node inside has finished and its pipeline has not."""
    used = []

    def outer():
        made, looked_up = anyio.Event(), anyio.Event()

        @node("v", cache=False)
        def make(x):
            return x * 10

        @node("w", cache=False)
        async def wait(v):
            made.set()
            await looked_up.wait()
            return v

        @node("u", cache=False)
        async def other(y):
            await made.wait()
            return y

        @node("t")
        async def follow(u):
            looked_up.set()
            return u

        @node("s")
        async def use(v):
            used.append(v)
            return "s", v

        inner = Pipeline([make, wait], name="inner")
        return Pipeline([inner, other, follow, use], name="outer", cache=cache)

    with anyio.fail_after(PATIENCE_S):
        for x in (1, 2):
            assert (await outer().arun(x=x, y=x))["s"] == ("s", x * 10)
    assert used == [10, 20]


async def test_a_step_is_looked_up_before_it_is_run(cache):
    """After an uncached node several steps are ready at once: each finds its entry."""
    ran = []

    def step(name):
        async def run(u):
            ran.append(name)
            return u, name

        return node(name)(run)

    @node("u", cache=False)
    async def first(x):
        return x

    pipeline = Pipeline([first, *map(step, "abcdef")], cache=cache)
    await pipeline.arun(x=1)
    assert sorted(ran) == list("abcdef")
    ran.clear()
    await pipeline.arun(x=1)
    assert ran == []


async def test_lists_of_items_from_worker_processes(cache):
    """A map in workers whose items hold a map: what follows it is cached, and maps over it."""

    @node("y")
    def add_one(q):
        return q + 1

    @node("total")
    def total(y):
        return sum(sum(each) for each in y)

    @node("z")
    def part_of(part):
        return sum(part)

    item = Pipeline([Pipeline([add_one]).as_node(map_over="q", name="inner_map")], name="item")
    follow = Pipeline([part_of], name="parts").as_node(input_mapping={"y": "part"}, map_over="y")
    pipeline = Pipeline(
        [item.as_node(map_over="q", name="outer_map"), total, follow],
        cache=cache,
        backend=LocalBackend(map_execution="parallel", max_workers=2),
    )
    for _ in range(2):
        assert await pipeline.arun(q=[[1, 2], [3]]) == {"y": [[2, 3], [4]], "total": 9, "z": [5, 4]}


async def test_what_items_share_is_hashed_once(cache, monkeypatch):
    """An encoder or an index is not hashed for each item that is given it."""
    hashed = []
    hash_value = session.hash_value

    def counting(value, *args, **kwargs):
        if isinstance(value, np.ndarray):
            hashed.append(value)
        return hash_value(value, *args, **kwargs)

    monkeypatch.setattr(session, "hash_value", counting)

    @node("y")
    def use(x, shared):
        return x

    flat = Pipeline([use], cache=cache)
    nested = Pipeline([Pipeline([use]).as_node(map_over="x")], cache=cache)
    shared = np.zeros(10)
    for run in (
        lambda: flat.amap({"x": list(range(600)), "shared": shared}, "x"),
        lambda: nested.arun(x=list(range(600)), shared=shared),
    ):
        hashed.clear()
        await run()
        assert len(hashed) == 1


async def test_a_result_that_is_unpacked_and_one_that_is_kept_whole_are_two(cache):
    """The same function under two names and under one: each gets what its own node would have made."""

    class Pair(typing.NamedTuple):
        x: int
        y: int

    def make(a):
        return Pair(a, a + 1)

    def some(a):
        return [a, 2, 3]

    assert await Pipeline([node(("x", "y"))(make)], cache=cache).arun(a=1) == {"x": 1, "y": 2}
    assert isinstance(await Pipeline([node("p")(make)], cache=cache).arun(a=1, output_name="p"), Pair)
    assert await Pipeline([node("p")(some)], cache=cache).arun(a=1, output_name="p") == [1, 2, 3]
    with pytest.raises(OutputMismatchError):
        await Pipeline([node(("x", "y"))(some)], cache=cache).arun(a=1)


async def test_a_list_that_a_function_has_changed_is_known_as_it_is(cache):
    """An uncached function appends to what a map has made: what follows is not taken from an earlier run."""

    @node("o", cache=False)
    def make(q):
        return [q]

    @node("a", cache=False)
    def change(o, extra):
        if extra is None:
            o.pop()
        else:
            o.append(extra)
        return 1

    @node("b")
    def copy(o, a):
        return list(o)

    inner = Pipeline([make], name="inner").as_node(map_over="q")
    pipeline = Pipeline([inner, change, copy], cache=cache)
    made = [await pipeline.arun(q=[1, 2], extra=extra, output_name="b") for extra in (7, 8, None)]
    assert made == [[[1], [2], 7], [[1], [2], 8], [[1]]]


@pytest.mark.parametrize("backend", [None, LocalBackend()])
async def test_refresh_goes_into_a_pipeline_on_another_backend(cache, backend):
    """By the names outside; and what is recomputed outside makes what depends on it recomputed inside."""
    ran = []

    @node("a")
    def outside(x):
        ran.append("outside")
        return x

    @node("inside")
    def follow(a):
        ran.append("follow")
        return a

    options = {} if backend is None else {"backend": backend}
    inner = Pipeline([follow], name="inner", **options).as_node(output_mapping={"inside": "out"})
    pipeline = Pipeline([outside, inner], cache=cache)
    await pipeline.arun(x=1)
    ran.clear()
    await pipeline.arun(x=1, refresh=["out"])
    assert ran == ["follow"]
    ran.clear()
    await pipeline.arun(x=1, refresh=["a"])
    assert ran == ["outside", "follow"]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_sync_call_does_not_wait_for_the_loop_that_it_holds(cache, anyio_backend, monkeypatch):
    """In a notebook: a task computes, and a cell calls run() for the same, which holds the task's loop."""
    monkeypatch.setattr(_flight, "ACROSS_LOOPS_S", 600)  # who waits for the other loop hangs
    begun, go_on = anyio.Event(), anyio.Event()

    @node("y")
    async def compute(x):
        if not begun.is_set():
            begun.set()
            await go_on.wait()
        return x

    pipeline = Pipeline([compute], cache=cache)
    task = asyncio.create_task(pipeline.arun(x=1))
    await begun.wait()
    assert pipeline.run(x=1) == {"y": 1}
    go_on.set()
    assert await task == {"y": 1}

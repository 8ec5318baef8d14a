"""What a run with a cache tells, and how a cache goes together with limits, retries, timeouts and branches."""

import anyio
import pytest

from hypernodes import Pipeline, PipelineCallback, node
from hypernodes.events import (
    ItemCached,
    ItemFinished,
    ItemStarted,
    NodeCached,
    NodeStored,
    NotLoaded,
    PipelineFinished,
)
from tests import _caching
from tests._caching import PATIENCE_S, in_order, of, rebuilt, tally, watched

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

cache, ran = _caching.cache, _caching.ran  # pytest finds fixtures among a module's names
text, nested = _caching.text, _caching.nested


# ---- what a run tells


async def test_a_hit_is_told_instead_of_start_and_end(text, cache):
    """For each node that is not run there is one NodeCached, in the order of the plan, with its signature."""
    pipeline = text.with_cache(cache).with_backend(in_order)
    _, first = await watched(pipeline, {"raw": "a"})
    assert [type(each).__name__ for each in first] == [
        "PipelineStarted",
        *["NodeStarted", "NodeFinished", "NodeStored"] * 3,
        "PipelineFinished",
        "RunFinished",
    ]
    _, seen = await watched(pipeline, {"raw": "a"})
    assert [type(each).__name__ for each in seen] == [
        "PipelineStarted", "NodeCached", "NodeCached", "NodeCached", "PipelineFinished", "RunFinished",
    ]  # fmt: skip
    assert of(seen, NodeCached) == ["clean", "cut", "count"]
    assert all(each.size > 0 for each in first if type(each) is NodeStored)
    assert [each.signature for each in seen if type(each) is NodeCached] == [
        each.signature for each in first if type(each) is NodeStored
    ]


async def test_a_value_that_nothing_has_loaded_is_shown_as_such(nested, cache):
    """Events of a nested pipeline do not load what nobody needs."""
    await nested.with_cache(cache).arun(corpus="a b")
    rebuilt()
    _, seen = await watched(nested.with_cache(cache), {"corpus": "a b"}, output_name="report")
    inner = [each for each in seen if type(each) is PipelineFinished and len(each.path) > 1]
    assert [type(value) for each in inner for value in each.outputs["count"]] == [NotLoaded] * 2
    assert rebuilt() == []


class Log(PipelineCallback):
    """Writes down the hooks that have to do with nodes and items."""

    def __init__(self):
        self.calls = []
        self.signatures = []

    def on_node_start(self, node_id, inputs, ctx):
        self.calls.append(("start", node_id))

    def on_node_end(self, node_id, outputs, duration, ctx):
        self.calls.append(("end", node_id))

    def on_node_cached(self, node_id, signature, ctx):
        self.calls.append(("cached", node_id))
        self.signatures.append(signature)

    def on_map_item_start(self, item_index, ctx):
        self.calls.append(("item start", item_index))

    def on_map_item_end(self, item_index, duration, ctx):
        self.calls.append(("item end", item_index))

    def on_map_item_cached(self, item_index, signature, ctx):
        self.calls.append(("item cached", item_index))
        self.signatures.append(signature)


async def test_items_that_are_all_in_the_cache_are_told_as_cached(text, cache):
    """on_map_item_cached comes instead of start and end, when every node of the item came from the cache."""
    log = Log()
    pipeline = text.with_cache(cache).with_backend(in_order).with_callbacks([log])
    await text.with_cache(cache).amap({"raw": ["a"]}, "raw")
    await text.with_cache(cache).arun(raw="b", output_name="cleaned")
    await pipeline.amap({"raw": ["a", "b"]}, "raw")
    assert log.calls == [
        ("cached", "clean"),
        ("cached", "cut"),
        ("cached", "count"),
        ("item cached", 0),
        ("item start", 1),
        ("cached", "clean"),
        ("start", "cut"),
        ("end", "cut"),
        ("start", "count"),
        ("end", "count"),
        ("item end", 1),
    ]
    assert all(len(each) == 64 and int(each, 16) for each in log.signatures)


async def test_the_nodes_of_nested_pipelines_are_told_with_their_paths(nested, cache):
    """The second run of a pipeline with a nested map tells every node of every item as cached, and no item as run."""
    pipeline = nested.with_cache(cache).with_backend(in_order)
    await pipeline.arun(corpus="a b")
    _, seen = await watched(pipeline, {"corpus": "a b"})
    inner = [f"every.{index}.{name}" for index in range(2) for name in ("clean", "cut", "count")]
    assert [each for each in of(seen, NodeCached) if each.count(".") == 2] == inner
    assert {"load", "report"} < set(of(seen, NodeCached))
    assert of(seen, ItemCached) == ["every.0", "every.1"]
    assert of(seen, ItemStarted) == of(seen, ItemFinished) == []


# ---- together with limits, retries and timeouts


async def test_hits_need_no_token_and_no_time(cache):
    """A hit waits for no limit and no max_concurrency, and no timeout ends it."""

    @node("y", limit="gpu", max_concurrency=1, timeout=0.5)
    async def work(x):
        return x + 1

    gpu = anyio.CapacityLimiter(1)
    pipeline = Pipeline([work], limits={"gpu": gpu}).with_cache(cache)
    await pipeline.arun(x=1)
    with anyio.fail_after(PATIENCE_S):
        async with gpu:
            assert await pipeline.arun(x=1) == {"y": 2}
            assert await pipeline.amap({"x": [1, 1]}, "x") == {"y": [2, 2]}


async def test_what_was_retried_is_stored_once_it_succeeds(cache, ran):
    """An attempt that fails stores nothing; the one that succeeds does."""
    failures = [ValueError("once"), ValueError("twice")]

    @node("y", retry=3)
    async def flaky(x):
        ran.note("flaky")
        if failures:
            raise failures.pop()
        return x

    pipeline = Pipeline([flaky]).with_cache(cache)
    assert await pipeline.arun(x=1) == {"y": 1}
    assert len(ran.take()) == 3
    assert await pipeline.arun(x=1) == {"y": 1}
    assert ran.take() == []


async def test_a_node_that_timed_out_leaves_nothing(cache, tmp_path, ran):
    """What a timeout has ended is no result: the next run computes it."""
    ready = tmp_path / "ready"

    @node("y", timeout=0.05)
    async def slow(x):
        ran.note("slow")
        if not ready.exists():
            await anyio.sleep(PATIENCE_S)
        return x

    pipeline = Pipeline([slow]).with_cache(cache)
    with pytest.raises(TimeoutError):
        await pipeline.arun(x=1)
    ready.touch()
    assert await pipeline.arun(x=1) == {"y": 1}
    assert len(ran.take()) == 2


async def test_sync_nodes_in_threads_are_cached_like_any_other(cache, ran):
    """Where a function runs is no part of its signature."""

    def made(where):
        @node("y", run_in=where)
        def work(x):
            ran.note(x)
            return x * 2

        return Pipeline([work]).with_cache(cache)

    assert await made("thread").arun(x=1) == {"y": 2}
    assert ran.take() == ["1"]
    for where in ("loop", "auto"):
        assert await made(where).arun(x=1) == {"y": 2}
    assert ran.take() == []


async def test_wide_pipelines_run_what_is_missing_side_by_side(cache, ran):
    """Of branches that meet, those that are not in the cache run at the same time."""
    meeting = {}

    def branch(name):
        @node(name)
        async def work(x):
            ran.note(name)
            if x != "alone":
                meeting[name] = True
                with anyio.fail_after(PATIENCE_S):
                    while len(meeting) < 2:
                        await anyio.sleep(0.001)
            return f"{name} {x}"

        return work

    @node("all")
    async def meet(a, b, c):
        ran.note("all")
        return [a, b, c]

    pipeline = Pipeline([branch("a"), branch("b"), branch("c"), meet]).with_cache(cache)
    assert await pipeline.arun(x="alone", output_name="all") == ["a alone", "b alone", "c alone"]
    ran.take()
    assert await pipeline.arun(x="together", output_name="all") == ["a together", "b together", "c together"]
    assert ran.take() == ["a", "all", "b", "c"]
    _, seen = await watched(pipeline, {"x": "together"})
    assert tally(seen) == {"cached": 4}

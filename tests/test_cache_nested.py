"""Caches and nested pipelines: switched off, kept elsewhere, on another backend, refreshed, lost in the depth."""

import pytest

from hypernodes import DiskCache, Pipeline, node
from hypernodes.backend import LocalBackend
from tests import _caching
from tests._caching import Telling, rebuilt

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

cache, ran, text = _caching.cache, _caching.ran, _caching.text  # pytest finds fixtures among a module's names


# ---- where caching is switched off, and where it goes elsewhere


async def test_after_an_uncached_node_hits_follow_as_long_as_its_value_is_the_same(cache, ran):
    """A node with cache=False runs every time; what it makes counts by value for those after it."""
    answers = ["x", "x", "y"]

    @node("fetched", cache=False)
    async def fetch(url):
        ran.note("fetch")
        return {"body": answers.pop(0), "url": url}

    @node("parsed")
    async def parse(fetched):
        ran.note("parse")
        return fetched["body"]

    pipeline = Pipeline([fetch, parse]).with_cache(cache)
    assert await pipeline.arun(url="u", output_name="parsed") == "x"
    assert ran.take() == ["fetch", "parse"]
    assert await pipeline.arun(url="u", output_name="parsed") == "x"
    assert ran.take() == ["fetch"]
    assert await pipeline.arun(url="u", output_name="parsed") == "y"
    assert ran.take() == ["fetch", "parse"]


async def test_an_uncached_node_in_a_mapped_pipeline_is_run_for_every_item(cache, ran):
    """In maps too, what follows an uncached node hits, and the inputs it needs are loaded for it."""

    @node("a")
    async def first(x):
        ran.note("first")
        return Telling(str(x))

    @node("b", cache=False)
    async def middle(a):
        ran.note("middle")
        return a.name

    @node("c")
    async def last(b):
        ran.note("last")
        return b + "!"

    pipeline = Pipeline([first, middle, last]).with_cache(cache)
    first_time = await pipeline.amap({"x": [1, 2]}, "x", output_name="c")
    assert len(ran.take()) == 6
    assert await pipeline.amap({"x": [1, 2]}, "x", output_name="c") == first_time == {"c": ["1!", "2!"]}
    assert ran.take() == ["middle", "middle"]
    assert rebuilt() == ["1", "2"]


async def test_a_nested_pipeline_without_a_cache_always_runs(text, cache, ran):
    """cache=None switches caching off inside; what is outside counts its outputs by value."""

    @node("length")
    async def length(count):
        ran.note("length")
        return len(count.name)

    pipeline = Pipeline([text.with_cache(None), length]).with_cache(cache)
    first = await pipeline.arun(raw="a")
    assert len(ran.take()) == 4
    assert await pipeline.arun(raw="a") == first
    assert ran.take() == ["clean a", "count words of cleaned a", "cut cleaned a"]
    rebuilt()
    mapped = text.with_cache(None).as_node({"raws": "raw"}, {"count": "counts"}, map_over="raws", name="mapped")
    for _ in range(2):
        await Pipeline([mapped]).with_cache(cache).arun(raws=["a", "b"])
        assert len(ran.take()) == 6


@pytest.mark.parametrize("mapped", [False, True])
async def test_a_nested_pipeline_keeps_its_results_in_its_own_cache(mapped, text, tmp_path, ran):
    """The nearest cache counts: inner results go to the inner one, and what is outside still hits."""
    inner, outer = DiskCache(tmp_path / "inner"), DiskCache(tmp_path / "outer")

    @node("length")
    async def length(count):
        ran.note("length")
        return len(count) if isinstance(count, list) else len(count.name)

    options = {"map_over": "raw"} if mapped else {}
    pipeline = Pipeline([text.with_cache(inner).as_node(name="own", **options), length]).with_cache(outer)
    given = {"raw": ["a", "b"] if mapped else "a"}
    first = await pipeline.arun(given)
    assert len(ran.take()) == (7 if mapped else 4)
    assert await pipeline.arun(given) == first
    assert ran.take() == []
    assert await text.with_cache(inner).arun(raw="a", output_name="count") is not None
    assert ran.take() == []
    outer.clear()
    await pipeline.arun(given)
    assert ran.take() == ["length"]
    inner.clear()
    await pipeline.arun(given)
    assert len(ran.take()) == (6 if mapped else 3)


async def test_without_a_cache_everything_runs_and_nothing_is_written(text, tmp_path, ran):
    """No cache= means no cache; with_cache(None) takes one away."""
    cache = DiskCache(tmp_path / "cache")
    for pipeline in (text, text.with_cache(cache).with_cache(None)):
        await pipeline.arun(raw="a")
        await pipeline.arun(raw="a")
        assert len(ran.take()) == 6
    assert not (tmp_path / "cache").exists()


# ---- on backends of their own


@pytest.mark.parametrize(
    "options",
    [{}, {"map_execution": "parallel", "max_workers": 1}, {"node_execution": "parallel", "max_workers": 1}],
    ids=["here", "items in processes", "nodes in processes"],
)
@pytest.mark.parametrize("mapped", [False, True])
async def test_what_follows_a_nested_pipeline_on_another_backend_is_cached(options, mapped, cache, ran):
    """What comes back from another place counts by value: what follows hits, and explain and refresh know it."""

    @node("length")
    async def length(count):
        ran.note("length")
        return len(repr(count))

    def made(text):
        nested = text.with_backend(backend).as_node(name="nested", map_over="x" if mapped else None)
        return Pipeline([nested, length]).with_cache(cache)

    given = {"x": [1, 2] if mapped else 1}
    times = 2 if mapped else 1
    async with LocalBackend(**options) as backend:
        pipeline = made(numbers(ran))
        first = await pipeline.arun(given)
        assert len(ran.take()) == 2 * times + 1
        assert await pipeline.arun(given) == first
        assert ran.take() == []
        explained = await pipeline.explain(given)
        assert (explained.hits, len(explained)) == (2 * times + 1,) * 2
        assert await pipeline.arun(given, refresh=["count"]) == first
        assert [line.split()[0] for line in ran.take()] == ["count"] * times + ["length"]


def numbers(ran):
    """Two nodes in a row, for worker processes too."""

    @node("cleaned")
    async def clean(x):
        ran.note("clean", x)
        return [x]

    @node("count")
    async def count(cleaned):
        ran.note("count", cleaned)
        return [*cleaned, "counted"]

    return Pipeline([clean, count], name="numbers")


@pytest.mark.parametrize("options", [{}, {"map_execution": "parallel", "max_workers": 1}], ids=["here", "there"])
async def test_a_nested_pipeline_with_its_own_cache_is_refreshed_where_there_is_no_other(options, tmp_path, ran):
    """refresh= reaches caches that only nested pipelines have, in worker processes too."""
    nested = numbers(ran).with_cache(DiskCache(tmp_path / "own")).as_node(name="nested")
    async with LocalBackend(**options) as backend:
        pipeline = Pipeline([nested], backend=backend)
        for refresh, runs in [(False, 2), (False, 0), (True, 2), (["count"], 1), (False, 0)]:
            await pipeline.amap({"x": [1]}, "x", refresh=refresh)
            assert len(ran.take()) == runs, refresh


# ---- lost in the depth


@pytest.mark.parametrize("own", [False, True], ids=["one cache", "a cache of its own"])
@pytest.mark.parametrize("mapped", [False, True], ids=["once", "mapped"])
async def test_any_one_entry_may_be_lost_between_lookup_and_load(own, mapped, ran):
    """In a pipeline in a pipeline in a pipeline, whichever entry vanishes costs one call at most, and no answer."""
    outer, inner = Losing(), Losing()

    @node("x")
    async def start(n):
        ran.note("start")
        return list(range(n)) if mapped else n

    @node("passed")
    async def beside(x):
        ran.note("beside")
        return [x]

    @node("end")
    async def end(count):
        ran.note("end")
        return repr(count)

    middle = Pipeline([numbers(ran).as_node(name="deep"), beside], name="middle")
    middle = middle.with_cache(inner) if own else middle
    pipeline = Pipeline([start, middle.as_node(name="middle", map_over="x" if mapped else None), end]).with_cache(outer)
    for output in (None, "end", ["count"], ["cleaned", "end"]):
        expected = await pipeline.arun(n=2, output_name=output)
        ran.take()
        for store in (outer, inner):
            for key in list(store.entries):
                store.lost = key
                assert await pipeline.arun(n=2, output_name=output) == expected
                assert len(ran.take()) <= 1
                store.lost = None


class Losing:
    """A store in memory that finds an entry and then does not have it."""

    def __init__(self):
        self.entries = {}
        self.lost = None

    async def find_many(self, keys):
        return [key for key in keys if key in self.entries]

    async def get_many(self, keys):
        return {key: self.entries[key] for key in keys if key in self.entries and key != self.lost}

    async def set_many(self, entries):
        for key, entry in entries.items():
            self.entries[key] = entry if isinstance(entry, bytes) else b"".join(bytes(part) for part in entry)

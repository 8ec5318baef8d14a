"""Runs with a cache: what is there is not run, and loaded only when something needs it."""

import anyio
import pytest

from hypernodes import DiskCache, Pipeline, PipelineCallback, node
from hypernodes.backend import LocalBackend
from hypernodes.events import (
    ItemCached,
    ItemFinished,
    ItemStarted,
    NodeCached,
    NodeChunk,
    NodeStarted,
    NodeStored,
    NotLoaded,
    PipelineFinished,
)
from tests._caching import PATIENCE_S, Ran, Telling, in_order, of, opened, rebuilt, tally, watched

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


@pytest.fixture
def cache(tmp_path):
    return DiskCache(tmp_path / "cache")


@pytest.fixture
def ran(tmp_path):
    """Where functions note that they ran."""
    rebuilt()
    return Ran(str(tmp_path / "ran"))


@pytest.fixture
def text(ran):
    """Three nodes in a row, each of which makes a value that tells when it is unpickled."""

    @node("cleaned")
    async def clean(raw):
        ran.note("clean", raw)
        return Telling(f"cleaned {raw}")

    @node("words")
    def cut(cleaned):
        ran.note("cut", cleaned.name)
        return Telling(f"words of {cleaned.name}")

    @node("count")
    async def count(words):
        ran.note("count", words.name)
        return Telling(f"count of {words.name}")

    return Pipeline([clean, cut, count], name="text")


# ---- what is not run, and what is not loaded


async def test_a_second_run_runs_nothing(text, cache, ran):
    """The second run gives equal outputs without running a node."""
    first = await text.with_cache(cache).arun(raw="a")
    assert len(ran.take()) == 3
    assert await text.with_cache(cache).arun(raw="a") == first
    assert ran.take() == []


async def test_a_fresh_process_finds_what_another_has_left(text, cache, tmp_path, ran):
    """What a run has made is on disk when it returns, and each output is loaded once."""
    first = await text.with_cache(cache).arun(raw="a")
    ran.take()
    assert await text.with_cache(opened(tmp_path / "cache")).arun(raw="a") == first
    assert ran.take() == []
    assert rebuilt() == ["cleaned a", "count of words of cleaned a", "words of cleaned a"]


async def test_the_first_run_loads_nothing(text, cache):
    """Nodes hand over the objects that they have made: nothing goes through pickle and back."""
    await text.with_cache(cache).arun(raw="a")
    assert rebuilt() == []


async def test_a_final_output_alone_loads_nothing_that_comes_before_it(text, cache, ran):
    """With one output asked for, that one is loaded and no other."""
    await text.with_cache(cache).arun(raw="a")
    ran.take()
    answer = await text.with_cache(cache).arun(raw="a", output_name="count")
    assert answer == Telling("count of words of cleaned a")
    assert rebuilt() == ["count of words of cleaned a"]
    assert ran.take() == []


async def test_a_node_that_must_run_loads_its_inputs_and_nothing_before_them(text, cache, ran):
    """After an edit of the last node its direct input is loaded, and the first node's output is not."""

    @node("count")
    async def recount(words):
        ran.note("recount", words.name)
        return f"new count of {words.name}"

    await text.with_cache(cache).arun(raw="a")
    ran.take()
    edited = text.replace(count=recount).with_cache(cache)
    assert await edited.arun(raw="a", output_name="count") == "new count of words of cleaned a"
    assert rebuilt() == ["words of cleaned a"]
    assert ran.take() == ["recount words of cleaned a"]


async def test_an_edit_in_the_middle_runs_what_follows_and_nothing_before(text, cache, ran):
    """What is upstream of an edited node stays as it is; what is downstream is new."""

    @node("words")
    async def recut(cleaned):
        ran.note("recut", cleaned.name)
        return Telling(f"new words of {cleaned.name}")

    await text.with_cache(cache).arun(raw="a")
    ran.take()
    await text.replace(words=recut).with_cache(cache).arun(raw="a")
    assert ran.take() == ["count new words of cleaned a", "recut cleaned a"]


async def test_undoing_an_edit_finds_the_old_entries(text, cache, ran):
    """Entries are named by what made them, so those of the code before an edit are still there."""

    @node("words")
    async def recut(cleaned):
        return Telling(f"new words of {cleaned.name}")

    first = await text.with_cache(cache).arun(raw="a")
    await text.replace(words=recut).with_cache(cache).arun(raw="a")
    ran.take()
    assert await text.with_cache(cache).arun(raw="a") == first
    assert ran.take() == []


async def test_only_the_nodes_that_an_output_needs_are_run_and_stored(text, cache, ran):
    """A run for one output leaves the rest to be run later, once."""
    await text.with_cache(cache).arun(raw="a", output_name="cleaned")
    assert ran.take() == ["clean a"]
    await text.with_cache(cache).arun(raw="a")
    assert ran.take() == ["count words of cleaned a", "cut cleaned a"]


async def test_a_map_of_hits_loads_each_wanted_output_and_nothing_else(text, cache, ran):
    """Items that are in the cache are handed over without running; only the wanted output is loaded."""
    cached = text.with_cache(cache)
    first = await cached.amap({"raw": ["a", "b", "c"]}, "raw")
    ran.take()
    again = await cached.amap({"raw": ["a", "b", "c"]}, "raw", output_name="count")
    assert again["count"] == first["count"]
    assert ran.take() == []
    assert rebuilt() == [f"count of words of cleaned {raw}" for raw in "abc"]


async def test_changing_one_item_recomputes_one_item(text, cache, ran):
    """Of a list of which one item is new, that item alone is run, wherever it stands."""
    cached = text.with_cache(cache)
    await cached.amap({"raw": [str(n) for n in range(20)]}, "raw")
    ran.take()
    changed = await cached.amap({"raw": ["new" if n == 7 else str(n) for n in reversed(range(20))]}, "raw")
    assert [each.name for each in changed["cleaned"]][10:14] == ["cleaned 9", "cleaned 8", "cleaned new", "cleaned 6"]
    assert ran.take() == ["clean new", "count words of cleaned new", "cut cleaned new"]


@pytest.fixture
def nested(text):
    """A map of the pipeline `text`, between two other nodes."""

    @node("raws")
    async def load(corpus):
        return corpus.split()

    @node("report")
    async def report(counts):
        return [each.name for each in counts]

    every = text.as_node({"raws": "raw"}, {"count": "counts"}, map_over="raws", name="every")
    return Pipeline([load, every, report], name="corpus")


async def test_a_nested_map_that_is_all_in_the_cache_loads_nothing(nested, cache, ran):
    """What is after a nested map can be known, and found, without its items."""
    first = await nested.with_cache(cache).arun(corpus="a b c", output_name="report")
    ran.take()
    answer, seen = await watched(nested.with_cache(cache), {"corpus": "a b c"}, output_name="report")
    assert answer == first
    assert ran.take() == []
    assert rebuilt() == []
    assert NodeStarted not in {type(event) for event in seen if event.path[-1] != "every"}


async def test_changing_an_inner_node_recomputes_it_for_every_item_and_nothing_else(nested, text, cache, ran):
    """An edit of the last node of a mapped pipeline leaves the nodes before it alone, for every item."""

    @node("count")
    async def recount(words):
        ran.note("recount", words.name)
        return Telling(f"new count of {words.name}")

    await nested.with_cache(cache).arun(corpus="a b c")
    ran.take()
    inner = text.replace(count=recount).as_node({"raws": "raw"}, {"count": "counts"}, map_over="raws", name="every")
    edited = Pipeline([nested.nodes[0], inner, nested.nodes[2]]).with_cache(cache)
    await edited.arun(corpus="a b c", output_name="report")
    assert ran.take() == [f"recount words of cleaned {raw}" for raw in "abc"]
    assert rebuilt() == [f"words of cleaned {raw}" for raw in "abc"]


async def test_one_new_item_of_a_nested_map_loads_the_others_only_for_who_reads_the_list(nested, cache, ran):
    """A consumer of the whole list gets all of it, from the cache but for the new item."""
    await nested.with_cache(cache).arun(corpus="a b c")
    ran.take()
    answer = await nested.with_cache(cache).arun(corpus="a b c d", output_name="report")
    assert answer == [f"count of words of cleaned {raw}" for raw in "abcd"]
    assert ran.take() == ["clean d", "count words of cleaned d", "cut cleaned d"]
    assert rebuilt() == [f"count of words of cleaned {raw}" for raw in "abc"]


def one_item(pipeline):
    """Ways to compute the same item, each of which gives the value."""
    single = pipeline.as_node(name="single")
    rows = pipeline.as_node({"raws": "raw"}, {"count": "counts"}, map_over="raws", name="rows")
    table = Pipeline([rows]).as_node({"table": "raws"}, {"counts": "tables"}, map_over="table", name="table")

    async def streamed(cache):
        async with pipeline.with_cache(cache).astream({"raw": (raw for raw in ["a"])}, "raw") as items:
            [item] = [item async for item in items]
            return item.outputs["count"]

    async def mapped(cache, **options):
        made = await pipeline.with_cache(cache).with_backend(LocalBackend(**options)).amap({"raw": ["a"]}, "raw")
        return made["count"][0]

    async def product(cache):
        given = {"raw": ["a", "z"], "unused": [1, 2]}

        @node("other")
        async def other(unused):
            return unused

        both = Pipeline([pipeline, other]).with_cache(cache)
        return (await both.amap(given, ["raw", "unused"], map_mode="product"))["count"][1]

    async def run(cache, **options):
        return await pipeline.with_cache(cache).with_backend(LocalBackend(**options)).arun(raw="a", output_name="count")

    async def nested_once(cache):
        return await Pipeline([single]).with_cache(cache).arun(raw="a", output_name="count")

    async def nested_map(cache):
        return (await Pipeline([rows]).with_cache(cache).arun(raws=["z", "a"], output_name="counts"))[1]

    async def nested_maps(cache):
        return (await Pipeline([table]).with_cache(cache).arun(table=[[], ["z", "a"]], output_name="tables"))[1][1]

    async def sync_run(cache):
        return pipeline.with_cache(cache).run(raw="a", output_name="count")

    return {
        "run": run,
        "map": mapped,
        "product": product,
        "stream": streamed,
        "nested": nested_once,
        "nested map": nested_map,
        "nested maps": nested_maps,
        "sync run": sync_run,
        "sequential": lambda cache: run(cache, node_execution="sequential"),
        "sequential map": lambda cache: mapped(cache, map_execution="sequential"),
        "threaded": lambda cache: run(cache, node_execution="threaded", max_workers=2),
        "threaded map": lambda cache: mapped(cache, map_execution="threaded", max_workers=2),
    }


@pytest.mark.parametrize(
    "way", ["run", "map", "product", "stream", "nested", "nested map", "nested maps", "sync run", "threaded map"]
)
async def test_the_same_item_is_one_entry_whichever_way_it_was_computed(way, text, cache, ran):
    """How an item came to be computed is no part of its signature: every other way finds it."""
    ways = one_item(text)
    made = await ways[way](cache)
    ran.take()
    for name, other in ways.items():
        assert await other(cache) == made, name
        assert [line for line in ran.take() if not line.endswith("z")] == [], name


# ---- what can be stored


@pytest.mark.parametrize("value", [None, False, (), "", float("nan")], ids=repr)
async def test_none_and_the_like_are_values(value, cache, ran):
    """A stored None is a hit, as is any other value that is false or not equal to itself."""

    @node("nothing")
    async def make(x):
        ran.note("make")
        return value

    @node("kind")
    async def see(nothing):
        ran.note("see")
        return type(nothing).__name__

    pipeline = Pipeline([make, see]).with_cache(cache)
    first = await pipeline.arun(x=1)
    assert len(ran.take()) == 2
    again = await pipeline.arun(x=1)
    assert repr(again) == repr(first)
    assert repr((await pipeline.amap({"x": [1, 1]}, "x"))["nothing"]) == repr([value, value])
    assert ran.take() == []


async def test_the_outputs_of_a_tuple_node_are_one_entry_and_two_inputs(cache, ran):
    """Both outputs come from one entry, loaded once; consumers of the one and of the other are told apart."""

    @node(("low", "high"))
    async def split(x):
        ran.note("split", x)
        return Telling(f"low {x}"), Telling(f"high {x}")

    @node("under")
    async def under(low):
        ran.note("under", low.name)
        return low.name

    @node("over")
    async def over(high):
        ran.note("over", high.name)
        return high.name

    @node("first")
    async def swapped(high):
        return [high.name]

    pipeline = Pipeline([split, under, over]).with_cache(cache)
    first = await pipeline.arun(x=1)
    assert len(ran.take()) == 3
    assert await pipeline.arun(x=1) == first
    assert rebuilt() == ["high 1", "low 1"]
    assert await pipeline.arun(x=1, output_name="high") == Telling("high 1")
    assert await Pipeline([split, swapped]).with_cache(cache).arun(x=1, output_name="first") == ["high 1"]
    assert ran.take() == []


async def test_an_argument_is_an_input_by_its_name(cache, ran):
    """The same values under swapped names are another call."""

    @node("joined")
    async def join(left, right):
        ran.note(left, right)
        return left + right

    pipeline = Pipeline([join]).with_cache(cache)
    assert await pipeline.arun(left="a", right="b", output_name="joined") == "ab"
    assert await pipeline.arun(left="b", right="a", output_name="joined") == "ba"
    assert await pipeline.arun(right="b", left="a", output_name="joined") == "ab"
    assert ran.take() == ["a b", "b a"]


async def test_what_equal_outputs_feed_is_told_apart_by_what_made_them(cache, ran):
    """Signatures follow the calls, so two nodes that make equal values are two inputs, and each is right."""

    @node("one")
    async def one(x):
        return x

    @node("two")
    async def two(x):
        return x

    @node("a")
    async def of_one(one):
        return ("a", one)

    @node("b")
    async def of_two(two):
        return ("b", two)

    pipeline = Pipeline([one, two, of_one, of_two]).with_cache(cache)
    for _ in range(2):
        assert await pipeline.arun(x=1) == {"one": 1, "two": 1, "a": ("a", 1), "b": ("b", 1)}


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_a_generator_is_stored_as_the_list_of_its_pieces(kind, cache, ran):
    """A hit of a generator node gives the list, and no pieces as events."""

    @node("letters")
    async def spell(word):
        for letter in word:
            ran.note(letter)
            yield letter

    @node("letters")
    def spell_sync(word):
        for letter in word:
            ran.note(letter)
            yield letter

    pipeline = Pipeline([spell if kind == "async" else spell_sync]).with_cache(cache)
    first, seen = await watched(pipeline, {"word": "abc"})
    assert first == {"letters": ["a", "b", "c"]}
    assert len(of(seen, NodeChunk)) == len(ran.take()) == 3
    again, seen = await watched(pipeline, {"word": "abc"})
    assert again == first
    assert of(seen, NodeChunk) == ran.take() == []


async def test_partials_methods_and_callable_objects_are_cached(cache, ran):
    """Whatever a node's function may be, its second call is a hit, and what it is bound to counts."""
    from functools import partial

    class Scale:
        def __init__(self, factor):
            self.factor = factor

        def __call__(self, x):
            ran.note("call", self.factor)
            return x * self.factor

        def add(self, x):
            ran.note("add", self.factor)
            return x + self.factor

    def power(base, x):
        ran.note("power", base)
        return base**x

    def made(n):
        nodes = [node("a")(Scale(n)), node("b")(Scale(n).add), node("c")(partial(power, base=n))]
        return Pipeline(nodes).with_cache(cache)

    assert await made(2).arun(x=3) == {"a": 6, "b": 5, "c": 8}
    assert len(ran.take()) == 3
    assert await made(2).arun(x=3) == {"a": 6, "b": 5, "c": 8}
    assert ran.take() == []
    assert await made(4).arun(x=3) == {"a": 12, "b": 7, "c": 64}
    assert len(ran.take()) == 3


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


# ---- inputs


async def test_bound_values_defaults_and_arguments_are_the_same_inputs(cache, ran):
    """Where a value comes from is no part of a signature."""

    @node("found")
    async def search(query, top_k=5):
        ran.note(query, top_k)
        return [query] * top_k

    pipeline = Pipeline([search]).with_cache(cache)
    await pipeline.arun(query="a")
    assert ran.take() == ["a 5"]
    await pipeline.arun(query="a", top_k=5)
    await pipeline.bind(top_k=5).arun(query="a")
    await pipeline.bind(query="a").arun()
    await pipeline.bind(query="a").amap({"top_k": [5, 5]}, "top_k")
    assert ran.take() == []
    await pipeline.bind(top_k=6).arun(query="a")
    assert ran.take() == ["a 6"]
    await pipeline.arun(query="a", top_k=True)
    assert ran.take() == ["a True"]


async def test_inputs_count_by_what_they_are_and_not_by_what_they_look_like(cache, ran):
    """1, 1.0, True and "1" are four inputs, as are a list and a tuple; equal dicts are one, in any order."""

    @node("kind")
    async def kind(x):
        ran.note("kind")
        return f"{type(x).__name__} {x!r}"

    pipeline = Pipeline([kind]).with_cache(cache)
    values = [1, 1.0, True, "1", [1], (1,), {1}, {"a": 1, "b": 2}]
    for _ in range(2):
        made = await pipeline.amap({"x": values}, "x")
        assert made["kind"] == [f"{type(x).__name__} {x!r}" for x in values]
    assert len(ran.take()) == len(values)
    await pipeline.arun(x={"b": 2, "a": 1})
    assert ran.take() == []


async def test_version_and_depends_on_salt_the_signature(cache, tmp_path, ran):
    """Another version, or another content of a file, is another call; the old one is still there."""
    data = tmp_path / "data.txt"

    def made(version):
        @node("y", version=version, depends_on=[data])
        async def work(x):
            ran.note(version, data.read_text())
            return data.read_text()

        return Pipeline([work]).with_cache(cache)

    for version, content, runs in [("1", "a", 1), ("1", "a", 0), ("2", "a", 1), ("2", "b", 1), ("1", "a", 0)]:
        data.write_text(content)
        assert await made(version).arun(x=1, output_name="y") == content
        assert len(ran.take()) == runs, (version, content)


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

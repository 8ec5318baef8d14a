"""Runs with a cache: what is there is not run, and loaded only when something needs it."""

import pytest

from hypernodes import Pipeline, node
from hypernodes.backend import LocalBackend
from hypernodes.events import (
    NodeChunk,
    NodeStarted,
)
from tests import _caching
from tests._caching import Telling, of, opened, rebuilt, watched

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

cache, ran = _caching.cache, _caching.ran  # pytest finds fixtures among a module's names
text, nested = _caching.text, _caching.nested


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


async def test_the_outputs_of_a_tuple_node_are_different_inputs_of_one_function(cache):
    """The same function called with one output and with the other is two calls."""

    @node(("low", "high"))
    async def split(x):
        return [x], [x, x]

    @node("size")
    async def measure(items):
        return len(items)

    sizes = [
        Pipeline([measure]).as_node({name: "items"}, {"size": f"{name}_size"}, name=name) for name in ("low", "high")
    ]
    pipeline = Pipeline([split, *sizes]).with_cache(cache)
    for _ in range(2):
        assert await pipeline.arun(x=1, output_name=["low_size", "high_size"]) == {"low_size": 1, "high_size": 2}


async def test_lists_that_maps_have_made_count_by_the_order_of_their_items(cache):
    """The same items in another order, or one of them twice, are another list for what follows."""

    @node("letter")
    async def upper(raw):
        return raw.upper()

    @node("word")
    async def join(letters):
        return "".join(letters)

    every = Pipeline([upper]).as_node({"raws": "raw"}, {"letter": "letters"}, map_over="raws", name="every")
    pipeline = Pipeline([every, join]).with_cache(cache)
    for raws in ("abc", "cba", "abcc", "aabc", "ab", "", "abc"):
        assert await pipeline.arun(raws=list(raws), output_name="word") == raws.upper()


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

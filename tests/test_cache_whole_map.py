"""A nested map whose inputs are known by their digests is answered as a whole: its rows are not even loaded."""

import pickle
from typing import ClassVar

import anyio
import pytest

from hypernodes import DiskCache, Pipeline, PipelineCallback, node
from hypernodes import events as ev

pytestmark = pytest.mark.anyio


class Text:
    """A text that notes when it is unpickled."""

    loaded: ClassVar[list[str]] = []

    def __init__(self, text):
        self.text = text

    def __setstate__(self, state):
        self.__dict__.update(state)
        Text.loaded.append(self.text)


@pytest.fixture(autouse=True)
def nothing_loaded():
    Text.loaded.clear()


def made(ran, count=5, factor=1, name="corpus"):
    """A pipeline that makes texts, measures each, and adds the sizes up; `ran` notes what runs."""

    @node("texts", version=count)
    def load(count=count):
        ran.append("load")
        return [Text("a" * index) for index in range(count)]

    @node("size", version=factor)
    def measure(text, unit=1):
        ran.append(f"measure {len(text.text)}")
        return len(text.text) * factor * unit

    @node("total")
    def add(sizes):
        ran.append("add")
        return sum(sizes)

    nested = Pipeline([measure], name="measure").as_node(
        name="sizes", input_mapping={"texts": "text"}, output_mapping={"size": "sizes"}, map_over="texts"
    )
    return Pipeline([load, nested, add], name=name)


class Watch(PipelineCallback):
    def __init__(self):
        self.seen = []

    def on_map_start(self, total_items, ctx):
        self.seen.append(("map", total_items))

    def on_map_item_start(self, item_index, ctx):
        self.seen.append(("start", item_index))

    def on_map_item_cached(self, item_index, signature, ctx):
        self.seen.append(("cached", item_index))

    def on_map_end(self, total_duration, ctx):
        self.seen.append(("end",))


async def test_nothing_is_loaded_that_nothing_needs(tmp_path):
    """The second run loads its answer alone: no text, no size; and tells of a map all of whose items are cached."""
    ran, watch = [], Watch()
    pipeline = made(ran).with_cache(DiskCache(tmp_path / "cache"))
    assert await pipeline.arun(output_name="total") == 10
    ran.clear()
    assert await pipeline.with_callbacks([watch]).arun(output_name="total") == 10
    assert (ran, Text.loaded) == ([], [])
    assert watch.seen == [("map", 5), *(("cached", index) for index in range(5)), ("end",)]


async def test_who_listens_for_nodes_hears_of_all(tmp_path):
    """With NodeCached wanted, each item's nodes are told of one by one."""
    ran = []
    pipeline = made(ran).with_cache(DiskCache(tmp_path / "cache"))
    await pipeline.arun()
    async with pipeline.aevents() as events:
        seen = [event async for event in events]
    cached = [event.path for event in seen if isinstance(event, ev.NodeCached)]
    assert [path for path in cached if path[-1] == "measure"] == [
        ("corpus", "sizes", index, "measure") for index in range(5)
    ]


async def test_what_changes_is_run(tmp_path):
    """Another item, another version of the inner function, another shared input: nothing stale, nothing in vain."""
    cache = DiskCache(tmp_path / "cache")
    ran = []
    assert await made(ran).with_cache(cache).arun(output_name="total") == 10
    ran.clear()
    assert await made(ran, count=6).with_cache(cache).arun(output_name="total") == 15
    assert ran == ["load", "measure 5", "add"]
    ran.clear()
    assert await made(ran, factor=2).with_cache(cache).arun(output_name="total") == 20
    assert sorted(ran) == ["add", *(f"measure {size}" for size in range(5))]
    ran.clear()
    assert await made(ran).with_cache(cache).arun(unit=3, output_name="total") == 30
    assert sorted(ran) == ["add", *(f"measure {size}" for size in range(5))]
    ran.clear()
    assert await made(ran).with_cache(cache).arun(output_name="total") == 10
    assert ran == []


async def test_refresh_runs_every_item(tmp_path):
    """refresh= recomputes the items of a map that is known as a whole."""
    ran = []
    pipeline = made(ran).with_cache(DiskCache(tmp_path / "cache"))
    await pipeline.arun()
    for asked in (["size"], ["sizes"]):
        ran.clear()
        assert await pipeline.arun(output_name="total", refresh=asked) == 10
        assert sorted(ran) == ["add", *(f"measure {size}" for size in range(5))]


@pytest.mark.parametrize("damage", ["gone", "torn"])
async def test_an_item_that_is_gone_is_computed_again(tmp_path, damage):
    """The map is known as a whole, and an item's entry cannot be used: that item is run, and the answer is right."""
    ran = []
    store = Memory()
    pipeline = made(ran).with_cache(store)
    sizes = (await pipeline.arun())["sizes"]
    assert sizes == [0, 1, 2, 3, 4]
    key = next(key for key, value in store.entries.items() if value.endswith(pickle.dumps(3, protocol=5)))
    if damage == "gone":
        del store.entries[key]
    else:
        store.entries[key] = store.entries[key][:-2]
    ran.clear()
    with anyio.fail_after(20):
        assert (await pipeline.arun(output_name=["sizes"])) == {"sizes": sizes}
    assert ran == ["measure 3"]
    ran.clear()
    assert (await pipeline.arun(output_name=["sizes"])) == {"sizes": sizes}
    assert ran == []


async def test_a_map_with_failures_is_not_known_as_a_whole(tmp_path):
    """Failed items are tried again by the next run, the others are not."""
    ran = []

    @node("texts")
    def load():
        return [1, 2, 3]

    @node("half")
    def halve(number):
        ran.append(number)
        if number == 2 and ran.count(2) == 1:
            raise ValueError("not now")
        return number / 2

    nested = Pipeline([halve], name="halve").as_node(
        input_mapping={"texts": "number"}, map_over="texts", on_error="collect"
    )
    pipeline = Pipeline([load, nested], cache=DiskCache(tmp_path / "cache"))
    assert (await pipeline.arun(output_name="half")) == [0.5, None, 1.5]
    assert (await pipeline.arun(output_name="half")) == [0.5, 1.0, 1.5]
    assert sorted(ran) == [1, 2, 2, 3]


class Memory:
    """A store of two methods."""

    def __init__(self):
        self.entries = {}

    async def get_many(self, keys):
        return {key: self.entries[key] for key in keys if key in self.entries}

    async def set_many(self, entries):
        for key, value in entries.items():
            self.entries[key] = value if isinstance(value, bytes) else b"".join(value)


async def test_what_is_gone_and_not_needed_is_not_computed(tmp_path):
    """Of a chain whose end is in the cache alone, nothing is run; nor if something else beside it has to run."""
    ran = []

    @node("a")
    def first(x):
        ran.append("first")
        return x + 1

    @node("b")
    def second(a):
        ran.append("second")
        return a + 1

    @node("c")
    def third(b):
        ran.append("third")
        return b + 1

    @node("d")
    def fourth(c, y):
        ran.append("fourth")
        return c + y

    store = Memory()
    pipeline = Pipeline([first, second, third, fourth], cache=store)
    assert await pipeline.arun(x=1, y=1, output_name="d") == 5
    for value in (2, 3):
        key = next(key for key, entry in store.entries.items() if entry.endswith(pickle.dumps(value, protocol=5)))
        del store.entries[key]
    ran.clear()
    explained = await pipeline.explain(x=1, y=2, output_name="d")
    assert {each.path[-1]: each.status for each in explained} == {
        "first": "unneeded",
        "second": "unneeded",
        "third": "hit",
        "fourth": "miss",
    }
    assert await pipeline.arun(x=1, y=2, output_name="d") == 6
    assert ran == ["fourth"]
    # Asked for, it is computed.
    assert await pipeline.arun(x=1, y=2) == {"a": 2, "b": 3, "c": 4, "d": 6}
    assert ran == ["fourth", "first", "second"]

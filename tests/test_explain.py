"""What a run would do and why: the reasons that `explain` gives are the changes that were made."""

import threading
from collections import Counter
from pathlib import Path

import anyio
import pytest

from hypernodes import DependencyError, Pipeline, node
from hypernodes.backend import LocalBackend
from hypernodes.events import NodeCached, NodeStored
from tests import _caching
from tests._caching import Telling, of, opened, rebuilt, watched

cache, ran = _caching.cache, _caching.ran  # pytest finds fixtures among a module's names

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


class Memory:
    """A store of one's own, in memory."""

    def __init__(self):
        self.entries = {}

    async def get_many(self, keys):
        return {key: self.entries[key] for key in keys if key in self.entries}

    async def set_many(self, entries):
        for key, entry in entries.items():
            self.entries[key] = entry if isinstance(entry, bytes) else b"".join(bytes(part) for part in entry)


def told(explanation):
    """Status and reasons of each call, by its path below the pipeline."""
    return {
        ".".join(map(str, each.path[1:])): (
            each.status,
            *(f"{reason.why} {reason.name}".strip() for reason in each.reasons),
        )
        for each in explanation
    }


def scorer(ran, **options):
    """One node with three inputs, one of which has a default."""

    @node("score", **options)
    async def score(query, doc, weight=1):
        ran.note("score")
        return f"{query} {doc} {weight}"

    return Pipeline([score], name="scoring")


# ---- what can change besides the code (for that see test_explain_edits.py)


async def test_a_first_run_is_new(cache, ran):
    """Before anything was computed, everything is new."""
    pipeline = scorer(ran).with_cache(cache)
    explained = await pipeline.explain(query="a", doc="b")
    assert told(explained) == {"score": ("miss", "new")}
    assert (explained.hits, explained.misses, len(explained)) == (0, 1, 1)


@pytest.mark.parametrize(
    ("given", "reasons"),
    [
        ({"query": "a", "doc": "b"}, None),
        ({"query": "a", "doc": "b", "weight": 1}, None),
        ({"query": "x", "doc": "b"}, ["input query"]),
        ({"query": "a", "doc": "x"}, ["input doc"]),
        ({"query": "a", "doc": "b", "weight": 2}, ["input weight"]),
        ({"query": "a", "doc": "b", "weight": 1.0}, ["input weight"]),
        ({"query": "x", "doc": "y"}, ["input doc", "input query"]),
        ({"query": "x", "doc": "y", "weight": 3}, ["input doc", "input query", "input weight"]),
    ],
)
async def test_a_new_input_is_named(given, reasons, cache, ran):
    """The inputs that differ from the nearest earlier call are named, and no others."""
    pipeline = scorer(ran).with_cache(cache)
    await pipeline.arun(query="a", doc="b")
    await pipeline.arun(query="far", doc="away", weight=9)
    explained = await pipeline.with_cache(opened(cache.path)).explain(given)
    assert told(explained) == {"score": ("hit",) if reasons is None else ("miss", *reasons)}


async def test_inputs_that_were_never_used_together_are_told(cache, ran):
    """A new combination of values that are known one by one names an input, or all of them."""
    pipeline = scorer(ran).with_cache(cache)
    for query, doc, weight in [("a", "a", 1), ("b", "b", 2), ("c", "c", 3)]:
        await pipeline.arun(query=query, doc=doc, weight=weight)
    status, *reasons = told(await pipeline.explain(query="a", doc="b", weight=3))["score"]
    assert status == "miss"
    assert reasons
    assert set(reasons) <= {"input query", "input doc", "input weight"}


async def test_a_new_version_is_named(cache, ran):
    """Another version= is the reason; so is none."""
    await scorer(ran, version="1").with_cache(cache).arun(query="a", doc="b")
    for version in ("2", 1, None):
        explained = await scorer(ran, version=version).with_cache(cache).explain(query="a", doc="b")
        assert told(explained) == {"score": ("miss", "version version")}


async def test_of_several_earlier_states_the_nearest_is_compared(cache, ran):
    """What changed is told with respect to the earlier code that is most like today's, not to the last one."""

    def made(version, salt):
        return scorer(ran, version=version, depends_on=[salt]).with_cache(cache)

    for version, salt in [("1", 1), ("2", 2), ("3", 3)]:
        await made(version, salt).arun(query="a", doc="b")
    explained = await made("1", 9).explain(query="a", doc="b")
    assert told(explained) == {"score": ("miss", "depends_on depends_on[0]")}
    explained = await made("9", 2).explain(query="a", doc="b")
    assert told(explained) == {"score": ("miss", "version version")}


async def test_a_changed_file_is_named(cache, ran, tmp_path):
    """Of what a node depends on, that which has changed is named: a file, a folder, a value."""
    (tmp_path / "folder").mkdir()
    file, folder = tmp_path / "data.json", tmp_path / "folder"
    file.write_text("1")

    def made(value):
        return scorer(ran, depends_on=[file, folder, {"k": value}]).with_cache(cache)

    await made(1).arun(query="a", doc="b")
    assert told(await made(1).explain(query="a", doc="b")) == {"score": ("hit",)}
    assert told(await made(2).explain(query="a", doc="b")) == {"score": ("miss", "depends_on depends_on[2]")}
    (folder / "new").write_text("")
    expected = f"depends_on depends_on {str(folder)!r}"
    assert told(await made(1).explain(query="a", doc="b")) == {"score": ("miss", expected)}
    (folder / "new").unlink()
    file.write_text("2")
    expected = f"depends_on depends_on {str(file)!r}"
    assert told(await made(1).explain(query="a", doc="b")) == {"score": ("miss", expected)}


async def test_a_changed_default_is_named_as_part_of_the_code(cache, ran):
    """A default that is not overridden is code and input at once: it is named once."""

    def made(default):
        async def score(query, weight=default):
            return query * weight

        return Pipeline([node("score")(score)]).with_cache(cache)

    await made(1).arun(query="a")
    status, *reasons = told(await made(2).explain(query="a"))["score"]
    assert status == "miss"
    assert len(reasons) == 1
    assert reasons[0].startswith("code default of 'weight' of ")


async def test_what_is_upstream_is_named_where_it_arrives(cache, ran):
    """After an edit of the first node, those after it say which of their inputs will be computed anew."""

    def made(edited):
        @node("a")
        async def first(x):
            return x

        @node("a")
        async def first_edited(x):
            return [x]

        @node("b")
        async def second(a, y):
            return (a, y)

        @node("c")
        async def third(b):
            return b

        @node("d")
        async def beside(y):
            return y

        return Pipeline([first_edited if edited else first, second, third, beside]).with_cache(cache)

    await made(False).arun(x=1, y=2)
    explained = told(await made(True).explain(x=1, y=2))
    # Another function under the same output has no past of its own.
    assert explained.pop("first_edited") == ("miss", "new")
    assert explained == {
        "second": ("miss", "upstream a"),
        "third": ("miss", "upstream b"),
        "beside": ("hit",),
    }
    assert told(await made(False).explain(x=9, y=2)) == {
        "first": ("miss", "input x"),
        "second": ("miss", "upstream a"),
        "third": ("miss", "upstream b"),
        "beside": ("hit",),
    }


async def test_an_entry_that_is_gone_is_told_as_such(ran):
    """What was stored once and is no longer there is told apart from what is new."""
    store = Memory()
    pipeline = scorer(ran).with_cache(store)
    _, seen = await watched(pipeline, {"query": "a", "doc": "b"})
    [key] = [each.signature for each in seen if type(each) is NodeStored]
    del store.entries[key]
    assert told(await pipeline.explain(query="a", doc="b")) == {"score": ("miss", "gone")}
    assert told(await pipeline.explain(query="a", doc="c")) == {"score": ("miss", "input doc")}


async def test_a_cleared_cache_knows_nothing(cache, ran):
    """After clear() everything is new."""
    pipeline = scorer(ran).with_cache(cache)
    await pipeline.arun(query="a", doc="b")
    cache.clear()
    assert told(await pipeline.explain(query="a", doc="b")) == {"score": ("miss", "new")}


async def test_what_is_to_be_refreshed_is_told(cache, ran):
    """refresh= is a reason, and what depends on a refreshed output is recomputed too."""

    @node("twice")
    async def twice(score):
        return score * 2

    pipeline = Pipeline([*scorer(ran).nodes, twice]).with_cache(cache)
    await pipeline.arun(query="a", doc="b")
    explained = told(await pipeline.explain(query="a", doc="b", refresh=["twice"]))
    assert explained == {"score": ("hit",), "twice": ("miss", "refresh")}
    explained = told(await pipeline.explain(query="a", doc="b", refresh=["score"]))
    assert explained["score"] == ("miss", "refresh")
    assert explained["twice"][0] == "miss"
    assert told(await pipeline.explain(query="a", doc="b")) == {"score": ("hit",), "twice": ("hit",)}


async def test_what_is_not_cached_says_so(cache, ran):
    """No cache, cache=False and an input without identity are three reasons not to be cached."""
    assert told(await scorer(ran).explain(query="a", doc="b")) == {
        "score": ("uncached", "not cached there is no cache")
    }
    uncached = scorer(ran, cache=False).with_cache(cache)
    assert told(await uncached.explain(query="a", doc="b")) == {"score": ("uncached", "not cached cache=False")}
    status, reason = told(await scorer(ran).with_cache(cache).explain(query=threading.Lock(), doc="b"))["score"]
    assert status == "uncached"
    assert reason.startswith("uncacheable input 'query'")
    assert "lock" in reason


async def test_what_follows_an_uncached_node_is_unknown(cache, ran):
    """What depends on a value that only a run will show can be neither hit nor miss, down to the end."""

    @node("now", cache=False)
    async def now(x):
        ran.note("now")
        return x

    @node("a")
    async def first(now):
        return now

    @node("b")
    async def second(a, x):
        return a

    pipeline = Pipeline([now, first, second]).with_cache(cache)
    await pipeline.arun(x=1)
    ran.take()
    assert told(await pipeline.explain(x=1)) == {
        "now": ("uncached", "not cached cache=False"),
        "first": ("unknown", "unknown now"),
        "second": ("unknown", "unknown a"),
    }
    assert ran.take() == []


async def test_what_code_refers_to_and_cannot_be_looked_into_is_listed(cache):
    """A client counts by its class alone, which is said of hits and misses."""
    client = threading.Lock()

    @node("y")
    async def work(x):
        with client:
            return x

    pipeline = Pipeline([work]).with_cache(cache)
    for _ in range(2):
        [explained] = await pipeline.explain(x=1)
        assert len(explained.opaque) == 1
        assert "client" in explained.opaque[0]
        assert "client" in str(await pipeline.explain(x=1))
        await pipeline.arun(x=1)
    assert explained.status == "hit"


@pytest.fixture
def corpus(ran):
    """A nested map between two nodes, as in retrieval."""

    @node("passages")
    async def load(path):
        ran.note("load")
        return [f"{path} {number}" for number in range(4)]

    @node("vector")
    async def encode(passage, model):
        ran.note("encode", passage)
        return Telling(passage)

    @node("index")
    async def build(vectors):
        ran.note("build")
        return len(vectors)

    every = Pipeline([encode]).as_node(
        {"passages": "passage"}, {"vector": "vectors"}, map_over="passages", name="encode_all"
    )
    return Pipeline([load, every, build], name="corpus")


# ---- item by item


async def test_each_item_of_a_map_is_explained(cache, ran):
    """Of a map of 1,000 items of which three are new, these three are misses, at their indexes."""
    pipeline = scorer(ran).with_cache(cache)
    given = {"query": "q", "doc": [str(number) for number in range(1000)]}
    await pipeline.amap(given, "doc")
    for index in (0, 500, 999):
        given["doc"][index] = f"new {index}"
    explained = await pipeline.explain(given, "doc")
    assert len(explained) == 1000
    assert [each.path for each in explained] == [("scoring", index, "score") for index in range(1000)]
    assert [each.path[1] for each in explained if each.status == "miss"] == [0, 500, 999]
    assert {reason for each in explained for reason in each.reasons} == {("input", "doc")}
    given["query"] = "other"
    explained = await pipeline.explain(given, "doc")
    assert Counter(each.reasons for each in explained) == {
        (("input", "query"),): 997,
        (("input", "doc"), ("input", "query")): 3,
    }


async def test_each_combination_of_a_product_is_explained(cache, ran):
    """In product mode the last name is the fastest, as in results."""
    pipeline = scorer(ran).with_cache(cache)
    await pipeline.amap({"query": ["a", "b"], "doc": ["c"]}, ["query", "doc"], map_mode="product")
    explained = await pipeline.explain({"query": ["a", "b"], "doc": ["c", "d"]}, ["query", "doc"], map_mode="product")
    assert told(explained) == {
        "0.score": ("hit",),
        "1.score": ("miss", "input doc"),
        "2.score": ("hit",),
        "3.score": ("miss", "input doc"),
    }


async def test_the_items_of_a_nested_map_are_explained(corpus, cache, ran):
    """When the list that is mapped is in the cache, each of its items is looked up; what follows is known too."""
    pipeline = corpus.with_cache(cache)
    await pipeline.arun(path="p", model="m")
    ran.take()
    items = [f"encode_all.{index}.encode" for index in range(4)]
    assert told(await pipeline.explain(path="p", model="m")) == {
        "load": ("hit",),
        **dict.fromkeys(items, ("hit",)),
        "build": ("hit",),
    }
    assert told(await pipeline.explain(path="p", model="new")) == {
        "load": ("hit",),
        **dict.fromkeys(items, ("miss", "input model")),
        "build": ("miss", "upstream vectors"),
    }
    assert rebuilt() == []
    assert ran.take() == []


async def test_the_items_of_a_list_that_is_to_be_computed_are_unknown(corpus, cache):
    """Nobody knows how many items a list will have that is to be computed first."""
    pipeline = corpus.with_cache(cache)
    await pipeline.arun(path="p", model="m")
    assert told(await pipeline.explain(path="new", model="m")) == {
        "load": ("miss", "input path"),
        "encode_all.encode": ("unknown", "unknown passages"),
        "build": ("unknown", "unknown vectors"),
    }


async def test_maps_in_maps_are_explained(corpus, cache, ran):
    """Paths lead through both, and one new item is one miss."""
    rows = Pipeline([corpus.nodes[1]]).as_node({"books": "passages"}, map_over="books", name="books")
    pipeline = Pipeline([rows], name="library").with_cache(cache)
    await pipeline.arun(books=[["a", "b"], ["c"]], model="m")
    assert told(await pipeline.explain(books=[["a", "b"], ["c", "d"], []], model="m")) == {
        "books.0.encode_all.0.encode": ("hit",),
        "books.0.encode_all.1.encode": ("hit",),
        "books.1.encode_all.0.encode": ("hit",),
        "books.1.encode_all.1.encode": ("miss", "input passage"),
    }


@pytest.mark.parametrize("path", ["p", "new"])
@pytest.mark.parametrize("model", ["m", "new"])
@pytest.mark.parametrize("output", [None, "index", "passages"])
async def test_a_run_does_what_was_explained(path, model, output, corpus, cache, ran):
    """Hits come from the cache, misses are stored, and what was unknown turns out to be one or the other."""
    pipeline = corpus.with_cache(cache)
    await pipeline.arun(path="p", model="m")
    explained = await pipeline.explain(path=path, model=model, output_name=output)
    _, seen = await watched(pipeline, {"path": path, "model": model}, output_name=output)
    cached, stored = set(of(seen, NodeCached)), set(of(seen, NodeStored))
    for name, (status, *_) in told(explained).items():
        assert status == "unknown" or name in (cached if status == "hit" else stored), name
    assert len(stored) == explained.misses or explained.count("unknown")


async def test_what_worker_processes_have_made_is_known(cache, ran):
    """Their calls are remembered as those of this process are, with how long they took."""
    pipeline = scorer(ran).with_cache(cache)
    async with LocalBackend(map_execution="parallel", max_workers=2) as backend:
        await pipeline.with_backend(backend).amap({"query": "a", "doc": ["b", "c", "d"]}, "doc")
    explained = await pipeline.explain({"query": "a", "doc": ["b", "c", "d", "e"]}, "doc")
    assert explained.hits == 3
    assert told(explained)["3.score"] == ("miss", "input doc")
    assert explained.nodes[3].seconds > 0


# ---- harmless


def contents(folder):
    """All files below a folder, with what is in them."""
    return {file: file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}


async def test_nothing_is_run_and_nothing_is_stored(corpus, cache, ran):
    """The cache's files are the same afterwards; one that is not there is not made."""
    pipeline = corpus.with_cache(cache)
    for given in [{"path": "p"}, {"path": "new"}]:
        await pipeline.explain(given, model="m")
    assert ran.take() == []
    assert contents(cache.path) == {}
    await pipeline.arun(path="p", model="m")
    ran.take()
    before = contents(cache.path)
    assert before
    for given in [{"path": "p", "model": "m"}, {"path": "new", "model": "m"}, {"path": "p", "model": "new"}]:
        await pipeline.explain(given)
        await pipeline.explain(given, refresh=True)
    await pipeline.explain({"path": ["p", "q"], "model": "m"}, "path")
    assert ran.take() == []
    assert contents(cache.path) == before


async def test_wrong_names_are_refused_as_in_a_run(corpus, cache):
    """A missing or unknown input, output or map_over is an error."""
    pipeline = corpus.with_cache(cache)
    with pytest.raises(DependencyError, match="model"):
        await pipeline.explain(path="p")
    with pytest.raises(DependencyError, match="modle"):
        await pipeline.explain(path="p", modle="m")
    with pytest.raises(DependencyError, match="indx"):
        await pipeline.explain(path="p", model="m", output_name="indx")
    with pytest.raises(DependencyError, match="indx"):
        await pipeline.explain(path="p", model="m", refresh=["indx"])
    with pytest.raises(ValueError, match="length"):
        await pipeline.explain({"path": ["p"], "model": ["m", "n"]}, ["path", "model"])


# ---- how it prints


async def test_seconds_are_those_that_such_calls_took(cache):
    """What would run is told with the mean of earlier calls; hits cost nothing."""

    @node("slow")
    async def slow(x):
        await anyio.sleep(0.2)
        return x

    @node("quick")
    async def quick(x):
        return x

    pipeline = Pipeline([slow, quick]).with_cache(cache)
    assert (await pipeline.explain(x=1)).seconds == 0
    await pipeline.arun(x=1)
    assert (await pipeline.explain(x=1)).seconds == 0
    explained = await pipeline.explain(x=2)
    assert explained["slow"].seconds > 0.1  # loops round what they sleep
    assert 0 < explained["quick"].seconds < explained["slow"].seconds
    assert explained.seconds == pytest.approx(explained["slow"].seconds + explained["quick"].seconds)
    many = await pipeline.explain({"x": [1, 2, 3, 4]}, "x")
    assert many.seconds == pytest.approx(3 * explained.seconds)
    with pytest.raises(KeyError):
        explained["slwo"]


async def test_it_prints_as_a_table_with_a_line_for_each_node(corpus, cache):
    """Items of a map are one line, with how many hit and why the others do not."""
    pipeline = corpus.with_cache(cache)
    await pipeline.arun(path="p", model="m")
    lines = str(await pipeline.explain(path="p", model="new")).splitlines()
    assert lines[0].startswith("corpus: 1 hit, 5 miss; what runs took ")
    assert lines[1].split() == ["node", "cache", "took", "why"]
    assert lines[2].split() == ["load", "hit"]
    assert lines[3].startswith("encode_all / encode  4 miss")
    assert lines[3].endswith("input 'model' is new (4)")
    assert lines[4].startswith("build")
    assert lines[4].endswith("input 'vectors' will be computed anew")
    assert len(lines) == 5


async def test_its_html_escapes_names(cache):
    """In a notebook names are shown, not executed."""

    @node("y")
    async def work(x):
        return x

    nested = Pipeline([work]).as_node(name="<script>alert(1)</script>")
    pipeline = Pipeline([nested], name="<i>p</i>").with_cache(cache)
    shown = (await pipeline.explain(x=1))._repr_html_()
    assert "<table" in shown
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shown
    assert "&lt;i&gt;p&lt;/i&gt;" in shown
    assert "<script" not in shown
    assert "<i>" not in shown

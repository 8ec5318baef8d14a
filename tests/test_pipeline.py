"""Building pipelines: the graph from names, nesting, adapting, configuring, and what is refused."""

import pickle
from unittest.mock import AsyncMock, MagicMock, Mock

import anyio
import cloudpickle
import pytest

from hypernodes import Pipeline, PipelineCallback, node
from hypernodes.backend import LocalBackend
from hypernodes.errors import (
    CycleError,
    DefinitionError,
    DependencyError,
    HyperNodesError,
    MapInputError,
    NodeTimeoutError,
)

pytestmark = pytest.mark.anyio


@node("cleaned")
def clean(text: str) -> str:
    return text.strip().lower()


@node("words")
def split(cleaned: str, separator: str = " ") -> list[str]:
    return cleaned.split(separator)


@node("count")
async def count(words: list[str]) -> int:
    return len(words)


def counting() -> Pipeline:
    return Pipeline([clean, split, count], name="counting")


def mentions(error: BaseException, *words: str) -> bool:
    return all(word in str(error) for word in words)


def suggests(error: BaseException, *words: str) -> bool:
    return "did you mean" in str(error).lower() and mentions(error, *words)


class TestGraph:
    async def test_order_comes_from_names(self):
        """Nodes run in the order that their names require, however they are listed."""
        expected = {"cleaned": "a b", "words": ["a", "b"], "count": 2}
        assert await Pipeline([count, split, clean]).arun(text=" A b") == expected
        assert await Pipeline([clean, split, count]).arun(text=" A b") == expected

    def test_attributes(self):
        """A pipeline tells its nodes as given, its outputs in topological order, and its name."""
        pipeline = Pipeline([count, split, clean], name="counting")
        assert pipeline.nodes == (count, split, clean)
        assert pipeline.outputs == ("cleaned", "words", "count")
        assert pipeline.name == "counting"

    def test_inputs(self):
        """Inputs are what no node produces, required or optional, with annotations and defaults."""
        inputs = counting().inputs
        assert list(inputs) == ["text", "separator"]
        assert inputs["text"].required
        assert inputs["text"].annotation is str
        assert not inputs["separator"].required
        assert inputs["separator"].default == " "

    def test_inputs_are_read_only(self):
        """The inputs of a pipeline can't be written to."""
        with pytest.raises(TypeError):
            counting().inputs["text"] = None

    def test_required_by_one_is_required(self):
        """An input that one node defaults and another needs is required."""
        pipeline = Pipeline([node("a")(lambda k=1: k), node("b")(lambda k: k)])
        assert pipeline.inputs["k"].required
        with pytest.raises(DependencyError, match="k"):
            pipeline.run()

    def test_no_inputs(self):
        """A pipeline without inputs runs without arguments."""
        pipeline = Pipeline([node("y")(lambda: 3)])
        assert dict(pipeline.inputs) == {}
        assert pipeline.run() == {"y": 3}

    async def test_diamond(self):
        """A value with two consumers is computed once and reaches both."""
        calls = []

        @node("base")
        def base(x):
            calls.append(x)
            return x + 1

        pipeline = Pipeline(
            [
                base,
                node("left")(lambda base: base * 2),
                node("right")(lambda base: base * 3),
                node("top")(lambda left, right: left + right),
            ]
        )
        assert await pipeline.arun(x=1) == {"base": 2, "left": 4, "right": 6, "top": 10}
        assert calls == [1]

    def test_long_chain(self):
        """A chain of a few thousand nodes builds and runs: nothing recurses over its length."""
        namespace = {}
        nodes = []
        for i in range(3000):
            exec(f"def step{i}(v{i}): return v{i} + 1", namespace)
            nodes.append(node(f"v{i + 1}")(namespace[f"step{i}"]))
        assert Pipeline(reversed(nodes)).run(v0=0, output_name="v3000") == 3000

    def test_nodes_from_any_iterable(self):
        """Nodes may come from a tuple or a generator."""
        assert Pipeline(n for n in (clean, split)).outputs == ("cleaned", "words")


class TestConstructionErrors:
    def test_duplicate_output(self):
        """Two nodes for one output are refused, naming the output and both nodes."""
        with pytest.raises(DefinitionError) as caught:
            Pipeline([clean, node("cleaned")(lambda words: words), split])
        assert mentions(caught.value, "cleaned", "clean", "<lambda>")

    def test_duplicate_output_of_a_nested_pipeline(self):
        """A nested pipeline's outputs count: a clash with them is refused, naming both."""

        @node("count")
        def length(words):
            return len(words)

        with pytest.raises(DefinitionError) as caught:
            Pipeline([counting(), length])
        assert mentions(caught.value, "count", "counting", "length")

    def test_same_node_twice(self):
        """The same node listed twice is a duplicate output."""
        with pytest.raises(DefinitionError, match="cleaned"):
            Pipeline([clean, clean])

    def test_cycle(self):
        """A cycle is printed in full, every node on it and none beside it."""

        @node("b")
        def make_b(a):
            return a

        @node("c")
        def make_c(b):
            return b

        @node("a")
        def make_a(c, text):
            return c

        @node("zzz")
        def bystander(a):
            return a

        with pytest.raises(CycleError) as caught:
            Pipeline([bystander, make_b, make_c, make_a])
        assert mentions(caught.value, "make_a", "make_b", "make_c")
        assert not mentions(caught.value, "bystander")
        assert isinstance(caught.value, DefinitionError)
        assert isinstance(caught.value, ValueError)

    def test_cycle_of_one(self):
        """A node that needs its own output is refused by name."""
        with pytest.raises(DefinitionError, match="feed"):

            @node("x")
            def feed(x):
                return x

            Pipeline([feed])

    def test_cycle_through_a_nested_pipeline(self):
        """A cycle that goes through a nested pipeline names it."""

        @node("text")
        def write(count):
            return "word " * count

        with pytest.raises(CycleError) as caught:
            Pipeline([counting(), write])
        assert mentions(caught.value, "counting", "write")

    def test_plain_function(self):
        """A plain function among the nodes is refused by name, with the way to make it one."""

        def plain(x):
            return x

        with pytest.raises(DefinitionError) as caught:
            Pipeline([clean, plain])
        assert mentions(caught.value, "plain", "@node")

    @pytest.mark.parametrize("nodes", [clean, None, 3, "clean"])
    def test_not_a_list(self, nodes):
        """Something that is not a list of nodes is refused."""
        with pytest.raises(DefinitionError):
            Pipeline(nodes)

    def test_bad_options(self):
        """A pipeline's options are checked when it is made."""
        for options in (
            {"timeout": 0},
            {"timeout": "soon"},
            {"limits": {"openai": 0}},
            {"limits": {"openai": "many"}},
            {"limits": 8},
            {"backend": "threads"},
            {"callbacks": print},
            {"callbacks": [PipelineCallback]},
            {"name": 3},
        ):
            with pytest.raises(DefinitionError) as caught:
                Pipeline([clean], **options)
            [option] = options
            assert mentions(caught.value, option.removesuffix("s")), options

    def test_unknown_engine_mode(self):
        """An engine mode that does not exist is refused with the ones that do."""
        with pytest.raises(DefinitionError) as caught:
            LocalBackend(node_execution="sequental")
        assert mentions(caught.value, "sequental", "'sequential'", "node_execution")


class TestNesting:
    async def test_shares_names(self):
        """A pipeline among the nodes takes inputs from its neighbours, and gives them outputs, by name."""
        outer = Pipeline([node("text")(lambda raw: raw + " "), counting(), node("odd")(lambda count: count % 2)])
        assert dict(outer.inputs).keys() == {"raw", "separator"}
        assert await outer.arun(raw="A b c") == {
            "text": "A b c ",
            "cleaned": "a b c",
            "words": ["a", "b", "c"],
            "count": 3,
            "odd": 1,
        }

    async def test_inner_default_is_an_optional_input(self):
        """A default deep inside a nested pipeline is an optional input outside."""
        outer = Pipeline([Pipeline([counting()])])
        assert not outer.inputs["separator"].required
        assert await outer.arun(text="a,b", separator=",", output_name="count") == 2

    async def test_one_pipeline_in_many_parents(self):
        """One pipeline object is nested in several parents, and twice in one, without a trace."""
        inner = counting()
        before = repr(inner)
        twice = Pipeline(
            [
                inner.as_node(
                    input_mapping={"a": "text"},
                    output_mapping={"count": "a_count", "cleaned": "a_cleaned", "words": "a_words"},
                ),
                inner.as_node(input_mapping={"b": "text"}),
            ]
        )
        other = Pipeline([inner, node("more")(lambda count: count + 1)])
        assert (await twice.arun(a="x y", b="z"))["a_count"] == 2
        assert (await twice.arun(a="x y", b="z"))["count"] == 1
        assert (await other.arun(text="x"))["more"] == 2
        assert repr(inner) == before
        assert (await inner.arun(text="x y z"))["count"] == 3

    async def test_deep(self):
        """A hundred levels of nesting build and run."""
        pipeline = counting()
        for _ in range(100):
            pipeline = Pipeline([pipeline])
        assert await pipeline.arun(text="a b", output_name="count") == 2


class TestAsNode:
    async def test_renames(self):
        """input_mapping is {outer: inner}, output_mapping {inner: outer}; others keep their names."""
        step = counting().as_node(
            input_mapping={"title": "text"}, output_mapping={"count": "title_length", "words": "title_words"}
        )
        pipeline = Pipeline([step])
        assert list(pipeline.inputs) == ["title", "separator"]
        assert await pipeline.arun(title="A b") == {
            "cleaned": "a b",
            "title_words": ["a", "b"],
            "title_length": 2,
        }

    async def test_swaps_names(self):
        """Two names may be swapped by a mapping."""
        inner = Pipeline([node("y")(lambda a, b: [a, b])])
        outer = Pipeline([inner.as_node(input_mapping={"a": "b", "b": "a"})])
        assert await outer.arun(a=1, b=2) == {"y": [2, 1]}

    async def test_rename_onto_an_inner_name(self):
        """An outer name may equal another name inside: only the boundary counts."""
        inner = Pipeline([node("y")(lambda a: a + 1), node("z")(lambda y: y * 10)])
        outer = Pipeline([inner.as_node(input_mapping={"y": "a"}, output_mapping={"y": "a"})])
        assert await outer.arun(y=1) == {"a": 2, "z": 20}

    @pytest.mark.parametrize("map_over", ["texts", ["texts"], ("texts",)])
    async def test_map_over(self, map_over):
        """map_over names outer parameters; every output becomes a list in the order of the input."""
        step = counting().as_node(input_mapping={"texts": "text"}, map_over=map_over)
        pipeline = Pipeline([step, node("total")(lambda count: sum(count))])
        assert await pipeline.arun(texts=["A b", "c"]) == {
            "cleaned": ["a b", "c"],
            "words": [["a", "b"], ["c"]],
            "count": [2, 1],
            "total": 3,
        }

    async def test_zip(self):
        """Two mapped parameters go side by side, and the others are shared."""
        inner = Pipeline([node("y")(lambda a, b, c: (a, b, c))])
        outer = Pipeline([inner.as_node(map_over=["a", "b"])])
        assert await outer.arun(a=[1, 2], b=["xy", "xy"], c=[0]) == {"y": [(1, "xy", [0]), (2, "xy", [0])]}

    async def test_product(self):
        """map_mode="product" gives every combination, the last name fastest."""
        inner = Pipeline([node("y")(lambda a, b: (a, b))])
        outer = Pipeline([inner.as_node(map_over=["b", "a"], map_mode="product")])
        assert await outer.arun(a=[1, 2], b=["x", "y"]) == {"y": [(1, "x"), (2, "x"), (1, "y"), (2, "y")]}

    async def test_mapped_over_a_generator_node(self):
        """What a generator node yields is a list that a mapped step takes."""

        @node("texts")
        def read(n):
            for i in range(n):
                yield "w " * (i + 1)

        step = counting().as_node(input_mapping={"texts": "text"}, map_over="texts")
        assert await Pipeline([read, step]).arun(n=3, output_name="count") == [1, 2, 3]

    async def test_empty(self):
        """A mapped step over an empty list gives empty lists, and the run goes on."""
        step = counting().as_node(input_mapping={"texts": "text"}, map_over="texts")
        pipeline = Pipeline([step, node("total")(lambda count: sum(count))])
        assert await pipeline.arun(texts=[]) == {"cleaned": [], "words": [], "count": [], "total": 0}

    async def test_maps_within_maps(self):
        """A mapped step of a mapped step gives lists of lists."""
        inner = Pipeline([node("y")(lambda x, k: x * k)])
        rows = Pipeline([inner.as_node(input_mapping={"row": "x"}, map_over="row")])
        table = Pipeline([rows.as_node(input_mapping={"table": "row"}, map_over="table")])
        assert await table.arun(table=[[1, 2], [], [3]], k=10) == {"y": [[10, 20], [], [30]]}

    async def test_unequal_lengths(self):
        """A zip of unequal lists inside a run is refused, with the step, the names, and the lengths."""
        inner = Pipeline([node("y")(lambda a, b: (a, b))], name="pairing")
        outer = Pipeline([inner.as_node(map_over=["a", "b"])])
        with pytest.raises(MapInputError, match="length") as caught:
            await outer.arun(a=[1, 2, 3], b=[1, 2])
        assert mentions(caught.value, "a", "b", "3", "2")

    async def test_mapped_str(self):
        """A str where a list is mapped is refused inside a run too, instead of being cut into letters."""
        step = counting().as_node(input_mapping={"texts": "text"}, map_over="texts")
        with pytest.raises(MapInputError, match="texts"):
            await Pipeline([step]).arun(texts="word")

    async def test_collect(self):
        """on_error="collect" puts None where an item failed, and the run goes on."""
        inner = Pipeline([node("y")(lambda x: 1 // x)])
        outer = Pipeline(
            [inner.as_node(map_over="x", on_error="collect"), node("n")(lambda y: sum(v is None for v in y))]
        )
        assert await outer.arun(x=[1, 0, -1, 0]) == {"y": [1, None, -1, None], "n": 2}

    async def test_raise_is_the_default(self):
        """Without on_error, the first failing item fails the run as itself, with the path to it."""
        inner = Pipeline([node("y")(lambda x: 1 // x)], name="invert")
        outer = Pipeline([inner.as_node(map_over="x", name="invert_all")], name="outer")
        with pytest.raises(ZeroDivisionError) as caught:
            await outer.arun(x=[1, 0])
        assert any("outer / invert_all[1] / <lambda>" in note for note in caught.value.__notes__)

    async def test_name_defaults_to_the_pipeline(self):
        """A step without a name shows as its pipeline's name, or as its outputs when that has none."""

        def fail(x):
            raise LookupError(x)

        named = Pipeline([Pipeline([node("y")(fail)], name="inner").as_node()], name="outer")
        unnamed = Pipeline([Pipeline([node("y")(fail), node("z")(lambda y: y)])], name="outer")
        for pipeline, path in ((named, "outer / inner / fail"), (unnamed, "outer / y+z / fail")):
            with pytest.raises(LookupError) as caught:
                await pipeline.arun(x=1)
            assert any(path in note for note in caught.value.__notes__)

    @pytest.mark.parametrize("limit", [1, 3])
    async def test_max_concurrency(self, limit):
        """max_concurrency on a mapped step is how many items are open at once, and no more."""
        together = anyio.Event()
        open_items = set()
        most = 0

        @node("y")
        async def visit(x):
            nonlocal most
            open_items.add(x)
            most = max(most, len(open_items))
            if len(open_items) == limit:
                together.set()
            await together.wait()
            await anyio.lowlevel.checkpoint()
            open_items.remove(x)
            return x

        pipeline = Pipeline([Pipeline([visit]).as_node(map_over="x", max_concurrency=limit)])
        with anyio.fail_after(10):
            await pipeline.arun(x=list(range(7)))
        assert most == limit

    def test_original_is_untouched(self):
        """as_node returns something new; the pipeline keeps its names."""
        pipeline = counting()
        pipeline.as_node(input_mapping={"texts": "text"}, output_mapping={"count": "counts"}, map_over="texts")
        assert list(pipeline.inputs) == ["text", "separator"]
        assert pipeline.outputs == ("cleaned", "words", "count")
        assert pipeline.run(text="a")["count"] == 1

    def test_mapping_is_copied(self):
        """Changing the dict after as_node changes nothing."""
        mapping = {"title": "text"}
        step = counting().as_node(input_mapping=mapping)
        mapping["title"] = "separator"
        assert list(Pipeline([step]).inputs) == ["title", "separator"]

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"input_mapping": {"title": "txt"}}, ["input_mapping", "txt", "text"]),
            ({"output_mapping": {"cuont": "n"}}, ["output_mapping", "cuont", "count"]),
            ({"map_over": "texd"}, ["map_over", "texd", "text"]),
            ({"map_over": ["text", "separater"]}, ["map_over", "separater", "separator"]),
        ],
    )
    def test_names_nothing(self, options, words):
        """A mapping that names nothing is refused with the names and what was probably meant."""
        with pytest.raises(DefinitionError) as caught:
            Pipeline([counting().as_node(**options)])
        assert suggests(caught.value, *words)

    def test_map_over_an_inner_name(self):
        """map_over takes the outer name; the renamed inner one is refused and the outer one is suggested."""
        with pytest.raises(DefinitionError) as caught:
            counting().as_node(input_mapping={"texts": "text"}, map_over="text")
        assert mentions(caught.value, "map_over", "'text'", "texts")

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"input_mapping": {"a": "text", "b": "text"}}, ["input_mapping", "text", "a", "b"]),
            ({"output_mapping": {"cleaned": "n", "count": "n"}}, ["output_mapping", "n", "cleaned", "count"]),
            ({"output_mapping": {"cleaned": "count"}}, ["count", "cleaned"]),
            ({"input_mapping": {"separator": "text"}}, ["separator"]),
            ({"map_over": "text", "map_mode": "prodcut"}, ["map_mode", "prodcut", "'product'"]),
            ({"map_over": "text", "on_error": "colect"}, ["on_error", "colect", "'collect'"]),
            ({"map_over": []}, ["map_over"]),
            ({"map_over": ["text", "text"]}, ["map_over", "text"]),
            ({"map_over": 3}, ["map_over", "3"]),
            ({"map_over": "text", "max_concurrency": 0}, ["max_concurrency", "0"]),
            ({"input_mapping": ["text"]}, ["input_mapping"]),
            ({"name": 3}, ["name", "3"]),
        ],
    )
    def test_contradictions(self, options, words):
        """Mappings that can't mean anything are refused, naming what clashes."""
        with pytest.raises(DefinitionError) as caught:
            Pipeline([counting().as_node(**options)])
        assert mentions(caught.value, *words)


class TestWith:
    def test_name(self):
        """with_name gives a renamed pipeline and leaves the old one."""
        old = counting()
        new = old.with_name("other")
        assert (old.name, new.name) == ("counting", "other")
        assert new.run(text="a b")["count"] == 2

    async def test_callbacks(self):
        """with_callbacks gives a watched pipeline and leaves the old one unwatched."""
        seen = []

        class Watch(PipelineCallback):
            def on_node_end(self, node_id, outputs, duration, ctx):
                seen.append(node_id)

        old = counting()
        new = old.with_callbacks([Watch()])
        await old.arun(text="a")
        assert seen == []
        await new.arun(text="a")
        assert seen == ["clean", "split", "count"]

    async def test_timeout(self):
        """with_timeout bounds a whole run, in seconds, and leaves the old pipeline unbounded."""
        release = anyio.Event()

        @node("y")
        async def wait(x):
            await release.wait()
            return x

        old = Pipeline([wait], name="waiting")
        with pytest.raises(NodeTimeoutError) as caught:
            await old.with_timeout(0.05).arun(x=1)
        assert isinstance(caught.value, TimeoutError)
        assert mentions(caught.value, "waiting", "0.05")
        release.set()
        assert await old.arun(x=1) == {"y": 1}

    async def test_limits(self):
        """with_limits defines a bound that nodes share by name; a run without it says which is missing."""
        together = anyio.Event()
        open_calls = most = 0

        def make(output):
            @node(output, limit="openai")
            async def call(x):
                nonlocal open_calls, most
                open_calls += 1
                most = max(most, open_calls)
                if open_calls == 2:
                    together.set()
                await together.wait()
                await anyio.lowlevel.checkpoint()
                open_calls -= 1
                return x

            return call

        old = Pipeline([make(name) for name in "abcdef"])
        with pytest.raises(DependencyError, match="openai"):
            await old.arun(x=1)
        with anyio.fail_after(10):
            assert await old.with_limits({"openai": 2}).arun(x=1) == dict.fromkeys("abcdef", 1)
        assert most == 2
        with pytest.raises(DependencyError) as caught:
            await old.with_limits({"opnai": 2}).arun(x=1)
        assert suggests(caught.value, "openai", "opnai")

    async def test_backend(self):
        """with_backend gives a pipeline that runs there and leaves the old one."""
        ready = anyio.Event()

        @node("a")
        async def wait(x):
            with anyio.move_on_after(0.05):
                await ready.wait()
            return ready.is_set()

        @node("b")
        async def tell(x):
            ready.set()

        old = Pipeline([wait, tell])
        new = old.with_backend(LocalBackend(node_execution="sequential"))
        assert (await new.arun(x=1))["a"] is False
        ready = anyio.Event()
        assert (await old.arun(x=1))["a"] is True

    def test_chain(self):
        """The fluent methods chain, and each keeps what the others set."""
        pipeline = counting().bind(separator=",").with_name("n").with_timeout(5).with_callbacks([])
        assert pipeline.name == "n"
        assert pipeline.run(text="a,b", output_name="count") == 2

    @pytest.mark.parametrize(
        "change",
        [
            lambda p: p.with_timeout(-1),
            lambda p: p.with_limits({"gpu": 0}),
            lambda p: p.with_backend("modal"),
            lambda p: p.with_callbacks(print),
            lambda p: p.with_name(3),
        ],
        ids=["timeout", "limits", "backend", "callbacks", "name"],
    )
    def test_bad_value(self, change):
        """The fluent methods check what they are given, as the constructor does."""
        with pytest.raises(DefinitionError):
            change(counting())


class TestBind:
    async def test_fixes_inputs(self):
        """A bound input is not asked for any more."""
        bound = counting().bind(text="A-b", separator="-")
        assert await bound.arun() == {"cleaned": "a-b", "words": ["a", "b"], "count": 2}
        assert not any(given.required for given in bound.inputs.values())

    def test_original_is_untouched(self):
        """Binding leaves the pipeline as it was."""
        pipeline = counting()
        pipeline.bind(text="a")
        assert pipeline.inputs["text"].required
        with pytest.raises(DependencyError, match="text"):
            pipeline.run()

    def test_same_object(self):
        """A bound client reaches the node as the very same object, never a copy."""
        client = object()
        pipeline = Pipeline([node("y")(lambda client: client)]).bind(client=client)
        assert pipeline.run()["y"] is client

    def test_adds_up(self):
        """Binding twice keeps both, and the later value wins for the same name."""
        pipeline = counting().bind(separator=",").bind(text="a,b")
        assert pipeline.run(output_name="count") == 2
        assert pipeline.bind(text="a,b,c").run(output_name="count") == 3

    def test_none_is_a_value(self):
        """None can be bound."""
        pipeline = Pipeline([node("y")(lambda x: x is None)]).bind(x=None)
        assert pipeline.run() == {"y": True}

    async def test_in_a_nested_pipeline(self):
        """What a nested pipeline has bound need not be given outside."""
        inner = counting().bind(separator=",")
        outer = Pipeline([inner.as_node(input_mapping={"texts": "text"}, map_over="texts")])
        assert await outer.arun(texts=["a,b", "c"], output_name="count") == [2, 1]

    async def test_shared_by_items(self):
        """A bound value is shared by all items of a map."""
        assert (await counting().bind(separator=",").amap({"text": ["a,b", "c"]}, "text"))["count"] == [2, 1]

    def test_unknown(self):
        """Binding a name that is no input is refused with a suggestion."""
        with pytest.raises(HyperNodesError) as caught:
            counting().bind(separater=",")
        assert isinstance(caught.value, ValueError)
        assert suggests(caught.value, "separater", "separator")

    def test_output(self):
        """An output is not an input: binding it is refused instead of silently ignored."""
        with pytest.raises(HyperNodesError, match="words"):
            counting().bind(words=["a"])


class TestReplace:
    async def test_swaps_a_node(self):
        """replace puts a fake in the place of the node with that output."""
        fake = node("words")(lambda cleaned: ["fake"] * 7)
        pipeline = counting().replace(words=fake)
        assert await pipeline.arun(text="a") == {"cleaned": "a", "words": ["fake"] * 7, "count": 7}

    async def test_original_is_untouched(self):
        """The pipeline that replace was called on keeps its node."""
        pipeline = counting()
        pipeline.replace(words=node("words")(lambda cleaned: []))
        assert (await pipeline.arun(text="a"))["count"] == 1
        assert pipeline.nodes == (clean, split, count)

    async def test_inputs_follow(self):
        """The inputs are those of the new nodes."""
        pipeline = counting().replace(cleaned=node("cleaned")(lambda title: title))
        assert list(pipeline.inputs) == ["title", "separator"]
        assert await pipeline.arun(title="a b", output_name="count") == 2

    async def test_with_a_pipeline(self):
        """A node may be replaced with a whole pipeline that gives the output."""
        inner = Pipeline([node("loud")(lambda text: text.upper()), node("cleaned")(lambda loud: loud + "!")])
        assert await counting().replace(cleaned=inner).arun(text="a", output_name="words") == ["A!"]

    async def test_several(self):
        """Several nodes are replaced in one call."""
        pipeline = counting().replace(
            cleaned=node("cleaned")(lambda text: "x y"), count=node("count")(lambda words: -len(words))
        )
        assert await pipeline.arun(text="", output_name="count") == -2

    async def test_keeps_configuration(self):
        """Name, bound values and the rest stay."""
        pipeline = counting().bind(separator=",").replace(cleaned=node("cleaned")(lambda text: text))
        assert pipeline.name == "counting"
        assert await pipeline.arun(text="a,b", output_name="count") == 2

    def test_unknown(self):
        """Replacing an output that no node gives is refused with a suggestion."""
        with pytest.raises(HyperNodesError) as caught:
            counting().replace(wrods=split)
        assert isinstance(caught.value, ValueError)
        assert suggests(caught.value, "wrods", "words")

    def test_wrong_output(self):
        """A replacement that does not give the output is refused: it would turn it into an input."""
        with pytest.raises(DefinitionError) as caught:
            counting().replace(words=node("letters")(lambda cleaned: list(cleaned)))
        assert mentions(caught.value, "words", "letters")

    async def test_with_a_plain_function(self):
        """A plain function takes the place and the output of the node that it replaces."""
        pipeline = counting().replace(words=lambda cleaned: list(cleaned))
        assert await pipeline.arun(text="abc", output_name="count") == 3

    @pytest.mark.parametrize("thing", [3, None, "split"])
    def test_not_a_node(self, thing):
        """Something that is neither node nor function is refused, with what to write instead."""
        with pytest.raises(DefinitionError) as caught:
            counting().replace(words=thing)
        assert mentions(caught.value, repr(thing), "replace(words=lambda: value)")

    @pytest.mark.parametrize("kind", [Mock, MagicMock, AsyncMock])
    async def test_with_a_mock(self, kind):
        """A mock is called by keyword with what the node in its place needed."""
        fake = kind(return_value=["a", "b"])
        pipeline = counting().replace(words=fake)
        assert pipeline.nodes[1].kind == ("async" if kind is AsyncMock else "sync")
        assert {name: given.required for name, given in pipeline.inputs.items()} == {"text": True, "separator": False}
        assert await pipeline.arun(text=" A ", separator="-", output_name="count") == 2
        fake.assert_called_once_with(cleaned="a", separator="-")

    async def test_with_keywords(self):
        """A function with **kwargs gets what the node in its place needed, besides what it names itself."""
        pipeline = counting().replace(words=lambda more=1, **given: [more, given])
        assert await pipeline.arun(text="a", more=2, output_name="words") == [2, {"cleaned": "a", "separator": " "}]

    def test_a_mock_that_fails(self):
        """What a mock raises leaves as itself."""
        with pytest.raises(ConnectionError):
            counting().replace(words=Mock(side_effect=ConnectionError)).run(text="a")

    async def test_inputs_no_longer_needed(self):
        """A faked pipeline is called and bound like the real one; what nothing needs is ignored."""
        pipeline = counting().replace(words=lambda: ["x"], cleaned=lambda: "c")
        expected = {"cleaned": "c", "words": ["x"], "count": 1}
        assert list(pipeline.inputs) == []
        assert await pipeline.arun() == expected
        assert await pipeline.arun(text="a", separator=",") == expected
        assert await pipeline.bind(text="a").arun(separator=",") == expected
        assert await pipeline.replace(count=lambda: 5).arun(text="a", output_name="count") == 5
        result = await pipeline.amap({"text": ["a", "b"]}, "text", output_name="count")
        assert result == {"count": [1, 1]}
        with pytest.raises(DependencyError):
            await pipeline.arun(title="a")

    @pytest.mark.parametrize("backend", [LocalBackend(), LocalBackend(map_execution="parallel", max_workers=1)])
    async def test_ignored_inputs_of_a_nest(self, backend):
        """A pipeline around a faked one may give it what it ignores, also to map over."""
        faked = counting().replace(cleaned=lambda: "c d")
        once = Pipeline([faked.as_node(input_mapping={"title": "text"})])
        assert await once.arun(title="a", output_name="count") == 2
        mapped = Pipeline([faked.as_node(input_mapping={"titles": "text"}, map_over="titles")], backend=backend)
        assert await mapped.arun(titles=["a"] * 3, output_name="count") == [2, 2, 2]
        rows = await Pipeline([once], backend=backend).amap({"title": ["a", "b"]}, "title", output_name="count")
        assert rows == {"count": [2, 2]}

    async def test_a_faked_nest_does_not_ask_for_what_it_ignores(self):
        """What only the replaced node needed is not made for it."""
        real = Mock(side_effect=AssertionError)
        text = node("text")(lambda url: real(url))
        pipeline = Pipeline([text, counting()]).replace(cleaned=lambda: "a b")
        assert await pipeline.arun(url="u", output_name="count") == 2
        assert not real.called

    async def test_inside_a_nest(self):
        """An output made only inside a nested pipeline is replaced there; the nest stays adapted as it was."""
        step = counting().as_node(
            name="all",
            input_mapping={"titles": "text", "by": "separator"},
            output_mapping={"count": "counts", "words": "all_words"},
            map_over="titles",
            max_concurrency=1,
            on_error="collect",
        )
        pipeline = Pipeline([Pipeline([step], name="middle"), node("total")(lambda counts: sum(counts))])
        fake = AsyncMock(side_effect=[["x"], ["x", "y"]])
        faked = pipeline.replace(words=fake)
        assert faked.run(titles=["A", "B"], by=",", output_name=["counts", "total"]) == {"counts": [1, 2], "total": 3}
        assert [call.kwargs["cleaned"] for call in fake.await_args_list] == ["a", "b"]
        assert repr(faked.nodes[0].nodes[0]) == repr(step)
        assert pipeline.run(titles=["A B"], by=" ", output_name="counts") == [2]
        failing = pipeline.replace(words=Mock(side_effect=[KeyError, ["x"]]), total=lambda counts: counts)
        assert failing.run(titles=["A", "B"], output_name="total") == [None, 1]

    async def test_by_the_name_outside(self):
        """A function, or a node that makes only a part, goes inside the nest whose output is named."""
        step = counting().as_node(output_mapping={"count": "length"})
        for new in (Mock(return_value=7), node("count")(lambda words: 7)):
            assert await Pipeline([step]).replace(length=new).arun(text="a") == {
                "cleaned": "a",
                "words": ["a"],
                "length": 7,
            }
        assert await Pipeline([counting()]).replace(count=lambda: 8).arun(text="a", output_name="count") == 8

    async def test_a_whole_nest(self):
        """A node that makes all that a nested pipeline makes takes its place."""
        whole = node(("cleaned", "words", "count"))(lambda text: (text, [], 0))
        pipeline = Pipeline([counting()]).replace(count=whole)
        assert pipeline.nodes == (whole,)
        assert await pipeline.arun(text="a", output_name="words") == []
        with pytest.raises(DefinitionError):
            Pipeline([counting()]).replace(count=whole, words=lambda: None)

    def test_inside_several_nests(self):
        """An output that several nested pipelines make inside is refused, with their names."""
        first = counting().as_node(name="first", output_mapping={"cleaned": "c1", "words": "w1", "count": "n1"})
        other = counting().as_node(name="other", output_mapping={"cleaned": "c2", "words": "w2", "count": "n2"})
        pipeline = Pipeline([first, other])
        with pytest.raises(DefinitionError) as caught:
            pipeline.replace(count=lambda: 1)
        assert mentions(caught.value, "count", "first", "other")
        result = pipeline.replace(n2=lambda: 9).run(text="a", output_name=["n1", "n2"])
        assert result == {"n1": 1, "n2": 9}

    def test_makes_a_cycle(self):
        """A replacement that closes a cycle is refused like any cycle."""
        with pytest.raises(CycleError):
            counting().replace(cleaned=node("cleaned")(lambda count: ""))


class TestImmutable:
    @pytest.mark.parametrize("name", ["name", "nodes", "inputs", "outputs", "backend", "anything"])
    def test_no_assignment(self, name):
        """Nothing can be set on a pipeline."""
        with pytest.raises(AttributeError):
            setattr(counting(), name, None)

    def test_no_deletion(self):
        """Nothing can be deleted from a pipeline."""
        with pytest.raises(AttributeError):
            del counting().name

    def test_nodes_are_copied(self):
        """Changing the list, limits or callbacks after construction changes nothing."""
        nodes, limits, callbacks = [clean, split], {"gpu": 1}, []
        pipeline = Pipeline(nodes, limits=limits, callbacks=callbacks)
        text = repr(pipeline)
        nodes.append(count)
        limits.clear()
        callbacks.append(None)
        assert repr(pipeline) == text
        assert pipeline.run(text="a") == {"cleaned": "a", "words": ["a"]}

    def test_bound_values_are_the_callers(self):
        """A run changes nothing on the pipeline: it looks the same before and after."""
        pipeline = counting()
        before = (repr(pipeline), pipeline.nodes, dict(pipeline.inputs), pipeline.outputs, hash(pipeline))
        pipeline.run(text="a b")
        pipeline.map({"text": ["a", "b"]}, "text")
        assert before == (
            repr(pipeline),
            pipeline.nodes,
            dict(pipeline.inputs),
            pipeline.outputs,
            hash(pipeline),
        )

    def test_nested_backend_is_not_written(self):
        """What a parent configures is never written onto the pipeline nested in it."""
        inner = counting()
        outer = Pipeline([inner], backend=LocalBackend(node_execution="sequential"), timeout=5, callbacks=[])
        before = repr(inner)
        outer.run(text="a")
        assert repr(inner) == before

    def test_pickle(self):
        """A pipeline, lambdas and all, survives cloudpickle: that is how it gets to another process."""
        pipeline = counting().replace(cleaned=node("cleaned")(lambda text: text + " more")).bind(separator=" ")
        copy = pickle.loads(cloudpickle.dumps(pipeline))
        assert copy.name == pipeline.name
        assert list(copy.inputs) == list(pipeline.inputs)
        assert copy.run(text="a b") == pipeline.run(text="a b")


class TestRecursion:
    async def test_replaced_by_itself(self):
        """A pipeline put into its own place is nesting, not recursion: the old one is inside the new one."""
        step = Pipeline([node("y")(lambda x: x + 1)], name="step")
        twice = step.replace(y=step)
        assert await twice.arun(x=1) == {"y": 2}

    async def test_terminating_async(self):
        """An async node may run its own pipeline, as long as that ends."""

        @node("factorial")
        async def factorial(n):
            return n * await pipeline.arun(n=n - 1, output_name="factorial") if n else 1

        pipeline = Pipeline([factorial])
        assert await pipeline.arun(n=10, output_name="factorial") == 3628800

    async def test_terminating_sync(self):
        """A sync node may run its own pipeline, as long as that ends."""

        @node("factorial")
        def factorial(n):
            return n * pipeline.run(n=n - 1, output_name="factorial") if n else 1

        pipeline = Pipeline([factorial])
        assert await pipeline.arun(n=10, output_name="factorial") == 3628800

    @pytest.mark.parametrize("call", ["arun", "run", "amap", "map"])
    async def test_endless(self, call):
        """A pipeline that calls itself without end is stopped by name, and its next run is well."""

        async def again_async(x):
            if x < 0:
                return "done"
            return await (pipeline.arun(x=x + 1) if call == "arun" else pipeline.amap({"x": [x + 1]}, "x"))

        def again_sync(x):
            if x < 0:
                return "done"
            return pipeline.run(x=x + 1) if call == "run" else pipeline.map({"x": [x + 1]}, "x")

        again = again_async if call.startswith("a") else again_sync
        pipeline = Pipeline([node("y")(again)], name="ouroboros")
        with pytest.raises(HyperNodesError, match="ouroboros"):
            await pipeline.arun(x=0)
        assert await pipeline.arun(x=-1) == {"y": "done"}


class TestRepr:
    def test_repr(self):
        """A pipeline's repr says its name, inputs and outputs."""
        text = repr(counting())
        for word in ("Pipeline", "counting", "text", "separator", "count"):
            assert word in text

    def test_repr_of_unnamed(self):
        """A pipeline without a name has a repr too, of one reasonable length whatever its size."""
        assert "cleaned" in repr(Pipeline([clean]))
        namespace = {}
        nodes = []
        for i in range(1000):
            exec(f"def f{i}(x): return x", namespace)
            nodes.append(node(f"output_{i}")(namespace[f"f{i}"]))
        assert len(repr(Pipeline(nodes))) < 20_000

    def test_notebook(self):
        """A notebook gets plain text and HTML, both with the names."""
        bundle = counting()._repr_mimebundle_(include=None, exclude=None)
        assert {"text/plain", "text/html"} <= bundle.keys()
        for text in bundle.values():
            for word in ("counting", "clean", "words", "count"):
                assert word in str(text)

    def test_notebook_escapes(self):
        """Names and defaults are escaped in HTML: nothing that a user wrote becomes markup."""

        def evil(x="<img src=x onerror=alert(1)>"):
            return x

        evil.__name__ = "<script>alert(2)</script>"
        pipeline = Pipeline(
            [Pipeline([node("y")(evil)], name="<b onclick='x'>").as_node(name="<u>")],
            name='"><script>alert(3)</script>',
        )
        html = pipeline._repr_mimebundle_()["text/html"]
        for raw in ("<script", "<img", "<b onclick", "<u>"):
            assert raw not in html

    def test_every_step_is_shown(self):
        """A nested and mapped step appears in the notebook with its name and what it maps over."""
        step = counting().as_node(input_mapping={"texts": "text"}, map_over="texts", name="count_all")
        html = Pipeline([step])._repr_mimebundle_()["text/html"]
        assert "count_all" in html
        assert "texts" in html


class TestRefusedCallbacks:
    @pytest.mark.parametrize("name", ["on_node_start", "on_map_item_end"])
    def test_async_hook(self, name):
        """A hook that is an async function would never be awaited: it is refused by name."""

        async def hook(self, *args): ...

        bad = type("Late", (PipelineCallback,), {name: hook})()
        for build in (lambda: Pipeline([clean], callbacks=[bad]), lambda: counting().with_callbacks([bad])):
            with pytest.raises(DefinitionError) as caught:
                build()
            assert mentions(caught.value, name, "Late", "plain functions")


@pytest.mark.parametrize("inputs", [{1: "a"}, {"text": "a", None: 1}])
def test_input_names_that_are_no_str(inputs):
    """A name that is no str is an unknown name like any other."""
    with pytest.raises(DependencyError) as caught:
        counting().run(inputs)
    assert mentions(caught.value, "by name", repr(list(inputs)[-1]))
    with pytest.raises(DependencyError):
        counting().map({"text": ["a"], **inputs, 2: ""}, "text")

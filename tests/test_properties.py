"""Properties that hold for every pipeline: found by generating them."""

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hypernodes import Pipeline, node
from hypernodes.backend import LocalBackend
from hypernodes.errors import MapInputError

MODES = ["sequential", "async", "threaded"]


def examples(count: int) -> settings:
    """So many examples; none of these properties is about how long anything takes."""
    return settings(deadline=None, max_examples=count, suppress_health_check=[HealthCheck.too_slow])


# --- random pipelines -------------------------------------------------------------------------------------

FORMS = ["sync", "async", "generator", "async generator", "loop", "thread"]


@dataclass(frozen=True)
class Spec:
    """One node of a random pipeline: what it is called, what it needs, how it is written."""

    output: str
    needs: tuple[str, ...]
    form: str
    defaults: tuple[str, ...] = ()

    def compute(self, values: dict[str, Any]) -> str:
        """The node's value by hand: it tells its own name and all that it was given, in order."""
        text = f"{self.output}({','.join(str(values.get(name, 'default')) for name in self.needs)})"
        return [text] if "generator" in self.form else text

    def function(self) -> Callable[..., Any]:
        """The node's function, written out as a user would write it."""
        parameters = ", ".join(
            f"{name}='default'" if name in self.defaults else name
            for name in sorted(self.needs, key=lambda name: name in self.defaults)
        )
        given = ", ".join(f"str({name})" for name in self.needs)
        text = f"'{self.output}(' + ','.join([{given}]) + ')'"
        define = "async def" if self.form.startswith("async") else "def"
        give = "yield" if "generator" in self.form else "return"
        pause = "    await checkpoint()\n" if self.form.startswith("async") else ""
        namespace = {"checkpoint": anyio.lowlevel.checkpoint}
        exec(f"{define} {self.output}_node({parameters}):\n{pause}    {give} {text}\n", namespace)
        return namespace[f"{self.output}_node"]

    def node(self):
        options = {"run_in": self.form} if self.form in ("loop", "thread") else {}
        return node(self.output, **options)(self.function())


@dataclass(frozen=True)
class Graph:
    """A random acyclic graph: specs in an order that can be computed, and the order they are listed in."""

    specs: tuple[Spec, ...]
    listed: tuple[int, ...]
    inputs: dict[str, str] = field(hash=False)

    def pipeline(self, **options: Any) -> Pipeline:
        return Pipeline([self.specs[i].node() for i in self.listed], name="random", **options)

    def by_hand(self, inputs: dict[str, Any]) -> dict[str, Any]:
        values = dict(inputs)
        for spec in self.specs:
            values[spec.output] = spec.compute(values)
        return {spec.output: values[spec.output] for spec in self.specs}

    def needed(self, output: str) -> set[str]:
        """The outputs that one output is computed from, itself included."""
        needed, stack = set(), [output]
        makers = {spec.output: spec for spec in self.specs}
        while stack:
            name = stack.pop()
            if name in makers and name not in needed:
                needed.add(name)
                stack.extend(makers[name].needs)
        return needed


@st.composite
def graphs(draw: st.DrawFn, max_size: int = 9) -> Graph:
    outer = [f"in{i}" for i in range(draw(st.integers(1, 3)))]
    optional = draw(st.sets(st.sampled_from(outer)))
    specs = []
    for i in range(draw(st.integers(1, max_size))):
        known = outer + [spec.output for spec in specs]
        needs = tuple(draw(st.lists(st.sampled_from(known), unique=True, max_size=4)))
        defaults = tuple(name for name in needs if name in optional and draw(st.booleans()))
        specs.append(Spec(f"out{i}", needs, draw(st.sampled_from(FORMS)), defaults))
    listed = draw(st.permutations(range(len(specs))))
    used = {name for spec in specs for name in spec.needs} & set(outer)
    required = {name for spec in specs for name in set(spec.needs) - set(spec.defaults)} & used
    inputs = {name: name.upper() for name in sorted(used) if name in required or draw(st.booleans())}
    return Graph(tuple(specs), tuple(listed), inputs)


# --- engine modes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("map_execution", MODES)
@pytest.mark.parametrize("node_execution", MODES)
@examples(15)
@given(graph=graphs(), n=st.integers(0, 5))
def test_engine_modes(node_execution, map_execution, graph, n):
    """In every engine mode a pipeline gives what calling its functions by hand gives, one run or mapped."""
    backend = LocalBackend(node_execution=node_execution, map_execution=map_execution, max_workers=3)
    pipeline = graph.pipeline(backend=backend)
    assert pipeline.run(graph.inputs) == graph.by_hand(graph.inputs)
    if not graph.inputs:
        return
    mapped = min(graph.inputs)
    values = [f"{mapped}-{i}" for i in range(n)]
    rows = [graph.by_hand({**graph.inputs, mapped: value}) for value in values]
    result = pipeline.map({**graph.inputs, mapped: values}, mapped)
    assert result == {output: [row[output] for row in rows] for output in pipeline.outputs}


@pytest.mark.parametrize(
    ("node_execution", "map_execution"),
    [("parallel", "async"), ("async", "parallel"), ("parallel", "parallel")],
)
@pytest.mark.skipif(os.name != "posix", reason="worker processes are POSIX only")
@examples(4)
@given(graph=graphs(max_size=5), n=st.integers(0, 5))
def test_engine_modes_with_processes(node_execution, map_execution, graph, n):
    """In worker processes too a pipeline gives what calling its functions by hand gives."""

    async def main():
        async with LocalBackend(node_execution=node_execution, map_execution=map_execution, max_workers=2) as backend:
            pipeline = graph.pipeline(backend=backend)
            assert await pipeline.arun(graph.inputs) == graph.by_hand(graph.inputs)
            if graph.inputs:
                mapped = min(graph.inputs)
                values = [f"{mapped}-{i}" for i in range(n)]
                rows = [graph.by_hand({**graph.inputs, mapped: value}) for value in values]
                result = await pipeline.amap({**graph.inputs, mapped: values}, mapped)
                assert result == {output: [row[output] for row in rows] for output in pipeline.outputs}

    anyio.run(main)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@examples(30)
@given(graph=graphs())
def test_event_loops(backend, graph):
    """On asyncio and on trio a pipeline gives the same outputs."""
    assert anyio.run(graph.pipeline().arun, graph.inputs, backend=backend) == graph.by_hand(graph.inputs)


@examples(40)
@given(graph=graphs(), cut=st.integers(0, 9))
def test_nesting_changes_nothing(graph, cut):
    """Moving the first nodes of a pipeline into a nested one changes no output."""
    cut = min(cut, len(graph.specs))
    inside = [spec.node() for spec in graph.specs[:cut]]
    outside = [spec.node() for spec in graph.specs[cut:]]
    nested = Pipeline([*outside, *([Pipeline(inside, name="inside")] if inside else [])])
    assert nested.run(graph.inputs) == graph.by_hand(graph.inputs)


@examples(40)
@given(graph=graphs(), data=st.data())
def test_renaming_changes_nothing(graph, data):
    """Behind as_node with every name renamed, a pipeline computes what it computed."""
    pipeline = graph.pipeline()
    old_inputs, old_outputs = list(pipeline.inputs), list(pipeline.outputs)
    new_inputs = data.draw(st.permutations([f"new_{name}" for name in old_inputs]))
    new_outputs = data.draw(st.permutations([f"new_{name}" for name in old_outputs]))
    step = pipeline.as_node(
        input_mapping=dict(zip(new_inputs, old_inputs, strict=True)),
        output_mapping=dict(zip(old_outputs, new_outputs, strict=True)),
    )
    outer_name = dict(zip(old_inputs, new_inputs, strict=True))
    result = Pipeline([step]).run({outer_name[name]: value for name, value in graph.inputs.items()})
    expected = graph.by_hand(graph.inputs)
    assert result == {new: expected[old] for old, new in zip(old_outputs, new_outputs, strict=True)}


# --- plans ------------------------------------------------------------------------------------------------


@examples(60)
@given(graph=graphs())
def test_outputs_are_in_topological_order(graph):
    """outputs lists every output once, each after what it is computed from."""
    outputs = graph.pipeline().outputs
    assert sorted(outputs) == sorted(spec.output for spec in graph.specs)
    for spec in graph.specs:
        for name in set(spec.needs) & set(outputs):
            assert outputs.index(name) < outputs.index(spec.output)


@examples(60)
@given(graph=graphs())
def test_inputs_are_what_nobody_makes(graph):
    """inputs is exactly what is needed and made by no node; required unless every node defaults it."""
    pipeline = graph.pipeline()
    outputs = {spec.output for spec in graph.specs}
    needed = {name for spec in graph.specs for name in spec.needs} - outputs
    required = {name for name in needed for spec in graph.specs if name in spec.needs and name not in spec.defaults}
    assert set(pipeline.inputs) == needed
    assert {name for name, each in pipeline.inputs.items() if each.required} == required


@examples(60)
@given(graph=graphs(), data=st.data())
def test_selection_runs_exactly_what_is_needed(graph, data):
    """Selecting outputs runs the nodes that they are computed from, each once, and no other."""
    ran = []

    def recorded(spec: Spec):
        namespace = {"ran": ran}
        exec(f"def run({', '.join(spec.needs)}):\n    ran.append({spec.output!r})\n", namespace)
        return node(spec.output, run_in="loop")(namespace["run"])

    pipeline = Pipeline([recorded(graph.specs[i]) for i in graph.listed])
    selection = data.draw(st.lists(st.sampled_from(pipeline.outputs), min_size=1, unique=True))
    result = pipeline.run(dict.fromkeys(pipeline.inputs, 1), output_name=selection)
    assert set(result) == set(selection)
    assert sorted(ran) == sorted(set().union(*(graph.needed(output) for output in selection)))


@examples(40)
@given(graph=graphs())
def test_planning_is_pure(graph):
    """Building pipelines from the same nodes and running them leaves no trace on nodes or pipelines."""
    nodes = [spec.node() for spec in graph.specs]
    before = [(repr(each), dict(vars(each.func)), dict(each.inputs)) for each in nodes]
    first = Pipeline(nodes, name="random")
    looks = (repr(first), first.outputs, dict(first.inputs), first.nodes)
    expected = graph.by_hand(graph.inputs)
    assert first.run(graph.inputs) == expected
    second = Pipeline(reversed(nodes), name="random")
    assert second.run(graph.inputs) == expected
    assert first.run(graph.inputs) == expected
    assert (repr(first), first.outputs, dict(first.inputs), first.nodes) == looks
    assert [(repr(each), dict(vars(each.func)), dict(each.inputs)) for each in nodes] == before


# --- maps -------------------------------------------------------------------------------------------------

names = ["a", "b", "c"]
lists = st.lists(st.integers(), max_size=5)


triples = Pipeline([node("triple", run_in="loop")(lambda a, b, c: (a, b, c))])


@examples(60)
@given(values=st.tuples(lists, lists, lists), over=st.permutations(names), k=st.integers(1, 3))
def test_product_order(values, over, k):
    """A product goes through its rows as itertools.product does over the names in the order of map_over."""
    inputs = dict(zip(names, values, strict=True))
    mapped, shared = over[:k], over[k:]
    expected = []
    for row in itertools.product(*(inputs[name] for name in mapped)):
        given_row = {**{name: inputs[name] for name in shared}, **dict(zip(mapped, row, strict=True))}
        expected.append(tuple(given_row[name] for name in names))
    assert triples.map(inputs, mapped, map_mode="product")["triple"] == expected
    with triples.stream(inputs, mapped, map_mode="product") as items:
        assert [item.outputs["triple"] for item in items] == expected


@examples(60)
@given(values=st.tuples(lists, lists, lists), over=st.permutations(names), lazy=st.sets(st.sampled_from(names)))
def test_zip_is_strict(values, over, lazy):
    """A zip goes through its rows as zip(strict=True) does, or refuses unequal lengths; it never cuts."""
    lengths = {len(value) for value in values}
    inputs = {name: (x for x in value) if name in lazy else value for name, value in zip(names, values, strict=True)}
    if len(lengths) > 1:
        with pytest.raises(MapInputError, match="length"):
            triples.map(inputs, over)
    else:
        assert triples.map(inputs, over)["triple"] == list(zip(*values, strict=True))


@examples(30)
@given(
    wrong=st.sets(st.integers(0, 11)),
    n=st.integers(0, 12),
    max_concurrency=st.sampled_from([None, 1, 3]),
    mode=st.sampled_from(MODES),
)
def test_collect_loses_nothing(wrong, n, max_concurrency, mode):
    """With collect every item is either a value at its position or one failure with its index and inputs."""

    @node("y")
    def check(x):
        if x in wrong:
            raise LookupError(x)
        return -x

    pipeline = Pipeline([check], backend=LocalBackend(map_execution=mode, max_workers=2))
    result = pipeline.map({"x": list(range(n))}, "x", on_error="collect", max_concurrency=max_concurrency)
    assert result["y"] == [None if x in wrong else -x for x in range(n)]
    assert [failure.index for failure in result.failures] == sorted(x for x in wrong if x < n)
    for failure in result.failures:
        assert failure.inputs["x"] == failure.index
        assert failure.error.args == (failure.index,)


@examples(30)
@given(n=st.integers(0, 30), take=st.integers(0, 30), max_concurrency=st.integers(1, 6), ordered=st.booleans())
def test_stream_gives_each_item_once(n, take, max_concurrency, ordered):
    """However many are taken, a stream gives each item once, in order if asked, and closes its source."""
    closed = []

    def source():
        try:
            yield from range(n)
        finally:
            closed.append(True)

    pipeline = Pipeline([node("y")(lambda x: x * x)])
    with pipeline.stream({"x": source()}, "x", ordered=ordered, max_concurrency=max_concurrency) as items:
        got = list(itertools.islice(items, take))
    assert len(got) == min(n, take)
    assert len({item.index for item in got}) == len(got)
    assert all(item.outputs == {"y": item.index**2} for item in got)
    if ordered:
        assert [item.index for item in got] == list(range(len(got)))
    assert closed == [True] or not got


# --- paths ------------------------------------------------------------------------------------------------

step_names = st.text("abcdefgh_אבג", min_size=1, max_size=8)


@examples(40)
@given(levels=st.lists(st.tuples(step_names, st.none() | st.integers(0, 3)), min_size=1, max_size=5))
def test_path_of_a_failure(levels):
    """A failure's note spells the path: each step by name, [index] where it is mapped, then the node."""

    @node("y")
    async def fail(x):
        if x == "fail":
            raise LookupError
        return x

    pipeline, value = Pipeline([fail]), "fail"
    for name, index in reversed(levels[1:]):
        if index is None:
            pipeline = Pipeline([pipeline.as_node(name=name)])
        else:
            value = [_quiet(value)] * index + [value]
            pipeline = Pipeline([pipeline.as_node(name=name, map_over="x")])
    name, index = levels[0]
    pipeline = pipeline.with_name(name)
    with pytest.raises(LookupError) as caught:
        if index is None:
            pipeline.run(x=value)
        else:
            pipeline.map({"x": [_quiet(value)] * index + [value]}, "x")
    path = " / ".join([*(name if i is None else f"{name}[{i}]" for name, i in levels), "fail"])
    [note] = caught.value.__notes__
    assert note == f"in node 'fail' at {path}"


def _quiet(value: Any) -> Any:
    """A value of the same shape in which nothing fails."""
    return [_quiet(each) for each in value] if isinstance(value, list) else 0

"""What can be watched of a run: events with their paths and order, callbacks, and their context."""

import gc
import itertools
import logging
import pickle
import threading
import time

import anyio
import pytest

from hypernodes import CallbackContext, DiskCache, Pipeline, PipelineCallback, node
from hypernodes.backend import LocalBackend
from hypernodes.events import (
    ItemFailed,
    ItemFinished,
    ItemStarted,
    MapFinished,
    MapStarted,
    NodeCancelled,
    NodeChunk,
    NodeFailed,
    NodeFinished,
    NodeStarted,
    PipelineFailed,
    PipelineFinished,
    PipelineStarted,
    RunFinished,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

PATIENCE_S = 20  # only a hang takes this long


class Boom(Exception):
    """A failure of the user's own."""


@node("text")
async def clean(raw):
    return raw.strip()


@node("words")
def split(text):
    return text.split()


@node("vector")
async def encode(word):
    return len(word)


@node("total")
def add(vectors):
    return sum(vectors)


encode_one = Pipeline([encode], name="encode_one")
retrieval = Pipeline(
    [
        clean,
        split,
        encode_one.as_node({"words": "word"}, {"vector": "vectors"}, map_over="words", name="encode_all"),
        add,
    ],
    name="retrieval",
)


async def watched(pipeline, inputs):
    """All events of a run; what it raised comes last, if it did."""
    seen = []
    with anyio.fail_after(PATIENCE_S):
        try:
            async with pipeline.aevents(inputs) as events:
                async for event in events:
                    seen.append(event)  # noqa: PERF401 - keeps what came before an error
        except Boom as error:
            seen.append(error)
    return seen


def kinds_and_paths(seen):
    return [(type(event), event.path) for event in seen]


class Log(PipelineCallback):
    """Writes down every hook it is called with."""

    def __init__(self):
        self.calls = []
        self.contexts = []
        self.threads = set()

    def note(self, ctx, *call):
        assert isinstance(ctx, CallbackContext)
        self.calls.append(call)
        self.contexts.append(ctx)
        self.threads.add(threading.get_ident())

    def names(self):
        return [call[0] for call in self.calls]

    def on_pipeline_start(self, pipeline_id, inputs, ctx):
        self.note(ctx, "pipeline_start", pipeline_id, dict(inputs))

    def on_pipeline_end(self, pipeline_id, outputs, duration, ctx):
        assert duration >= 0
        self.note(ctx, "pipeline_end", pipeline_id, dict(outputs))

    def on_node_start(self, node_id, inputs, ctx):
        self.note(ctx, "node_start", node_id, dict(inputs))

    def on_node_end(self, node_id, outputs, duration, ctx):
        assert duration >= 0
        self.note(ctx, "node_end", node_id, dict(outputs))

    def on_node_chunk(self, node_id, chunk, ctx):
        self.note(ctx, "node_chunk", node_id, chunk)

    def on_error(self, node_id, error, ctx):
        self.note(ctx, "error", node_id, error)

    def on_nested_pipeline_start(self, parent_id, child_pipeline_id, ctx):
        self.note(ctx, "nested_start", parent_id, child_pipeline_id)

    def on_nested_pipeline_end(self, parent_id, child_pipeline_id, duration, ctx):
        assert duration >= 0
        self.note(ctx, "nested_end", parent_id, child_pipeline_id)

    def on_map_start(self, total_items, ctx):
        self.note(ctx, "map_start", total_items)

    def on_map_item_start(self, item_index, ctx):
        self.note(ctx, "item_start", item_index)

    def on_map_item_end(self, item_index, duration, ctx):
        assert duration >= 0
        self.note(ctx, "item_end", item_index)

    def on_map_end(self, total_duration, ctx):
        assert total_duration >= 0
        self.note(ctx, "map_end")


# --- events -----------------------------------------------------------------------------------------------


async def test_a_run_tells_its_steps_in_order_with_their_paths():
    """Events come in the order of what happens, each with the path from the outermost pipeline."""
    one_word = retrieval.with_backend(LocalBackend(node_execution="sequential", map_execution="sequential"))
    seen = await watched(one_word, {"raw": " to be "})
    top = ("retrieval",)
    nested = ("retrieval", "encode_all")
    assert kinds_and_paths(seen) == [
        (PipelineStarted, top),
        (NodeStarted, (*top, "clean")),
        (NodeFinished, (*top, "clean")),
        (NodeStarted, (*top, "split")),
        (NodeFinished, (*top, "split")),
        (NodeStarted, nested),
        (PipelineStarted, nested),
        (MapStarted, nested),
        (ItemStarted, (*nested, 0)),
        (NodeStarted, (*nested, 0, "encode")),
        (NodeFinished, (*nested, 0, "encode")),
        (ItemFinished, (*nested, 0)),
        (ItemStarted, (*nested, 1)),
        (NodeStarted, (*nested, 1, "encode")),
        (NodeFinished, (*nested, 1, "encode")),
        (ItemFinished, (*nested, 1)),
        (MapFinished, nested),
        (PipelineFinished, nested),
        (NodeFinished, nested),
        (NodeStarted, (*top, "add")),
        (NodeFinished, (*top, "add")),
        (PipelineFinished, top),
        (RunFinished, top),
    ]
    by_kind = {(type(event), event.path): event for event in seen}
    assert by_kind[NodeStarted, (*top, "split")].inputs == {"text": "to be"}
    assert by_kind[NodeFinished, (*top, "split")].outputs == {"words": ["to", "be"]}
    assert by_kind[NodeFinished, nested].outputs == {"vectors": [2, 2]}
    assert by_kind[MapStarted, nested].total_items == 2
    assert by_kind[ItemStarted, (*nested, 1)].index == 1
    assert by_kind[PipelineStarted, top].inputs == {"raw": " to be "}
    assert by_kind[PipelineFinished, top].outputs["total"] == 4


async def test_events_carry_one_run_id_and_growing_times():
    """All events of a run share its id, runs differ in it, and times are unix seconds that never go back."""
    before = time.time()
    first, second = await watched(retrieval, {"raw": "a b"}), await watched(retrieval, {"raw": "a b"})
    assert len({event.run_id for event in first}) == 1
    assert first[0].run_id != second[0].run_id
    times = [event.at for event in first]
    assert times == sorted(times)
    assert before - 1 <= times[0] <= times[-1] <= time.time() + 1


async def test_events_survive_pickling():
    """Every event can be sent to another process as it is."""
    for event in await watched(retrieval, {"raw": "a b"}):
        assert pickle.loads(pickle.dumps(event)) == event


async def test_the_last_event_holds_the_result():
    """The last event holds what ``arun`` would have returned, bare with a single output name."""
    seen = await watched(retrieval, {"raw": "to be"})
    assert type(seen[-1]) is RunFinished
    assert seen[-1].result == await retrieval.arun(raw="to be")
    async with retrieval.aevents({"raw": "to be"}, output_name="total") as events:
        last = [event async for event in events][-1]
    assert last.result == 4


async def test_events_come_as_they_happen():
    """An event is there while the run goes on: the run waits for its reader to have seen the first node."""
    seen_first = anyio.Event()

    @node("second")
    async def wait(first):
        await seen_first.wait()
        return first + 1

    pipeline = Pipeline([node("first")(lambda x: x), wait], name="p")
    with anyio.fail_after(PATIENCE_S):
        async with pipeline.aevents(x=1) as events:
            async for event in events:
                if type(event) is NodeFinished and event.outputs == {"first": 1}:
                    seen_first.set()
    assert event.result == {"first": 1, "second": 2}


def test_events_can_be_read_from_sync_code():
    """``events`` gives in a script what ``aevents`` gives, the last one holding the result."""
    with retrieval.events(raw="to be") as events:
        seen = list(events)
    assert type(seen[0]) is PipelineStarted
    assert seen[-1].result["total"] == 4


async def failing_run(on_error="raise"):
    @node("vector")
    async def fail(word):
        if word == "b":
            raise Boom(word)
        return word

    inner = Pipeline([fail], name="inner").as_node({"words": "word"}, map_over="words", name="all", on_error=on_error)
    outer = Pipeline([inner, node("n")(lambda vector: len(vector))], name="outer")
    outer = outer.with_backend(LocalBackend(node_execution="sequential", map_execution="sequential"))
    return await watched(outer, {"words": ["a", "b", "c"]})


async def test_a_failing_run_tells_where_it_failed_on_every_level():
    """A failure is told from the node outwards, its origin is the innermost node, and then it is raised."""
    *seen, raised = await failing_run()
    failure = seen.index(next(event for event in seen if type(event) is NodeFailed))
    assert kinds_and_paths(seen[failure:]) == [
        (NodeFailed, ("outer", "all", 1, "fail")),
        (ItemFailed, ("outer", "all", 1)),
        (PipelineFailed, ("outer", "all")),
        (NodeFailed, ("outer", "all")),
        (PipelineFailed, ("outer",)),
    ]
    assert [event.origin for event in seen[failure:] if type(event) is NodeFailed] == [True, False]
    assert all(event.error is raised for event in seen[failure:])
    assert isinstance(raised, Boom)


async def test_a_collected_failure_ends_its_item_only():
    """With ``on_error="collect"`` a failed item is told as failed, and the map goes on to its end."""
    seen = await failing_run(on_error="collect")
    assert [event.path for event in seen if type(event) is ItemFailed] == [("outer", "all", 1)]
    assert [event.index for event in seen if type(event) is ItemFinished] == [0, 2]
    assert [event.path for event in seen if type(event) is PipelineFailed] == []
    assert seen[-1].result == {"vector": ["a", None, "c"], "n": 3}


async def test_a_cancelled_sibling_is_told_as_cancelled():
    """A node that another's failure stopped is told as cancelled, never as failed or finished."""
    started = anyio.Event()

    @node("slow")
    async def hang(x):
        started.set()
        await anyio.sleep_forever()

    @node("bad")
    async def fail(x):
        await started.wait()
        raise Boom

    seen = await watched(Pipeline([hang, fail], name="p"), {"x": 1})
    told = [type(event) for event in seen[:-1] if event.path == ("p", "hang")]
    assert told == [NodeStarted, NodeCancelled]


def everything_that_starts_ends(seen):
    """Each started node, item, map and pipeline has exactly one end, and no end comes without a start."""
    started, ended = {}, {}
    starts = {NodeStarted: "node", ItemStarted: "item", PipelineStarted: "pipeline"}
    ends = {
        NodeFinished: "node",
        NodeFailed: "node",
        NodeCancelled: "node",
        ItemFinished: "item",
        ItemFailed: "item",
        PipelineFinished: "pipeline",
        PipelineFailed: "pipeline",
    }
    for event in seen:
        kind = type(event)
        if kind in starts:
            key = starts[kind], event.path
            assert key not in started, f"{key} started twice"
            started[key] = event
        if kind in ends:
            key = ends[kind], event.path
            assert key in started, f"{key} ended and never started"
            assert key not in ended, f"{key} ended twice"
            ended[key] = event
    return set(started) - set(ended)


@pytest.mark.parametrize("mode", ["sequential", "async", "threaded", "parallel"])
async def test_everything_that_starts_ends_in_every_mode(mode):
    """In each mode every node, item and pipeline that is told to start is told to end, once, in order."""
    backend = LocalBackend(node_execution=mode, map_execution=mode, max_workers=2)
    seen = await watched(retrieval.with_backend(backend), {"raw": "in the beginning was"})
    assert everything_that_starts_ends(seen) == set()
    paths = {event.path for event in seen}
    assert {("retrieval", "encode_all", index, "encode") for index in range(4)} <= paths
    assert seen[-1].result["total"] == 17
    for index in range(4):
        item = [type(e) for e in seen if e.path[:3] == ("retrieval", "encode_all", index)]
        assert item == [ItemStarted, NodeStarted, NodeFinished, ItemFinished]


async def test_a_sequential_run_is_strictly_sequential():
    """In sequential modes nothing starts before what was started earlier has ended, but what encloses it."""
    pipeline = Pipeline(
        [retrieval, node("shout")(lambda raw: raw.upper()), node("letters")(lambda raw: list(raw))],
        name="all",
    )
    log = Log()
    backend = LocalBackend(node_execution="sequential", map_execution="sequential")
    seen = await watched(pipeline.with_backend(backend).with_callbacks([log]), {"raw": "let there be light"})
    open_places = []
    for event in seen:
        match event:
            case NodeStarted() | ItemStarted() | PipelineStarted() | MapStarted():
                if open_places:
                    last = open_places[-1]
                    assert event.path[: len(last)] == last, f"{event.path} started inside {last}"
                open_places.append(event.path)
            case NodeFinished() | ItemFinished() | PipelineFinished() | MapFinished():
                assert open_places.pop() == event.path
    assert open_places == []
    indexes = [call[1] for call in log.calls if call[0] in ("item_start", "item_end")]
    assert indexes == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("run_in", ["loop", "thread", "auto", "process"])
async def test_pieces_of_a_sync_generator_are_events(run_in):
    """Each piece a generator yields is an event in its order, wherever the generator runs."""

    def count(n):
        for number in range(n):
            yield number * 10

    seen = await watched(Pipeline([node("numbers", run_in=run_in)(count)], name="p"), {"n": 4})
    chunks = [event for event in seen if type(event) is NodeChunk]
    assert [event.chunk for event in chunks] == [0, 10, 20, 30]
    assert {event.path for event in chunks} == {("p", "count")}
    assert seen[-1].result == {"numbers": [0, 10, 20, 30]}


@pytest.mark.parametrize("mode", ["async", "threaded", "parallel"])
async def test_pieces_of_an_async_generator_in_a_map_are_events(mode):
    """Pieces of generators in mapped items are events at the item's path, in each mode."""

    @node("letters")
    async def spell(word):
        for letter in word:
            await anyio.sleep(0)
            yield letter

    inner = Pipeline([spell], name="inner")
    outer = Pipeline([inner.as_node({"words": "word"}, map_over="words")], name="outer")
    backend = LocalBackend(node_execution=mode, map_execution=mode, max_workers=2)
    seen = await watched(outer.with_backend(backend), {"words": ["abc", "de"]})
    for index, word in enumerate(["abc", "de"]):
        path = ("outer", "inner", index, "spell")
        assert [event.chunk for event in seen if type(event) is NodeChunk and event.path == path] == list(word)
    assert seen[-1].result == {"letters": [["a", "b", "c"], ["d", "e"]]}


@pytest.mark.parametrize("form", ["async", "thread", "process", "parallel map"])
async def test_a_piece_is_an_event_before_the_next_one_is_made(form, tmp_path):
    """A piece is told as it comes: the generator goes on only once its reader has seen the last piece."""
    seen_one, seen_in_thread, sign = anyio.Event(), threading.Event(), tmp_path / "seen"

    async def async_pieces(x):
        yield 1
        await seen_one.wait()
        yield 2

    def thread_pieces(x):
        yield 1
        assert seen_in_thread.wait(PATIENCE_S)
        yield 2

    def process_pieces(x):
        yield 1
        give_up = time.monotonic() + PATIENCE_S
        while not x.exists():
            assert time.monotonic() < give_up
            time.sleep(0.005)
        yield 2

    pieces = {
        "async": node("y")(async_pieces),
        "thread": node("y", run_in="thread")(thread_pieces),
        "process": node("y", run_in="process")(process_pieces),
        "parallel map": node("y")(process_pieces),
    }[form]
    pipeline, inputs, answer = Pipeline([pieces], name="inner"), {"x": sign}, [1, 2]
    if form == "parallel map":
        backend = LocalBackend(map_execution="parallel", max_workers=1)
        pipeline = Pipeline([pipeline.as_node({"xs": "x"}, map_over="xs")], backend=backend)
        inputs, answer = {"xs": [sign]}, [[1, 2]]
    with anyio.fail_after(PATIENCE_S):
        async with pipeline.aevents(inputs) as events:
            async for event in events:
                if type(event) is NodeChunk and event.chunk == 1:
                    seen_one.set()
                    seen_in_thread.set()
                    sign.touch()
    assert event.result == {"y": answer}


async def test_leaving_events_early_cancels_the_run():
    """A reader that leaves takes the run with it: what it started is cancelled before the block is left."""
    started, ended = anyio.Event(), []

    @node("y")
    async def hang(x):
        started.set()
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(x)

    with anyio.fail_after(PATIENCE_S):
        async with Pipeline([hang]).aevents(x=1) as events:
            async for _ in events:
                await started.wait()
                break
        assert ended == [1]


async def test_a_readers_failure_cancels_the_run_and_comes_out_bare():
    """An exception in the reader's own block ends the run and is raised as itself."""
    started, ended = anyio.Event(), []

    @node("y")
    async def hang(x):
        started.set()
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(x)

    with anyio.fail_after(PATIENCE_S), pytest.raises(Boom):
        async with Pipeline([hang]).aevents(x=1) as events:
            async for _ in events:
                await started.wait()
                raise Boom
    assert ended == [1]


async def test_a_wrong_call_of_events_is_refused_like_any_other():
    """A missing input is an error of ``aevents`` as of ``arun``."""
    with pytest.raises(ValueError, match="raw"):
        async with retrieval.aevents() as events:
            async for _ in events:
                pass


# --- callbacks --------------------------------------------------------------------------------------------


async def test_callbacks_are_called_for_every_step():
    """Each hook is called at its time with the ids and values that belong to it."""
    log = Log()
    backend = LocalBackend(node_execution="sequential", map_execution="sequential")
    answer = await retrieval.with_backend(backend).with_callbacks([log]).arun(raw=" to be ")
    nested = "retrieval / encode_all"
    assert log.calls == [
        ("pipeline_start", "retrieval", {"raw": " to be "}),
        ("node_start", "clean", {"raw": " to be "}),
        ("node_end", "clean", {"text": "to be"}),
        ("node_start", "split", {"text": "to be"}),
        ("node_end", "split", {"words": ["to", "be"]}),
        ("node_start", "encode_all", {"words": ["to", "be"]}),
        ("nested_start", "retrieval", nested),
        ("map_start", 2),
        ("item_start", 0),
        ("node_start", "encode", {"word": "to"}),
        ("node_end", "encode", {"vector": 2}),
        ("item_end", 0),
        ("item_start", 1),
        ("node_start", "encode", {"word": "be"}),
        ("node_end", "encode", {"vector": 2}),
        ("item_end", 1),
        ("map_end",),
        ("nested_end", "retrieval", nested),
        ("node_end", "encode_all", {"vectors": [2, 2]}),
        ("node_start", "add", {"vectors": [2, 2]}),
        ("node_end", "add", {"total": 4}),
        ("pipeline_end", "retrieval", answer),
    ]


async def test_callbacks_of_a_top_level_map():
    """A map of the outermost pipeline is a pipeline with items; a stream of unknown length has no total."""
    log = Log()
    pipeline = encode_one.with_callbacks([log]).with_backend(
        LocalBackend(node_execution="sequential", map_execution="sequential")
    )
    await pipeline.amap({"word": ["a", "bc"]}, "word")
    assert log.names() == [
        "pipeline_start",
        "map_start",
        *["item_start", "node_start", "node_end", "item_end"] * 2,
        "map_end",
        "pipeline_end",
    ]
    assert log.calls[-1] == ("pipeline_end", "encode_one", {"vector": [1, 2]})
    log.calls.clear()
    async with pipeline.astream({"word": iter(["a", "bc"])}, "word") as items:
        assert [item.outputs["vector"] async for item in items] == [1, 2]
    assert ("map_start", None) in log.calls
    assert log.names().count("item_end") == 2


@pytest.mark.parametrize("mode", ["sequential", "async", "threaded", "parallel"])
async def test_callbacks_run_on_the_loops_thread_never_concurrently(mode):
    """Hooks are called on the loop's thread, one after the other, wherever nodes and items run."""
    log = Log()
    inside = 0

    class Nosy(Log):
        def note(self, ctx, *call):
            nonlocal inside
            inside += 1
            assert inside == 1
            super().note(ctx, *call)
            time.sleep(0.0002)
            inside -= 1

    log = Nosy()
    backend = LocalBackend(node_execution=mode, map_execution=mode, max_workers=2)
    await retrieval.with_backend(backend).with_callbacks([log]).amap({"raw": ["a b c", "d e"]}, "raw")
    assert log.threads == {threading.get_ident()}
    assert log.names().count("node_end") == 2 * 4 + 5
    assert log.names().count("item_end") == 2 + 5


async def test_on_error_is_called_once_for_each_failure():
    """A failure three levels down is one error, of the innermost node, and nothing above it ends well."""
    log = Log()

    @node("y")
    async def fail(x):
        raise Boom(x)

    inner = Pipeline([fail], name="inner")
    middle = Pipeline([inner.as_node(map_over="x")], name="middle")
    with pytest.raises(Boom) as raised:
        await Pipeline([middle], name="outer", callbacks=[log]).arun(x=[1])
    errors = [(call, ctx) for call, ctx in zip(log.calls, log.contexts, strict=True) if call[0] == "error"]
    assert [call for call, _ in errors] == [("error", "fail", raised.value)]
    assert errors[0][1].current_pipeline_id == "outer / middle / inner[0]"
    assert not {"pipeline_end", "nested_end", "node_end", "item_end", "map_end"} & set(log.names())


async def test_on_error_is_called_for_each_collected_item():
    """A collecting map reports each failed item once."""
    log = Log()

    @node("y")
    async def fail(x):
        if x % 2:
            raise Boom(x)
        return x

    await Pipeline([fail], callbacks=[log]).amap({"x": range(6)}, "x", on_error="collect")
    assert [call[2].args for call in log.calls if call[0] == "error"] == [(1,), (3,), (5,)]
    assert log.names().count("item_start") == 6
    assert log.names().count("item_end") == 3


async def test_the_context_is_right_when_branches_and_items_overlap():
    """Nested pipelines and items that run at the same time each see their own place, depth and parents."""
    seen = {}
    everyone, count = anyio.Event(), 0

    async def meet():
        nonlocal count
        count += 1
        if count == 6:
            everyone.set()
        await everyone.wait()

    def branch(name):
        async def work(x):
            await meet()
            return x

        return Pipeline([node(f"{name}_y")(work)], name=name)

    class Places(PipelineCallback):
        def on_node_end(self, node_id, outputs, duration, ctx):
            if node_id == "work":
                (output,) = outputs
                seen[output, ctx.current_pipeline_id] = (
                    ctx.depth,
                    ctx.parent_pipeline_id,
                    ctx.hierarchy_path,
                )

    mapped = branch("mapped").as_node({"xs": "x"}, map_over="xs")
    outer = Pipeline([branch("left"), branch("right"), branch("middle"), mapped], name="outer")
    with anyio.fail_after(PATIENCE_S):
        await outer.with_callbacks([Places()]).arun(x=1, xs=[1, 2, 3])
    expected = {
        (f"{name}_y", f"outer / {name}"): (1, "outer", ["outer", f"outer / {name}"])
        for name in ("left", "right", "middle")
    }
    for index in range(3):
        here = f"outer / mapped[{index}]"
        expected["mapped_y", here] = (2, "outer / mapped", ["outer", "outer / mapped", here])
    assert seen == expected


async def test_the_context_of_the_outermost_pipeline():
    """At the root the depth is 0 and there is no parent."""
    log = Log()
    await encode_one.with_callbacks([log]).arun(word="a")
    ctx = log.contexts[0]
    assert (ctx.depth, ctx.current_pipeline_id, ctx.parent_pipeline_id) == (0, "encode_one", None)
    assert ctx.hierarchy_path == ["encode_one"]


async def test_the_context_knows_the_pipelines_of_the_run():
    """``get_pipeline_metadata`` tells the nodes and the name of each pipeline on the way."""
    told = {}

    class Curious(PipelineCallback):
        def on_nested_pipeline_start(self, parent_id, child_pipeline_id, ctx):
            told["parent"] = ctx.get_pipeline_metadata(parent_id)
            told["child"] = ctx.get_pipeline_metadata(child_pipeline_id)

    await retrieval.with_callbacks([Curious()]).arun(raw="a b")
    assert told["parent"] == {
        "total_nodes": 4,
        "node_ids": ["clean", "split", "encode_all", "add"],
        "pipeline_name": "retrieval",
    }
    assert told["child"] == {"total_nodes": 1, "node_ids": ["encode"], "pipeline_name": "encode_one"}


async def test_callbacks_of_one_run_share_values():
    """What one callback sets in the context another gets, in the same run only."""
    got = []

    class Writer(PipelineCallback):
        def on_node_start(self, node_id, inputs, ctx):
            ctx.set("last", (node_id, inputs["word"]))

    class Reader(PipelineCallback):
        def on_pipeline_start(self, pipeline_id, inputs, ctx):
            got.append(ctx.get("last", "nothing yet"))

        def on_node_end(self, node_id, outputs, duration, ctx):
            got.append(ctx.get("last"))

    pipeline = encode_one.with_callbacks([Writer(), Reader()])
    await pipeline.arun(word="a")
    await pipeline.arun(word="b")
    assert got == ["nothing yet", ("encode", "a"), "nothing yet", ("encode", "b")]


async def test_one_callback_serves_overlapping_runs():
    """One callback object on two runs at the same time sees both, each with its own values."""
    both, count = anyio.Event(), 0

    @node("y")
    async def meet(x):
        nonlocal count
        count += 1
        if count == 2:
            both.set()
        await both.wait()
        return x

    seen = []

    class Remember(PipelineCallback):
        def on_node_start(self, node_id, inputs, ctx):
            ctx.set("x", inputs["x"])

        def on_node_end(self, node_id, outputs, duration, ctx):
            seen.append((ctx.get("x"), outputs["y"]))

    pipeline = Pipeline([meet], callbacks=[Remember()])
    with anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: pipeline.arun(x=1))
            tasks.start_soon(lambda: pipeline.arun(x=2))
    assert sorted(seen) == [(1, 1), (2, 2)]


@pytest.mark.parametrize(
    "hook", [name for name in dir(PipelineCallback) if name.startswith("on_") and name != "on_error"]
)
async def test_a_callback_that_raises_is_switched_off_and_logged(hook, caplog, tmp_path):
    """A broken hook is logged once, its callback is called no more in this run, the run and others go on."""
    calls = []

    def broken(self, *args):
        calls.append(hook)
        raise RuntimeError("broken callback")

    broken.__name__ = hook

    @node("letters")
    async def spell(raw):
        for letter in raw:
            yield letter

    bad, good = type("Bad", (PipelineCallback,), {hook: broken})(), Log()
    # Of two items one is in the cache already.
    counted = encode_one.with_cache(DiskCache(tmp_path / "cache"))
    await counted.arun(word="known")
    known = counted.as_node({"known": "word"}, {"vector": "lengths"}, map_over="known", name="count_known")
    pipeline = Pipeline([retrieval, spell, known], name="all", callbacks=[bad, good])
    with caplog.at_level(logging.DEBUG, "hypernodes"):
        answer = await pipeline.arun(raw="to be", known=["known", "new"])
    assert answer["total"] == 4
    assert answer["lengths"] == [5, 3]
    assert calls == [hook]
    records = [record for record in caplog.records if record.name == "hypernodes" and "Bad" in record.getMessage()]
    assert len(records) == 1
    assert records[0].exc_info[1].args == ("broken callback",)
    assert hook in records[0].getMessage()
    assert "pipeline_end" in good.names()


async def test_a_broken_callback_is_asked_again_in_the_next_run():
    """Switching off is for the run: the next one tries again."""
    calls = []

    class Bad(PipelineCallback):
        def on_node_start(self, node_id, inputs, ctx):
            calls.append(node_id)
            raise RuntimeError

    pipeline = encode_one.with_callbacks([Bad()])
    await pipeline.arun(word="a")
    await pipeline.arun(word="a")
    assert calls == ["encode", "encode"]


async def test_a_broken_error_hook_does_not_hide_the_error():
    """The user's exception comes out though the callback fails on it."""

    class Bad(PipelineCallback):
        def on_error(self, node_id, error, ctx):
            raise RuntimeError("broken callback")

    @node("y")
    def fail(x):
        raise Boom

    with pytest.raises(Boom):
        await Pipeline([fail], callbacks=[Bad()]).arun(x=1)


async def test_nested_pipelines_inherit_callbacks():
    """A nested pipeline that says nothing reports to its parent's callbacks."""
    log = Log()
    await Pipeline([Pipeline([encode_one], name="middle")], name="outer", callbacks=[log]).arun(word="a")
    assert ("node_end", "encode", {"vector": 1}) in log.calls


async def test_an_empty_list_of_callbacks_silences_a_nested_pipeline():
    """``callbacks=[]`` keeps what happens inside from the parent's callbacks; the step itself is seen."""
    log = Log()
    quiet = encode_one.with_callbacks([])
    await Pipeline([Pipeline([quiet], name="middle")], name="outer", callbacks=[log]).arun(word="a")
    ids = [call[1] for call in log.calls if call[0] == "node_start"]
    assert ids == ["middle", "encode_one"]


async def test_the_nearest_callbacks_win():
    """A nested pipeline with callbacks of its own reports inside to those, not to its parent's."""
    outer_log, inner_log = Log(), Log()
    inner = encode_one.with_callbacks([inner_log])
    outer = Pipeline([inner, node("z")(lambda word: word)], name="outer", callbacks=[outer_log])
    await outer.arun(word="a")
    assert ("node_end", "encode", {"vector": 1}) in inner_log.calls
    assert ("node_end", "encode", {"vector": 1}) not in outer_log.calls
    assert ("node_end", "encode_one", {"vector": 1}) in outer_log.calls
    inner_log.calls.clear()
    await encode_one.arun(word="a")
    assert inner_log.calls == []


async def test_a_mapped_stream_with_a_callback_keeps_no_context_of_past_items():
    """A stream's memory stays flat under a callback, whichever hooks it has and whether items fail or not."""

    class Counting(PipelineCallback):
        nodes = 0

        def on_node_start(self, node_id, inputs, ctx):
            self.nodes += 1

    @node("y")
    async def work(x):
        if x % 3 == 0:
            raise Boom
        return x

    counting, most = Counting(), 0
    pipeline = Pipeline([Pipeline([work], name="inner")], callbacks=[counting])
    async with pipeline.astream(
        {"x": itertools.count()}, "x", on_error="collect", max_concurrency=4, ordered=False
    ) as items:
        async for item in items:
            if item.index % 500 == 499:
                gc.collect()  # an error and its frames wait for it
                most = max(most, sum(type(each) is CallbackContext for each in gc.get_objects()))
            if item.index >= 2000:
                break
    assert counting.nodes >= 2000
    assert most < 100


@pytest.mark.parametrize("callbacks", [Log, [Log], "log"])
def test_what_is_no_list_of_callbacks_is_refused(callbacks):
    """A callback that overrides nothing is welcome; a class in the place of an instance is refused."""
    assert retrieval.with_callbacks([PipelineCallback()]).run(raw="a")["total"] == 1
    with pytest.raises(ValueError, match="callbacks"):
        retrieval.with_callbacks(callbacks)


def test_a_pipeline_without_a_name_has_an_id():
    """A pipeline without a name is called ``pipeline`` in ids."""
    log = Log()
    Pipeline([encode], callbacks=[log]).run(word="a")
    assert log.calls[0][1] == "pipeline"
    assert log.contexts[0].current_pipeline_id == "pipeline"


async def test_events_and_callbacks_agree():
    """A run that is watched both ways tells the same story to both."""
    log = Log()
    seen = await watched(retrieval.with_callbacks([log]), {"raw": "a b c"})
    kinds = [type(event) for event in seen]
    assert log.names().count("node_start") == kinds.count(NodeStarted)
    assert log.names().count("item_end") == kinds.count(ItemFinished)
    assert log.names().count("node_end") == kinds.count(NodeFinished)

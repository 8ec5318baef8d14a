"""Structured concurrency: one failure ends a run as itself, and cancelling leaves nothing behind."""

import contextvars
import os
import sys
import threading
import time
import traceback

import anyio
import anyio.lowlevel
import psutil
import pytest

from hypernodes import Pipeline, RetryPolicy, node
from hypernodes.backend import LocalBackend

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

PATIENCE_S = 20  # only a hang takes this long

request_id = contextvars.ContextVar("request_id", default="none")


class Boom(Exception):
    """A failure of the user's own."""


class Waiter:
    """Async nodes that wait for ever, and what became of them."""

    def __init__(self, expected=1):
        self.expected = expected
        self.started = 0
        self.ended = 0
        self.all_started = anyio.Event()

    async def wait(self, x):
        self.started += 1
        if self.started == self.expected:
            self.all_started.set()
        try:
            await anyio.sleep_forever()
        finally:
            self.ended += 1

    def node(self, output_name, **options):
        async def hang(x):
            await self.wait(x)

        return node(output_name, **options)(hang)


async def cancel_once(waiting_for, func, *args, **kwargs):
    """Call ``func`` in a task of its own and cancel that task once ``waiting_for`` has happened."""
    outcome = []

    async def call():
        try:
            outcome.append(await func(*args, **kwargs))
        except BaseException as error:
            outcome.append(error)
            raise

    with anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call)
            await waiting_for()
            tasks.cancel_scope.cancel()
    assert isinstance(outcome[0], anyio.get_cancelled_exc_class())


# --- failures ---------------------------------------------------------------------------------------------


async def test_a_failure_comes_out_as_itself_with_its_path():
    """The user's exception keeps type, arguments and traceback, and one note says where it was raised."""

    @node("y")
    async def fail(x):
        await anyio.sleep(0)
        raise Boom("no", x)

    with pytest.raises(Boom) as raised:
        await Pipeline([fail], name="retrieval").arun(x=3)
    assert raised.value.args == ("no", 3)
    assert raised.value.__notes__ == ["in node 'fail' at retrieval / fail"]
    assert traceback.extract_tb(raised.value.__traceback__)[-1].name == "fail"


@pytest.mark.parametrize("run_in", ["loop", "thread", "process", "auto"])
async def test_a_sync_nodes_failure_comes_out_as_itself(run_in):
    """An exception from a sync function is the user's own, with one note, wherever it ran."""

    @node("y", run_in=run_in)
    def fail(x):
        raise KeyError("word", x)

    with pytest.raises(KeyError) as raised:
        await Pipeline([fail], name="retrieval").arun(x=3)
    assert raised.value.args == ("word", 3)
    assert raised.value.__notes__ == ["in node 'fail' at retrieval / fail"]
    assert "fail" in "".join(traceback.format_exception(raised.value))


async def test_a_failure_deep_inside_says_its_whole_path():
    """The note names every step from the outermost pipeline to the node, with the item's number."""

    @node("vector")
    async def encode(text):
        if text == "c":
            raise Boom(text)
        return text

    encode_all = Pipeline([encode], name="one").as_node({"texts": "text"}, map_over="texts", name="encode_all")
    middle = Pipeline([encode_all], name="middle")
    with pytest.raises(Boom) as raised:
        await Pipeline([middle], name="retrieval").arun(texts=["a", "b", "c", "d"])
    assert raised.value.__notes__ == ["in node 'encode' at retrieval / middle / encode_all[2] / encode"]


async def test_a_failing_item_of_a_map_says_its_path():
    """The note of a top-level map's item carries its number."""

    @node("y")
    def fail(x):
        raise Boom(x)

    with pytest.raises(Boom) as raised:
        await Pipeline([fail], name="retrieval").amap({"x": [1]}, "x")
    assert raised.value.__notes__ == ["in node 'fail' at retrieval[0] / fail"]


async def test_the_first_failure_cancels_the_other_branches():
    """When a branch fails, the branches beside it are cancelled, and the failure comes out bare."""
    waiter = Waiter(expected=3)

    @node("bad")
    async def fail(x):
        await waiter.all_started.wait()
        raise Boom("first")

    pipeline = Pipeline([waiter.node("a"), waiter.node("b"), fail, waiter.node("c")])
    with anyio.fail_after(PATIENCE_S), pytest.raises(Boom, match="first"):
        await pipeline.arun(x=1)
    assert waiter.ended == 3


async def test_a_failing_sync_node_cancels_async_ones_beside_it():
    """A failure in a worker thread stops the async branches too."""
    waiter = Waiter()
    started = threading.Event()

    @node("bad", run_in="thread")
    def fail(x):
        assert started.wait(PATIENCE_S)
        raise Boom

    @node("a")
    async def hang(x):
        started.set()
        await waiter.wait(x)

    with anyio.fail_after(PATIENCE_S), pytest.raises(Boom):
        await Pipeline([fail, hang]).arun(x=1)
    assert waiter.ended == 1


async def test_the_first_failing_item_cancels_the_rest_of_the_map():
    """When an item fails, those under way are cancelled and those to come never start."""
    waiter, seen = Waiter(expected=4), []

    @node("y")
    async def work(x):
        seen.append(x)
        if x < 4:
            await waiter.wait(x)
        await waiter.all_started.wait()
        raise Boom(x)

    with anyio.fail_after(PATIENCE_S), pytest.raises(Boom):
        await Pipeline([work]).amap({"x": range(1000)}, "x", max_concurrency=5)
    assert waiter.ended == 4
    assert sorted(seen) == [0, 1, 2, 3, 4]


async def test_a_nested_failure_stops_the_whole_run():
    """A failure three levels down cancels a branch at the top, and comes out without any group around it."""
    waiter = Waiter()

    @node("bad")
    async def fail(x):
        await waiter.all_started.wait()
        raise Boom

    inner = Pipeline([fail], name="inner")
    middle = Pipeline([inner.as_node(map_over="x")], name="middle")
    with anyio.fail_after(PATIENCE_S), pytest.raises(Boom):
        await Pipeline([middle, waiter.node("a")], name="outer").arun(x=[1, 2])
    assert waiter.ended == 1


async def test_of_two_failures_at_once_one_comes_out_bare():
    """Two branches that fail together still give one exception, never a group."""
    both = [anyio.Event(), anyio.Event()]

    def branch(number):
        async def fail(x):
            both[number].set()
            await both[1 - number].wait()
            raise Boom(number)

        return node(f"b{number}")(fail)

    with anyio.fail_after(PATIENCE_S), pytest.raises(Boom):
        await Pipeline([branch(0), branch(1)]).arun(x=1)


async def test_a_failure_during_cancellation_does_not_hide_the_first():
    """A branch that fails while it is being cancelled does not replace the failure that caused it."""
    started = anyio.Event()

    @node("a")
    async def fail_when_cancelled(x):
        started.set()
        try:
            await anyio.sleep_forever()
        finally:
            raise ValueError("while cleaning up")

    @node("b")
    async def fail(x):
        await started.wait()
        raise Boom("first")

    with anyio.fail_after(PATIENCE_S), pytest.raises(Boom, match="first"):
        await Pipeline([fail_when_cancelled, fail]).arun(x=1)


async def test_a_users_own_exception_group_stays_one():
    """A group that a node raises itself is the user's exception: it comes out whole."""

    async def fail():
        raise Boom

    @node("y")
    async def fan_out(x):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(fail)

    with pytest.raises(ExceptionGroup) as raised:
        await Pipeline([fan_out], name="web").arun(x=1)
    assert [type(error) for error in raised.value.exceptions] == [Boom]
    assert any("web / fan_out" in note for note in raised.value.__notes__)


async def test_a_failure_in_a_stream_comes_out_as_itself():
    """The failure of a streamed item is raised bare out of the iteration, and the others are cancelled."""
    waiter = Waiter()

    @node("y")
    async def work(x):
        if x == 1:
            await waiter.wait(x)
        await waiter.all_started.wait()
        raise Boom(x)

    with anyio.fail_after(PATIENCE_S), pytest.raises(Boom):
        async with Pipeline([work]).astream({"x": [0, 1]}, "x") as items:
            async for _ in items:
                pass
    assert waiter.ended == 1


async def test_the_consumers_failure_leaves_a_stream_as_itself():
    """An exception in the body of a stream comes out bare, and the items under way are cancelled."""
    waiter = Waiter(expected=2)

    @node("y")
    async def work(x):
        if x:
            await waiter.wait(x)
        return x

    with anyio.fail_after(PATIENCE_S), pytest.raises(Boom, match="mine"):
        async with Pipeline([work]).astream({"x": [0, 1, 2]}, "x", max_concurrency=3) as items:
            async for _ in items:
                await waiter.all_started.wait()
                raise Boom("mine")
    assert waiter.ended == 2


async def test_a_failing_source_of_a_stream_comes_out_as_itself():
    """An exception of the mapped async iterable is raised to the consumer bare."""

    async def source():
        yield 1
        raise Boom("source")

    pipeline = Pipeline([node("y")(lambda x: x)])
    with anyio.fail_after(PATIENCE_S), pytest.raises(Boom, match="source"):
        async with pipeline.astream({"x": source()}, "x") as items:
            async for _ in items:
                pass


async def test_a_cancelled_failing_map_reruns_from_scratch():
    """The same pipeline object runs well right after a failed and a cancelled run."""
    bad = True

    @node("y")
    async def work(x):
        await anyio.sleep(0)
        if bad:
            raise Boom
        return x

    pipeline = Pipeline([work])
    with pytest.raises(Boom):
        await pipeline.amap({"x": range(5)}, "x")
    bad = False
    assert await pipeline.amap({"x": range(5)}, "x") == {"y": [0, 1, 2, 3, 4]}


# --- cancellation, wherever something is awaited ----------------------------------------------------------


async def test_cancelling_stops_every_branch():
    """Cancelling the awaiting task cancels all nodes under way and waits for their cleanup."""
    waiter = Waiter(expected=3)
    pipeline = Pipeline([waiter.node("a"), waiter.node("b"), waiter.node("c")])
    await cancel_once(waiter.all_started.wait, pipeline.arun, x=1)
    assert waiter.ended == 3


async def test_cancelling_stops_a_lone_node():
    """A run of one node, which needs no task of its own, is cancelled in the node."""
    waiter = Waiter()
    await cancel_once(waiter.all_started.wait, Pipeline([waiter.node("a")]).arun, x=1)
    assert waiter.ended == 1


async def test_cancelling_stops_a_map():
    """Cancelling a map cancels its items under way."""
    waiter = Waiter(expected=10)
    pipeline = Pipeline([waiter.node("y")])
    await cancel_once(waiter.all_started.wait, pipeline.amap, {"x": range(1000)}, "x", max_concurrency=10)
    assert waiter.ended == waiter.started == 10


async def test_cancelling_stops_a_collecting_map():
    """``on_error="collect"`` does not take cancellation for a failure of items."""
    waiter = Waiter(expected=5)
    pipeline = Pipeline([waiter.node("y")])
    await cancel_once(waiter.all_started.wait, pipeline.amap, {"x": range(5)}, "x", on_error="collect")
    assert waiter.ended == 5


async def test_cancelling_stops_nested_maps():
    """Cancelling reaches the nodes of maps within maps."""
    waiter = Waiter(expected=6)
    row = Pipeline([waiter.node("y")], name="row").as_node({"row": "x"}, map_over="row")
    table = Pipeline([Pipeline([row], name="rows").as_node({"table": "row"}, map_over="table")], name="table")
    await cancel_once(waiter.all_started.wait, table.arun, table=[[1, 2, 3], [4, 5, 6]])
    assert waiter.ended == 6


async def test_cancelling_reaches_those_that_wait_for_a_limit():
    """Nodes that wait for a limit are cancelled there and never start."""
    waiter = Waiter()
    limiter = anyio.CapacityLimiter(1)
    pipeline = Pipeline([waiter.node("y", limit="api")], limits={"api": limiter})

    async def queue_is_full():
        while limiter.statistics().tasks_waiting < 4:
            await anyio.sleep(0)

    await cancel_once(queue_is_full, pipeline.amap, {"x": range(5)}, "x")
    assert (waiter.started, waiter.ended) == (1, 1)
    assert limiter.borrowed_tokens == 0


async def test_cancelling_reaches_the_wait_between_attempts():
    """A node that waits to try again is cancelled in its wait, at once."""
    failed, calls = anyio.Event(), []

    @node("y", retry=RetryPolicy(attempts=5, wait_s=3600, max_wait_s=3600, jitter_s=0))
    async def fail(x):
        calls.append(x)
        failed.set()
        raise Boom

    await cancel_once(failed.wait, Pipeline([fail]).arun, x=1)
    assert calls == [1]


async def test_cancelling_closes_an_async_generator():
    """A generator node that is cancelled between its pieces runs its own cleanup."""
    yielded, cleaned_up = anyio.Event(), []

    @node("y")
    async def pieces(x):
        try:
            yield x
            yielded.set()
            await anyio.sleep_forever()
        finally:
            cleaned_up.append(x)

    await cancel_once(yielded.wait, Pipeline([pieces]).arun, x=1)
    assert cleaned_up == [1]


@pytest.mark.parametrize("options", [{}, {"timeout": 3600}], ids=["plain", "timeout"])
async def test_cancelling_waits_for_a_running_thread(options):
    """A function in a thread cannot be stopped: cancelling waits for its end, so nothing runs on unseen."""
    started, go_on = threading.Event(), threading.Event()
    order = []

    @node("y", run_in="thread", **options)
    def block(x):
        started.set()
        assert go_on.wait(PATIENCE_S)
        order.append("function ended")

    async def call():
        try:
            await Pipeline([block]).arun(x=1)
        finally:
            order.append("run ended")

    with anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call)
            while not started.is_set():
                await anyio.sleep(0.001)
            tasks.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.01)
            go_on.set()
    assert order == ["function ended", "run ended"]


async def test_cancelling_reaches_a_sync_run_inside_a_sync_node():
    """A run that a sync node made in its thread is cancelled with the run around it."""
    started, ended = threading.Event(), []

    @node("y")
    async def hang(x):
        started.set()
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(x)

    inner = Pipeline([hang], name="inner")
    outer = Pipeline([node("z", run_in="thread")(lambda x: inner.run(x=x))], name="outer")

    async def has_started():
        while not started.is_set():
            await anyio.sleep(0.001)

    await cancel_once(has_started, outer.arun, x=1)
    assert ended == [1]


async def test_cancelling_kills_a_process_call(tmp_path):
    """A function in a process is killed by cancelling, promptly."""

    @node("y", run_in="process")
    def hang(folder):
        (folder / "pid.part").write_text(str(os.getpid()))
        (folder / "pid.part").rename(folder / "pid")
        time.sleep(3600)

    async def started():
        while not (tmp_path / "pid").exists():
            await anyio.sleep(0.005)

    await cancel_once(started, Pipeline([hang]).arun, folder=tmp_path)
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


async def test_cancelling_stops_a_stream_that_waits_for_items():
    """A consumer cancelled while it waits for the next item stops the items under way."""
    waiter = Waiter(expected=2)

    async def consume():
        async with Pipeline([waiter.node("y")]).astream({"x": [1, 2]}, "x") as items:
            async for _ in items:
                raise AssertionError("no item ever finishes")

    await cancel_once(waiter.all_started.wait, consume)
    assert waiter.ended == 2


async def test_cancelling_stops_a_stream_that_waits_for_its_source():
    """A stream whose source is silent is cancelled there, and the source is closed."""
    asked, closed = anyio.Event(), []

    async def silent():
        try:
            asked.set()
            await anyio.sleep_forever()
            yield 1
        finally:
            closed.append(True)

    async def consume():
        async with Pipeline([node("y")(lambda x: x)]).astream({"x": silent()}, "x") as items:
            async for _ in items:
                pass

    await cancel_once(asked.wait, consume)
    assert closed == [True]


async def test_leaving_a_stream_early_stops_its_items():
    """Breaking out of a stream cancels the items under way before the block is left."""
    waiter = Waiter(expected=3)

    @node("y")
    async def work(x):
        if x:
            await waiter.wait(x)
        return x

    with anyio.fail_after(PATIENCE_S):
        async with Pipeline([work]).astream({"x": range(100)}, "x", max_concurrency=4) as items:
            async for item in items:
                assert item.index == 0
                await waiter.all_started.wait()
                break
        assert waiter.ended == waiter.started


async def test_cancelling_stops_aevents():
    """A reader of events cancelled in its wait cancels the run behind them."""
    waiter = Waiter()

    async def read():
        async with Pipeline([waiter.node("y")]).aevents(x=1) as events:
            async for _ in events:
                pass

    await cancel_once(waiter.all_started.wait, read)
    assert waiter.ended == 1


@pytest.mark.parametrize("mode", ["sequential", "async", "threaded"])
async def test_cancelling_stops_every_mode(mode):
    """Cancelling stops async nodes and mapped items in each mode that stays in this process."""
    started = threading.Event()
    ended = []

    @node("y")
    async def hang(x):
        started.set()
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(x)

    async def has_started():
        while not started.is_set():
            await anyio.sleep(0.001)

    backend = LocalBackend(node_execution=mode, map_execution=mode, max_workers=1)
    await cancel_once(has_started, Pipeline([hang], backend=backend).amap, {"x": [1]}, "x")
    assert ended == [1]


async def test_cleanup_that_awaits_under_a_shield_is_waited_for():
    """A node's shielded cleanup finishes before the cancelled run is left."""
    started, order = anyio.Event(), []

    @node("y")
    async def hang(x):
        started.set()
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.005)
                order.append("cleaned up")

    pipeline = Pipeline([hang, node("z")(lambda x: x)])
    await cancel_once(started.wait, pipeline.arun, x=1)
    order.append("left")
    assert order == ["cleaned up", "left"]


async def test_a_run_in_a_cancelled_scope_does_not_start():
    """A run begun under a scope that is cancelled already is cancelled at its first await."""
    waiter = Waiter()
    with anyio.CancelScope() as scope:
        scope.cancel()
        await Pipeline([waiter.node("y"), waiter.node("z")]).arun(x=1)
    assert scope.cancelled_caught
    assert waiter.started == waiter.ended


# --- the user's own scopes and context variables ----------------------------------------------------------


async def test_a_deadline_around_a_run_is_the_users():
    """``anyio.fail_after`` around a run gives the user's ``TimeoutError`` and stops the run."""
    waiter = Waiter(expected=2)
    with pytest.raises(TimeoutError):
        with anyio.fail_after(0.05):
            await Pipeline([waiter.node("a"), waiter.node("b")]).arun(x=1)
    assert waiter.ended == waiter.started


async def test_a_deadline_inside_a_node_is_the_nodes():
    """``anyio.move_on_after`` inside a node ends there; the node and its siblings go on."""

    @node("y")
    async def give_up_early(x):
        with anyio.move_on_after(0.01) as scope:
            await anyio.sleep_forever()
        return scope.cancelled_caught

    pipeline = Pipeline([give_up_early, node("z")(lambda x: x)])
    assert await pipeline.arun(x=1) == {"y": True, "z": 1}
    assert (await pipeline.amap({"x": range(3)}, "x"))["y"] == [True] * 3


async def test_a_task_group_inside_a_node_works():
    """A node may start tasks of its own and wait for them."""

    @node("squares")
    async def fan_out(n):
        squares = {}

        async def square(number):
            await anyio.sleep(0)
            squares[number] = number * number

        async with anyio.create_task_group() as tasks:
            for number in range(n):
                tasks.start_soon(square, number)
        return sorted(squares.values())

    assert (await Pipeline([fan_out]).amap({"n": [1, 2, 3]}, "n"))["squares"] == [[0], [0, 1], [0, 1, 4]]


async def test_runs_in_tasks_of_a_users_group_are_cancelled_with_it():
    """When the user's own task group fails, the runs in it are cancelled like any other task."""
    waiter = Waiter(expected=2)

    async def fail():
        await waiter.all_started.wait()
        raise Boom("mine")

    pipeline = Pipeline([waiter.node("y")])
    with anyio.fail_after(PATIENCE_S), pytest.raises(ExceptionGroup) as raised:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: pipeline.arun(x=1))
            tasks.start_soon(lambda: pipeline.arun(x=2))
            tasks.start_soon(fail)
    assert [str(error) for error in raised.value.exceptions] == ["mine"]
    assert waiter.ended == 2


async def test_nodes_see_the_callers_context_variables():
    """Async nodes of every branch and item read what the caller set."""

    async def read(x):
        await anyio.sleep(0)
        return request_id.get()

    pipeline = Pipeline([node("a")(read), node("b")(read), Pipeline([node("c")(read)], name="inner")])
    token = request_id.set("r-1")
    try:
        assert await pipeline.arun(x=1) == {"a": "r-1", "b": "r-1", "c": "r-1"}
        assert (await pipeline.amap({"x": [1, 2]}, "x"))["c"] == ["r-1", "r-1"]
        async with pipeline.astream({"x": [1, 2]}, "x") as items:
            assert [item.outputs["b"] async for item in items] == ["r-1", "r-1"]
    finally:
        request_id.reset(token)


def test_sync_calls_see_the_callers_context_variables():
    """The sync calls carry the caller's context variables into the run, also inside a running loop."""
    pipeline = Pipeline([node("seen")(lambda x: request_id.get())])

    async def inside_a_loop():
        return pipeline.run(x=1)

    token = request_id.set("r-2")
    try:
        assert pipeline.run(x=1) == {"seen": "r-2"}
        assert pipeline.map({"x": [1]}, "x") == {"seen": ["r-2"]}
        assert anyio.run(inside_a_loop) == {"seen": "r-2"}
    finally:
        request_id.reset(token)


async def test_items_do_not_see_each_others_context_variables():
    """What an item's node sets in the context is seen by no other item, nor by the caller."""

    @node("seen")
    async def read_and_set(x):
        before = request_id.get()
        request_id.set(f"item {x}")
        await anyio.sleep(0)
        return before, request_id.get()

    result = await Pipeline([read_and_set]).amap({"x": range(30)}, "x", max_concurrency=5)
    assert result["seen"] == [("none", f"item {x}") for x in range(30)]
    assert request_id.get() == "none"


async def test_a_scope_entered_by_a_node_does_not_leak_to_the_next():
    """A cancelled scope in one node of a chain leaves the nodes after it untouched."""

    @node("a")
    async def cancel_myself(x):
        with anyio.CancelScope() as scope:
            scope.cancel()
            await anyio.sleep_forever()
        return x

    @node("b")
    async def go_on(a):
        await anyio.sleep(0.001)
        return a + 1

    assert await Pipeline([cancel_myself, go_on]).arun(x=1) == {"a": 1, "b": 2}


async def test_a_long_run_gives_other_tasks_their_turn():
    """A map of trivial async nodes does not starve the task that would cancel it."""

    @node("y")
    async def trivial(x):
        return x

    async def endless():
        number = 0
        while True:
            yield number
            number += 1

    with anyio.move_on_after(0.1) as scope:
        async with Pipeline([trivial]).astream({"x": endless()}, "x") as items:
            async for _ in items:
                pass
    assert scope.cancelled_caught


# --- leaving the program ----------------------------------------------------------------------------------


LOOPS = {
    "asyncio": {"backend": "asyncio"},
    "asyncio+uvloop": {"backend": "asyncio", "backend_options": {"use_uvloop": True}},
    "trio": {"backend": "trio"},
}
on_every_loop = pytest.mark.parametrize("loop", LOOPS)


def leaving(place, error):
    """A pipeline whose node leaves the program, beside one that waits; and the one that waits."""
    ended = []

    @node("waits")
    async def wait(x):
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(x)

    if place == "async":

        async def leave(x):
            await anyio.sleep(0.01)
            raise error("goodbye")

        options = {}
    else:

        def leave(x):
            time.sleep(0.01)
            raise error("goodbye")

        options = {"run_in": place}
    return Pipeline([wait, node("leaves", **options)(leave)], name="retrieval"), ended


@on_every_loop
@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["loop", "thread", "async"])
def test_leaving_the_program_from_a_node_gets_out(loop, place, error):
    """``SystemExit`` and ``KeyboardInterrupt`` from a node end the program; siblings are cleaned up."""
    pipeline, ended = leaving(place, error)
    with pytest.raises(error, match="goodbye"):
        anyio.run(lambda: pipeline.arun(x=1), **LOOPS[loop])
    assert len(ended) == 1 or place == "loop"


@on_every_loop
@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["loop", "thread", "async"])
@pytest.mark.parametrize("on_error", ["raise", "collect"])
def test_leaving_the_program_from_a_map_item_gets_out(loop, place, error, on_error):
    """Leaving the program is no failure of an item: not even a collecting map holds it back."""
    pipeline, ended = leaving(place, error)
    with pytest.raises(error, match="goodbye"):
        anyio.run(lambda: pipeline.amap({"x": [1, 2, 3]}, "x", on_error=on_error), **LOOPS[loop])
    assert len(ended) in ((0, 1, 2, 3) if place == "loop" else (1, 2, 3))


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["loop", "thread", "async"])
def test_leaving_the_program_from_a_sync_call_gets_out(place, error):
    """The sync calls let ``SystemExit`` and ``KeyboardInterrupt`` through as themselves."""
    pipeline, _ = leaving(place, error)
    with pytest.raises(error, match="goodbye"):
        pipeline.run(x=1)
    with pytest.raises(error, match="goodbye"):
        pipeline.map({"x": [1, 2]}, "x", on_error="collect")


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_leaving_the_program_from_a_sync_call_inside_a_loop_gets_out(error):
    """Inside a running loop too, what leaves the program leaves ``run`` as itself."""
    pipeline, _ = leaving("thread", error)
    caught = []

    async def cell():
        try:
            pipeline.run(x=1)
        except (Exception, SystemExit, KeyboardInterrupt) as raised:  # noqa: BLE001 - asserted below
            caught.append(raised)

    anyio.run(cell)
    assert [type(raised) for raised in caught] == [error]


@on_every_loop
@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_a_nested_item_that_leaves_the_program_gets_out(loop, error):
    """Three levels down, leaving the program still comes out bare."""
    pipeline, ended = leaving("async", error)
    outer = Pipeline([Pipeline([pipeline.as_node(map_over="x")], name="middle")], name="outer")
    with pytest.raises(error, match="goodbye"):
        anyio.run(lambda: outer.arun(x=[1, 2]), **LOOPS[loop])
    assert ended


SCRIPT = """
import signal, sys, threading, os, time
from hypernodes import Pipeline, node

@node("y")
async def hang(x):
    import anyio
    print("started", flush=True)
    try:
        await anyio.sleep_forever()
    finally:
        print("cleaned up", flush=True)

Pipeline([hang, node("z")(lambda x: x)]).run(x=1)
"""


async def test_control_c_stops_a_script():
    """Pressing Control-C in a script ends the run with its cleanup and a ``KeyboardInterrupt``."""
    with anyio.fail_after(PATIENCE_S):
        async with await anyio.open_process([sys.executable, "-c", SCRIPT], stderr=-1) as script:
            said = b""
            while b"started" not in said:
                said += await script.stdout.receive()
            script.send_signal(2)
            async for more in script.stdout:
                said += more
            await script.wait()
            complaint = b"".join([piece async for piece in script.stderr])
    assert b"cleaned up" in said
    assert b"KeyboardInterrupt" in complaint
    assert b"ExceptionGroup" not in complaint
    assert script.returncode != 0

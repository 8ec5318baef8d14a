"""Where a sync function runs, and that the event loop stays free meanwhile."""

import contextvars
import functools
import os
import signal
import threading
import time

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest

from hypernodes import DefinitionError, Pipeline, node
from hypernodes.backend import LocalBackend

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

PATIENCE_S = 20  # only a hang takes this long
MANY = 500  # calls after which a cheap function has certainly proved cheap

request_id = contextvars.ContextVar("request_id", default="none")


class Place:
    """A callable that says in which thread it runs, after as much work as it is told."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self, x):
        if self.seconds:
            time.sleep(self.seconds)
        return threading.get_ident()


class Heartbeat:
    """A task on the loop that counts its own beats; a thread can wait for more of them."""

    def __init__(self):
        self.beats = 0
        self.more = threading.Condition()

    async def beat(self):
        while True:
            with self.more:
                self.beats += 1
                self.more.notify_all()
            await anyio.sleep(0.001)

    def wait_for_beats(self, count):
        """Block this thread until the loop has gone on for ``count`` more beats; False if it did not."""
        with self.more:
            goal = self.beats + count
            return self.more.wait_for(lambda: self.beats >= goal, timeout=PATIENCE_S)


async def test_run_in_loop_runs_on_the_loops_thread():
    """``run_in="loop"`` calls the function on the thread of the event loop, from the first call on."""
    pipeline = Pipeline([node("place", run_in="loop")(Place())])
    assert await pipeline.arun(x=1) == {"place": threading.get_ident()}


async def test_run_in_thread_never_runs_on_the_loops_thread():
    """``run_in="thread"`` stays off the loop however cheap the function proves to be."""
    pipeline = Pipeline([node("place", run_in="thread")(Place())])
    places = {await pipeline.arun(x=1, output_name="place") for _ in range(50)}
    assert threading.get_ident() not in places


async def test_run_in_process_runs_in_another_process():
    """``run_in="process"`` calls the function in another process, with no backend to ask for."""
    pipeline = Pipeline([node("pid", run_in="process")(lambda x: (os.getpid(), x + 1))])
    pid, answer = await pipeline.arun(x=1, output_name="pid")
    assert pid != os.getpid()
    assert answer == 2


async def test_a_function_of_unknown_cost_starts_in_a_thread():
    """``run_in="auto"`` does not risk the loop on a function that it has not measured."""
    pipeline = Pipeline([node("place")(Place())])
    assert await pipeline.arun(x=1, output_name="place") != threading.get_ident()


async def called_on_the_loop(pipeline):
    """Whether the function comes to run on the loop's thread within ``MANY`` calls."""
    for _ in range(MANY):
        if await pipeline.arun(x=1, output_name="place") == threading.get_ident():
            return True
    return False


async def test_a_function_that_proves_cheap_moves_to_the_loop():
    """After some quick calls an ``auto`` function pays for no thread any more."""
    pipeline = Pipeline([node("place")(Place())])
    assert await called_on_the_loop(pipeline)


async def test_a_function_that_becomes_slow_goes_back_to_a_thread():
    """One slow call on the loop is the last one there."""
    place = Place()
    pipeline = Pipeline([node("place")(place)])
    assert await called_on_the_loop(pipeline)
    place.seconds = 0.05
    places = [await pipeline.arun(x=1, output_name="place") for _ in range(6)]
    assert threading.get_ident() not in places[1:]


async def test_a_slow_function_never_moves_to_the_loop():
    """An ``auto`` function that takes milliseconds stays in threads."""
    place = Place()
    place.seconds = 0.002
    pipeline = Pipeline([node("place")(place)])
    assert threading.get_ident() not in {await pipeline.arun(x=1, output_name="place") for _ in range(30)}


async def test_a_cheap_function_in_a_map_moves_to_the_loop():
    """Items of one map count as calls: most of a long map of cheap calls run on the loop."""
    pipeline = Pipeline([node("place")(Place())])
    places = (await pipeline.amap({"x": range(MANY)}, "x"))["place"]
    assert places[0] != threading.get_ident()
    # Not all at the end: a call that the machine interrupts for long is slow, and the function goes back for a while.
    assert places.count(threading.get_ident()) > MANY / 4


@pytest.mark.parametrize("run_in", ["auto", "thread"])
async def test_a_waiting_sync_node_leaves_the_loop_free(run_in):
    """A sync node that blocks until the loop has moved on gets its answer: the loop is not held."""
    heart = Heartbeat()
    pipeline = Pipeline([node("free", run_in=run_in)(lambda beats: heart.wait_for_beats(beats))])
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(heart.beat)
        assert await pipeline.arun(beats=20) == {"free": True}
        tasks.cancel_scope.cancel()


async def test_a_map_of_waiting_sync_nodes_leaves_the_loop_free():
    """Blocking items of a map, more than there are cores, leave the loop free too."""
    heart = Heartbeat()
    pipeline = Pipeline([node("free")(lambda beats: heart.wait_for_beats(beats))])
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(heart.beat)
        result = await pipeline.amap({"beats": [10] * 12}, "beats")
        assert result["free"] == [True] * 12
        tasks.cancel_scope.cancel()


async def test_busy_python_code_leaves_the_loop_free():
    """The loop goes on while a sync node computes in pure Python."""
    heart = Heartbeat()

    @node("beats_meanwhile")
    def compute(beats):
        before = heart.beats
        give_up = time.monotonic() + PATIENCE_S
        while heart.beats < before + beats and time.monotonic() < give_up:
            sum(range(1000))
        return heart.beats - before

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(heart.beat)
        assert (await Pipeline([compute]).arun(beats=10))["beats_meanwhile"] >= 10
        tasks.cancel_scope.cancel()


async def test_a_long_map_of_cheap_nodes_lets_other_tasks_in():
    """Tens of thousands of cheap calls on the loop do not starve the tasks beside them."""
    pipeline = Pipeline([node("y", run_in="loop")(lambda x: x + 1)])
    beats, done = 0, anyio.Event()

    async def heart():
        nonlocal beats
        while not done.is_set():
            beats += 1
            await anyio.sleep(0)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(heart)
        await anyio.sleep(0)
        before = beats
        result = await pipeline.amap({"x": range(100_000)}, "x")
        during = beats - before
        done.set()
    assert len(result["y"]) == 100_000
    assert during >= 3


async def test_a_long_chain_of_cheap_nodes_can_be_left_by_a_timeout():
    """Cheap nodes yield to the loop by time: a run of endless glue is cancelled, not waited for."""

    def link(number):
        if number:
            return node(f"v{number}", run_in="loop")(_renamed(number))
        return node("v0", run_in="loop")(lambda x: x)

    pipeline = Pipeline([link(number) for number in range(300)])
    rounds = 0
    with anyio.move_on_after(0.3) as scope:
        while rounds < 1_000_000:
            await pipeline.arun(x=1)
            rounds += 1
    assert scope.cancelled_caught
    assert rounds < 1_000_000


def _renamed(number):
    namespace = {}
    exec(f"def step(v{number - 1}): return v{number - 1}", namespace)
    return namespace["step"]


@pytest.fixture
async def no_shared_threads():
    """Every token of anyio's own threads is held by someone else."""
    limiter = anyio.to_thread.current_default_thread_limiter()
    borrowers = [object() for _ in range(int(limiter.available_tokens))]
    for borrower in borrowers:
        limiter.acquire_on_behalf_of_nowait(borrower)
    yield
    for borrower in borrowers:
        limiter.release_on_behalf_of(borrower)


async def test_sync_nodes_need_no_token_of_anyios_shared_threads(no_shared_threads):
    """Sync nodes run even when the program around us holds every thread token of anyio."""
    pipeline = Pipeline([node("place", run_in="thread")(Place())])
    with anyio.fail_after(PATIENCE_S):
        assert await pipeline.arun(x=1, output_name="place") != threading.get_ident()


async def test_a_streams_source_needs_no_token_of_anyios_shared_threads(no_shared_threads):
    """A sync source of a stream is read even when the program around us holds every thread token of anyio."""
    pipeline = Pipeline([node("y")(lambda x: x + 1)])
    with anyio.fail_after(PATIENCE_S):
        async with pipeline.astream({"x": (number for number in range(3))}, "x") as items:
            assert [item.outputs["y"] async for item in items] == [1, 2, 3]


async def test_running_nodes_leave_anyios_shared_threads_to_others():
    """Blocking sync nodes take none of the thread tokens that a web framework lives on."""
    limiter = anyio.to_thread.current_default_thread_limiter()
    started, go_on = threading.Event(), threading.Event()

    @node("y", run_in="thread")
    def block(x):
        started.set()
        return go_on.wait(PATIENCE_S)

    async def run():
        assert await Pipeline([block]).arun(x=1) == {"y": True}

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        while not started.is_set():
            await anyio.sleep(0.001)
        borrowed = limiter.borrowed_tokens
        go_on.set()
    assert borrowed == 0


@pytest.mark.parametrize("run_in", ["auto", "loop", "thread", "process"])
async def test_every_form_of_sync_function_runs_in_every_place(run_in):
    """Functions, partials, bound methods, callable objects and generators run in any place."""

    class Scale:
        def __init__(self, by):
            self.by = by

        def apply(self, x):
            return x * self.by

        def __call__(self, x):
            return x * self.by + 1

    def plain(x):
        return x + 1

    def pieces(x):
        yield x
        yield x + 1

    make = functools.partial(node, run_in=run_in)
    pipeline = Pipeline(
        [
            make("function")(plain),
            make("partial")(functools.partial(lambda x, y: x + y, y=5)),
            make("method")(Scale(3).apply),
            make("object")(Scale(3)),
            make("pieces")(pieces),
            make(("small", "large"))(lambda x: (x - 1, x * 100)),
        ]
    )
    assert await pipeline.arun(x=2) == {
        "function": 3,
        "partial": 7,
        "method": 6,
        "object": 7,
        "pieces": [2, 3],
        "small": 1,
        "large": 200,
    }


async def test_a_generator_node_in_a_thread_is_iterated_there():
    """All of a sync generator's body runs off the loop, also what comes after its first piece."""

    @node("places", run_in="thread")
    def pieces(x):
        for _ in range(x):
            yield threading.get_ident()

    places = (await Pipeline([pieces]).arun(x=4))["places"]
    assert len(places) == 4
    assert threading.get_ident() not in places


async def test_a_waiting_generator_leaves_the_loop_free():
    """A sync generator that blocks between its pieces does not hold the loop."""
    heart = Heartbeat()

    @node("free")
    def pieces(beats):
        for _ in range(3):
            yield heart.wait_for_beats(beats)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(heart.beat)
        assert await Pipeline([pieces]).arun(beats=5) == {"free": [True] * 3}
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("run_in", ["loop", "thread", "auto"])
async def test_a_node_sees_the_callers_context_variables(run_in):
    """A sync node reads, wherever it runs in this process, the context variables of the caller."""
    pipeline = Pipeline([node("seen", run_in=run_in)(lambda x: request_id.get())])
    token = request_id.set("r-17")
    try:
        assert await pipeline.arun(x=1) == {"seen": "r-17"}
        assert (await pipeline.amap({"x": [1, 2]}, "x"))["seen"] == ["r-17", "r-17"]
    finally:
        request_id.reset(token)


async def test_a_node_in_a_thread_can_call_back_to_the_loop():
    """A sync node in a thread may use ``anyio.from_thread``, as in any thread that anyio started."""
    here = threading.get_ident()

    async def answer():
        await anyio.sleep(0)
        return threading.get_ident()

    pipeline = Pipeline([node("loop_thread", run_in="thread")(lambda x: anyio.from_thread.run(answer))])
    assert await pipeline.arun(x=1) == {"loop_thread": here}


async def test_measuring_survives_failing_calls():
    """A function that fails in between still comes to the loop, and its failures come out."""
    calls = 0

    @node("place")
    def sometimes(x):
        nonlocal calls
        calls += 1
        if calls % 5 == 4:
            raise LookupError("not this time")
        return threading.get_ident()

    pipeline = Pipeline([sometimes])
    on_loop = failed = 0
    for _ in range(MANY):
        try:
            on_loop += await pipeline.arun(x=1, output_name="place") == threading.get_ident()
        except LookupError:
            failed += 1
    assert failed == MANY // 5
    assert on_loop > 0


async def test_a_node_killed_in_its_process_leaves_this_one_alone():
    """What a ``run_in="process"`` function does to its process stays there."""
    pipeline = Pipeline(
        [node("y", run_in="process")(lambda x: os.kill(os.getpid(), signal.SIGKILL)), node("z")(lambda x: x)]
    )
    assert await pipeline.arun(x=1, output_name="z") == 1
    with pytest.raises(Exception, match="process"):
        await pipeline.arun(x=1)


def test_an_unknown_place_is_refused():
    """A misspelt place is refused at decoration, with what there is to choose from."""
    with pytest.raises(DefinitionError, match="'gpu'") as refused:
        node("y", run_in="gpu")(lambda x: x)
    for place in ("auto", "loop", "thread", "process"):
        assert place in str(refused.value)


@pytest.mark.parametrize("mode", ["sequential", "async", "threaded"])
def test_a_sync_node_may_run_a_pipeline_of_its_own(mode):
    """``run`` inside a sync node, under a running loop, gives its answer in every mode."""
    inner = Pipeline([node("y")(lambda x: x + 1)])
    outer = Pipeline([node("z")(lambda x: inner.run(x=x)["y"] * 10)], backend=LocalBackend(node_execution=mode))
    assert outer.run(x=1) == {"z": 20}
    assert outer.map({"x": [1, 2, 3]}, "x") == {"z": [20, 30, 40]}


async def test_a_node_on_the_loop_may_run_a_pipeline_of_its_own():
    """``run`` inside a function that runs on the loop itself does not deadlock it."""
    inner = Pipeline([node("y")(lambda x: x + 1)])
    outer = Pipeline([node("z", run_in="loop")(lambda x: inner.run(x=x)["y"] * 10)])
    assert await outer.arun(x=1) == {"z": 20}


@pytest.mark.parametrize("run_in", ["auto", "loop"])
async def test_a_sync_function_that_hands_out_a_coroutine_is_awaited(run_in):
    """The output is the coroutine's result, wherever the function that made it was called."""

    async def later(x):
        return x + 1

    pipeline = Pipeline([node("y", run_in=run_in)(lambda x: later(x))])
    assert await pipeline.arun(x=1) == {"y": 2}

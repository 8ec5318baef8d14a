"""What a service does to streams and runs: leaves them half-way, from other tasks, and awaits what others cancel."""

import asyncio

import pytest

from hypernodes import AwaitedCancelledError, Pipeline, events, node
from hypernodes.backend import LocalBackend

pytestmark = pytest.mark.asyncio


class Answering:
    """A pipeline that yields pieces without end, and notes when it has been stopped."""

    def __init__(self):
        self.stopped = asyncio.Event()
        self.pipeline = Pipeline([node("answer")(self.ask)])

    async def ask(self, question):
        try:
            while True:
                await asyncio.sleep(0)
                yield question
        finally:
            self.stopped.set()

    async def pieces(self, question="why"):
        """What a web framework's streaming response is given."""
        async with self.pipeline.aevents(question=question) as happenings:
            async for event in happenings:
                if isinstance(event, events.NodeChunk):
                    yield event.chunk


async def test_a_generator_around_events_may_be_dropped():
    """A handler that stops reading goes on undisturbed, and the run is stopped."""
    answering = Answering()
    async for piece in answering.pieces():
        assert piece == "why"
        break
    async with asyncio.timeout(10):
        await answering.stopped.wait()
    await asyncio.sleep(0)
    assert asyncio.current_task().cancelling() == 0


async def test_a_generator_around_events_may_be_closed_from_another_task():
    """Whoever closes the generator stops the run."""
    answering = Answering()
    pieces = answering.pieces()
    assert await asyncio.wait_for(anext(pieces), 10) == "why"
    assert await asyncio.create_task(anext(pieces)) == "why"
    await asyncio.create_task(pieces.aclose())
    assert answering.stopped.is_set()


async def test_a_deadline_around_reading_ends_reading_alone():
    """After a timeout in the middle of a stream the request goes on."""
    answering = Answering()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            async for _ in answering.pieces():
                await asyncio.sleep(10)
    async with asyncio.timeout(10):
        await answering.stopped.wait()


async def test_requests_that_fail_while_reading_fail_as_themselves():
    """An error in the reader's own code is the only one there is."""
    unheard = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: unheard.append(context))

    async def request():
        async for _ in Answering().pieces():
            raise OSError("the client is gone")

    results = await asyncio.gather(*(request() for _ in range(10)), return_exceptions=True)
    assert [type(result) for result in results] == [OSError] * 10
    before = asyncio.all_tasks()
    async with asyncio.timeout(10):
        while len(asyncio.all_tasks()) > 1:
            await asyncio.sleep(0)
    assert unheard == []
    assert asyncio.current_task() in before


async def await_a_cancelled_future(x):
    if x == 1:
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        await future
    return x


@pytest.mark.parametrize("beside", [0, 1], ids=["alone", "beside another"])
async def test_what_others_cancelled_is_a_failure_of_the_item(beside):
    """A cancellation that comes out of a client, and that nobody asked of the run, fails its item alone."""
    others = [node("other")(lambda x: x)] * beside
    pipeline = Pipeline([node("y")(await_a_cancelled_future), *others], name="p")
    result = await pipeline.amap({"x": [0, 1, 2]}, "x", on_error="collect", output_name="y")
    assert result["y"] == [0, None, 2]
    (failure,) = result.failures
    assert isinstance(failure.error, AwaitedCancelledError)
    assert isinstance(failure.error.__cause__, asyncio.CancelledError)
    assert failure.path == ("p", 1, "await_a_cancelled_future")
    with pytest.raises(AwaitedCancelledError):
        await pipeline.arun(x=1)
    assert asyncio.current_task().cancelling() == 0


async def test_a_nest_runs_only_what_is_wanted_of_it():
    """Selecting an output of a nested pipeline asks for no input, and runs no node, that it does not need."""
    ran = []

    @node("b")
    def make_b(z):
        ran.append("b")
        return z

    inner = Pipeline([node("y1")(lambda a: a + 1), node("y2")(lambda b: b + 1)])
    outer = Pipeline([make_b, inner.as_node(name="inner")])
    assert await outer.arun(a=1, output_name="y1") == 2
    assert ran == []
    assert await outer.arun(a=1, z=5, output_name="y2") == 6
    assert ran == ["b"]


async def test_nested_backends_have_their_own_workers():
    """A nested pipeline with its own backend uses that one's number of worker processes."""
    import os
    import time

    def work(x):
        time.sleep(0.1)
        return os.getpid()

    inner = Pipeline([node("pid")(work)], backend=LocalBackend(map_execution="parallel", max_workers=2))
    first = node("one", run_in="process")(lambda start: os.getpid())
    outer = Pipeline(
        [first, inner.as_node(map_over="x", name="all")], backend=LocalBackend(max_workers=1), name="outer"
    )
    result = await outer.arun(x=list(range(8)), start=0)
    assert len(set(result["pid"])) == 2
    assert result["one"] not in result["pid"]

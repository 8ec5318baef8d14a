"""Timeouts and retries of nodes and pipelines."""

import logging
import os
import threading
import time

import anyio
import psutil
import pytest

from hypernodes import DefinitionError, NodeTimeoutError, Pipeline, RetryPolicy, node
from hypernodes.backend import LocalBackend
from hypernodes.events import NodeFailed, NodeRetried

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

PATIENCE_S = 20  # only a hang takes this long
AT_ONCE = RetryPolicy(attempts=3, wait_s=0, jitter_s=0)


async def test_an_async_node_is_stopped_at_its_timeout():
    """A node that takes too long is cancelled, its cleanup runs, and the error says which and how long."""
    cleaned_up = []

    @node("y", timeout=0.02)
    async def hang(x):
        try:
            await anyio.sleep_forever()
        finally:
            cleaned_up.append(x)

    with anyio.fail_after(PATIENCE_S), pytest.raises(NodeTimeoutError) as stopped:
        await Pipeline([hang], name="slow").arun(x=7)
    assert cleaned_up == [7]
    assert "'hang'" in str(stopped.value)
    assert "0.02" in str(stopped.value)
    assert any("slow / hang" in note for note in stopped.value.__notes__)


async def test_a_timeout_is_also_the_languages_own():
    """``except TimeoutError`` catches a node's timeout."""

    @node("y", timeout=0.01)
    async def hang(x):
        await anyio.sleep_forever()

    with pytest.raises(TimeoutError):
        await Pipeline([hang]).arun(x=1)


async def test_a_node_within_its_timeout_is_left_alone():
    """A generous timeout changes nothing, in any form of function."""

    @node("a", timeout=PATIENCE_S)
    async def suspends(x):
        await anyio.sleep(0.001)
        return x

    @node("b", timeout=PATIENCE_S)
    def plain(x):
        return x

    @node("c", timeout=PATIENCE_S)
    async def pieces(x):
        yield x

    @node("d", timeout=PATIENCE_S, run_in="process")
    def elsewhere(x):
        return x

    assert await Pipeline([suspends, plain, pieces, elsewhere]).arun(x=1) == {
        "a": 1,
        "b": 1,
        "c": [1],
        "d": 1,
    }


async def test_an_async_generator_is_stopped_at_its_timeout():
    """The timeout covers all pieces of a generator together, and its cleanup runs."""
    cleaned_up = []

    @node("y", timeout=0.05)
    async def endless(x):
        try:
            while True:
                yield x
                await anyio.sleep(0.005)
        finally:
            cleaned_up.append(x)

    with anyio.fail_after(PATIENCE_S), pytest.raises(NodeTimeoutError):
        await Pipeline([endless]).arun(x=1)
    assert cleaned_up == [1]


async def test_a_sync_node_in_a_thread_times_out_promptly(caplog):
    """The run goes on at the timeout, the thread to its end: what it returns is dropped, which is logged."""
    timed_out, ended = threading.Event(), threading.Event()

    @node("y", run_in="thread", timeout=0.02)
    def block(x):
        assert timed_out.wait(PATIENCE_S)  # fails if the error came only after the function's end
        ended.set()
        return "too late"

    with caplog.at_level(logging.DEBUG, "hypernodes"):
        with pytest.raises(NodeTimeoutError, match="block"):
            await Pipeline([block]).arun(x=1)
        timed_out.set()
        while not ended.is_set():
            await anyio.sleep(0.001)
    assert any("block" in record.getMessage() for record in caplog.records if record.name == "hypernodes")


async def test_a_node_in_a_process_is_killed_at_its_timeout(tmp_path):
    """A process that runs over its time is killed, not waited for."""

    @node("y", run_in="process", timeout=1.5)
    def hang(folder):
        (folder / "pid").write_text(str(os.getpid()))
        time.sleep(3600)

    with anyio.fail_after(PATIENCE_S), pytest.raises(NodeTimeoutError, match="hang"):
        await Pipeline([hang]).arun(folder=tmp_path)
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


async def test_only_the_item_over_its_time_is_lost():
    """In a collecting map, one item's timeout leaves the others alone."""

    @node("y", timeout=0.05)
    async def work(x):
        if x == 2:
            await anyio.sleep_forever()
        return x

    result = await Pipeline([work]).amap({"x": range(5)}, "x", on_error="collect")
    assert result["y"] == [0, 1, None, 3, 4]
    assert [(failure.index, type(failure.error)) for failure in result.failures] == [(2, NodeTimeoutError)]


async def test_a_pipelines_timeout_bounds_the_whole_run():
    """A pipeline's timeout stops every node under way and is an error of the pipeline."""
    cleaned_up = []

    def branch(name):
        async def hang(x):
            try:
                await anyio.sleep_forever()
            finally:
                cleaned_up.append(name)

        return node(name)(hang)

    pipeline = Pipeline([branch("a"), branch("b")], name="retrieval", timeout=0.05)
    with anyio.fail_after(PATIENCE_S), pytest.raises(NodeTimeoutError) as stopped:
        await pipeline.arun(x=1)
    assert sorted(cleaned_up) == ["a", "b"]
    assert "retrieval" in str(stopped.value)
    assert "0.05" in str(stopped.value)


@pytest.mark.parametrize("how", ["amap", "astream", "nested"])
async def test_a_pipelines_timeout_is_felt_however_it_is_called(how):
    """A pipeline's timeout bounds a map, a stream and a nested run as well."""

    @node("y")
    async def hang(x):
        await anyio.sleep_forever()

    pipeline = Pipeline([hang], name="inner", timeout=0.05)
    with anyio.fail_after(PATIENCE_S), pytest.raises(NodeTimeoutError):
        if how == "amap":
            await pipeline.amap({"x": [1, 2]}, "x")
        elif how == "astream":
            async with pipeline.astream({"x": [1, 2]}, "x") as items:
                async for _ in items:
                    pass
        else:
            await Pipeline([pipeline.as_node(map_over="x")], name="outer").arun(x=[1, 2])


async def test_a_pipelines_timeout_stops_an_item_in_a_worker(tmp_path):
    """An item that is over its pipeline's timeout is killed in its worker; the others have their answers."""

    @node("y")
    def work(x, folder):
        if x == 1:
            (folder / "pid").write_text(str(os.getpid()))
            time.sleep(3600)
        return x

    backend = LocalBackend(map_execution="parallel", max_workers=2)
    pipeline = Pipeline([work], timeout=1.0, backend=backend)
    with anyio.fail_after(PATIENCE_S):
        result = await pipeline.amap({"x": range(4), "folder": tmp_path}, "x", on_error="collect")
    assert result["y"] == [0, None, 2, 3]
    assert [(failure.index, type(failure.error)) for failure in result.failures] == [(1, NodeTimeoutError)]
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


async def test_with_timeout_gives_a_new_pipeline():
    """``with_timeout`` bounds the copy only; None lifts it again."""
    go_on = anyio.Event()

    @node("y")
    async def wait(x):
        await go_on.wait()
        return x

    free = Pipeline([wait])
    bounded = free.with_timeout(0.02)
    with pytest.raises(NodeTimeoutError):
        await bounded.arun(x=1)
    go_on.set()
    assert await free.arun(x=1) == {"y": 1}
    assert await bounded.with_timeout(None).arun(x=1) == {"y": 1}


async def test_a_users_own_timeout_error_stays_the_users():
    """A ``TimeoutError`` raised by the function itself is not taken for the node's timeout."""

    @node("y", timeout=PATIENCE_S)
    async def call(x):
        with anyio.fail_after(0):
            await anyio.sleep_forever()

    with pytest.raises(TimeoutError) as raised:
        await Pipeline([call]).arun(x=1)
    assert not isinstance(raised.value, NodeTimeoutError)


@pytest.mark.parametrize("value", [0, -1, "1s", True])
def test_a_timeout_is_a_positive_number_of_seconds(value):
    """A timeout that is no positive number is refused on a node and on a pipeline."""
    with pytest.raises(DefinitionError, match="timeout"):
        node("y", timeout=value)(lambda x: x)
    with pytest.raises(DefinitionError, match="timeout"):
        Pipeline([node("y")(lambda x: x)], timeout=value)


class Flaky:
    """Fails a number of times, then gives what it got; remembers its calls."""

    def __init__(self, failures, error=ConnectionError):
        self.failures = failures
        self.error = error
        self.calls = 0

    def call(self, x):
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error(f"attempt {self.calls}")
        return x

    async def acall(self, x):
        await anyio.sleep(0)
        return self.call(x)

    def pieces(self, x):
        yield "first"
        yield self.call(x)

    async def apieces(self, x):
        yield "first"
        yield self.call(x)


@pytest.mark.parametrize("run_in", ["loop", "thread", "auto"])
async def test_a_sync_node_is_tried_again(run_in):
    """A node that fails twice and has three attempts succeeds, wherever it runs."""
    flaky = Flaky(2)
    pipeline = Pipeline([node("y", run_in=run_in, retry=AT_ONCE)(flaky.call)])
    assert await pipeline.arun(x=5) == {"y": 5}
    assert flaky.calls == 3


async def test_an_async_node_is_tried_again():
    """Async nodes are tried again as sync ones are."""
    flaky = Flaky(2)
    assert await Pipeline([node("y", retry=AT_ONCE)(flaky.acall)]).arun(x=5) == {"y": 5}
    assert flaky.calls == 3


@pytest.mark.parametrize("form", ["pieces", "apieces"])
async def test_a_generators_answer_holds_the_last_attempts_pieces_only(form):
    """A generator that failed half way starts again: its list holds nothing twice."""
    flaky = Flaky(2)
    assert await Pipeline([node("y", retry=AT_ONCE)(getattr(flaky, form))]).arun(x=5) == {"y": ["first", 5]}
    assert flaky.calls == 3


async def test_a_node_in_a_process_is_tried_again(tmp_path):
    """A function in a process is tried again in a process."""

    @node("y", run_in="process", retry=AT_ONCE)
    def flaky(folder):
        attempt = len(list(folder.iterdir()))
        (folder / str(attempt)).touch()
        if attempt < 2:
            raise ConnectionError(attempt)
        return attempt

    assert await Pipeline([flaky]).arun(folder=tmp_path_of_its_own(tmp_path)) == {"y": 2}


def tmp_path_of_its_own(tmp_path):
    folder = tmp_path / "signs"
    folder.mkdir()
    return folder


async def test_an_int_is_the_number_of_attempts():
    """``retry=2`` means two attempts in all."""
    flaky = Flaky(1)
    assert await Pipeline([node("y", retry=2)(flaky.acall)]).arun(x=5) == {"y": 5}
    assert flaky.calls == 2


async def test_the_last_error_comes_out_when_attempts_run_out():
    """After the last attempt the function's own, last error comes out, with the path as its note."""
    flaky = Flaky(99)
    with pytest.raises(ConnectionError, match="attempt 3") as raised:
        await Pipeline([node("y", retry=AT_ONCE)(flaky.acall)], name="web").arun(x=5)
    assert flaky.calls == 3
    assert [note for note in raised.value.__notes__ if "web / acall" in note] == raised.value.__notes__


async def test_a_node_without_retry_has_one_attempt():
    """Nothing is tried again unless the node says so."""
    flaky = Flaky(1)
    with pytest.raises(ConnectionError):
        await Pipeline([node("y")(flaky.acall)]).arun(x=5)
    assert flaky.calls == 1


async def test_only_the_named_exceptions_are_tried_again():
    """``on`` names what is worth another attempt; any other error comes out at once."""
    policy = RetryPolicy(attempts=3, on=(ConnectionError,), wait_s=0, jitter_s=0)
    covered, other = Flaky(2, ConnectionResetError), Flaky(2, ValueError)
    assert await Pipeline([node("y", retry=policy)(covered.acall)]).arun(x=1) == {"y": 1}
    with pytest.raises(ValueError, match="attempt 1"):
        await Pipeline([node("y", retry=policy)(other.acall)]).arun(x=1)
    assert (covered.calls, other.calls) == (3, 1)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_leaving_the_program_is_never_tried_again(error):
    """``SystemExit`` and ``KeyboardInterrupt`` come out of the first attempt."""
    flaky = Flaky(99, error)
    with pytest.raises(error):
        Pipeline([node("y", run_in="loop", retry=AT_ONCE)(flaky.call)]).run(x=1)
    assert flaky.calls == 1


async def test_cancellation_is_never_tried_again():
    """A cancelled node is not started a second time."""
    started = []

    @node("y", retry=AT_ONCE)
    async def hang(x):
        started.append(x)
        scope.cancel()
        await anyio.sleep_forever()

    with anyio.CancelScope() as scope:
        await Pipeline([hang]).arun(x=1)
    assert scope.cancelled_caught
    assert started == [1]


async def test_each_attempt_has_the_timeout_for_itself():
    """A hanging first attempt is stopped at the node's timeout, and the second may succeed."""
    calls = 0

    @node("y", timeout=0.05, retry=AT_ONCE)
    async def hang_once(x):
        nonlocal calls
        calls += 1
        if calls == 1:
            await anyio.sleep_forever()
        return x

    with anyio.fail_after(PATIENCE_S):
        assert await Pipeline([hang_once]).arun(x=1) == {"y": 1}
    assert calls == 2


async def retries_of(pipeline, **inputs):
    """The waits between attempts, as their events tell them."""
    retried = []
    with pytest.raises(ConnectionError):
        async with pipeline.aevents(inputs) as events:
            async for event in events:
                if isinstance(event, NodeRetried):
                    retried.append(event)  # noqa: PERF401 - keeps what came before the error
    return retried


async def test_waits_grow_exponentially_up_to_the_longest():
    """Each wait doubles the one before until ``max_wait_s``, and every retry is an event that says why."""
    policy = RetryPolicy(attempts=6, wait_s=0.001, max_wait_s=0.005, jitter_s=0)
    pipeline = Pipeline([node("y", retry=policy)(Flaky(99).acall)], name="web")
    retried = await retries_of(pipeline, x=1)
    assert [event.wait for event in retried] == pytest.approx([0.001, 0.002, 0.004, 0.005, 0.005])
    assert [event.attempt for event in retried] == [1, 2, 3, 4, 5]
    assert [str(event.error) for event in retried] == [f"attempt {n}" for n in range(1, 6)]
    assert {event.path for event in retried} == {("web", "acall")}


async def test_jitter_adds_a_random_part_to_each_wait():
    """With jitter the waits differ and stay within the bound."""
    policy = RetryPolicy(attempts=12, wait_s=0, max_wait_s=1, jitter_s=0.003)
    retried = await retries_of(Pipeline([node("y", retry=policy)(Flaky(99).acall)]), x=1)
    waits = [event.wait for event in retried]
    assert len(waits) == 11
    assert len(set(waits)) > 5
    assert all(0 <= wait <= 0.003 for wait in waits)


async def test_a_retried_failure_is_no_failure_of_the_node():
    """A node that succeeds in the end never reports a failure, only its retries."""
    async with Pipeline([node("y", retry=AT_ONCE)(Flaky(2).acall)]).aevents(x=1) as events:
        seen = [type(event) async for event in events]
    assert seen.count(NodeRetried) == 2
    assert NodeFailed not in seen


async def test_items_are_retried_each_for_itself():
    """Each item of a map has all its attempts; only the hopeless one is lost."""
    calls = {}

    @node("y", retry=AT_ONCE)
    async def work(x):
        calls[x] = calls.get(x, 0) + 1
        if x == 3 or calls[x] < 3:
            raise ConnectionError(x)
        return x

    result = await Pipeline([work]).amap({"x": range(5)}, "x", on_error="collect")
    assert result["y"] == [0, 1, 2, None, 4]
    assert calls == dict.fromkeys(range(5), 3)


def test_a_retry_policy_is_frozen_and_equal_by_value():
    """A policy can be shared by many nodes: nobody can change it."""
    policy = RetryPolicy(attempts=4)
    with pytest.raises(AttributeError):
        policy.attempts = 5
    assert policy == RetryPolicy(attempts=4)
    assert (policy.wait_s, policy.max_wait_s, policy.jitter_s, policy.on) == (0.1, 5.0, 0.1, (Exception,))


@pytest.mark.parametrize(
    "options",
    [
        {"attempts": 0},
        {"attempts": 1.5},
        {"on": ("ConnectionError",)},
        {"on": (KeyboardInterrupt,)},
        {"wait_s": -1},
        {"max_wait_s": "5"},
        {"jitter_s": -0.1},
    ],
)
def test_a_bad_retry_policy_is_refused(options):
    """A policy that cannot work is refused when it is made, by the option's name."""
    with pytest.raises(DefinitionError, match=next(iter(options))):
        RetryPolicy(**options)


@pytest.mark.parametrize("retry", ["3", 2.0, 0, True])
def test_a_bad_retry_is_refused_at_decoration(retry):
    """``retry=`` takes a number of attempts or a policy, nothing else."""
    with pytest.raises(DefinitionError, match=r"retry|attempts"):
        node("y", retry=retry)(lambda x: x)

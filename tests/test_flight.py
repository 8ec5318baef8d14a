"""Single-flight: one computes, the others wait, across tasks, event loops and threads."""

import asyncio
import contextvars
import copyreg
import gc
import os
import random
import threading
import traceback
import weakref
from contextlib import suppress

import anyio
import anyio.to_thread
import pytest

from hypernodes.cache import _flight
from hypernodes.cache._flight import Flights
from hypernodes.errors import CacheError

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

PATIENCE_S = 20  # only a hang takes this long


class Work:
    """A computation that a test holds up, and counts."""

    def __init__(self, result=None):
        self.result = object() if result is None else result
        self.calls = 0
        self.started = anyio.Event()
        self.go_on = anyio.Event()

    async def __call__(self):
        self.calls += 1
        self.started.set()
        await self.go_on.wait()
        return self.result


async def all_wait(flights, key, count):
    """Until so many wait for a key."""
    with anyio.fail_after(PATIENCE_S):
        while len(flights._flying[key].waiters) < count:
            await anyio.sleep(0)


async def at_once():
    return 1


async def start_waiters(tasks, flights, key, count, outcomes, compute=at_once):
    async def ask(number):
        outcomes[number] = await flights.once(key, compute)

    for number in range(count):
        tasks.start_soon(ask, number)
    await all_wait(flights, key, count)


def in_threads(*calls, backend):
    """Run async functions, each on an event loop in a thread of its own; return the errors they raised."""
    errors = []

    def run(call):
        try:
            anyio.run(call, backend=backend[0], backend_options=backend[1])
        except BaseException as error:  # noqa: BLE001 - returned
            errors.append(error)

    threads = [threading.Thread(target=run, args=[call], daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    return errors


# --- one computes -----------------------------------------------------------------------------------------


async def test_alone_a_caller_computes():
    """Each call that finds nobody at it computes, and nothing is kept."""
    flights = Flights()
    results = [await flights.once("key", at_once) for _ in range(3)]
    assert results == [(1, True)] * 3
    assert len(flights) == 0


async def test_callers_of_one_key_share_one_result():
    """The leader computes once, and all get the very same object."""
    flights, work, outcomes = Flights(), Work(), {}
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(flights.once, "key", work)
        await work.started.wait()
        await start_waiters(tasks, flights, "key", 50, outcomes)
        work.go_on.set()
    assert work.calls == 1
    assert all(result is work.result and not led for result, led in outcomes.values())
    assert len(outcomes) == 50
    assert len(flights) == 0


async def test_none_is_a_result():
    """Those who wait for None get None, and do not compute."""
    flights, outcomes = Flights(), {}
    started, go_on = anyio.Event(), anyio.Event()

    async def nothing():
        started.set()
        await go_on.wait()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(flights.once, "key", nothing)
        await started.wait()
        await start_waiters(tasks, flights, "key", 2, outcomes)
        go_on.set()
    assert outcomes == {0: (None, False), 1: (None, False)}


async def test_other_keys_do_not_wait():
    """A key, and the same key of another cache, are computed while the first is in flight."""
    flights, others, work = Flights(), Flights(), Work()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(flights.once, "key", work)
        await work.started.wait()
        assert await flights.once("other", at_once) == (1, True)
        assert await others.once("key", at_once) == (1, True)
        work.go_on.set()


async def test_nobody_alone_pays_for_an_event(monkeypatch):
    """Without a second caller nothing to wait for is made."""
    monkeypatch.setattr(_flight, "_Waiter", None)
    assert await Flights().once("key", at_once) == (1, True)


async def test_the_context_is_as_before():
    """After a flight, and after one that failed, the same key may be asked for again in the same context."""
    flights = Flights()

    async def fail():
        raise LookupError

    for _ in range(2):
        with pytest.raises(LookupError):
            await flights.once("key", fail)
        assert await flights.once("key", at_once) == (1, True)
    assert _flight._leading.get() is None


# --- errors -----------------------------------------------------------------------------------------------


class Needs(Exception):
    """Its ``__init__`` takes other arguments than ``args``."""

    def __init__(self, code, *, reason):
        super().__init__(f"{code}: {reason}")
        self.code = code


class Alone(Exception):
    """There is only one of it."""

    def __copy__(self):
        return self


async def fail_together(error, waiters=3):
    """Return what the leader and those who waited raised."""
    flights, raised = Flights(), []
    work = Work()

    async def fail():
        await work()
        raise error

    async def ask(number):
        try:
            await flights.once("key", fail)
        except Exception as caught:  # noqa: BLE001 - returned
            caught.add_note(f"noted by {number}")
            raised.append(caught)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask, "leader")
        await work.started.wait()
        for number in range(waiters):
            tasks.start_soon(ask, number)
        await all_wait(flights, "key", waiters)
        work.go_on.set()
    assert work.calls == 1
    assert len(raised) == waiters + 1
    assert len(flights) == 0
    return raised


async def test_copies_that_share_their_attributes_are_told_apart(monkeypatch):
    """tblib, which other packages install, has `copy` make errors that share one dict."""

    def shared(error):
        return _sharing, (type(error), error.args, error.__dict__)

    monkeypatch.setitem(copyreg.dispatch_table, ValueError, shared)
    raised = await fail_together(ValueError("bad"))
    assert {each.__notes__[-1] for each in raised} == {f"noted by {name}" for name in ("leader", 0, 1, 2)}


def _sharing(kind, args, attributes):
    error = kind(*args)
    error.__dict__ = attributes
    return error


@pytest.mark.parametrize(
    "make_error",
    [
        pytest.param(lambda: ValueError("bad", 3), id="plain"),
        pytest.param(lambda: Needs(7, reason="odd"), id="other arguments"),
        pytest.param(lambda: FileNotFoundError(2, "gone", "a.txt"), id="more than args"),
        pytest.param(lambda: ExceptionGroup("two", [ValueError(1)]), id="group"),
    ],
)
async def test_the_leaders_error_is_raised_for_all(make_error):
    """Each gets an equal error of its own, with its own note, and a traceback that begins in its own call."""
    error = make_error()
    error.add_note("from the node")
    raised = await fail_together(error)
    assert error in raised
    assert len({id(each) for each in raised}) == 4
    for each in raised:
        assert type(each) is type(error)
        assert (str(each), each.args, vars(each).keys()) == (str(error), error.args, vars(error).keys())
        assert len(each.__notes__) == 2
        assert each.__notes__[0] == "from the node"
        names = [frame.name for frame in traceback.extract_tb(each.__traceback__)]
        assert names.count("ask") == 1
        assert names[-1] == "fail"
    assert len({each.__notes__[1] for each in raised}) == 4


async def test_the_cause_of_an_error_is_kept():
    """Copies have the cause of the original."""
    error = ValueError("bad")
    error.__cause__ = KeyError("why")
    assert all(each.__cause__ is error.__cause__ for each in await fail_together(error))


async def test_an_error_that_cannot_be_copied_is_shared():
    """Then all raise the same object."""
    error = Alone("only one")
    assert all(each is error for each in await fail_together(error))


async def test_an_error_keeps_nothing_alive():
    """No cycle of references holds what the computation had at hand."""
    flights = Flights()

    class Large:
        pass

    died = []

    async def fail():
        large = Large()
        weakref.finalize(large, died.append, True)
        raise LookupError

    gc.collect()
    gc.disable()
    try:
        with pytest.raises(LookupError):
            await flights.once("key", fail)
        assert died == [True]
    finally:
        gc.enable()


async def test_an_interrupt_of_the_leader_is_its_own():
    """KeyboardInterrupt and the like are not shared: one of those who wait computes."""
    flights, work, outcomes, ended = Flights(), Work(), {}, []

    async def interrupted():
        await work()
        raise SystemExit(3)

    async def lead():
        try:
            await flights.once("key", interrupted)
        except SystemExit as error:
            ended.append(error.code)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lead)
        await work.started.wait()
        await start_waiters(tasks, flights, "key", 3, outcomes)
        work.go_on.set()
    assert ended == [3]
    assert {result for result, _ in outcomes.values()} == {1}
    assert len(flights) == 0


# --- cancellation -----------------------------------------------------------------------------------------


async def test_a_cancelled_leader_hands_over_to_one():
    """Of those who wait exactly one computes; the others get what it made."""
    flights, first, second, outcomes = Flights(), Work(), Work(), {}
    async with anyio.create_task_group() as tasks:
        leader = anyio.CancelScope()

        async def lead():
            with leader:
                await flights.once("key", first)

        tasks.start_soon(lead)
        await first.started.wait()
        await start_waiters(tasks, flights, "key", 20, outcomes, second)
        leader.cancel()
        await second.started.wait()
        await all_wait(flights, "key", 19)
        second.go_on.set()
    assert second.calls == 1
    assert sorted(led for _, led in outcomes.values()) == [False] * 19 + [True]
    assert all(result is second.result for result, _ in outcomes.values())
    assert len(flights) == 0


async def test_all_are_cancelled_but_one():
    """The leader and those who would be next are cancelled in the same moment: the last one computes."""
    flights, first, outcomes = Flights(), Work(), {}
    async with anyio.create_task_group() as tasks, anyio.create_task_group() as doomed:
        doomed.start_soon(flights.once, "key", first)
        await first.started.wait()
        await start_waiters(doomed, flights, "key", 10, {}, Work())

        async def survive():
            outcomes["survivor"] = await flights.once("key", at_once)

        tasks.start_soon(survive)
        await all_wait(flights, "key", 11)
        doomed.cancel_scope.cancel()
    assert outcomes == {"survivor": (1, True)}
    assert len(flights) == 0


async def test_one_that_stops_waiting_is_forgotten():
    """A cancelled waiter leaves the flight as it was."""
    flights, work = Flights(), Work()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(flights.once, "key", work)
        await work.started.wait()
        for _ in range(3):
            with anyio.move_on_after(0.001) as scope:
                await flights.once("key", at_once)
            assert scope.cancelled_caught
        assert not flights._flying["key"].waiters
        work.go_on.set()
    assert work.calls == 1


async def test_a_flight_that_is_thrown_away_is_over(anyio_backend_name):
    """A leader whose coroutine is closed half-way, as by the garbage collector, lets another lead."""
    if anyio_backend_name == "trio":
        pytest.skip("trio's coroutines are not stepped by hand")
    flights = Flights()
    coroutine = flights.once("key", asyncio.Event().wait)
    contextvars.copy_context().run(coroutine.send, None)
    assert len(flights) == 1
    contextvars.copy_context().run(coroutine.close)
    assert await flights.once("key", at_once) == (1, True)


async def test_no_waiter_is_left_behind_whoever_is_cancelled():
    """Hundreds of callers of a few keys, cancelled at random: each gets a right result or its own cancellation."""
    flights = Flights()
    for seed in range(15):
        chance = random.Random(seed)
        done = []

        async def call(key, wait_s, patience_s, done=done):
            async def compute():
                await anyio.sleep(wait_s)
                return key

            with anyio.move_on_after(patience_s) as scope:
                result, _ = await flights.once(key, compute)
                assert result == key
            done.append(scope.cancelled_caught)

        with anyio.fail_after(PATIENCE_S):
            async with anyio.create_task_group() as tasks:
                for _ in range(100):
                    patience_s = chance.choice([0, 0.001, 0.003, 0.005, PATIENCE_S])
                    tasks.start_soon(call, chance.randrange(4), chance.choice([0, 0.002, 0.004]), patience_s)
        assert len(done) == 100
        assert len(flights) == 0


# --- one's own key, and circles ---------------------------------------------------------------------------


async def test_a_key_that_needs_itself_is_an_error():
    """Directly, in a task, through another key, and in a thread with a loop of its own: never a deadlock."""
    flights = Flights()

    async def directly():
        return await flights.once("key", at_once)

    async def in_a_task():
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(directly)

    async def through_another():
        return await flights.once("other", directly)

    async def in_a_thread():
        await anyio.to_thread.run_sync(lambda: anyio.run(directly))

    for way in directly, in_a_task, through_another, in_a_thread:
        with anyio.fail_after(PATIENCE_S), pytest.raises((CacheError, ExceptionGroup)) as raised:
            await flights.once("key", way)
        error = raised.value.exceptions[0] if isinstance(raised.value, ExceptionGroup) else raised.value
        assert isinstance(error, CacheError)
        assert "needs its own result" in str(error)
        assert len(flights) == 0


async def test_what_outlives_its_flight_may_ask_for_its_key():
    """A task that was started by a computation and goes on after it is no longer part of it."""
    flights, outcomes, go_on = Flights(), [], anyio.Event()

    async def later():
        await go_on.wait()
        outcomes.append(await flights.once("key", at_once))

    async with anyio.create_task_group() as tasks:

        async def compute():
            tasks.start_soon(later)

        await flights.once("key", compute)
        go_on.set()
    assert outcomes == [(1, True)]


async def test_a_circle_of_two_does_not_hang():
    """Two computations that need each other's key at the same time both get a result."""
    flights, outcomes = Flights(), {}
    both = [anyio.Event(), anyio.Event()]

    async def lead(number):
        async def compute():
            both[number].set()
            await both[1 - number].wait()
            return await flights.once(1 - number, at_once)

        outcomes[number] = await flights.once(number, compute)

    with anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lead, 0)
            tasks.start_soon(lead, 1)
    # One of them found the circle and computed the other's key itself; the other one waited.
    waited = [outcomes[number][0] for number in (0, 1)]
    assert sorted(led for _, led in waited) == [False, True]
    assert len(flights) == 0


async def test_circles_through_loops_in_threads_do_not_hang(anyio_backend):
    """Five computations in a ring, each on a loop of its own; the ring is closed by the last one to ask."""
    flights, outcomes = Flights(), {}
    barrier = threading.Barrier(5)

    def lead(number):
        async def compute():
            await anyio.to_thread.run_sync(barrier.wait)
            return await flights.once((number + 1) % 5, at_once)

        async def main():
            outcomes[number] = await flights.once(number, compute)

        return main

    assert await anyio.to_thread.run_sync(lambda: in_threads(*map(lead, range(5)), backend=anyio_backend)) == []
    assert len(outcomes) == 5
    assert len(flights) == 0


async def test_siblings_in_one_flight_may_wait_for_each_other():
    """Branches of one computation that need the same inner key share it: that is no circle."""
    flights, inner, results = Flights(), Work(), []

    async def branch():
        results.append(await flights.once("inner", inner))

    async def outer():
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(branch)
            await inner.started.wait()
            tasks.start_soon(branch)
            await all_wait(flights, "inner", 1)
            inner.go_on.set()

    await flights.once("outer", outer)
    assert inner.calls == 1
    assert sorted(led for _, led in results) == [False, True]


# --- threads, loops and processes -------------------------------------------------------------------------


async def test_loops_in_other_threads_wait_too(anyio_backend):
    """Eight event loops in eight threads, on asyncio and on trio, need one key: it is computed once."""
    flights, outcomes, calls = Flights(), [], []
    everyone = threading.Barrier(8)

    async def slow():
        calls.append(1)
        while len(flights._flying["key"].waiters) < 7:
            await anyio.sleep(0.001)
        return "made"

    async def main():
        await anyio.to_thread.run_sync(everyone.wait)
        outcomes.append(await flights.once("key", slow))

    def run_all():
        mixed = [(main, anyio_backend), (main, ("trio", {}))] * 4
        threads = [
            threading.Thread(
                target=anyio.run, args=[call], kwargs={"backend": name, "backend_options": options}, daemon=True
            )
            for call, (name, options) in mixed
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)

    await anyio.to_thread.run_sync(run_all)
    assert len(calls) == 1
    assert sorted(outcomes) == [("made", False)] * 7 + [("made", True)]


async def test_a_flight_that_ends_in_the_moment_when_one_begins_to_wait(monkeypatch):
    """Another thread's leader may land after a caller has found it and before that is entered as waiting."""
    flights, work = Flights(), Work()

    class Late(_flight._Waiter):
        def __init__(self, flight):
            super().__init__(flight)
            flight.land("landed", work.result)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(flights.once, "key", work)
        await work.started.wait()
        monkeypatch.setattr(_flight, "_Waiter", Late)
        with anyio.fail_after(PATIENCE_S):
            assert await flights.once("key", at_once) == (work.result, False)
        work.go_on.set()


async def test_a_loop_that_is_gone_disturbs_nobody(anyio_backend):
    """A waiter whose event loop was closed under it is passed over; the others get the result."""
    flights, work, outcomes = Flights(), Work(), {}
    loop = asyncio.new_event_loop()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(flights.once, "key", work)
        await work.started.wait()

        def wait_and_vanish():
            coroutine = flights.once("key", at_once)
            task = loop.create_task(coroutine)
            loop.run_until_complete(asyncio.sleep(0))
            task._log_destroy_pending = False
            loop.close()
            return task, coroutine

        vanished, coroutine = await anyio.to_thread.run_sync(wait_and_vanish)
        await all_wait(flights, "key", 1)
        await start_waiters(tasks, flights, "key", 2, outcomes)
        work.go_on.set()
    assert list(outcomes.values()) == [(work.result, False)] * 2
    with suppress(RuntimeError):  # what it was about to do belongs to a task that is no more
        coroutine.close()
    del vanished


async def test_nobody_waits_for_another_loop_for_ever(anyio_backend, monkeypatch):
    """A leader on another loop may wait for what this caller holds: after a while the caller computes for itself."""
    monkeypatch.setattr("hypernodes.cache._flight.ACROSS_LOOPS_S", 0.05)
    flights, work = Flights(), Work()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(flights.once, "key", work)
        await work.started.wait()
        made, led = await anyio.to_thread.run_sync(lambda: anyio.run(flights.once, "key", at_once))
        assert led
        assert made is not work.result
        work.go_on.set()


async def test_threads_and_cancellations_at_random(anyio_backend):
    """Loops in six threads, callers cancelled at random: no hang, nothing wrong, nothing left."""
    flights = Flights()

    def caller(seed):
        chance = random.Random(seed)

        async def one(key):
            async def compute():
                await anyio.sleep(chance.choice([0, 0.001]))
                return key

            with anyio.move_on_after(chance.choice([0.0005, 0.002, PATIENCE_S])):
                result, _ = await flights.once(key, compute)
                assert result == key

        async def main():
            for _ in range(15):
                async with anyio.create_task_group() as tasks:
                    for _ in range(8):
                        tasks.start_soon(one, chance.randrange(3))

        return main

    assert await anyio.to_thread.run_sync(lambda: in_threads(*map(caller, range(6)), backend=anyio_backend)) == []
    assert len(flights) == 0


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # pooled threads of earlier tests may be idle
def test_a_forked_child_waits_for_nobody_in_its_parent():
    """What was in flight when a process forked is computed again in the child."""
    flights = Flights()

    async def main():
        started, go_on = anyio.Event(), anyio.Event()

        async def hold():
            started.set()
            await go_on.wait()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(flights.once, "key", hold)
            await started.wait()
            with _flight._lock:
                child = os.fork()
            if child == 0:
                os._exit(0 if len(flights) == 0 and _flight._lock.acquire(blocking=False) else 1)
            go_on.set()
        return child

    assert os.waitstatus_to_exitcode(os.waitpid(anyio.run(main), 0)[1]) == 0

"""The guard around a store: whatever the store does, a run goes on, warned once."""

import asyncio
import gc
import logging
import threading
import weakref
from dataclasses import dataclass, field

import anyio
import anyio.to_thread
import pytest

from hypernodes import CacheError
from hypernodes.cache import _guard
from hypernodes.cache._guard import Breaker, guard_of
from hypernodes.cache._store import joined

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

PATIENCE_S = 20  # only a hang takes this long
OPEN_S = 0.05


class Moody:
    """A store in memory whose calls do what the test says."""

    def __init__(self):
        self.entries = {}
        self.get = self.put = None
        self.calls = 0

    async def get_many(self, keys):
        self.calls += 1
        if self.get is not None:
            return await self.get()
        return {key: self.entries[key] for key in keys if key in self.entries}

    async def set_many(self, entries):
        self.calls += 1
        if self.put is not None:
            await self.put()
        else:
            self.entries.update({key: joined(entry) for key, entry in entries.items()})

    def fail(self, error):
        async def call():
            raise error

        self.get = self.put = call

    def recover(self):
        self.get = self.put = None


@pytest.fixture
def store():
    return Moody()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Breakers that open for a moment only, and warnings for every outage."""
    monkeypatch.setattr(_guard, "OPEN_S", OPEN_S)
    monkeypatch.setattr(_guard, "QUIET_S", 0.0)


@pytest.fixture
def log(caplog):
    """What was logged, as pairs of level and text."""
    caplog.set_level(logging.DEBUG, "hypernodes")
    return lambda: [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "hypernodes"]


async def test_a_good_store_is_passed_through(store, log):
    """What is stored is found; nothing is said."""
    guard = guard_of(store)
    assert await guard.set_many({"a": b"1", "b": [b"2", b"3"]}) is True
    assert await guard.get_many(["a", "c"]) == {"a": b"1"}
    assert set(await guard.find_many(["b", "c"])) == {"b"}
    assert log() == []
    assert (guard.health.missed, guard.health.dropped) == (0, 0)


async def test_a_store_that_can_find_is_not_read(store):
    """`find_many` of the store is used where there is one."""
    store.find_many = find = []

    async def find_many(keys):
        find.append(keys)
        return ["a"]

    store.find_many = find_many
    guard = guard_of(store)
    assert guard.can_find
    assert set(await guard.find_many(["a", "b"])) == {"a"}
    assert (find, store.calls) == ([["a", "b"]], 0)


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        ConnectionRefusedError(111, "refused"),
        TimeoutError(),
        KeyError("a bug"),
        CacheError("not here"),
        ExceptionGroup("several", [OSError(5, "io"), ValueError()]),
        RecursionError(),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_no_error_of_a_store_comes_out(store, log, error):
    """Whatever it raises is a miss, or a result that is not kept; one warning says so, and one line its end."""
    store.entries["a"] = b"1"
    guard = guard_of(store)
    store.fail(error)
    assert await guard.get_many(["a", "b"]) == {}
    assert set(await guard.find_many(["a"])) == set()
    assert await guard.set_many({"c": b"3"}) is False
    assert [level for level, _ in log()] == ["WARNING"]
    assert "the cache Moody fails" in log()[0][1]
    assert (guard.health.missed, guard.health.dropped) == (3, 1)
    store.recover()
    await anyio.sleep(2 * OPEN_S)
    assert await guard.get_many(["a"]) == {"a": b"1"}
    assert [level for level, _ in log()] == ["WARNING"]  # writing has not been seen to work yet
    assert await guard.set_many({"c": b"3"}) is True
    assert [level for level, _ in log()] == ["WARNING", "INFO"]
    assert "3 lookups and 1 results" in log()[1][1]


@pytest.mark.parametrize("answer", [None, [b"1"], {"a": "text"}, {"a": None}, {"a": 3}])
async def test_a_wrong_answer_is_a_miss(store, log, answer):
    """What is no mapping to bytes never reaches the run."""

    async def wrong():
        return answer

    store.get = wrong
    assert await guard_of(store).get_many(["a"]) == {}
    assert "get_many() returned" in log()[0][1]


async def test_a_method_that_is_not_async_is_a_miss(store, log):
    """A store whose method returns its result instead of an awaitable costs a warning, not a run."""
    store.get_many = lambda keys: {}
    assert await guard_of(store).get_many(["a"]) == {}
    assert len(log()) == 1


async def test_a_store_that_does_not_answer_is_given_up(store, log):
    """After its deadline a call is a miss, and the next one does not wait at all."""
    store.deadline_s = 0.05
    store.get = anyio.sleep_forever
    guard = guard_of(store)
    with anyio.fail_after(PATIENCE_S):
        assert await guard.get_many(["a"]) == {}
    assert "no answer in time" in log()[0][1]
    assert store.calls == 1
    assert await guard.get_many(["a"]) == {}
    assert store.calls == 1


async def test_large_writes_get_more_time(store, monkeypatch):
    """The deadline grows with the bytes that are written, and with the keys."""
    monkeypatch.setattr(_guard, "BYTES_PER_S", 1000)
    monkeypatch.setattr(_guard, "KEYS_PER_S", 10)
    store.deadline_s = 0.0

    async def slow():
        await anyio.sleep(0.2)
        return {}

    store.get = store.put = slow
    assert await guard_of(store).set_many({"a": [bytes(9_000), bytes(1_000)]}) is True
    assert guard_of(store).health.missed == 0
    await guard_of(store).get_many([str(n) for n in range(100)])
    assert guard_of(store).health.missed == 0
    assert await guard_of(store).set_many({"a": b"little"}) is False


async def test_a_store_without_deadline_may_take_its_time(store, monkeypatch):
    """`deadline_s = None` of a store holds."""
    monkeypatch.setattr(_guard, "DEADLINE_S", 0.0)
    monkeypatch.setattr(_guard, "KEYS_PER_S", 1e9)
    store.deadline_s = None

    async def slow():
        await anyio.sleep(0.05)
        return {"a": b"1"}

    store.get = slow
    assert await guard_of(store).get_many(["a"]) == {"a": b"1"}


async def test_cancelling_a_call_is_no_failure(store, log):
    """It comes out untouched, and says nothing of the store."""
    store.get = anyio.sleep_forever
    guard = guard_of(store)
    for _ in range(2 * _guard.FAILURES):
        with anyio.move_on_after(0.001) as scope:
            await guard.get_many(["a"])
        assert scope.cancelled_caught
    store.recover()
    store.entries["a"] = b"1"
    assert await guard.get_many(["a"]) == {"a": b"1"}
    assert log() == []


async def test_a_cancellation_of_the_stores_own_is_a_failure(store, log, anyio_backend_name):
    """A store that awaits something that others have cancelled fails; the run is not cancelled."""
    if anyio_backend_name == "trio":
        pytest.skip("on trio nothing but a scope can cancel")

    async def get():
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    store.get = get
    assert await guard_of(store).get_many(["a"]) == {}
    assert len(log()) == 1


async def test_interrupts_come_out(store):
    """KeyboardInterrupt is no failure of the store."""
    store.fail(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        await guard_of(store).get_many(["a"])


# --- the breaker ------------------------------------------------------------------------------------------


async def test_a_store_that_is_down_is_left_alone(store, log):
    """After a few failures it is not called again until a while has passed, by however many runs."""
    store.fail(ConnectionError("down"))
    for _ in range(50):
        assert await guard_of(store).get_many(["a"]) == {}
    assert store.calls == _guard.FAILURES
    assert len(log()) == 1
    assert guard_of(store).health.missed == 50


async def test_reading_goes_on_while_writing_fails(store, log):
    """A full disk does not keep results from being found."""
    store.entries["a"] = b"1"

    async def full():
        raise OSError(28, "No space left on device")

    store.put = full
    guard = guard_of(store)
    for _ in range(10):
        assert await guard.set_many({"b": b"2"}) is False
        assert await guard.get_many(["a"]) == {"a": b"1"}
    assert store.calls == 10 + _guard.FAILURES
    assert [level for level, _ in log()] == ["WARNING"]
    assert guard.health.dropped == 10


async def test_one_call_at_a_time_tries_whether_it_is_back(store):
    """When an open breaker may be tried, of many callers one does, and the others are not held up."""
    store.fail(TimeoutError())
    guard = guard_of(store)
    await guard.get_many(["a"])
    await anyio.sleep(2 * OPEN_S)
    store.calls, go_on = 0, anyio.Event()

    async def slow():
        await go_on.wait()
        return {"a": b"1"}

    store.get = slow
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(guard.get_many, ["a"])
        while not store.calls:
            await anyio.sleep(0)
        for _ in range(20):
            assert await guard.get_many(["a"]) == {}
        assert store.calls == 1
        go_on.set()
    store.recover()
    await guard.get_many(["a"])
    assert store.calls == 2


async def test_a_trial_that_is_cancelled_leaves_room_for_another(store):
    """The next caller tries."""
    store.fail(TimeoutError())
    guard = guard_of(store)
    await guard.get_many(["a"])
    await anyio.sleep(2 * OPEN_S)
    store.get = anyio.sleep_forever
    with anyio.move_on_after(0.001):
        await guard.get_many(["a"])
    store.recover()
    store.entries["a"] = b"1"
    assert await guard.get_many(["a"]) == {"a": b"1"}


def test_each_trial_in_vain_doubles_the_pause():
    """Up to a longest one; a success begins anew."""
    breaker, now, pauses = Breaker(), 0.0, []
    for _ in range(_guard.FAILURES):
        assert breaker.begin(now) == "usual"
        breaker.failed(now, "usual", late=False)
    for _ in range(12):
        began = now
        while breaker.begin(now) is None:
            now += OPEN_S / 4
        pauses.append(now - began)
        breaker.failed(now, "trial", late=False)
    assert pauses[0] == pytest.approx(OPEN_S, abs=OPEN_S / 4)
    assert pauses[3] == pytest.approx(8 * OPEN_S, abs=OPEN_S / 4)
    assert pauses[-1] == pytest.approx(_guard.LONGEST_OPEN_S, abs=OPEN_S)
    while breaker.begin(now) is None:
        now += 1.0
    assert breaker.succeeded("trial")
    for _ in range(_guard.FAILURES):
        assert breaker.begin(now) == "usual"
        breaker.failed(now, "usual", late=False)
    assert breaker.begin(now + OPEN_S) == "trial"


def test_successes_in_between_keep_it_closed():
    """Failures count in a row only."""
    breaker = Breaker()
    for _ in range(5 * _guard.FAILURES):
        breaker.failed(0.0, "usual", late=False)
        assert breaker.succeeded("usual")
    assert breaker.begin(0.0) == "usual"


def test_a_late_success_from_before_the_outage_proves_nothing():
    """A slow call that began while the breaker was closed does not close it again."""
    breaker = Breaker()
    breaker.failed(0.0, "usual", late=True)
    assert not breaker.succeeded("usual")
    assert breaker.begin(0.0) is None


async def test_a_store_that_fails_on_and_off_is_warned_of_once(store, log, monkeypatch):
    """Within a minute there is one warning, and one line for its end."""
    monkeypatch.setattr(_guard, "QUIET_S", 60.0)
    guard = guard_of(store)
    for _ in range(20):
        store.fail(ConnectionError("down"))
        await guard.get_many(["a"])
        store.recover()
        await guard.get_many(["a"])
    assert [level for level, _ in log()] == ["WARNING", "INFO"]


# --- shared by runs ---------------------------------------------------------------------------------------


async def test_an_outage_is_known_to_all_loops_and_threads(store, log, anyio_backend):
    """The state belongs to the store: runs in other threads neither call a store that is down nor warn again."""
    store.fail(ConnectionError("down"))

    async def use():
        guard = guard_of(store)
        for _ in range(20):
            assert await guard.get_many(["a"]) == {}
            assert await guard.set_many({"a": b"1"}) is False

    def run_all():
        name, options = anyio_backend
        kwargs = {"backend": name, "backend_options": options}
        threads = [threading.Thread(target=anyio.run, args=[use], kwargs=kwargs) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)

    await anyio.to_thread.run_sync(run_all)
    assert len(log()) == 1
    health = guard_of(store).health
    assert (health.missed, health.dropped) == (120, 120)
    # Calls that were under way when the breaker opened may come on top.
    assert 2 * _guard.FAILURES <= store.calls <= 2 * (_guard.FAILURES + 6)


async def test_equal_stores_are_not_the_same(store):
    """Health goes by identity, also for stores that cannot be hashed, or referred to weakly."""

    @dataclass
    class Equal(Moody):
        entries: dict = field(default_factory=dict)
        get: object = None
        put: object = None
        calls: int = 0

    class Slotted:
        __slots__ = ()

        async def get_many(self, keys):
            return {}

        async def set_many(self, entries):
            pass

    for make in Equal, Slotted:
        one, other = make(), make()
        assert guard_of(one).health is guard_of(one).health
        assert guard_of(one).health is not guard_of(other).health


async def test_the_health_of_a_store_goes_with_it():
    """What is known of a store is forgotten when nobody has it any more."""
    store = Moody()
    await guard_of(store).get_many(["a"])
    health = weakref.ref(guard_of(store).health)
    gc.collect()
    assert health() is guard_of(store).health
    del store
    gc.collect()
    assert health() is None


# --- what is logged ---------------------------------------------------------------------------------------


SECRET = "s3cret-value"


class Telling(Moody):
    """Its repr tells what nobody should read in a log."""

    def __repr__(self):
        return f"Telling({SECRET})"


@pytest.mark.parametrize(
    "error",
    [
        ValueError(f"cannot store {SECRET}"),
        KeyError(SECRET),
        ConnectionError(f"no way to redis://user:{SECRET}@localhost:6379/0"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_log_lines_hold_no_secrets(log, error):
    """Neither values nor passwords: of an unknown error its type and place are told."""
    store = Telling()
    store.fail(error)
    await guard_of(store).get_many([SECRET])
    [(_, line)] = log()
    assert SECRET not in line
    assert type(error).__name__ in line


async def test_the_place_of_a_bug_is_told(store, log):
    """A store of the user's own can be repaired from the warning."""

    async def buggy():
        return {}["a"]

    store.get = buggy
    await guard_of(store).get_many(["a"])
    assert "KeyError at test_guard.py:" in log()[0][1]


def test_a_store_may_refuse_at_the_start():
    """`check` raises what the store's own check raises, and asks nothing of a store that has none."""

    class Choosy(Moody):
        def check(self):
            raise CacheError("not on this loop")

    guard_of(Moody()).check()
    with pytest.raises(CacheError, match="not on this loop"):
        guard_of(Choosy()).check()

"""One run's use of a cache: what it gathers, writes, remembers and forgets."""

import asyncio
import json
import os
import struct
import threading
from functools import partial

import anyio
import pytest

from hypernodes import Pipeline, node
from hypernodes.cache import _buffer, _ledger, _session
from hypernodes.cache._buffer import buffer_of, identity
from hypernodes.cache._code import _place
from hypernodes.cache._envelope import seal
from hypernodes.cache._ledger import History, Ledger
from hypernodes.cache._session import CacheSession
from tests._caching import until, waiting

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

KEY = "0" * 64


class Kept:
    """A store in a dict, which cannot find without reading."""

    def __init__(self):
        self.entries = {}
        self.reads = 0
        self.writes = []

    async def get_many(self, keys):
        self.reads += 1
        await anyio.sleep(0)
        return {key: self.entries[key] for key in keys if key in self.entries}

    async def set_many(self, entries):
        self.writes.append(sorted(entries))
        await anyio.sleep(0)
        for key, parts in entries.items():
            self.entries[key] = parts if isinstance(parts, bytes) else b"".join(parts)


def recorded(monkeypatch):
    """The sessions that are opened from now on."""
    sessions = []
    begin = CacheSession.__init__

    def noted(self, *args, **options):
        begin(self, *args, **options)
        sessions.append(self)

    monkeypatch.setattr(CacheSession, "__init__", noted)
    return sessions


def reasons(explained):
    """Why each node would run."""
    return [reason.why for each in explained for reason in each.reasons]


class Unhashable(Kept):
    """A store that is equal to another by what it holds."""

    def __eq__(self, other):
        return type(other) is Unhashable and self.entries == other.entries

    __hash__ = None


# ---- what waits to be written


async def test_a_store_without_a_hash_has_one_buffer():
    """Two runs at the same time share what waits to be written, also where the store cannot be the key of a dict."""
    store, other = Unhashable(), Unhashable()
    first, second = CacheSession(store), CacheSession(store)
    first._buffer.put(KEY, b"what waits")
    assert await second.find([KEY]) == {KEY}
    assert await CacheSession(other).find([KEY]) == set()


async def test_a_store_without_a_hash_computes_once():
    """Equal calls of two runs that overlap are made once, also where the store cannot be the key of a dict."""
    ran, go_on = [], anyio.Event()

    @node("y")
    async def work(x):
        ran.append(x)
        await go_on.wait()
        return x

    pipeline = Pipeline([work], cache=Unhashable())
    async with anyio.create_task_group() as both:
        both.start_soon(partial(pipeline.arun, x=1))
        both.start_soon(partial(pipeline.arun, x=1))
        await until(waiting)
        go_on.set()
    assert len(ran) == 1


async def test_what_could_not_be_written_waits_on(anyio_backend):
    """A write that is cancelled, even before it begins, loses nothing: the next one has it."""
    if anyio_backend[0] != "asyncio":
        pytest.skip("asyncio's own task.cancel(), from which nothing can be shielded")
    store = Kept()
    session = CacheSession(store)
    session._buffer.put(KEY, b"old")

    async def stuck(entries):
        await anyio.sleep_forever()

    store.set_many = stuck
    writing = asyncio.create_task(session.flush())
    await anyio.wait_all_tasks_blocked()
    session._buffer.put("1" * 64, b"meanwhile")
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    del store.set_many
    assert await session.find([KEY]) == {KEY}
    await session.flush()
    assert store.entries == {KEY: b"old", "1" * 64: b"meanwhile"}
    assert not session.unwritten


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_has_buffers_of_its_own():
    """A child neither writes what its parent has gathered nor waits for a lock that a thread of the parent held."""
    store = Kept()
    buffer = buffer_of(identity(store))
    buffer.put(KEY, b"the parent's")
    with _buffer._buffers._lock:
        child = os.fork()
        if not child:
            os._exit(0 if not buffer_of(identity(store)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert buffer_of(identity(store)) is buffer


# ---- what is kept in memory


async def test_a_run_without_end_keeps_what_it_knows_of_its_entries_in_bounds(monkeypatch):
    """However many entries a run makes, it knows the latest of them."""
    monkeypatch.setattr(_session, "MOST_FRESH", 100)
    sessions = recorded(monkeypatch)

    @node("y")
    def same(x):
        return x

    rows = 2_000
    assert len((await Pipeline([same], cache=Kept()).amap({"x": list(range(rows))}, "x"))["y"]) == rows
    [session] = sessions
    assert len(session._fresh) == 100


async def test_entries_that_are_asked_for_stay_known(monkeypatch):
    """What every row of a refreshed map shares is made once, however many rows there are."""
    monkeypatch.setattr(_session, "MOST_FRESH", 1_100)
    ran = []

    @node("base")
    def base(seed):
        ran.append(seed)
        return seed

    @node("y")
    def plus(base, x):
        return base + x

    pipeline = Pipeline([base, plus], cache=Kept())
    for _ in range(2):
        await pipeline.amap({"x": list(range(5_000)), "seed": 1}, "x", refresh=True)
    assert ran == [1, 1]


async def test_what_was_read_and_is_not_loaded_is_held_in_bounds(monkeypatch):
    """A store that cannot find without reading fills no memory; what was forgotten is read again."""
    sessions = recorded(monkeypatch)

    @node("a")
    def large(x):
        return bytes([x % 256]) * 1_000

    @node("b")
    def length(a):
        return len(a)

    pipeline = Pipeline([large, length], cache=Kept())
    inputs = {"x": list(range(1_000))}
    await pipeline.amap(inputs, "x")
    monkeypatch.setattr(_session, "MOST_HELD_BYTES", 50_000)
    sessions.clear()
    assert (await pipeline.amap(inputs, "x"))["b"] == [1_000] * 1_000
    [session] = sessions
    assert 0 <= session._held_bytes == sum(map(len, session._held.values())) <= 50_000
    monkeypatch.setattr(_session, "MOST_HELD", 3)
    sessions.clear()
    assert (await pipeline.amap(inputs, "x"))["a"][-1] == bytes([999 % 256]) * 1_000
    assert len(sessions[0]._held) <= 3


# ---- histories


async def test_a_run_without_end_notes_the_latest_of_its_entries(monkeypatch):
    """What a run notes for explanations has bounds already before it is written."""
    monkeypatch.setattr(_ledger, "MOST_ROWS", 100)
    ledger = Ledger()
    longest = 0
    for each in range(1_000):
        ledger.note("history", ("x",), {"body": "00"}, f"{each:064x}"[::-1], 0.0, [b"digest.."])
        longest = max(longest, len(ledger._noted["history"].rows))
    assert longest <= 111
    [history] = ledger.take().values()
    assert bytes.fromhex(f"{999:064x}"[::-1])[:8] in history.rows
    assert bytes.fromhex(f"{899:064x}"[::-1])[:8] in history.rows
    assert bytes.fromhex(f"{500:064x}"[::-1])[:8] not in history.rows
    assert history.codes[0].calls == 1_000


async def test_little_by_little_a_large_history_is_not_written_each_time():
    """What runs add is gathered while it is little, and explanations know it."""
    store = Kept()

    @node("y")
    def same(x):
        return x

    pipeline = Pipeline([same], cache=store)
    await pipeline.amap({"x": list(range(2_000))}, "x")
    store.writes.clear()
    for x in range(-10, 0):
        await pipeline.arun(x=x)
    assert sum(key.startswith("ledger-") for batch in store.writes for key in batch) == 0
    for key in [key for key in store.entries if not key.startswith("ledger-")]:
        del store.entries[key]
    assert reasons(await pipeline.explain(x=-1)) == ["gone"]
    await pipeline.amap({"x": list(range(2_000, 2_050))}, "x")
    assert sum(key.startswith("ledger-") for batch in store.writes for key in batch) == 1
    elsewhere = Kept()
    elsewhere.entries = {key: data for key, data in store.entries.items() if key.startswith("ledger-")}
    explained = await pipeline.with_cache(elsewhere).explain({"x": [-1, 2_049, 5_000]}, map_over="x")
    assert reasons(explained) == ["gone", "gone", "input"]


async def test_what_is_gathered_is_written_after_a_while(monkeypatch):
    """The next run that stores something writes all that has been gathered, once the last time is long ago."""
    store = Kept()

    @node("y")
    def same(x):
        return x

    pipeline = Pipeline([same], cache=store)
    await pipeline.amap({"x": list(range(1_000))}, "x")
    await pipeline.arun(x=-1)
    monkeypatch.setattr(_ledger, "OFTEN_S", 0.0)
    await pipeline.arun(x=-2)
    elsewhere = Kept()
    elsewhere.entries = {key: data for key, data in store.entries.items() if key.startswith("ledger-")}
    explained = await pipeline.with_cache(elsewhere).explain({"x": [-1, -2, -3]}, map_over="x")
    assert reasons(explained) == ["gone", "gone", "input"]


async def test_histories_are_merged_beside_the_loop(monkeypatch):
    """Reading and writing what is remembered of a node happens in a thread."""
    threads = []
    unpacked, packed = History.unpacked, History.packed
    monkeypatch.setattr(
        History, "unpacked", lambda data: threads.append(threading.get_ident()) or unpacked(data), raising=True
    )
    monkeypatch.setattr(History, "packed", lambda self: threads.append(threading.get_ident()) or packed(self))

    @node("y")
    def same(x):
        return x

    pipeline = Pipeline([same], cache=Kept())
    for x in (1, 2):
        await pipeline.arun(x=x)
    await pipeline.explain(x=3)
    assert len(threads) == 4
    assert threading.get_ident() not in threads


PARTS = {"parts": {"body": "00"}, "calls": 1, "seconds": 0.0, "at": 0.0}


@pytest.mark.parametrize(
    "head",
    [
        b"[" * 200_000,
        b"[]",
        json.dumps({"names": ["x"], "codes": [PARTS | {"calls": "many"}]}).encode(),
        json.dumps({"names": ["x"], "codes": [PARTS | {"seconds": None}]}).encode(),
        json.dumps({"names": ["x"], "codes": [PARTS | {"at": float("nan")}]}).encode(),
        json.dumps({"names": ["x"], "codes": [PARTS | {"at": 10**400}]}).encode(),
        json.dumps({"names": ["x"], "codes": [PARTS | {"parts": ["body"]}]}).encode(),
        json.dumps({"names": ["x"], "codes": [PARTS | {"parts": {"body": [1]}}]}).encode(),
        json.dumps({"names": [["x"]], "codes": []}).encode(),
        json.dumps({"names": ["x"], "codes": 3}).encode(),
    ],
    ids=["deep", "list", "calls", "seconds", "nan", "high", "parts", "part", "names", "codes"],
)
async def test_a_history_of_another_shape_is_forgotten(head):
    """Whatever a store says of a node's past, runs and explanations go on, and the next run begins anew."""
    store = Kept()

    @node("y")
    def same(x):
        return x

    pipeline = Pipeline([same], cache=store)
    await pipeline.arun(x=1)
    [name] = [key for key in store.entries if key.startswith("ledger-")]
    data = struct.pack("<I", len(head)) + head
    store.entries[name] = b"".join(seal(name, _ledger.CODEC, b"{}", [data], None))
    assert reasons(await pipeline.explain(x=2)) == ["new"]
    assert await pipeline.arun(x=2) == {"y": 2}
    assert reasons(await pipeline.explain(x=3)) == ["input"]


# ---- names


class Answering:
    """Has any attribute that it is asked for."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, x):
        return x


def test_where_a_function_was_written():
    """Partials and nodes are followed to the function; an object that answers everything is named by its class."""

    def plain(x):
        return x

    place = f"{__name__}.test_where_a_function_was_written.<locals>.plain"
    assert _place(plain) == _place(partial(partial(plain), x=1)) == _place(node("y")(plain)) == place
    assert _place(Answering()) == f"{__name__}.Answering"

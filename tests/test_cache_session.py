"""One run's use of a cache: what it gathers, writes, remembers and forgets."""

import asyncio
import os
from functools import partial

import anyio
import pytest

from hypernodes import Pipeline, node
from hypernodes.cache import _buffer
from hypernodes.cache._buffer import buffer_of, identity
from hypernodes.cache._session import CacheSession, _place
from tests._caching import PATIENCE_S

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
    ran = []

    @node("y")
    async def slow(x):
        ran.append(x)
        await anyio.sleep(0.1)
        return x

    pipeline = Pipeline([slow], cache=Unhashable())
    with anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as both:
            both.start_soon(partial(pipeline.arun, x=1))
            both.start_soon(partial(pipeline.arun, x=1))
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

"""What every store promises: bytes in, the same bytes out, in batches, from many tasks at once."""

import hashlib
import random

import anyio
import pytest

from hypernodes.cache import Store
from tests._stores import CASES

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


def key(of):
    """A key as pipelines have them."""
    return hashlib.sha256(repr(of).encode()).hexdigest()


def content(of, size=300):
    """Bytes that no other entry has."""
    return random.Random(repr(of)).randbytes(size)


def plain(found):
    """What a store gave, as bytes that compare and print."""
    return {key: bytes(value) for key, value in found.items()}


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request, anyio_backend, servers):
    """Each kind of store, on the event loops that it works with, with its server (if it has one) running."""
    if request.param.server is not None:
        servers.port(request.param.server)
    if anyio_backend[0] not in request.param.libraries:
        pytest.skip(f"{request.param} does not work with {anyio_backend[0]}")
    return request.param


@pytest.fixture
async def store(case, tmp_path):
    """An empty store."""
    async with case.open(tmp_path) as opened:
        yield opened


async def test_it_is_a_store(store):
    """It has the methods that `cache=` asks for."""
    assert isinstance(store, Store)


async def test_what_is_stored_comes_back(store):
    """Every stored key gives its own bytes; one that was never stored is left out."""
    entries = {key(n): content(n) for n in range(20)}
    await store.set_many(entries)
    assert plain(await store.get_many([*entries, key("never")])) == entries


async def test_an_empty_store_has_nothing(store):
    """Nothing is found where nothing was stored."""
    assert plain(await store.get_many([key(1), key(2)])) == {}


async def test_empty_batches_are_fine(store):
    """To ask for nothing gives nothing, and to store nothing does nothing."""
    await store.set_many({})
    assert plain(await store.get_many([])) == {}


async def test_an_entry_in_several_buffers_is_their_sum(store):
    """Buffers of any kind are stored one behind the other."""
    await store.set_many(
        {
            key("small"): [b"ab", bytearray(b"cd"), memoryview(b"ef"), b""],
            key("large"): (b"head", memoryview(content("large", 200_000))),
            key("words"): [memoryview(b"12345678").cast("I")],
            key("one"): memoryview(b"one piece"),
        }
    )
    assert plain(await store.get_many([key("small"), key("large"), key("words"), key("one")])) == {
        key("small"): b"abcdef",
        key("large"): b"head" + content("large", 200_000),
        key("words"): b"12345678",
        key("one"): b"one piece",
    }


@pytest.mark.parametrize("sizes", [(10, 20), (10, 200_000), (200_000, 10), (200_000, 150_000)])
async def test_the_last_one_stored_counts(case, store, tmp_path, sizes):
    """Storing again replaces, whatever the sizes, for this user and for the next one."""
    for turn, size in enumerate(sizes):
        await store.set_many({key(1): content(turn, size), key(("beside", turn)): b"beside"})
    newest = {key(1): content(1, sizes[1])}
    assert plain(await store.get_many([key(1)])) == newest
    async with case.open(tmp_path) as another:
        assert plain(await another.get_many([key(1)])) == newest


async def test_ledger_keys_are_others(store):
    """A key and the ledger key with the same digits are two entries."""
    await store.set_many({key(1): b"value", f"ledger-{key(1)}": b"ledger"})
    assert plain(await store.get_many([f"ledger-{key(1)}", key(1)])) == {
        key(1): b"value",
        f"ledger-{key(1)}": b"ledger",
    }


async def test_keys_asked_for_twice_are_found(store):
    """A batch may name a key more than once."""
    await store.set_many({key(1): b"value"})
    assert plain(await store.get_many([key(1), key(1), key(2), key(2)])) == {key(1): b"value"}


async def test_large_batches(store):
    """Two thousand entries go in and out at once."""
    entries = {key(n): content(n, 100) for n in range(2000)}
    await store.set_many(entries)
    assert plain(await store.get_many(list(entries))) == entries


async def test_large_entries(case, store):
    """An entry of the largest size that the store must take."""
    large = content("large", case.largest)
    await store.set_many({key("large"): large, key("small"): b"small"})
    assert plain(await store.get_many([key("large"), key("small")])) == {key("large"): large, key("small"): b"small"}


async def test_another_user_of_the_same_place_finds_it(case, store, tmp_path):
    """What one has stored is there for the next that opens the place."""
    await store.set_many({key(1): b"value", key(2): content(2, 100_000)})
    async with case.open(tmp_path) as another:
        assert plain(await another.get_many([key(1), key(2)])) == {key(1): b"value", key(2): content(2, 100_000)}


async def test_finding_agrees_with_reading(store):
    """A store that can find without reading finds what it can read."""
    if not hasattr(store, "find_many"):
        pytest.skip("this store cannot find without reading")
    await store.set_many({key(1): b"value", key(2): content(2, 100_000)})
    asked = [key(2), key("never"), key(1)]
    assert set(await store.find_many(asked)) == set(await store.get_many(asked)) == {key(1), key(2)}
    assert set(await store.find_many([])) == set()


@pytest.mark.parametrize("size", [100, 100_000])
async def test_nobody_shares_memory_with_a_store(store, size):
    """Changing the bytes that were stored, or those that were given out, changes no entry."""
    mine = bytearray(content(1, size))
    await store.set_many({key(1): mine})
    mine[:] = bytes(size)
    given = (await store.get_many([key(1)]))[key(1)]
    view = memoryview(given)
    if not view.readonly:
        view[:] = bytes(size)
    assert plain(await store.get_many([key(1)])) == {key(1): content(1, size)}


async def test_many_tasks_at_once(store):
    """Three hundred tasks store and read at the same time; each finds its own and everyone's in the end."""

    async def use(n):
        await store.set_many({key(n): content(n), key("shared"): b"shared"})
        assert plain(await store.get_many([key(n), key("shared")])) == {key(n): content(n), key("shared"): b"shared"}

    async with anyio.create_task_group() as tasks:
        for n in range(300):
            tasks.start_soon(use, n)
    assert len(await store.get_many([key(n) for n in range(300)])) == 300


async def test_a_cancelled_call_leaves_it_usable(store):
    """Whoever is cancelled while storing leaves the whole entry or none, and nothing that is in the way."""
    entries = {key(n): content(n, 70_000) for n in range(20)}
    for delay in (0, 0.0005, 0.002, 0.01):
        with anyio.move_on_after(delay):
            await store.set_many(entries)
        assert plain(await store.get_many(list(entries))).items() <= entries.items()
    await store.set_many(entries)
    assert plain(await store.get_many(list(entries))) == entries

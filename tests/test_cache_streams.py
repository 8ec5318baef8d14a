"""Streams with a cache: rows are looked up together as far as they have come, and none waits for those behind it."""

import anyio
import pytest

from hypernodes import Pipeline, node
from hypernodes._ahead import Ahead
from hypernodes._feed import stream_feed
from hypernodes._mapping import MapSpec
from hypernodes._run import Run
from hypernodes._stream import ItemStream
from tests._caching import PATIENCE_S

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


class Counting:
    """A store in memory that counts how often it is asked."""

    def __init__(self):
        self.entries = {}
        self.asked = 0

    async def get_many(self, keys):
        self.asked += 1
        return {key: self.entries[key] for key in keys if key in self.entries}

    async def set_many(self, entries):
        self.entries.update(entries)


@node("doubled")
def double(x):
    """Twice."""
    return 2 * x


async def outputs(pipeline, source, **options):
    """What a stream gives, in order."""
    async with pipeline.astream({"x": source}, "x", **options) as items:
        return [item.outputs["doubled"] async for item in items]


async def numbers(count):
    """A source that never waits."""
    for number in range(count):
        yield number


@pytest.mark.parametrize("kind", ["async generator", "iterator"])
async def test_rows_that_have_come_are_looked_up_together(kind):
    """A thousand hits of a source that never waits cost the store some dozen calls, and one of them some entries."""
    store = Counting()
    pipeline = Pipeline([double], cache=store)
    expected = [2 * number for number in range(1000)]

    def source():
        return numbers(1000) if kind == "async generator" else iter(range(1000))

    assert await outputs(pipeline, source(), max_concurrency=100) == expected
    store.asked = 0
    assert await outputs(pipeline, source(), max_concurrency=100) == expected
    assert store.asked <= 250


async def test_a_row_does_not_wait_for_those_behind_it():
    """What is in the cache arrives before the source goes on, which waits for that."""
    store = Counting()
    pipeline = Pipeline([double], cache=store)
    await pipeline.amap({"x": [0, 1, 2]}, "x")
    arrived = [anyio.Event() for _ in range(3)]

    async def source():
        for number in range(3):
            yield number
            await arrived[number].wait()

    with anyio.fail_after(PATIENCE_S):
        async with pipeline.astream({"x": source()}, "x") as items:
            async for item in items:
                arrived[item.index].set()
    assert all(each.is_set() for each in arrived)


async def test_no_more_is_read_than_there_is_room_for():
    """The source is read as far as the window of the stream, and as far as one look-up goes."""
    for window, most, expected in ((4, 512, 4), (100, 3, 3)):
        feed, _ = stream_feed(MapSpec(("x",)), {"x": numbers(50)}, "here")
        ahead = Ahead(feed, ItemStream(("doubled",), window, ordered=True), Run("run", None), 0, most)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ahead.read, None)
            await anyio.wait_all_tasks_blocked()
            assert await ahead.rows() == [(number, (number,)) for number in range(expected)]
            tasks.cancel_scope.cancel()
        await feed.aclose()


async def test_what_came_before_the_source_failed_arrives():
    """An error of the source is raised after the results of the rows before it."""
    pipeline = Pipeline([double], cache=Counting())
    await pipeline.amap({"x": [0, 1, 2]}, "x")

    async def source():
        for number in range(3):
            yield number
        raise LookupError("the source is broken")

    found: list[int] = []
    with pytest.raises(LookupError, match="the source is broken"):
        async with pipeline.astream({"x": source()}, "x") as items:
            async for item in items:
                found += [item.outputs["doubled"]]
    assert found == [0, 2, 4]

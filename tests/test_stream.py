"""Streams: items of any source, endless ones too, as they finish and no faster than they are taken."""

import asyncio
import gc
import inspect
import itertools
import weakref

import anyio
import pytest

from hypernodes import ItemResult, Pipeline, node
from hypernodes.errors import (
    DependencyError,
    HyperNodesError,
    MapInputError,
    MapTypeError,
    TooManyFailuresError,
)

pytestmark = pytest.mark.usefixtures("no_leaks")


@node("y")
async def double(x):
    await anyio.lowlevel.checkpoint()
    return 2 * x


@node("y")
def sync_double(x):
    return 2 * x


doubling = Pipeline([double], name="doubling")
pairs = Pipeline([node("pair")(lambda a, b: (a, b))], name="pairs")
invert = Pipeline([node("y")(lambda x: 1 // x), node("z")(lambda y: -y)], name="invert")


class Complaint(Exception):
    """An error of the user's own."""


class Source:
    """Numbers from 0, without end: remembers what was taken and whether it was closed."""

    def __init__(self, stop: int | None = None):
        self.taken = 0
        self.closed = False
        self.numbers = itertools.count() if stop is None else range(stop)

    def sync_generator(self):
        try:
            for i in self.numbers:
                self.taken += 1
                yield i
        finally:
            self.closed = True

    async def async_generator(self):
        try:
            for i in self.numbers:
                self.taken += 1
                yield i
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.lowlevel.checkpoint()
            self.closed = True

    def make(self, kind: str):
        return self.sync_generator() if kind == "sync" else self.async_generator()


class AsyncNumbers:
    """An async iterable that is no generator."""

    def __init__(self, stop):
        self.stop = stop

    def __aiter__(self):
        self.i = -1
        return self

    async def __anext__(self):
        await anyio.lowlevel.checkpoint()
        self.i += 1
        if self.i >= self.stop:
            raise StopAsyncIteration
        return self.i


SOURCES = {
    "list": lambda: [0, 1, 2, 3],
    "tuple": lambda: (0, 1, 2, 3),
    "range": lambda: range(4),
    "iterator": lambda: iter([0, 1, 2, 3]),
    "generator": lambda: (i for i in range(4)),
    "async generator": lambda: Source(4).async_generator(),
    "async iterable": lambda: AsyncNumbers(4),
}

both_kinds = pytest.mark.parametrize("kind", ["sync", "async"])


@pytest.mark.anyio
class TestSources:
    @pytest.mark.parametrize("name", SOURCES)
    @pytest.mark.parametrize("ordered", [True, False])
    async def test_any_iterable(self, name, ordered):
        """The mapped input may be any iterable or async iterable; each item comes once."""
        async with doubling.astream({"x": SOURCES[name]()}, "x", ordered=ordered) as items:
            results = [item async for item in items]
        assert sorted(results) == [(i, {"y": 2 * i}, None) for i in range(4)]
        assert all(isinstance(item, ItemResult) for item in results)
        if ordered:
            assert [item.index for item in results] == [0, 1, 2, 3]

    @pytest.mark.parametrize("source", [list, lambda: iter(()), lambda: Source(0).async_generator()])
    async def test_nothing(self, source):
        """A source of nothing gives no items."""
        async with doubling.astream({"x": source()}, "x") as items:
            assert [item async for item in items] == []

    @both_kinds
    @pytest.mark.parametrize("ordered", [True, False])
    async def test_endless(self, kind, ordered):
        """A source without end is streamed for as long as someone takes."""
        got = []
        with anyio.fail_after(20):
            async with doubling.astream({"x": Source().make(kind)}, "x", ordered=ordered, max_concurrency=5) as items:
                async for item in items:
                    got.append(item.index)
                    if len(got) == 200:
                        break
        assert len(set(got)) == 200
        assert not ordered or got == list(range(200))

    async def test_shared_values(self):
        """Values not in map_over go to every item as they are."""
        async with pairs.astream({"a": iter("xy"), "b": [1, 2]}, "a") as items:
            assert [item.outputs["pair"] async for item in items] == [("x", [1, 2]), ("y", [1, 2])]

    async def test_zip(self):
        """Several mapped inputs go side by side, sync and async ones together."""
        async with pairs.astream({"a": Source(3).async_generator(), "b": iter("xyz")}, ["a", "b"]) as items:
            assert [item.outputs["pair"] async for item in items] == [(0, "x"), (1, "y"), (2, "z")]

    async def test_product(self):
        """A product of lists is streamed, the last name fastest."""
        async with pairs.astream({"a": [1, 2], "b": ["x", "y"]}, ["a", "b"], map_mode="product") as items:
            assert [item.outputs["pair"] async for item in items] == [(1, "x"), (1, "y"), (2, "x"), (2, "y")]

    async def test_output_name(self):
        """With output_name only what it needs runs, and outputs is still a dict."""
        for selection in ("y", ["y"]):
            async with invert.astream({"x": [1, 2]}, "x", output_name=selection) as items:
                assert [item.outputs async for item in items] == [{"y": 1}, {"y": 0}]

    async def test_many(self):
        """Twenty thousand trivial items come out right and in order."""
        async with Pipeline([sync_double]).astream({"x": range(20_000)}, "x") as items:
            assert [item.outputs["y"] async for item in items] == list(range(0, 40_000, 2))

    async def test_two_at_once(self):
        """Two streams of one pipeline, taken in turns, keep apart."""
        async with (
            doubling.astream({"x": itertools.count()}, "x") as low,
            doubling.astream({"x": itertools.count(100)}, "x") as high,
        ):
            for i in range(20):
                assert (await anext(low)).outputs == {"y": 2 * i}
                assert (await anext(high)).outputs == {"y": 200 + 2 * i}

    async def test_a_stream_feeds_a_stream(self):
        """A generator that reads one stream is the source of another."""

        async def doubled(items):
            async for item in items:
                yield item.outputs["y"]

        async with (
            doubling.astream({"x": itertools.count()}, "x") as first,
            doubling.astream({"x": doubled(first)}, "x", max_concurrency=3) as second,
        ):
            got = [(await anext(second)).outputs["y"] for _ in range(10)]
        assert got == list(range(0, 40, 4))


@pytest.mark.anyio
class TestOrder:
    async def test_ordered(self):
        """By default items come in the order of the source, whichever finishes first."""
        done = [anyio.Event() for _ in range(6)]
        done[5].set()
        finished = []

        @node("y")
        async def wait_for_the_next(x):
            await done[x + 1].wait()
            finished.append(x)
            done[x].set()
            return x

        with anyio.fail_after(10):
            async with Pipeline([wait_for_the_next]).astream({"x": range(5)}, "x") as items:
                assert [item.index async for item in items] == [0, 1, 2, 3, 4]
        assert finished == [4, 3, 2, 1, 0]

    async def test_unordered(self):
        """With ordered=False items come as they finish: each is let go when the one before has come."""
        go = [anyio.Event() for _ in range(5)]

        @node("y")
        async def wait(x):
            await go[x].wait()
            return x

        with anyio.fail_after(10):
            async with Pipeline([wait]).astream({"x": range(5)}, "x", ordered=False) as items:
                for i in (4, 0, 3, 1, 2):
                    go[i].set()
                    assert (await anext(items)).index == i

    async def test_comes_as_soon_as_finished(self):
        """An item is handed over while later ones are still open, whose release waits for it."""
        release = anyio.Event()

        @node("y")
        async def visit(x):
            if x:
                await release.wait()
            return x

        for ordered in (True, False):
            release = anyio.Event()
            with anyio.fail_after(10):
                async with Pipeline([visit]).astream({"x": range(3)}, "x", ordered=ordered) as items:
                    assert (await anext(items)).index == 0
                    release.set()
                    assert sorted([item.index async for item in items]) == [1, 2]

    async def test_comes_while_the_source_waits(self):
        """A finished item is handed over while the source still waits for its next, which waits for it."""
        taken = anyio.Event()

        async def source():
            yield 0
            await taken.wait()
            yield 1

        for ordered in (True, False):
            taken = anyio.Event()
            with anyio.fail_after(10):
                async with doubling.astream({"x": source()}, "x", ordered=ordered) as items:
                    assert (await anext(items)).outputs == {"y": 0}
                    taken.set()
                    assert (await anext(items)).outputs == {"y": 2}

    async def test_a_slow_first_item_lets_others_run(self):
        """While the first item waits, the others of the window run: it waits here for them."""
        others = anyio.Event()
        done = 0

        @node("y")
        async def visit(x):
            nonlocal done
            if x == 0:
                await others.wait()
            else:
                done += 1
                if done == 3:
                    others.set()
            return x

        with anyio.fail_after(10):
            async with Pipeline([visit]).astream({"x": range(4)}, "x", max_concurrency=4) as items:
                assert [item.index async for item in items] == [0, 1, 2, 3]


@pytest.mark.anyio
class TestBackPressure:
    @both_kinds
    @pytest.mark.parametrize("ordered", [True, False])
    async def test_a_slow_consumer_slows_the_source(self, kind, ordered):
        """What is read ahead of the consumer is bounded by max_concurrency, however long it pauses."""
        source = Source()
        with anyio.fail_after(20):
            async with doubling.astream({"x": source.make(kind)}, "x", ordered=ordered, max_concurrency=4) as items:
                for taken in range(1, 30):
                    await anext(items)
                    await anyio.wait_all_tasks_blocked()
                    assert source.taken - taken <= 2 * 4 + 1

    async def test_a_blocked_first_item_holds_the_window(self):
        """In order, an item that does not finish stops the reading ahead too: memory stays bounded."""
        release = anyio.Event()
        source = Source()

        @node("y")
        async def visit(x):
            if x == 0:
                await release.wait()
            return x

        with anyio.fail_after(20):
            async with Pipeline([visit]).astream({"x": source.async_generator()}, "x", max_concurrency=4) as items:
                async with anyio.create_task_group() as group:

                    async def take_first():
                        assert (await anext(items)).index == 0

                    group.start_soon(take_first)
                    for _ in range(5):
                        await anyio.wait_all_tasks_blocked()
                    assert source.taken <= 2 * 4 + 1
                    release.set()
                assert (await anext(items)).index == 1

    async def test_nobody_takes(self):
        """A stream that nobody takes from reads no more than its window."""
        source = Source()
        async with doubling.astream({"x": source.async_generator()}, "x", max_concurrency=3):
            await anyio.wait_all_tasks_blocked()
            assert source.taken <= 2 * 3 + 1
        assert source.closed or source.taken == 0

    async def test_max_concurrency(self):
        """max_concurrency is how many items are open at once: that many meet, and never more."""
        together = anyio.Event()
        open_items = most = 0

        @node("y")
        async def visit(x):
            nonlocal open_items, most
            open_items += 1
            most = max(most, open_items)
            if open_items == 3:
                together.set()
            await together.wait()
            await anyio.lowlevel.checkpoint()
            open_items -= 1
            return x

        with anyio.fail_after(10):
            async with Pipeline([visit]).astream({"x": range(20)}, "x", max_concurrency=3) as items:
                assert [item.index async for item in items] == list(range(20))
        assert most == 3


@pytest.mark.anyio
class TestLeavingEarly:
    @both_kinds
    async def test_closes_the_source(self, kind):
        """Leaving early closes the source's own generator before the block is left."""
        source = Source()
        async with doubling.astream({"x": source.make(kind)}, "x", max_concurrency=3) as items:
            async for item in items:
                if item.index == 5:
                    break
        assert source.closed

    @both_kinds
    async def test_closes_every_source(self, kind):
        """When several generators are mapped side by side, all of them are closed."""
        first, second = Source(), Source()
        inputs = {"a": first.make("sync"), "b": second.make(kind)}
        async with pairs.astream(inputs, ["a", "b"]) as items:
            await anext(items)
        assert first.closed
        assert second.closed

    async def test_cancels_open_items(self):
        """Leaving early cancels the items still open; their cleanup has run when the block is left."""
        entered, cleaned = anyio.Event(), []

        @node("y")
        async def visit(x):
            if x == 0:
                await entered.wait()
                return x
            if x == 2:
                entered.set()
            try:
                await anyio.sleep_forever()
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.lowlevel.checkpoint()
                cleaned.append(x)

        with anyio.fail_after(10):
            async with Pipeline([visit]).astream({"x": range(3)}, "x") as items:
                assert (await anext(items)).index == 0
        assert sorted(cleaned) == [1, 2]

    async def test_interrupts_a_waiting_source(self):
        """An async source that waits for something which never comes is interrupted and closed."""
        closed = []

        async def source():
            try:
                yield 0
                await anyio.sleep_forever()
            finally:
                closed.append(True)

        with anyio.fail_after(10):
            async with doubling.astream({"x": source()}, "x") as items:
                await anext(items)
        assert closed == [True]

    @both_kinds
    async def test_own_exception(self, kind):
        """An exception raised inside the block leaves as itself, after everything is closed."""
        source = Source()
        error = Complaint("mine")
        with pytest.raises(Complaint) as caught:
            async with doubling.astream({"x": source.make(kind)}, "x") as items:
                async for _ in items:
                    raise error
        assert caught.value is error
        assert source.closed

    async def test_without_taking_anything(self):
        """Entering and leaving at once closes the source and leaves nothing."""
        source = Source().sync_generator()
        async with doubling.astream({"x": source}, "x"):
            pass
        assert inspect.getgeneratorstate(source) == inspect.GEN_CLOSED
        agenerator = Source().async_generator()
        async with doubling.astream({"x": agenerator}, "x"):
            pass
        with pytest.raises(StopAsyncIteration):
            await anext(agenerator)

    async def test_afterwards(self):
        """A stream that was left gives nothing more and does not hang."""
        async with doubling.astream({"x": itertools.count()}, "x") as items:
            await anext(items)
        with anyio.fail_after(10), pytest.raises((StopAsyncIteration, RuntimeError, HyperNodesError)):
            while True:
                await anext(items)

    async def test_cancelled_from_outside(self):
        """Cancelling the task that reads a stream closes the source and cancels the items."""
        source, entered, cleaned = Source(), anyio.Event(), []

        @node("y")
        async def visit(x):
            if x == 3:
                entered.set()
            try:
                await anyio.sleep_forever()
            finally:
                cleaned.append(x)

        async def read():
            async with Pipeline([visit]).astream({"x": source.async_generator()}, "x", max_concurrency=4) as items:
                await anext(items)

        with anyio.fail_after(10):
            async with anyio.create_task_group() as group:
                group.start_soon(read)
                await entered.wait()
                group.cancel_scope.cancel()
        assert sorted(cleaned) == [0, 1, 2, 3]
        assert source.closed

    async def test_a_source_that_fails_to_close(self):
        """A source whose cleanup raises is heard, and nothing hangs."""

        async def source():
            try:
                while True:
                    yield 0
            finally:
                raise Complaint("cleanup")

        with anyio.fail_after(10), pytest.raises(Complaint, match="cleanup"):
            async with doubling.astream({"x": source()}, "x") as items:
                await anext(items)


@pytest.mark.anyio
class TestErrors:
    @both_kinds
    async def test_raise(self, kind):
        """By default the first failure is raised out of the iteration as itself, with its item's path."""
        source = Source()
        pipeline = Pipeline([node("y")(lambda x: 1 // (3 - x))], name="p")
        got = []
        with pytest.raises(ZeroDivisionError) as caught:
            async with pipeline.astream({"x": source.make(kind)}, "x", max_concurrency=1) as items:
                async for item in items:
                    got += [item.index]
        assert got == [0, 1, 2]
        [note] = caught.value.__notes__
        assert "p[3] / <lambda>" in note
        assert source.closed

    @pytest.mark.parametrize("ordered", [True, False])
    async def test_collect(self, ordered):
        """With collect a failed item has an error and no outputs, and the stream goes on."""
        async with invert.astream({"x": iter([1, 0, 2])}, "x", ordered=ordered, on_error="collect") as items:
            results = sorted([item async for item in items], key=lambda item: item.index)
        assert results[0] == ItemResult(0, {"y": 1, "z": -1}, None)
        assert results[2] == ItemResult(2, {"y": 0, "z": 0}, None)
        failed = results[1]
        assert (failed.index, failed.outputs) == (1, None)
        assert isinstance(failed.error, ZeroDivisionError)
        assert "invert[1] / <lambda>" in failed.error.__notes__[0]

    async def test_max_failures(self):
        """max_failures stops a stream that goes wrong, after so many failures."""
        source = Source()

        @node("y")
        async def fail(x):
            raise Complaint(x)

        with anyio.fail_after(10), pytest.raises(TooManyFailuresError) as caught:
            async with Pipeline([fail], name="failing").astream(
                {"x": source.async_generator()}, "x", on_error="collect", max_failures=3, max_concurrency=1
            ) as items:
                async for item in items:
                    assert isinstance(item.error, Complaint)
        assert [failure.index for failure in caught.value.failures] == [0, 1, 2]
        assert isinstance(caught.value.__cause__, Complaint)
        assert source.closed

    @both_kinds
    @pytest.mark.parametrize("on_error", ["raise", "collect"])
    async def test_a_source_that_fails(self, kind, on_error):
        """An exception of the source leaves the iteration as itself, collecting or not."""

        def sync_source():
            yield 1
            yield 2
            raise Complaint("source")

        async def async_source():
            for i in sync_source():
                yield i

        got = []
        with anyio.fail_after(10), pytest.raises(Complaint, match="source"):
            async with doubling.astream(
                {"x": sync_source() if kind == "sync" else async_source()}, "x", on_error=on_error
            ) as items:
                async for item in items:
                    got += [item.outputs["y"]]
        assert got == [2, 4][: len(got)]

    @pytest.mark.parametrize("value", ["word", b"bytes", {"k": 1}, 3, None])
    async def test_not_a_list(self, value):
        """A str, bytes, a dict or nothing iterable is refused as in a map."""
        with pytest.raises(MapTypeError, match="'x'"):
            async with doubling.astream({"x": value}, "x") as items:
                await anext(items)

    async def test_generator_in_a_product(self):
        """A generator in a product is refused by name, unread, and its own cleanup is the caller's."""
        for kind in ("sync", "async"):
            source = Source()
            with pytest.raises(MapInputError, match=r"(?s)'b'.*(?=.*list)"):
                async with pairs.astream(
                    {"a": [1, 2], "b": source.make(kind)}, ["a", "b"], map_mode="product"
                ) as items:
                    await anext(items)
            assert source.taken == 0

    @pytest.mark.parametrize(("a", "b"), [(3, 2), (2, 3)])
    @both_kinds
    async def test_unequal_lengths(self, a, b, kind):
        """Where one source ends before the other, that is an error and never a short stream."""
        with anyio.fail_after(10), pytest.raises(MapInputError, match="length"):
            async with pairs.astream({"a": range(a), "b": Source(b).make(kind)}, ["a", "b"]) as items:
                async for _ in items:
                    pass

    async def test_unequal_lists(self):
        """Lists of unequal length are refused before anything runs."""
        ran = []
        pipeline = Pipeline([node("y")(lambda a, b: ran.append(a))])
        with pytest.raises(MapInputError, match="length"):
            async with pipeline.astream({"a": [1, 2], "b": [1]}, ["a", "b"]) as items:
                await anext(items)
        assert ran == []

    async def test_inputs_are_checked(self):
        """Names and options are checked as in a map, before the source is read."""
        source = Source()
        for inputs, map_over, options in (
            ({"xx": source.sync_generator()}, "xx", {}),
            ({"x": source.sync_generator(), "k": 1}, "x", {}),
            ({"x": source.sync_generator()}, "z", {}),
            ({"x": source.sync_generator()}, "x", {"output_name": "yy"}),
            ({"x": source.sync_generator()}, "x", {"max_concurrency": 0}),
            ({"x": source.sync_generator()}, "x", {"on_error": "ignore"}),
            ({"x": source.sync_generator()}, "x", {"map_mode": "both"}),
        ):
            with pytest.raises(HyperNodesError) as caught:
                async with doubling.astream(inputs, map_over, **options) as items:
                    await anext(items)
            assert isinstance(caught.value, ValueError)
        assert source.taken == 0

    async def test_misspelt_input(self):
        """A misspelt input gets a suggestion."""
        with pytest.raises(DependencyError, match=r"(?i)'pasages'.*did you mean.*'passages'"):
            async with Pipeline([node("n")(lambda passages: 1)]).astream({"pasages": [1]}, "passages") as items:
                await anext(items)

    @pytest.mark.parametrize("error", [StopIteration, StopAsyncIteration])
    async def test_stop_iteration_does_not_end_the_stream(self, error):
        """An item that raises StopIteration fails; the stream does not end as if it were complete."""

        @node("y")
        async def stop(x):
            if x == 1:
                raise error("odd")
            return x

        @node("y", run_in="loop")
        def sync_stop(x):
            if x == 1:
                raise error("odd")
            return x

        for failing in (stop, sync_stop):
            got = []
            with anyio.fail_after(10), pytest.raises((error, RuntimeError), match=r"odd|Stop\w*Iteration"):
                async with Pipeline([failing]).astream({"x": range(4)}, "x") as items:
                    while True:
                        got += [(await anext(items)).index]
            assert got in ([], [0])


@pytest.mark.asyncio
class TestPlainAsyncio:
    """The same, as someone sees it who uses asyncio and has never heard of anyio."""

    async def test_leaves_no_task(self):
        """Leaving a stream early leaves no task behind."""
        before = asyncio.all_tasks()
        async with doubling.astream({"x": Source().async_generator()}, "x") as items:
            async for item in items:
                if item.index == 10:
                    break
        assert asyncio.all_tasks() == before

    async def test_cancel_a_task(self):
        """Cancelling a task in the middle of a stream closes the source, and the task counts as cancelled."""
        source, entered = Source(), asyncio.Event()

        async def read():
            async with doubling.astream({"x": source.async_generator()}, "x") as items:
                async for item in items:
                    if item.index == 10:
                        entered.set()

        before = asyncio.all_tasks()
        task = asyncio.create_task(read())
        await asyncio.wait_for(entered.wait(), 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()
        assert source.closed
        assert asyncio.all_tasks() == before

    async def test_feeding_from_a_queue(self):
        """A queue that a producer fills is streamed: each answer is there before the next question is put."""
        questions = asyncio.Queue()

        async def asked():
            while (question := await questions.get()) is not None:
                yield question

        async with asyncio.timeout(10), doubling.astream({"x": asked()}, "x") as items:
            for i in range(10):
                await questions.put(i)
                assert (await anext(items)).outputs == {"y": 2 * i}
            await questions.put(None)
            with pytest.raises(StopAsyncIteration):
                await anext(items)


class TestSync:
    @pytest.mark.parametrize("name", SOURCES)
    def test_any_iterable(self, name):
        """stream takes what astream takes, from sync code."""
        with doubling.stream({"x": SOURCES[name]()}, "x") as items:
            assert list(items) == [(i, {"y": 2 * i}, None) for i in range(4)]

    @both_kinds
    def test_endless_and_left_early(self, kind):
        """An endless source is taken from as long as wanted, and closed when the block is left."""
        source = Source()
        got = []
        with doubling.stream({"x": source.make(kind)}, "x", max_concurrency=3) as items:
            for item in items:
                got.append(item.outputs["y"])
                if len(got) == 50:
                    break
        assert got == list(range(0, 100, 2))
        assert source.closed
        assert source.taken <= 50 + 2 * 3 + 1

    def test_options(self):
        """ordered, on_error and output_name do what they do in astream."""
        with invert.stream({"x": [1, 0]}, "x", ordered=False, on_error="collect", output_name="y") as items:
            results = sorted(items, key=lambda item: item.index)
        assert results[0].outputs == {"y": 1}
        assert isinstance(results[1].error, ZeroDivisionError)

    def test_raise(self):
        """A failure is raised out of the iteration as itself, with its path."""
        with pytest.raises(ZeroDivisionError) as caught, invert.stream({"x": [1, 0]}, "x") as items:
            for _ in items:
                pass
        assert "invert[1] / <lambda>" in caught.value.__notes__[0]

    @both_kinds
    def test_own_exception(self, kind):
        """An exception raised inside the block leaves as itself, after the source is closed."""
        source = Source()
        error = Complaint("mine")
        with pytest.raises(Complaint) as caught, doubling.stream({"x": source.make(kind)}, "x") as items:
            for _ in items:
                raise error
        assert caught.value is error
        assert source.closed

    def test_refusals(self):
        """What astream refuses, stream refuses."""
        with pytest.raises(MapTypeError), doubling.stream({"x": "word"}, "x") as items:
            next(items)
        with pytest.raises(DependencyError), doubling.stream({"y": [1]}, "x") as items:
            next(items)

    def test_afterwards(self):
        """A stream that was left gives nothing more and does not hang."""
        with doubling.stream({"x": itertools.count()}, "x") as items:
            next(items)
        with pytest.raises((StopIteration, RuntimeError, HyperNodesError)):
            while True:
                next(items)

    def test_several_at_once(self):
        """Two sync streams are taken in turns."""
        with (
            doubling.stream({"x": itertools.count()}, "x") as low,
            doubling.stream({"x": itertools.count(100)}, "x") as high,
        ):
            for i in range(20):
                assert next(low).outputs == {"y": 2 * i}
                assert next(high).outputs == {"y": 200 + 2 * i}


@pytest.mark.anyio
async def test_errors_are_let_go_once_their_items_are_taken():
    """An endless stream keeps no error: neither that of a failed item nor one raised while it was stopped."""
    alive = weakref.WeakSet()

    class Lost(Exception):
        def __init__(self):
            super().__init__()
            alive.add(self)

    @node("y")
    async def fail(x):
        await anyio.sleep(0)
        raise Lost

    @node("z")
    async def fail_when_stopped(x):
        try:
            await anyio.sleep_forever()
        finally:
            raise Lost

    pipeline = Pipeline([fail, fail_when_stopped])
    async with pipeline.astream({"x": itertools.count()}, "x", max_concurrency=4, on_error="collect") as items:
        async for item in items:
            if item.index == 100:
                break
        del item
        gc.collect()
        assert len(alive) <= 8 * 2

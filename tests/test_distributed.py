"""Maps in chunks over several machines, on the seam itself: the other machines are tasks of this process.

What a container adds to it is tested in test_modal_distributed.py.
"""

import asyncio
import math
import os
import threading
from collections import Counter

import anyio
import pytest

from hypernodes import (
    DefinitionError,
    DiskCache,
    NodeTimeoutError,
    Pipeline,
    PipelineCallback,
    RemoteExecutionError,
    RemoteTimeoutError,
    SerializationError,
    TooManyFailuresError,
    WorkerCrashedError,
    node,
)
from hypernodes.backend import LocalBackend, RemoteBackend
from hypernodes.backend._entry import Shared, run_payload
from hypernodes.backend._message import packed, unpacked, unpacked_reply
from hypernodes.backend._remote import Line
from hypernodes.events import Emitter, ItemFailed, NodeStarted, PipelineStarted

pytestmark = pytest.mark.anyio


@node("doubled")
def double(x):
    return 2 * x


class Place(RemoteBackend):
    """As many machines as it is told, and a hook that may let one die."""

    def __init__(self, width=4, hook=None, posting=False, mode="distributed", **options):
        super().__init__(mode=mode, **options)
        self.width = width
        self.hook = hook
        self.posting = posting
        self.chunks = []
        self.active = self.most_active = self.fetched = self.left = 0

    async def connected(self, label, receive, work):
        try:
            return await work(PlaceLine(self, receive))
        finally:
            self.left += 1


class PlaceLine(Line):
    target_s = 0.05

    def __init__(self, place, receive):
        self.width = place.width
        self._place = place
        self._receive = receive

    async def call(self, payload, shared=None):
        place = self._place
        rows = unpacked(payload)[1]["rows"] or ()
        place.chunks.append([row[0] for row in rows])
        place.active += 1
        place.most_active = max(place.most_active, place.active)
        try:
            await anyio.sleep(0)
            if place.hook is not None:
                await place.hook([row[0] for row in rows])
            post = None
            if place.posting and self._receive is not None:

                async def post(batch):
                    await self._receive(batch)

            return await run_payload(payload, post, shared)
        finally:
            place.active -= 1

    async def share(self, data):
        async def fetch():
            self._place.fetched += 1
            return data

        return Shared(Shared.name(data), fetch)


def deadly(*guilty, kind=WorkerCrashedError):
    """A hook under which a chunk with one of these items never comes back."""

    async def hook(items):
        if set(guilty) & set(items):
            raise kind("died")

    return hook


async def test_results_are_in_order(anyio_backend):
    """Chunks finish in any order; the lists are in input order."""

    async def hook(items):
        await anyio.sleep(0.01 if items[0] % 2 else 0)

    place = Place(hook=hook, chunk_size=3)
    result = await Pipeline([double], backend=place).amap({"x": range(100)}, "x")
    assert result == {"doubled": [2 * x for x in range(100)]}
    assert sorted(len(chunk) for chunk in place.chunks) == [1] + [3] * 33
    assert 1 < place.most_active <= 4
    assert place.left == 1


async def test_an_empty_map_calls_nobody(anyio_backend):
    """No items, no connection."""
    place = Place()
    assert await Pipeline([double], backend=place).amap({"x": []}, "x") == {"doubled": []}
    assert place.left == 0


async def test_a_run_is_one_call(anyio_backend):
    """Distributed or not, a single run goes to one machine."""

    class Once(Place):
        async def connected(self, label, receive, work):
            return await work(OnceLine())

    class OnceLine(Line):
        async def call(self, payload, shared=None):
            assert shared is None
            return await run_payload(payload)

        async def share(self, data):
            raise AssertionError("there is nothing to share")

    assert await Pipeline([double], backend=Once()).arun(x=2) == {"doubled": 4}


async def test_chunks_grow_to_the_time_they_should_take(anyio_backend):
    """Quick items go out by many; what they share is unpickled once."""
    place = Place(width=2)
    pipeline = Pipeline([node("y")(lambda x, big: x + len(big))], backend=place)
    big = bytes(1000) + str(id(place)).encode()
    result = await pipeline.amap({"x": range(20_000), "big": big}, "x")
    assert result["y"] == [x + len(big) for x in range(20_000)]
    assert len(place.chunks) < 200
    assert max(map(len, place.chunks)) > 200
    assert place.fetched <= 2


async def test_slow_items_go_out_one_by_one(anyio_backend):
    """An item that takes as long as a chunk should is a chunk."""

    @node("slept")
    async def sleep(x):
        await anyio.sleep(0.06)
        return x

    place = Place(width=4)
    await Pipeline([sleep], backend=place).amap({"x": range(12)}, "x")
    assert [len(chunk) for chunk in place.chunks] == [1] * 12


async def test_large_results_make_chunks_small(anyio_backend, monkeypatch):
    """A chunk's reply is bounded, whatever little time it takes."""
    from hypernodes.backend import _distributed

    monkeypatch.setattr(_distributed, "TARGET_BYTES", 100_000)
    place = Place(width=1)
    await Pipeline([node("y")(lambda x: bytes(10_000))], backend=place).amap({"x": range(200)}, "x")
    assert max(map(len, place.chunks)) <= 10


async def test_a_dead_chunk_is_tried_again(anyio_backend):
    """One container's death costs nothing but time."""
    died = []

    async def hook(items):
        if 5 in items and not died:
            died.append(items)
            raise WorkerCrashedError("preempted")

    place = Place(hook=hook, chunk_size=4)
    assert (await Pipeline([double], backend=place).amap({"x": range(20)}, "x"))["doubled"] == [
        2 * x for x in range(20)
    ]
    assert place.chunks.count([4, 5, 6, 7]) == 2


async def test_a_poisoned_item_fails_alone(anyio_backend):
    """Of a chunk that dies again and again, the item that does it is found; the others succeed."""
    place = Place(hook=deadly(13), chunk_size=8)
    pipeline = Pipeline([double], name="p", backend=place)
    result = await pipeline.amap({"x": range(32)}, "x", on_error="collect")
    assert result["doubled"] == [None if x == 13 else 2 * x for x in range(32)]
    (failure,) = result.failures
    assert (failure.index, failure.path, failure.inputs) == (13, ("p", 13), {"x": 13})
    assert isinstance(failure.error, WorkerCrashedError)
    assert "item 13 (p[13])" in str(failure.error)
    assert isinstance(failure.error.__cause__, WorkerCrashedError)
    with pytest.raises(WorkerCrashedError, match=r"item 13"):
        await pipeline.amap({"x": range(32)}, "x")


@pytest.mark.parametrize("elsewhere", [True, False])
async def test_an_item_whose_machine_died_is_told_as_failed(anyio_backend, elsewhere):
    """So that who counts items comes to the end; on other machines, and in worker processes here."""
    backend = (
        Place(hook=deadly(3), chunk_size=2) if elsewhere else LocalBackend(map_execution="parallel", max_workers=1)
    )
    pipeline = Pipeline([node("y")(double.func if elsewhere else die_of_three)], name="p", backend=backend)
    failed = []

    emit = Emitter(lambda event: failed.append((event.index, event.path)), frozenset({ItemFailed}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pipeline, "_emit", lambda self, job: emit)
        await pipeline.amap({"x": range(6)}, "x", on_error="collect")
    assert failed == [(3, ("p", 3))]


def die_of_three(x):
    if x == 3:
        os._exit(1)
    return x


async def test_every_item_poisoned(anyio_backend):
    """Where nothing ever succeeds the map ends soon, and says how many died."""
    place = Place(width=2, hook=deadly(*range(1_000)))
    pipeline = Pipeline([double], backend=place)
    with pytest.raises(WorkerCrashedError, match=r"16 containers .* died before one had finished"):
        await pipeline.amap({"x": range(1_000)}, "x", on_error="collect")
    assert len(place.chunks) <= 18


async def test_the_first_items_poisoned(anyio_backend):
    """Dead chunks wait until another has succeeded, so that a bad beginning is not the end."""
    place = Place(width=2, hook=deadly(*range(12)), chunk_size=1)
    result = await Pipeline([double], backend=place).amap({"x": range(40)}, "x", on_error="collect")
    assert [failure.index for failure in result.failures] == list(range(12))
    assert result["doubled"][12:] == [2 * x for x in range(12, 40)]


async def test_one_item_that_kills_its_machine(anyio_backend):
    """A map of a single item that dies ends with that item's failure."""
    result = await Pipeline([double], backend=Place(hook=deadly(0))).amap({"x": [0]}, "x", on_error="collect")
    assert [failure.index for failure in result.failures] == [0]


async def test_an_item_that_takes_too_long_fails_alone(anyio_backend):
    """A chunk past the place's timeout is halved until the item that hangs is alone."""
    place = Place(hook=deadly(3, kind=RemoteTimeoutError), chunk_size=8)
    result = await Pipeline([double], name="p", backend=place).amap({"x": range(8)}, "x", on_error="collect")
    (failure,) = result.failures
    assert failure.index == 3
    assert isinstance(failure.error, RemoteTimeoutError)
    assert "item 3 (p[3])" in str(failure.error)
    assert result["doubled"] == [None if x == 3 else 2 * x for x in range(8)]


async def test_a_row_that_cannot_be_sent_fails_alone(anyio_backend):
    """An input that cannot be pickled is that item's failure, with its path."""
    rows = [1, 2, threading.Lock(), 4, 5]
    pipeline = Pipeline([node("y")(lambda x: 1)], name="p", backend=Place(chunk_size=5))
    result = await pipeline.amap({"x": rows}, "x", on_error="collect")
    assert result["y"] == [1, 1, None, 1, 1]
    (failure,) = result.failures
    assert isinstance(failure.error, SerializationError)
    assert "inputs['x'][2] is a lock" in str(failure.error)


class Unwelcome:
    def __reduce__(self):
        return _refuse, ()


def _refuse():
    raise ImportError("not on this machine")


class Picky(Place):
    """Its test's hook cannot look at rows that cannot be unpickled."""

    async def connected(self, label, receive, work):
        class PickyLine(PlaceLine):
            async def call(self, payload, shared=None):
                return await run_payload(payload, None, shared)

        return await work(PickyLine(self, receive))


async def test_a_row_that_cannot_be_rebuilt_there_fails_alone(anyio_backend):
    """An input that unpickles with an error there is that item's failure."""
    pipeline = Pipeline([node("y")(lambda x: 1)], name="p", backend=Picky(chunk_size=4))
    result = await pipeline.amap({"x": [1, Unwelcome(), 3, 4]}, "x", on_error="collect")
    assert result["y"] == [1, None, 1, 1]
    (failure,) = result.failures
    assert isinstance(failure.error, RemoteExecutionError)
    assert "not on this machine" in str(failure.error)


@pytest.mark.parametrize("mode", ["single", "distributed"])
async def test_an_output_that_cannot_be_sent_back_fails_alone(anyio_backend, mode):
    """The other items of its chunk, or of the whole map, are there."""
    pipeline = Pipeline([node("y")(lambda x: threading.Lock() if x == 2 else x)], name="p", backend=Picky(mode=mode))
    result = await pipeline.amap({"x": range(8)}, "x", on_error="collect")
    assert result["y"] == [0, 1, None, *range(3, 8)]
    (failure,) = result.failures
    assert isinstance(failure.error, SerializationError)
    assert "output 'y' of item 2 is a lock" in str(failure.error)
    with pytest.raises(SerializationError, match="output 'y' of item 2"):
        await pipeline.amap({"x": range(8)}, "x")


class Watch(PipelineCallback):
    def __init__(self):
        self.ended = []

    def on_map_item_end(self, item_index, duration, ctx):
        self.ended.append(item_index)


class TestErrors:
    async def test_a_users_error_keeps_its_type_and_place(self, anyio_backend):
        """The first failure is raised as itself, with the item in its note; the others are cancelled."""

        @node("y")
        def fail(x):
            if x == 7:
                raise LookupError("no seven")
            return x

        place = Place(chunk_size=5)
        with pytest.raises(LookupError, match="no seven") as caught:
            await Pipeline([fail], name="p", backend=place).amap({"x": range(1_000)}, "x")
        assert caught.value.__notes__ == ["in node 'fail' at p[7] / fail"]
        assert len(place.chunks) < 100
        assert place.active == 0

    async def test_failures_are_collected_with_their_place(self, anyio_backend):
        """Index, path, error and inputs are those of the whole map."""

        @node("y")
        def fail(x, shared):
            if x % 10 == 3:
                raise LookupError(x)
            return x + shared

        pipeline = Pipeline([fail], name="p", backend=Place(chunk_size=4))
        result = await pipeline.amap({"x": range(40), "shared": 1}, "x", on_error="collect")
        assert [(each.index, each.path, each.inputs) for each in result.failures] == [
            (x, ("p", x, "fail"), {"x": x}) for x in (3, 13, 23, 33)
        ]
        assert [type(each.error) for each in result.failures] == [LookupError] * 4

    async def test_max_failures_counts_over_all_chunks(self, anyio_backend):
        """A map that goes wrong as a whole is stopped, however its items are spread."""

        @node("y")
        def fail(x):
            raise LookupError(x)

        with pytest.raises(TooManyFailuresError, match="failed item number 5"):
            await Pipeline([fail], backend=Place(chunk_size=2)).amap(
                {"x": range(100)}, "x", on_error="collect", max_failures=5
            )

    async def test_a_job_that_cannot_be_rebuilt_fails_the_map(self, anyio_backend):
        """What all items share and no machine can rebuild is no item's fault."""
        pipeline = Pipeline([node("y")(lambda x, shared: 1)], name="p", backend=Place())
        with pytest.raises(RemoteExecutionError, match="not on this machine"):
            await pipeline.amap({"x": range(10), "shared": Unwelcome()}, "x", on_error="collect")

    @pytest.mark.parametrize("listening", [False, True])
    async def test_a_result_that_cannot_be_rebuilt_here_fails_alone(self, anyio_backend, listening):
        """Collected, or raised at once; whoever listens hears of each item once."""
        pipeline = Pipeline([node("y")(lambda x: Unwelcome() if x % 20 == 7 else -x)], name="p", backend=Place())
        watch = Watch()
        if listening:
            pipeline = pipeline.with_callbacks([watch])
        result = await pipeline.amap({"x": range(60)}, "x", on_error="collect")
        assert result["y"] == [None if x % 20 == 7 else -x for x in range(60)]
        assert [(each.index, each.path, each.inputs) for each in result.failures] == [
            (x, ("p", x), {"x": x}) for x in (7, 27, 47)
        ]
        assert {type(each.error) for each in result.failures} == {RemoteExecutionError}
        assert "cannot be rebuilt here: ImportError: not on this machine" in str(result.failures[0].error)
        if listening:
            assert len(watch.ended) == len(set(watch.ended))
            assert set(watch.ended) >= set(range(60)) - {7, 27, 47}
        with pytest.raises(RemoteExecutionError, match="cannot be rebuilt here"):
            await pipeline.amap({"x": range(60)}, "x")

    async def test_options_are_checked(self):
        """A wrong mode or size is refused at once."""
        with pytest.raises(DefinitionError, match="'single' or 'distributed'"):
            RemoteBackend.__init__(Place(), mode="both")
        with pytest.raises(DefinitionError, match="chunk_size"):
            Place(chunk_size=0)
        with pytest.raises(DefinitionError, match="for mode='distributed'"):
            RemoteBackend.__init__(Place(), mode="single", chunk_size=3)


@node("one", limit="few")
async def limited(x):
    await count("one")


@node("two", max_concurrency=6)
async def bounded(x):
    await count("two")


@node("met", limit="few")
async def meeting(x):
    await meet("met")


@node("met", max_concurrency=3)
async def meeting_few(x):
    await meet("met")


ACTIVE, MOST, EVENTS = Counter(), Counter(), {}


async def count(name):
    ACTIVE[name] += 1
    MOST[name] = max(MOST[name], ACTIVE[name])
    await anyio.sleep(0.001)
    ACTIVE[name] -= 1


async def meet(name):
    """Wait until three have been here at the same time."""
    ACTIVE[name] += 1
    MOST[name] = max(MOST[name], ACTIVE[name])
    if ACTIVE[name] == 3:
        EVENTS[name].set()
    await EVENTS[name].wait()
    await anyio.sleep(0.001)
    ACTIVE[name] -= 1


class TestLimits:
    """This module's functions travel by name, so that all machines count together."""

    async def test_a_limit_holds_over_all_machines(self, anyio_backend):
        """Each call gets its share of a limit, and there are no more calls than its tokens."""
        MOST.clear()
        place = Place(width=8, chunk_size=10)
        await Pipeline([limited, bounded], limits={"few": 3}, backend=place).amap({"x": range(120)}, "x")
        assert place.most_active == 3
        assert MOST == {"one": 3, "two": 6}

    async def test_a_limit_from_further_out_holds_too(self, anyio_backend):
        """A nested pipeline on other machines shares the limit that the pipeline around it sets."""
        MOST.clear()
        place = Place(width=8, chunk_size=10)
        inner = Pipeline([limited], name="inner", backend=place).as_node(map_over="x")
        await Pipeline([inner], limits={"few": 2}).arun(x=list(range(60)))
        assert place.most_active == 2
        assert MOST == {"one": 2}

    @pytest.mark.parametrize("outside", [False, True])
    async def test_a_users_own_limiter_holds_too(self, anyio_backend, outside):
        """What travels of it is how many tokens it has: no more run at once, and no fewer; it may be endless."""
        place = Place(width=8, chunk_size=10)
        pipeline = Pipeline([limited], name="inner", backend=place)
        for tokens in (3, math.inf):
            MOST.clear()
            limits = {"few": anyio.CapacityLimiter(tokens)}
            if outside:
                await Pipeline([pipeline.as_node(map_over="x")], limits=limits).arun(x=list(range(80)))
            else:
                await Pipeline([limited], limits=limits, backend=place).amap({"x": range(80)}, "x")
            assert MOST["one"] == 3 if tokens == 3 else MOST["one"] > 8

    async def test_a_users_own_limiter_on_one_machine(self, anyio_backend):
        """There its tokens are all in one place."""
        MOST.clear()
        limits = {"few": anyio.CapacityLimiter(5)}
        await Pipeline([limited], limits=limits, backend=Place(width=1, chunk_size=20)).amap({"x": range(20)}, "x")
        assert MOST == {"one": 5}

    @pytest.mark.parametrize("mode", ["single", "distributed"])
    @pytest.mark.parametrize("limiter", [False, True])
    async def test_a_limit_holds_over_many_runs_on_other_machines(self, anyio_backend, mode, limiter):
        """A nested pipeline of which many run there at once waits for tokens, each in turn."""
        MOST.clear()
        EVENTS["met"] = anyio.Event()
        inner = Pipeline([meeting], name="inner", backend=Place(mode=mode)).as_node(name="inner")
        middle = Pipeline([inner], name="middle").as_node(map_over="x")
        few = anyio.CapacityLimiter(3) if limiter else 3
        with anyio.fail_after(20):
            await Pipeline([middle], limits={"few": few}).arun(x=list(range(20)))
        assert MOST["met"] == 3

    @pytest.mark.parametrize("mode", ["single", "distributed"])
    @pytest.mark.parametrize("said_by", ["node", "pipeline", "pipeline inside"])
    @pytest.mark.parametrize("mapped", [False, True])
    async def test_what_is_said_elsewhere_holds_over_many_runs_too(self, anyio_backend, mode, said_by, mapped):
        """The bound of a node, or a limit that the pipeline there sets, or one inside of it, is that of a run."""
        MOST.clear()
        EVENTS["met"] = anyio.Event()
        place = Place(mode=mode)
        limits = {} if said_by == "node" else {"few": 3}
        inner = Pipeline([meeting_few if said_by == "node" else meeting], name="inner", limits=limits)
        if said_by == "pipeline inside":
            inner = Pipeline([inner.as_node(name="deep")], name="around")
        there = inner.with_backend(place).as_node(name="inner", map_over="x" if mapped else None)
        middle = Pipeline([there], name="middle").as_node(map_over="x")
        with anyio.fail_after(20):
            await Pipeline([middle]).arun(x=[[1, 2, 3, 4, 5]] * 6 if mapped else list(range(20)))
        assert MOST["met"] == 3

    async def test_two_runs_that_need_the_same_two_limits_take_turns(self, anyio_backend):
        """Neither holds one and waits for the other; one limiter under two names is taken once."""
        MOST.clear()
        one = Pipeline([node("a", limit="first")(free), node("b", limit="second")(free)], name="one")
        other = Pipeline([node("c", limit="second")(free), node("d", limit="first")(free)], name="other")
        nested = [each.with_backend(Place(mode="single")).as_node(map_over="x") for each in (one, other)]
        both = Pipeline(nested, name="both").as_node(map_over="x")
        for limits in ({"first": 1, "second": 1}, dict.fromkeys(["first", "second"], anyio.CapacityLimiter(1))):
            with anyio.fail_after(20):
                await Pipeline([both], limits=limits).arun(x=[[1, 2]] * 9)

    async def test_the_same_node_here_and_there(self, anyio_backend):
        """What has a bound of its own and a limit takes both in one order, wherever it runs."""
        bounded = node("y", max_concurrency=1, limit="few")(back)
        encode = Pipeline([bounded], name="encode")
        here = encode.as_node(name="here", output_mapping={"y": "a"}, map_over="x")
        there = encode.with_backend(Place(mode="single")).as_node(name="there", output_mapping={"y": "b"})
        both = Pipeline([here, Pipeline([there], name="m").as_node(name="all_there", map_over="x")])
        limiters = [anyio.CapacityLimiter(1) for _ in range(20)]
        for few in [1, *sorted(limiters, key=id)]:
            with anyio.fail_after(20):
                result = await both.with_limits({"few": few}).arun(x=[1, 2, 3])
            assert result["a"] == result["b"] == [1, 2, 3]

    @pytest.mark.parametrize("mode", ["single", "distributed"])
    async def test_one_limiter_under_two_names(self, anyio_backend, mode):
        """Is one, elsewhere too."""
        MOST.clear()
        few = anyio.CapacityLimiter(2)
        both = [node("a", limit="p")(free), node("b", limit="q")(free)]
        inner = Pipeline(both, name="inner", backend=Place(mode=mode)).as_node(map_over="x")
        with anyio.fail_after(20):
            await Pipeline([inner], limits={"p": few, "q": few}).arun(x=list(range(20)))
        assert MOST == {"free": 2}
        assert few.borrowed_tokens == 0

    @pytest.mark.parametrize("mode", ["single", "distributed"])
    async def test_a_users_limiter_holds_over_runs_elsewhere(self, anyio_backend, mode):
        """Those that are no part of another one."""
        MOST.clear()
        few = anyio.CapacityLimiter(3)
        pipeline = Pipeline([limited], limits={"few": few}, backend=Place(mode=mode))
        with anyio.fail_after(20):
            async with anyio.create_task_group() as group:
                for _ in range(5):
                    group.start_soon(pipeline.amap, {"x": range(10)}, "x")
        assert 1 <= MOST["one"] <= 3
        assert few.borrowed_tokens == 0

    async def test_of_worker_processes(self, anyio_backend):
        """Runs elsewhere that worker processes ask for: two limits in any order, one limiter under two names."""
        one = Pipeline([node("a", limit="p")(back), node("b", limit="q")(back)], name="one")
        other = Pipeline([node("c", limit="q")(back), node("d", limit="p", max_concurrency=1)(back)], name="other")
        there = [each.with_backend(Place(mode="single")).as_node() for each in (one, other)]
        here = one.as_node(name="here", output_mapping={"a": "e", "b": "f"})
        workers = LocalBackend(map_execution="parallel", max_workers=2)
        for limits in ({"p": 1, "q": 1}, dict.fromkeys(["p", "q"], anyio.CapacityLimiter(1))):
            with anyio.fail_after(40):
                result = await Pipeline([*there, here], limits=limits, backend=workers).amap({"x": range(30)}, "x")
            assert result == {name: list(range(30)) for name in "abcdef"}

    async def test_no_more_tokens_are_taken_than_can_be_used(self, anyio_backend):
        """A map of two rows takes two, an endless limiter need not be asked, a node that does not run takes none."""
        few, endless, unused = anyio.CapacityLimiter(50), anyio.CapacityLimiter(math.inf), anyio.CapacityLimiter(1)
        taken = []

        async def look(items):
            taken.append((few.borrowed_tokens, endless.borrowed_tokens))

        nodes = [limited, node("z", limit="endless")(free), node("other", limit="unused")(back)]
        inner = Pipeline(nodes, name="inner", backend=Place(mode="single", hook=look))
        outer = Pipeline([inner.as_node(map_over="x")], limits={"few": few, "endless": endless, "unused": unused})
        async with unused:
            with anyio.fail_after(20):
                await outer.arun(x=[1, 2], output_name=["one", "z"])
        assert taken == [(2, 0)]

    async def test_a_run_elsewhere_takes_what_is_free(self, anyio_backend):
        """A single run with a map inside has all tokens, where nobody else wants one, and gives them back."""
        MOST.clear()
        inner = Pipeline([limited], name="inner").as_node(map_over="x")
        outer = Pipeline([inner], name="outer", backend=Place(mode="single")).as_node(name="outer")
        pipeline = Pipeline([outer], limits={"few": 4})
        for _ in range(2):
            await pipeline.arun(x=list(range(20)))
        assert MOST == {"one": 4}

    async def test_what_waits_for_a_token_can_be_cancelled(self, anyio_backend):
        """And gives back what it has taken."""
        few = anyio.CapacityLimiter(1)
        inner = Pipeline([limited], name="inner", backend=Place(mode="single")).as_node(name="inner")
        pipeline = Pipeline([inner], limits={"few": few})
        borrower = object()
        await few.acquire_on_behalf_of(borrower)
        with anyio.move_on_after(0.05) as scope:
            await pipeline.arun(x=1)
        assert scope.cancelled_caught
        few.release_on_behalf_of(borrower)
        await pipeline.arun(x=1)
        assert few.borrowed_tokens == 0

    async def test_items_at_once_hold_over_all_machines(self, anyio_backend):
        """max_concurrency of a call is shared out too."""
        MOST.clear()
        place = Place(width=8, chunk_size=10)
        await Pipeline([node("y")(free)], backend=place).amap({"x": range(100)}, "x", max_concurrency=5)
        assert MOST == {"free": 5}
        assert place.most_active == 5


async def back(x):
    await anyio.sleep(0.001)
    return x


async def free(x):
    await count("free")


class Watching(PipelineCallback):
    """What was told, in order."""

    def __init__(self):
        self.told = []

    def on_map_start(self, total_items, ctx):
        self.told.append(("start", total_items))

    def on_map_item_end(self, item_index, duration, ctx):
        self.told.append(("item", item_index))

    def on_node_end(self, node_id, outputs, duration, ctx):
        self.told.append((node_id, ctx.hierarchy_path))

    def on_map_end(self, total_duration, ctx):
        self.told.append(("end", None))


@pytest.mark.parametrize("posting", [False, True])
async def test_a_map_is_told_as_one(anyio_backend, posting):
    """It begins and ends once; each item is told once, under its own index; as chunks go on, where that can be sent."""
    watching = Watching()
    place = Place(chunk_size=7, posting=posting)
    await Pipeline([double], name="p", backend=place, callbacks=[watching]).amap({"x": range(50)}, "x")
    assert watching.told[0] == ("start", 50)
    assert watching.told[-1] == ("end", None)
    assert [kind for kind, _ in watching.told].count("start") == 1
    assert sorted(index for kind, index in watching.told if kind == "item") == list(range(50))
    assert len([1 for kind, _ in watching.told if kind == "double"]) == 50


@pytest.mark.parametrize("kind", [WorkerCrashedError, RemoteTimeoutError])
async def test_what_a_dead_chunk_has_told_is_told_once(anyio_backend, kind):
    """Its items run again, and those that had come to their end before it died are not counted twice."""
    watching, died = Watching(), []

    class DyingLine(PlaceLine):
        async def call(self, payload, shared=None):
            reply = await super().call(payload, shared)
            if len(died) < 2:
                died.append(kind("after all that it had to say"))
                events = unpacked_reply(reply)[2]
                call = unpacked(payload)[1]["call"]
                half = [(number, [event for event in each if event.path[1] % 2]) for number, each in events]
                await self._receive(packed("events", half, call))
                raise died[-1]
            return reply

    class Dying(Place):
        async def connected(self, label, receive, work):
            return await work(DyingLine(self, receive))

    pipeline = Pipeline([double], name="p", backend=Dying(width=2, chunk_size=8), callbacks=[watching])
    assert (await pipeline.amap({"x": range(40)}, "x"))["doubled"] == [2 * x for x in range(40)]
    assert len(died) == 2
    assert sorted(index for what, index in watching.told if what == "item") == list(range(40))
    assert len([1 for what, _ in watching.told if what == "double"]) == 40


async def test_a_listener_for_nodes_alone_is_told_once_too(anyio_backend):
    """Items' ends are sent for that, and told to nobody who did not ask for them."""
    seen = []

    class Nodes(PipelineCallback):
        def on_node_end(self, node_id, outputs, duration, ctx):
            seen.append(outputs["doubled"])

    await Pipeline([double], backend=Place(chunk_size=3), callbacks=[Nodes()]).amap({"x": range(10)}, "x")
    assert sorted(seen) == [2 * x for x in range(10)]


class OnlyThere:
    """Can be sent, and not be rebuilt on this machine."""

    def __reduce__(self):
        return __import__, ("a_package_of_the_image_alone",)


@node("inner")
def only_there(x):
    return OnlyThere()


@node("y")
def of_it(x, inner):
    return x + isinstance(inner, OnlyThere)


@pytest.mark.parametrize("posting", [False, True])
async def test_events_about_what_this_machine_lacks(anyio_backend, posting, caplog):
    """They are not told, which is logged; the run goes on."""
    pipeline = Pipeline([only_there, of_it], backend=Place(chunk_size=3, posting=posting), callbacks=[Watching()])
    made = await pipeline.amap({"x": range(10)}, "x", output_name="y")
    assert made["y"] == list(range(1, 11))
    assert "cannot be told here" in caplog.text
    assert "a_package_of_the_image_alone" in caplog.text


async def test_results_that_this_machine_lacks_a_package_for(anyio_backend):
    """One error of ours says which package, and what else may be asked for."""
    pipeline = Pipeline([only_there], backend=Place(chunk_size=3))
    with pytest.raises(RemoteExecutionError, match="'a_package_of_the_image_alone': install it here too, or ask for"):
        await pipeline.amap({"x": range(10)}, "x")


async def test_events_that_cannot_be_sent_come_with_the_reply(anyio_backend, monkeypatch):
    """A line for events that breaks costs nothing but their being late, in the order in which they happened."""
    from hypernodes.backend import _entry

    monkeypatch.setattr(_entry, "POST_S", 0.001)
    seen = []

    class Seeing(PipelineCallback):
        def on_map_item_end(self, item_index, duration, ctx):
            seen.append(item_index)

    class Broken(Place):
        async def connected(self, label, receive, work):
            async def fail(batch):
                raise OSError("the line is down")

            class BrokenLine(PlaceLine):
                async def call(self, payload, shared=None):
                    return await run_payload(payload, fail, shared)

            return await work(BrokenLine(self, receive))

    slow = node("y")(lambda x: x)
    pipeline = Pipeline([node("slept")(nap), slow], backend=Broken(width=1, chunk_size=5), callbacks=[Seeing()])
    assert (await pipeline.amap({"x": range(10)}, "x", max_concurrency=1))["y"] == list(range(10))
    assert seen == list(range(10))


async def nap(x):
    await anyio.sleep(0.005)


@pytest.mark.parametrize("mode", ["single", "distributed"])
async def test_events_that_may_have_been_sent_are_told_once(anyio_backend, monkeypatch, mode):
    """A line that takes a batch and never says so does not hold up the result; what it took comes in the reply too."""
    from hypernodes.backend import _entry

    monkeypatch.setattr(_entry, "POST_S", 0.001)
    monkeypatch.setattr(_entry, "_POSTING_S", 0.01)
    took = []

    class Deaf(Place):
        async def connected(self, label, receive, work):
            async def post(batch):
                took.append(len(batch))
                await receive(batch)
                await anyio.sleep_forever()

            class DeafLine(PlaceLine):
                async def call(self, payload, shared=None):
                    return await run_payload(payload, post, shared)

            return await work(DeafLine(self, receive))

    mapped = Pipeline([node("slept")(nap), double], name="p", backend=Deaf(width=1, mode=mode)).as_node(map_over="x")
    told = []
    async with Pipeline([mapped]).aevents(x=range(10)) as events:
        async for event in events:
            told.append((type(event).__name__, event.path))  # noqa: PERF401
    assert took
    assert len(told) == len(set(told))
    assert len([1 for kind, _ in told if kind == "NodeFinished"]) == 21


async def test_what_a_dead_chunk_began_is_told_to_its_end(anyio_backend):
    """Before its items run again: each beginning has an end, and so it is when an item ends its machine each time."""

    class Deadly(PlaceLine):
        async def call(self, payload, shared=None):
            rows = unpacked(payload)[1]["rows"]
            call = unpacked(payload)[1]["call"]
            if (3,) in rows:
                begun = NodeStarted("r", ("outer", "p", 3, "double"), 0.0, {"x": 3})
                await self._receive(packed("events", [(0, [begun])], call))
                raise WorkerCrashedError("it died")
            return await super().call(payload, shared)

    class Place3(Place):
        async def connected(self, label, receive, work):
            return await work(Deadly(self, receive))

    mapped = Pipeline([double], name="p", backend=Place3(width=2, chunk_size=4)).as_node(map_over="x")
    told = []
    with pytest.raises(WorkerCrashedError):
        async with Pipeline([mapped], name="outer").aevents(x=range(8)) as events:
            async for event in events:
                if 3 in event.path:
                    told.append(type(event).__name__)  # noqa: PERF401
    assert told.count("NodeStarted") > 1
    assert told == ["NodeStarted", "NodeCancelled"] * told.count("NodeStarted") + ["ItemFailed"]


async def test_the_end_that_is_told_is_the_error_that_is_raised(anyio_backend):
    """Also where it is this end that ends it: a timeout."""

    class Slow(Place):
        async def connected(self, label, receive, work):
            began = [PipelineStarted("r", ("p",), 0.0, {}), NodeStarted("r", ("p", "double"), 0.0, {"x": 3})]
            await receive(packed("events", [(0, began)], None))
            await anyio.sleep_forever()

    pipeline = Pipeline([double], name="p", backend=Slow(), timeout=0.05)
    ends = []
    with pytest.raises(NodeTimeoutError, match=r"did not finish within 0\.05 s") as caught:
        async with pipeline.aevents(x=1) as events:
            async for event in events:
                ends.append(event)  # noqa: PERF401
    assert [type(event).__name__ for event in ends[-2:]] == ["NodeCancelled", "PipelineFailed"]
    assert ends[-1].error is caught.value


async def test_events_come_while_a_chunk_runs(anyio_backend, monkeypatch):
    """Where the place can send them, progress does not wait for a chunk to end."""
    from hypernodes.backend import _entry

    monkeypatch.setattr(_entry, "POST_S", 0.001)
    seen = anyio.Event()
    GATE["open"] = anyio.Event()

    class Seeing(PipelineCallback):
        def on_map_item_end(self, item_index, duration, ctx):
            if item_index == 0:
                seen.set()

    pipeline = Pipeline([node("y")(wait_behind_gate)], backend=Place(width=1, chunk_size=2, posting=True))
    async with anyio.create_task_group() as group:
        group.start_soon(pipeline.with_callbacks([Seeing()]).amap, {"x": [0, 1]}, "x")
        with anyio.fail_after(10):
            await seen.wait()
        GATE["open"].set()


GATE = {}


async def wait_behind_gate(x):
    if x:
        await GATE["open"].wait()
    return x


class TestNested:
    async def test_a_part_of_a_pipeline(self, anyio_backend):
        """A mapped nested pipeline goes out in chunks while the pipeline around it stays."""
        place = Place(chunk_size=5)
        inner = Pipeline([double], name="inner", backend=place).as_node(map_over="x")
        outer = Pipeline([inner, node("total")(lambda doubled: sum(doubled))], name="outer")
        assert (await outer.arun(x=list(range(20))))["total"] == 380
        assert len(place.chunks) == 4

    async def test_its_failures_name_the_whole_path(self, anyio_backend):
        """The note says where in the outer pipeline it was."""

        @node("y")
        def fail(x):
            raise LookupError(x)

        inner = Pipeline([fail], name="inner", backend=Place(chunk_size=5)).as_node(map_over="x")
        with pytest.raises(LookupError) as caught:
            await Pipeline([inner], name="outer").arun(x=[0])
        assert caught.value.__notes__ == ["in node 'fail' at outer / inner[0] / fail"]

    async def test_a_map_inside_an_item(self, anyio_backend):
        """Items of a distributed map may hold maps of their own, which run where they are."""
        inner = Pipeline([double], name="inner").as_node(map_over="x")
        outer = Pipeline([inner], name="outer", backend=Place(chunk_size=2))
        result = await outer.amap({"x": [[1, 2], [3], []]}, "x")
        assert result["doubled"] == [[2, 4], [6], []]


async def test_worker_processes_there(anyio_backend):
    """Each machine's engine may spread its chunk over worker processes, with the indices of the whole."""
    watching = Watching()
    place = Place(width=1, chunk_size=6, map_execution="parallel", max_workers=2)
    pipeline = Pipeline([double], backend=place, callbacks=[watching])
    assert (await pipeline.amap({"x": range(12)}, "x"))["doubled"] == [2 * x for x in range(12)]
    assert sorted(index for kind, index in watching.told if kind == "item") == list(range(12))


async def test_a_cache_that_all_machines_share(anyio_backend, tmp_path):
    """A second map computes nothing, whatever the chunks were; a failed one keeps its successes."""

    @node("y")
    def mark(x):
        (tmp_path / f"{x}").touch(exist_ok=False)
        return x

    pipeline = Pipeline([mark], cache=DiskCache(tmp_path / "cache"), backend=Place(chunk_size=3))
    for size in (20, 30):
        assert (await pipeline.amap({"x": range(size)}, "x"))["y"] == list(range(size))
    again = pipeline.with_backend(Place(chunk_size=7))
    assert (await again.amap({"x": range(30)}, "x"))["y"] == list(range(30))


class TestStream:
    @pytest.mark.parametrize("ordered", [True, False])
    async def test_items_come_as_chunks_finish(self, anyio_backend, ordered):
        """In input order, or as they finish."""

        async def hook(items):
            if 0 in items:
                await anyio.sleep(0.05)

        place = Place(hook=hook, chunk_size=2)
        pipeline = Pipeline([double], backend=place)
        async with pipeline.astream({"x": range(20)}, "x", ordered=ordered) as items:
            indices = [item.index async for item in items]
        assert sorted(indices) == list(range(20))
        assert (indices == sorted(indices)) == ordered

    async def test_a_slow_consumer_slows_an_endless_source(self, anyio_backend):
        """No more rows are taken than the window has room for."""
        taken = 0

        def endless():
            nonlocal taken
            while True:
                taken += 1
                yield taken

        place = Place(width=3, chunk_size=4)
        pipeline = Pipeline([double], backend=place)
        async with pipeline.astream({"x": endless()}, "x", max_concurrency=12) as items:
            for count in range(1, 30):
                item = await anext(items)
                assert item.outputs == {"doubled": 2 * count}
                assert taken <= count + 12
        assert place.active == 0
        assert place.left == 1

    async def test_one_lane_leaves_room_for_others(self, anyio_backend):
        """A chunk takes no more than its lane's part of the window."""
        place = Place(width=4)
        async with Pipeline([double], backend=place).astream({"x": range(400)}, "x", max_concurrency=40) as items:
            assert [item.index async for item in items] == list(range(400))
        assert max(map(len, place.chunks)) <= 10

    async def test_a_dead_chunk_that_the_consumer_waits_for(self, anyio_backend):
        """It is run again at once, though the window is full."""
        died = []

        async def hook(items):
            if 0 in items and not died:
                died.append(items)
                raise WorkerCrashedError("preempted")

        pipeline = Pipeline([double], backend=Place(hook=hook, chunk_size=2))
        with anyio.fail_after(10):
            async with pipeline.astream({"x": range(40)}, "x", max_concurrency=8) as items:
                assert [item.index async for item in items] == list(range(40))

    async def test_a_poisoned_item_of_a_stream(self, anyio_backend):
        """It comes with its error, in its place."""
        pipeline = Pipeline([double], backend=Place(hook=deadly(5), chunk_size=4))
        async with pipeline.astream({"x": range(12)}, "x", on_error="collect", max_concurrency=8) as items:
            got = [item async for item in items]
        assert [item.index for item in got] == list(range(12))
        assert [item.index for item in got if item.error is not None] == [5]


async def test_cancelling_leaves_nothing(anyio_backend):
    """Every call is cancelled and the connection closed when the awaiting task is cancelled."""
    started = anyio.Event()

    async def hook(items):
        started.set()
        await anyio.sleep_forever()

    place = Place(hook=hook, chunk_size=1)
    async with anyio.create_task_group() as group:
        group.start_soon(Pipeline([double], backend=place).amap, {"x": range(100)}, "x")
        await started.wait()
        group.cancel_scope.cancel()
    assert place.active == 0
    assert place.left == 1
    assert len(place.chunks) <= 4


async def test_an_item_costs_no_task(anyio_backend):
    """There is a task for each call under way, and here those of the four chunks of five; none for an item."""
    if anyio_backend[0] == "trio":
        pytest.skip("counts the tasks of asyncio")
    counts = []

    async def hook(items):
        counts.append(len(asyncio.all_tasks()))

    await Pipeline([double], backend=Place(hook=hook, chunk_size=5)).amap({"x": range(10_000)}, "x")
    assert len(counts) == 2_000
    assert max(counts) <= 4 * (5 + 2) + 3

"""Maps: the same pipeline over many items, gathered in input order."""

import anyio
import pytest

from hypernodes import ItemFailure, MapResult, Pipeline, node
from hypernodes.errors import (
    DependencyError,
    HyperNodesError,
    MapInputError,
    MapTypeError,
    TooManyFailuresError,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


@node("pair")
def pair(a, b):
    return a, b


pairs = Pipeline([pair], name="pairs")
invert = Pipeline([node("y")(lambda x: 1 // x), node("z")(lambda y: -y)], name="invert")


def recording(ran: list) -> Pipeline:
    @node("y")
    def record(x):
        ran.append(x)
        return x

    return Pipeline([record], name="recording")


class TestResult:
    async def test_dict_of_lists(self):
        """amap gives a dict of lists in input order: a MapResult, which is a dict with failures."""
        result = await invert.amap({"x": [1, -1, 2]}, "x")
        assert result == {"y": [1, -1, 0], "z": [-1, 1, 0]}
        assert isinstance(result, MapResult)
        assert isinstance(result, dict)
        assert result.failures == []

    async def test_map_over_a_str_or_a_list(self):
        """map_over is a name or a list of names."""
        for map_over in ("x", ["x"], ("x",)):
            assert (await invert.amap({"x": [1, 2]}, map_over))["y"] == [1, 0]

    async def test_output_name(self):
        """With output_name the result is still a MapResult, of the selected outputs."""
        for selection in ("y", ["y"]):
            result = await invert.amap({"x": [1, 2]}, "x", output_name=selection)
            assert result == {"y": [1, 0]}
            assert isinstance(result, MapResult)

    async def test_input_order_whatever_finishes_first(self):
        """Items that finish in reverse order are gathered in input order."""
        finished = []
        done = [anyio.Event() for _ in range(5)]

        @node("y")
        async def wait_for_the_next(x):
            if x + 1 < len(done):
                await done[x + 1].wait()
            finished.append(x)
            done[x].set()
            return x * 10

        with anyio.fail_after(10):
            result = await Pipeline([wait_for_the_next]).amap({"x": list(range(5))}, "x")
        assert finished == [4, 3, 2, 1, 0]
        assert result == {"y": [0, 10, 20, 30, 40]}

    async def test_shared_values(self):
        """Values not in map_over go to every item as they are, lists too."""
        shared = [1, 2]
        result = await pairs.amap({"a": ["x", "y", "z"], "b": shared}, "a")
        assert result == {"pair": [("x", shared), ("y", shared), ("z", shared)]}
        assert all(second is shared for _, second in result["pair"])

    async def test_none_is_a_value(self):
        """None as an item and None as an output are values, not failures."""
        result = await Pipeline([node("y")(lambda x: x)]).amap({"x": [None, 0, None]}, "x", on_error="collect")
        assert result == {"y": [None, 0, None]}
        assert result.failures == []

    async def test_generator_node(self):
        """A generator node in a map gives one list for each item."""

        @node("words")
        def split(text):
            yield from text.split()

        assert await Pipeline([split]).amap({"text": ["a b", "", "c"]}, "text") == {"words": [["a", "b"], [], ["c"]]}

    async def test_tuple_outputs(self):
        """Each of a node's several outputs is a list of its own."""
        halves = node(("left", "right"))(lambda x: (x // 2, x - x // 2))
        assert await Pipeline([halves]).amap({"x": [4, 5]}, "x") == {"left": [2, 2], "right": [2, 3]}

    async def test_nested_maps(self):
        """A map of a pipeline that maps gives lists of lists."""
        rows = Pipeline([invert.as_node(input_mapping={"row": "x"}, map_over="row")])
        assert (await rows.amap({"row": [[1, 2], [], [-1]]}, "row"))["y"] == [[1, 0], [], [-1]]

    async def test_many_items(self):
        """Ten thousand items of mixed sync and async nodes come out right and in order."""

        @node("b")
        async def plus(a):
            return a + 1

        pipeline = Pipeline([node("a")(lambda x: x * 2), plus])
        result = await pipeline.amap({"x": range(10_000)}, "x", output_name="b")
        assert result["b"] == [2 * i + 1 for i in range(10_000)]

    async def test_two_maps_of_one_pipeline_at_once(self):
        """Maps of the same pipeline side by side don't mix."""
        results = {}

        async def run(factor):
            results[factor] = await pairs.amap({"a": range(200), "b": factor}, "a")

        async with anyio.create_task_group() as group:
            for factor in range(5):
                group.start_soon(run, factor)
        for factor in range(5):
            assert results[factor]["pair"] == [(i, factor) for i in range(200)]

    def test_sync_twin(self):
        """map gives what amap gives."""
        result = pairs.map({"a": [1, 2], "b": [3, 4]}, ["a", "b"])
        assert result == {"pair": [(1, 3), (2, 4)]}
        assert isinstance(result, MapResult)


class TestZip:
    async def test_side_by_side(self):
        """zip is the default: the first with the first, the second with the second."""
        assert await pairs.amap({"a": [1, 2], "b": ["x", "y"]}, ["a", "b"]) == {"pair": [(1, "x"), (2, "y")]}

    async def test_any_sized_or_lazy_iterable(self):
        """Tuples, ranges, dict views, iterators and generators are mapped as well as lists."""
        for items in (
            (3, 4),
            range(3, 5),
            {3: "x", 4: "y"}.keys(),
            iter([3, 4]),
            (i for i in (3, 4)),
            map(int, "34"),
        ):
            assert (await pairs.amap({"a": items, "b": 0}, "a"))["pair"] == [(3, 0), (4, 0)]

    async def test_numpy_array(self):
        """A numpy array is mapped over its first axis."""
        numpy = pytest.importorskip("numpy")
        result = await Pipeline([node("y")(lambda x: float(x.sum()))]).amap({"x": numpy.ones((3, 2))}, "x")
        assert result == {"y": [2.0, 2.0, 2.0]}

    @pytest.mark.parametrize(("a", "b"), [([1, 2, 3], [1, 2]), ([1], [1, 2]), ([], [1]), ([1, 2], [])])
    async def test_unequal_lengths(self, a, b):
        """Lists of unequal length are refused before anything runs, with both names and lengths."""
        ran = []
        pipeline = Pipeline([node("y")(lambda a, b: ran.append(a))])
        with pytest.raises(ValueError, match="length") as caught:
            await pipeline.amap({"a": a, "b": b}, ["a", "b"])
        assert isinstance(caught.value, MapInputError)
        for word in ("'a'", "'b'", str(len(a)), str(len(b))):
            assert word in str(caught.value)
        assert ran == []

    @pytest.mark.parametrize(("a", "b"), [(3, 2), (2, 3), (0, 1), (1, 0)])
    @pytest.mark.parametrize("lazy", ["first", "second", "both"])
    async def test_unequal_lengths_of_generators(self, a, b, lazy):
        """Where a length shows only on the way, a shorter one is an error and never cuts the result."""
        inputs = {
            "a": (i for i in range(a)) if lazy != "second" else list(range(a)),
            "b": (i for i in range(b)) if lazy != "first" else list(range(b)),
        }
        with pytest.raises(MapInputError, match="length"):
            await pairs.amap(inputs, ["a", "b"])

    async def test_callers_lists_are_untouched(self):
        """The inputs are neither changed nor given back."""
        inputs = {"a": [1, 2], "b": [3, 4]}
        result = await pairs.amap(inputs, ["a", "b"])
        assert inputs == {"a": [1, 2], "b": [3, 4]}
        assert result["pair"] is not inputs["a"]


class TestProduct:
    async def test_last_name_is_fastest(self):
        """product gives all combinations, the last name of map_over fastest."""
        result = await pairs.amap({"a": [1, 2], "b": ["x", "y"]}, ["a", "b"], map_mode="product")
        assert result == {"pair": [(1, "x"), (1, "y"), (2, "x"), (2, "y")]}
        result = await pairs.amap({"a": [1, 2], "b": ["x", "y"]}, ["b", "a"], map_mode="product")
        assert result == {"pair": [(1, "x"), (2, "x"), (1, "y"), (2, "y")]}

    async def test_unequal_lengths_are_fine(self):
        """Lengths may differ in a product, and one may be empty."""
        assert (await pairs.amap({"a": [1, 2, 3], "b": [0]}, ["a", "b"], map_mode="product"))["pair"] == [
            (1, 0),
            (2, 0),
            (3, 0),
        ]
        assert await pairs.amap({"a": [1, 2], "b": []}, ["a", "b"], map_mode="product") == {"pair": []}

    async def test_of_one(self):
        """A product of one name is that list."""
        assert (await pairs.amap({"a": [1, 2], "b": 0}, "a", map_mode="product"))["pair"] == [(1, 0), (2, 0)]

    async def test_generator(self):
        """A generator in a product is refused by name, unread, since it would be needed more than once."""
        taken = []

        def source():
            for i in range(3):
                taken.append(i)
                yield i

        with pytest.raises(MapInputError) as caught:
            await pairs.amap({"a": [1, 2], "b": source()}, ["a", "b"], map_mode="product")
        assert "'b'" in str(caught.value)
        assert "product" in str(caught.value)
        assert "list" in str(caught.value)
        assert taken == []


class TestEmpty:
    @pytest.mark.parametrize("map_mode", ["zip", "product"])
    async def test_empty_lists(self, map_mode):
        """An empty list gives an empty list for every output, and no node runs."""
        ran = []
        pipeline = Pipeline([node("y")(lambda x: ran.append(x)), node(("z", "w"))(lambda y: (y, y))])
        result = await pipeline.amap({"x": []}, "x", map_mode=map_mode)
        assert result == {"y": [], "z": [], "w": []}
        assert result.failures == []
        assert ran == []

    async def test_empty_generator(self):
        """A generator of nothing gives empty lists."""
        assert await invert.amap({"x": iter(())}, "x") == {"y": [], "z": []}

    async def test_empty_with_output_name(self):
        """An empty map has only the selected outputs."""
        assert await invert.amap({"x": []}, "x", output_name="z") == {"z": []}

    async def test_still_checks(self):
        """An empty map still refuses a misspelt or missing input."""
        with pytest.raises(DependencyError):
            await pairs.amap({"a": []}, "a")
        with pytest.raises(DependencyError):
            await pairs.amap({"a": [], "b": 1, "c": 2}, "a")


class TestRefused:
    @pytest.mark.parametrize("value", ["word", b"bytes", {"k": 1}, 3, None, bytearray(b"x"), object()])
    @pytest.mark.parametrize("map_mode", ["zip", "product"])
    async def test_not_a_list(self, value, map_mode):
        """What is not a list of items, such as a str or dict, is refused with its name and type."""
        ran = []
        with pytest.raises(MapTypeError) as caught:
            await recording(ran).amap({"x": value}, "x", map_mode=map_mode)
        assert "'x'" in str(caught.value)
        assert type(value).__name__ in str(caught.value)
        assert isinstance(caught.value, TypeError)
        assert isinstance(caught.value, ValueError)
        assert ran == []

    async def test_async_iterable(self):
        """An async iterable given to amap is refused unread, with the way to astream."""

        async def source():
            yield 1

        values = source()
        with pytest.raises(MapInputError, match="astream") as caught:
            await invert.amap({"x": values}, "x")
        assert "'x'" in str(caught.value)
        await values.aclose()

    async def test_unknown_map_over(self):
        """A misspelt map_over is refused with a suggestion."""
        with pytest.raises(HyperNodesError) as caught:
            await recorded_text.amap({"text": ["a"]}, "texd")
        assert isinstance(caught.value, ValueError)
        assert "did you mean" in str(caught.value).lower()
        assert "'texd'" in str(caught.value)
        assert "'text'" in str(caught.value)

    async def test_map_over_not_given(self):
        """A mapped input that is not given is a missing input."""
        with pytest.raises(DependencyError, match="'a'"):
            await pairs.amap({"b": 1}, "a")

    async def test_missing_and_unknown_inputs(self):
        """Inputs are checked as for a single run."""
        with pytest.raises(DependencyError, match="'b'"):
            await pairs.amap({"a": [1]}, "a")
        with pytest.raises(DependencyError, match=r"(?i)txet.*did you mean.*'text'"):
            await recorded_text.amap({"txet": ["a"]}, "text")
        with pytest.raises(DependencyError, match=r"(?i)lenght.*did you mean.*'length'"):
            await recorded_text.amap({"text": ["a"]}, "text", output_name="lenght")

    @pytest.mark.parametrize("map_over", [[], (), None, 3, ["a", "a"], ["a", 3]])
    async def test_bad_map_over(self, map_over):
        """map_over that names nothing, the same twice, or something else than names is refused."""
        with pytest.raises((HyperNodesError, TypeError), match="map_over"):
            await pairs.amap({"a": [1], "b": [2]}, map_over)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"map_mode": "prodcut"}, ["map_mode", "prodcut", "product"]),
            ({"on_error": "colect"}, ["on_error", "colect", "collect"]),
            ({"max_concurrency": 0}, ["max_concurrency", "0"]),
            ({"max_concurrency": -3}, ["max_concurrency", "-3"]),
            ({"max_concurrency": "3"}, ["max_concurrency", "'3'"]),
            ({"on_error": "collect", "max_failures": 0}, ["max_failures", "0"]),
            ({"on_error": "collect", "max_failures": "1"}, ["max_failures", "'1'"]),
        ],
    )
    async def test_bad_option(self, options, words):
        """An option out of its range is refused before anything runs, naming the option and the value."""
        ran = []
        with pytest.raises(HyperNodesError) as caught:
            await recording(ran).amap({"x": [1]}, "x", **options)
        assert isinstance(caught.value, ValueError)
        for word in words:
            assert word in str(caught.value)
        assert ran == []


recorded_text = Pipeline([node("length")(lambda text: len(text))])


class TestConcurrency:
    @pytest.mark.parametrize("limit", [1, 2, 7])
    async def test_max_concurrency(self, limit):
        """max_concurrency is how many items are open at once: that many meet, and never more."""
        together = anyio.Event()
        open_items = set()
        most = 0

        @node("y")
        async def visit(x):
            nonlocal most
            open_items.add(x)
            most = max(most, len(open_items))
            if len(open_items) == limit:
                together.set()
            await together.wait()
            await anyio.lowlevel.checkpoint()
            open_items.remove(x)
            return x

        with anyio.fail_after(10):
            result = await Pipeline([visit]).amap({"x": range(20)}, "x", max_concurrency=limit)
        assert result["y"] == list(range(20))
        assert most == limit

    async def test_default(self):
        """Without max_concurrency, a hundred items are open at once."""
        together = anyio.Event()
        open_items = most = 0

        @node("y")
        async def visit(x):
            nonlocal open_items, most
            open_items += 1
            most = max(most, open_items)
            if open_items == 100:
                together.set()
            await together.wait()
            await anyio.lowlevel.checkpoint()
            open_items -= 1

        with anyio.fail_after(10):
            await Pipeline([visit]).amap({"x": range(250)}, "x")
        assert most == 100


class Complaint(Exception):
    """An error of the user's own."""


class TestRaise:
    async def test_first_failure_is_raised_as_itself(self):
        """By default the first failure is raised, as itself, with the path of its item."""
        with pytest.raises(ZeroDivisionError) as caught:
            await invert.amap({"x": [1, 2, 0, 3]}, "x")
        [note] = caught.value.__notes__
        assert "invert[2] / <lambda>" in note

    async def test_path_of_a_nested_map(self):
        """The path goes through both maps: which row, and which item of it."""
        rows = Pipeline([invert.as_node(input_mapping={"row": "x"}, map_over="row", name="each")], name="rows")
        with pytest.raises(ZeroDivisionError) as caught:
            await rows.amap({"row": [[1], [1, 1, 0]]}, "row")
        [note] = caught.value.__notes__
        assert "rows[1] / each[2] / <lambda>" in note

    async def test_cancels_the_rest_promptly(self):
        """The other open items are cancelled, their cleanup has run, and no further item is started."""
        entered = [anyio.Event() for _ in range(3)]
        started, cleaned = [], []

        @node("y")
        async def visit(x):
            started.append(x)
            entered[x].set()
            if x == 2:
                for event in entered:
                    await event.wait()
                raise Complaint(x)
            try:
                await anyio.sleep_forever()
            finally:
                cleaned.append(x)

        with anyio.fail_after(10), pytest.raises(Complaint):
            await Pipeline([visit]).amap({"x": range(1000)}, "x", max_concurrency=3)
        assert started == [0, 1, 2]
        assert sorted(cleaned) == [0, 1]

    async def test_several_fail_at_once(self):
        """When several items fail together, one of the failures is raised: never a group."""
        together = anyio.Event()
        count = 0

        @node("y")
        async def visit(x):
            nonlocal count
            count += 1
            if count == 5:
                together.set()
            await together.wait()
            raise Complaint(x)

        with anyio.fail_after(10), pytest.raises(Complaint):
            await Pipeline([visit]).amap({"x": range(5)}, "x")

    async def test_source_that_fails(self):
        """A generator that raises while it is read fails the map as itself, also with collect."""

        def source():
            yield 1
            raise Complaint("source")

        for on_error in ("raise", "collect"):
            with pytest.raises(Complaint, match="source"):
                await invert.amap({"x": source()}, "x", on_error=on_error)

    @pytest.mark.parametrize("error", [StopIteration, StopAsyncIteration])
    @pytest.mark.parametrize("form", ["loop", "thread", "async"])
    async def test_stop_iteration_ends_nothing_early(self, error, form):
        """An item that raises StopIteration fails: it never passes for the end of the items."""

        def stop(x):
            if x == 1:
                raise error("odd")
            return x

        async def astop(x):
            return stop(x)

        failing = node("y")(astop) if form == "async" else node("y", run_in=form)(stop)
        with anyio.fail_after(10), pytest.raises((error, RuntimeError)):
            await Pipeline([failing]).amap({"x": range(4)}, "x")

    async def test_cancel(self):
        """Cancelling the awaiting task cancels all open items, and no further one is started."""
        entered, started, left = anyio.Event(), [], []

        @node("y")
        async def wait(x):
            started.append(x)
            if len(started) == 4:
                entered.set()
            try:
                await anyio.sleep_forever()
            finally:
                left.append(x)

        async def run():
            await Pipeline([wait]).amap({"x": range(1000)}, "x", max_concurrency=4)

        with anyio.fail_after(10):
            async with anyio.create_task_group() as group:
                group.start_soon(run)
                await entered.wait()
                group.cancel_scope.cancel()
        assert sorted(left) == sorted(started) == [0, 1, 2, 3]


class TestCollect:
    async def test_none_where_an_item_failed(self):
        """With collect, failed positions hold None in every output and the failures say what happened."""
        result = await invert.amap({"x": [1, 0, -1, 0]}, "x", on_error="collect")
        assert result == {"y": [1, None, -1, None], "z": [-1, None, 1, None]}
        assert [failure.index for failure in result.failures] == [1, 3]
        first = result.failures[0]
        assert isinstance(first, ItemFailure)
        assert isinstance(first.error, ZeroDivisionError)
        assert first.inputs == {"x": 0}
        assert "invert[1]" in str(first.path) or first.path[:2] == ("invert", 1)

    async def test_failures_are_in_input_order(self):
        """Failures are listed by index, whichever came first."""
        done = [anyio.Event() for _ in range(4)]

        @node("y")
        async def fail(x):
            if x + 1 < len(done):
                await done[x + 1].wait()
            done[x].set()
            raise Complaint(x)

        with anyio.fail_after(10):
            result = await Pipeline([fail]).amap({"x": range(4)}, "x", on_error="collect")
        assert [failure.index for failure in result.failures] == [0, 1, 2, 3]
        assert [failure.error.args for failure in result.failures] == [(0,), (1,), (2,), (3,)]
        assert result == {"y": [None] * 4}

    async def test_inputs_of_a_failure(self):
        """A failure carries the mapped inputs of its item, enough to try that one again."""
        pipeline = Pipeline([node("y")(lambda a, b, k: a // b)])
        result = await pipeline.amap({"a": [1, 2], "b": [1, 0], "k": 5}, ["a", "b"], on_error="collect")
        [failure] = result.failures
        assert {"a": 2, "b": 0}.items() <= failure.inputs.items()
        with pytest.raises(ZeroDivisionError):
            await pipeline.arun({"k": 5, **failure.inputs})

    async def test_note_on_a_collected_error(self):
        """A collected error carries the note with its path, as a raised one does."""
        result = await invert.amap({"x": [1, 0]}, "x", on_error="collect")
        assert "invert[1] / <lambda>" in result.failures[0].error.__notes__[0]

    async def test_failure_deep_inside(self):
        """A failing node in a nested pipeline fails the item, and its path leads there."""
        outer = Pipeline([invert.as_node(name="deep")], name="outer")
        result = await outer.amap({"x": [1, 0]}, "x", on_error="collect")
        [failure] = result.failures
        assert failure.index == 1
        assert "outer[1] / deep / <lambda>" in failure.error.__notes__[0]

    async def test_branches_beside_a_failing_node_are_cancelled(self):
        """Within a failed item what runs beside the failing node is cancelled; other items go on."""
        cancelled, entered = [], anyio.Event()

        @node("patient")
        async def wait(x):
            if x:
                return x
            entered.set()
            try:
                await anyio.sleep_forever()
            finally:
                cancelled.append(x)

        @node("y")
        async def fail(x):
            if x == 0:
                await entered.wait()
                raise Complaint
            return x

        with anyio.fail_after(10):
            result = await Pipeline([wait, fail]).amap({"x": [0, 1, 2]}, "x", on_error="collect")
        assert result == {"patient": [None, 1, 2], "y": [None, 1, 2]}
        assert cancelled == [0]

    async def test_all_fail(self):
        """A map in which every item failed still answers."""
        result = await invert.amap({"x": [0] * 5}, "x", on_error="collect")
        assert result == {"y": [None] * 5, "z": [None] * 5}
        assert len(result.failures) == 5

    async def test_cancellation_is_not_a_failure(self):
        """Cancelling a collecting map cancels it: nothing is collected."""
        outcome = []

        @node("y")
        async def wait(x):
            await anyio.sleep_forever()

        with anyio.move_on_after(0.05) as scope:
            outcome.append(await Pipeline([wait]).amap({"x": range(3)}, "x", on_error="collect"))
        assert scope.cancelled_caught
        assert outcome == []

    @pytest.mark.parametrize("error", [StopIteration, StopAsyncIteration])
    async def test_stop_iteration_is_collected(self, error):
        """A StopIteration of one item is that item's failure; the items after it are kept."""

        @node("y", run_in="loop")
        def stop(x):
            if x == 1:
                raise error("odd")
            return x

        result = await Pipeline([stop]).amap({"x": range(4)}, "x", on_error="collect")
        assert result == {"y": [0, None, 2, 3]}
        assert [failure.index for failure in result.failures] == [1]


class TestMaxFailures:
    async def test_stops_a_map_that_goes_wrong(self):
        """The map stops when max_failures items have failed, and the error carries what failed and why."""
        ran = []

        @node("y")
        async def fail(x):
            ran.append(x)
            if x % 2:
                raise Complaint(x)

        with pytest.raises(TooManyFailuresError) as caught:
            await Pipeline([fail], name="failing").amap(
                {"x": range(100)}, "x", on_error="collect", max_failures=3, max_concurrency=1
            )
        assert [failure.index for failure in caught.value.failures] == [1, 3, 5]
        assert isinstance(caught.value.__cause__, Complaint)
        assert caught.value.__cause__.args == (5,)
        assert "3" in str(caught.value)
        assert "failing" in str(caught.value)
        assert ran == [0, 1, 2, 3, 4, 5]

    async def test_fewer_are_collected(self):
        """Fewer failures than max_failures are collected as usual."""
        result = await invert.amap({"x": [0, 1, 0]}, "x", on_error="collect", max_failures=3)
        assert result["y"] == [None, 1, None]
        assert len(result.failures) == 2

    async def test_cancels_the_rest(self):
        """Items that are still open when the map is given up are cancelled."""
        entered, cleaned = anyio.Event(), []

        @node("y")
        async def visit(x):
            if x == 0:
                try:
                    entered.set()
                    await anyio.sleep_forever()
                finally:
                    cleaned.append(x)
            await entered.wait()
            raise Complaint(x)

        with anyio.fail_after(10), pytest.raises(TooManyFailuresError):
            await Pipeline([visit]).amap({"x": range(50)}, "x", on_error="collect", max_failures=2)
        assert cleaned == [0]


class TestInsideARun:
    async def test_sync_map_in_a_sync_node(self):
        """A sync node may map another pipeline with map."""

        @node("ys")
        def invert_all(xs):
            return invert.map({"x": xs}, "x", on_error="collect")["y"]

        assert await Pipeline([invert_all]).arun(xs=[1, 0, 2]) == {"ys": [1, None, 0]}

    async def test_max_concurrency_of_a_node_spans_items(self):
        """A node's own max_concurrency holds across all items of the map."""
        together = anyio.Event()
        open_calls = most = 0

        @node("y", max_concurrency=2)
        async def call(x):
            nonlocal open_calls, most
            open_calls += 1
            most = max(most, open_calls)
            if open_calls == 2:
                together.set()
            await together.wait()
            await anyio.lowlevel.checkpoint()
            open_calls -= 1
            return x

        with anyio.fail_after(10):
            result = await Pipeline([call]).amap({"x": range(10)}, "x")
        assert result["y"] == list(range(10))
        assert most == 2


async def test_no_outputs_asked_for():
    """An empty list of outputs makes nothing, as it does for a single run."""
    assert await invert.arun({"x": 1}, output_name=[]) == {}
    assert await invert.amap({"x": [1, 2]}, "x", output_name=[]) == {}


async def test_items_that_only_fail_let_the_loop_go_on():
    """A map whose every item fails at once gives other tasks of the loop their turns."""

    @node("y", run_in="loop")
    def fail(x):
        raise ValueError(x)

    turns = 0

    async def others():
        nonlocal turns
        while True:
            await anyio.sleep(0)
            turns += 1

    async with anyio.create_task_group() as group:
        group.start_soon(others)
        await anyio.sleep(0)
        before = turns
        result = await Pipeline([fail]).amap({"x": range(5000)}, "x", on_error="collect")
        group.cancel_scope.cancel()
    assert len(result.failures) == 5000
    assert turns - before > 5

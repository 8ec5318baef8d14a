"""One run: what arun and run take and give, what they refuse, and how a failure leaves them."""

import asyncio
import contextvars
import re
import threading
import traceback
from dataclasses import dataclass

import anyio
import pytest

from hypernodes import Pipeline, node
from hypernodes.backend import LocalBackend
from hypernodes.errors import DependencyError, HyperNodesError, RemoteExecutionError

pytestmark = pytest.mark.usefixtures("no_leaks")


def recorded() -> tuple[Pipeline, list[str]]:
    """A pipeline of two branches from one root, and the list of the nodes that ran."""
    ran = []

    @node("base")
    def make_base(text):
        ran.append("base")
        return text * 2

    @node("left")
    async def make_left(base, left_option=1):
        ran.append("left")
        return base + "l" * left_option

    @node(("right", "extra"))
    def make_right(base, right_option):
        ran.append("right")
        return base + "r", right_option

    @node("top")
    def make_top(left, right):
        ran.append("top")
        return left + right

    return Pipeline([make_base, make_left, make_right, make_top], name="tree"), ran


@pytest.mark.anyio
class TestInputs:
    async def test_dict_or_keywords(self):
        """Inputs come as a dict, as keywords, or as both."""
        pipeline, _ = recorded()
        expected = {"base": "aa", "left": "aal", "right": "aar", "extra": 5, "top": "aalaar"}
        assert await pipeline.arun({"text": "a", "right_option": 5}) == expected
        assert await pipeline.arun(text="a", right_option=5) == expected
        assert await pipeline.arun({"text": "a"}, right_option=5) == expected

    async def test_callers_dict_is_untouched(self):
        """The dict of inputs is neither changed nor given back."""
        pipeline, _ = recorded()
        inputs = {"text": "a", "right_option": 5}
        result = await pipeline.arun(inputs)
        assert inputs == {"text": "a", "right_option": 5}
        assert result is not inputs
        assert "text" not in result

    async def test_inputs_are_passed_as_they_are(self):
        """An input is never copied: the node gets the caller's object."""
        client = object()
        assert await Pipeline([node("y")(lambda client: client)]).arun(client=client, output_name="y") is client

    async def test_input_called_inputs(self):
        """Inputs that share a name with arun's own parameters go in by dict."""

        @node("y")
        def join(inputs, output_name):
            return inputs + output_name

        assert await Pipeline([join]).arun({"inputs": "a", "output_name": "b"}) == {"y": "ab"}

    async def test_missing(self):
        """A missing input is refused before anything runs, with the name of the pipeline that needs it."""
        pipeline, ran = recorded()
        with pytest.raises(DependencyError) as caught:
            await pipeline.arun(text="a")
        assert "right_option" in str(caught.value)
        assert "tree" in str(caught.value)
        assert isinstance(caught.value, ValueError)
        assert ran == []

    async def test_all_missing_are_named(self):
        """All missing inputs are named at once, not one a try."""
        pipeline, _ = recorded()
        with pytest.raises(DependencyError) as caught:
            await pipeline.arun()
        assert "text" in str(caught.value)
        assert "right_option" in str(caught.value)

    async def test_unknown(self):
        """An unknown input is refused before anything runs, with the known ones."""
        pipeline, ran = recorded()
        with pytest.raises(DependencyError) as caught:
            await pipeline.arun(text="a", right_option=1, zebra=3)
        for word in ("zebra", "text", "left_option", "right_option"):
            assert word in str(caught.value)
        assert ran == []

    @pytest.mark.parametrize("inputs", [{"txet": "a", "right_option": 1}, {"text": "a", "rihgt_option": 1}])
    async def test_misspelt(self, inputs):
        """A misspelt input gets a suggestion."""
        pipeline, _ = recorded()
        with pytest.raises(DependencyError) as caught:
            await pipeline.arun(inputs)
        misspelt, meant = ("txet", "text") if "txet" in inputs else ("rihgt_option", "right_option")
        message = str(caught.value)
        assert "did you mean" in message.lower()
        assert misspelt in message
        assert f"'{meant}'" in message

    async def test_misspelt_optional(self):
        """A misspelt optional input is refused, never dropped in favour of the default."""
        pipeline, ran = recorded()
        with pytest.raises(DependencyError, match=r"lift_option.*left_option"):
            await pipeline.arun(text="a", right_option=1, lift_option=3)
        assert ran == []

    async def test_output_given_as_input(self):
        """A value for what a node computes is refused, never silently dropped."""
        pipeline, _ = recorded()
        with pytest.raises(DependencyError, match="base"):
            await pipeline.arun(text="a", right_option=1, base="b")

    @pytest.mark.parametrize("inputs", [["text"], "text", 3, {"text", "right_option"}])
    async def test_not_a_mapping(self, inputs):
        """Inputs that are not a mapping are refused with their type."""
        pipeline, _ = recorded()
        with pytest.raises((HyperNodesError, TypeError), match=type(inputs).__name__):
            await pipeline.arun(inputs)


@pytest.mark.anyio
class TestSelection:
    async def test_str_gives_the_bare_value(self):
        """output_name as a str gives the bare value."""
        pipeline, _ = recorded()
        assert await pipeline.arun(text="a", right_option=5, output_name="top") == "aalaar"

    async def test_list_gives_a_dict(self):
        """output_name as a list gives a dict of those."""
        pipeline, _ = recorded()
        assert await pipeline.arun(text="a", right_option=5, output_name=["extra", "left"]) == {
            "extra": 5,
            "left": "aal",
        }
        assert await pipeline.arun(text="a", right_option=5, output_name=["left"]) == {"left": "aal"}

    async def test_runs_only_what_is_needed(self):
        """Only the nodes that the selection needs run."""
        pipeline, ran = recorded()
        assert await pipeline.arun(text="a", right_option=5, output_name="left") == "aal"
        assert ran == ["base", "left"]
        ran.clear()
        await pipeline.arun(text="a", right_option=5, output_name=["base"])
        assert ran == ["base"]

    async def test_asks_only_for_what_is_needed(self):
        """Inputs of nodes that don't run need not be given."""
        pipeline, _ = recorded()
        assert await pipeline.arun(text="a", output_name="left") == "aal"

    async def test_one_of_several_outputs(self):
        """One output of a node with several is selected alone."""
        pipeline, ran = recorded()
        assert await pipeline.arun(text="a", right_option=5, output_name="extra") == 5
        assert ran == ["base", "right"]

    async def test_through_a_nested_pipeline(self):
        """A nested pipeline that the selection does not need is not run."""
        pipeline, ran = recorded()
        outer = Pipeline([pipeline, node("other")(lambda text: text + "!")])
        assert await outer.arun(text="a", output_name="other") == "a!"
        assert ran == []
        assert await outer.arun(text="a", right_option=1, output_name=["other", "top"]) == {
            "other": "a!",
            "top": "aalaar",
        }

    async def test_in_a_map(self):
        """The same selection holds for every item of a map."""
        pipeline, ran = recorded()
        assert await pipeline.amap({"text": ["a", "b"]}, "text", output_name="left") == {"left": ["aal", "bbl"]}
        assert sorted(ran) == ["base", "base", "left", "left"]

    @pytest.mark.parametrize("output_name", ["tpo", ["left", "tpo"]])
    async def test_unknown(self, output_name):
        """An unknown output is refused before anything runs, with a suggestion."""
        pipeline, ran = recorded()
        with pytest.raises(DependencyError) as caught:
            await pipeline.arun(text="a", right_option=5, output_name=output_name)
        assert "did you mean" in str(caught.value).lower()
        assert "'tpo'" in str(caught.value)
        assert "'top'" in str(caught.value)
        assert ran == []

    async def test_input_is_no_output(self):
        """An input can't be selected as an output."""
        pipeline, _ = recorded()
        with pytest.raises(DependencyError, match="text"):
            await pipeline.arun(text="a", right_option=5, output_name="text")

    @pytest.mark.parametrize("output_name", [3, ["left", None]])
    async def test_not_names(self, output_name):
        """A selection that is not made of names is refused."""
        pipeline, ran = recorded()
        with pytest.raises((HyperNodesError, TypeError)):
            await pipeline.arun(text="a", right_option=5, output_name=output_name)
        assert ran == []


@pytest.mark.anyio
class TestTogether:
    async def test_ready_nodes_run_side_by_side(self):
        """Independent nodes are open at the same time: each waits here for the other."""
        left_in, right_in = anyio.Event(), anyio.Event()

        @node("left")
        async def left(x):
            left_in.set()
            await right_in.wait()
            return x

        @node("right")
        async def right(x):
            right_in.set()
            await left_in.wait()
            return x

        with anyio.fail_after(10):
            assert await Pipeline([left, right]).arun(x=1) == {"left": 1, "right": 1}

    async def test_starts_as_soon_as_ready(self):
        """A node starts when its own inputs are there, not when a whole layer is done."""
        release = anyio.Event()

        @node("slow")
        async def slow(x):
            await release.wait()
            return x

        @node("quick")
        async def quick(x):
            return x

        @node("after")
        async def after(quick):
            release.set()
            return quick

        with anyio.fail_after(10):
            assert await Pipeline([slow, quick, after]).arun(x=1) == {"slow": 1, "quick": 1, "after": 1}

    async def test_sync_nodes_do_not_hold_the_loop(self):
        """A sync node that blocks leaves the loop to the async node that it waits for."""
        reached = threading.Event()

        @node("blocked")
        def blocked(x):
            assert reached.wait(10), "the loop was held"
            return x

        @node("free")
        async def free(x):
            await anyio.lowlevel.checkpoint()
            reached.set()
            return x

        assert await Pipeline([blocked, free]).arun(x=1) == {"blocked": 1, "free": 1}

    async def test_many_runs_of_one_pipeline(self):
        """One pipeline object runs many times at once, and each run keeps its own values."""
        pipeline, _ = recorded()
        answers = {}

        async def run(i):
            answers[i] = await pipeline.arun(text=str(i), right_option=i)

        async with anyio.create_task_group() as group:
            for i in range(50):
                group.start_soon(run, i)
        for i in range(50):
            assert answers[i]["top"] == f"{i}{i}l{i}{i}r"
            assert answers[i]["extra"] == i

    async def test_context_variables(self):
        """Nodes see the caller's context variables, sync or async."""
        user = contextvars.ContextVar("user", default="nobody")
        pipeline = Pipeline(
            [
                node("threaded", run_in="thread")(lambda x: user.get()),
                node("looped", run_in="loop")(lambda x: user.get()),
                node("unknown")(lambda x: user.get()),
                node("nested")(_reader(user)),
            ]
        )
        user.set("Ada")
        assert set((await pipeline.arun(x=1)).values()) == {"Ada"}
        assert set(pipeline.run(x=1).values()) == {"Ada"}


def _reader(variable):
    async def read(x):
        await anyio.lowlevel.checkpoint()
        return variable.get()

    return read


class Complaint(Exception):
    """An error of the user's own."""


@pytest.mark.anyio
class TestFailure:
    @pytest.mark.parametrize("run_in", ["loop", "thread", "auto"])
    async def test_own_type_and_traceback(self, run_in):
        """A user's exception leaves as the very object that was raised, from the line that raised it."""
        error = Complaint("no")

        @node("y", run_in=run_in)
        def complain(x):
            raise error

        with pytest.raises(Complaint) as caught:
            await Pipeline([complain], name="p").arun(x=1)
        assert caught.value is error
        assert caught.traceback[-1].name == "complain"
        assert len(error.__notes__) == 1
        assert "'complain'" in error.__notes__[0]
        assert "p / complain" in error.__notes__[0]

    async def test_one_note_through_nesting(self):
        """However deep the failing node is, there is one note, with the whole path."""

        @node("y")
        async def complain(x):
            raise Complaint

        pipeline = Pipeline([complain], name="inner")
        for name in ("middle", "outer"):
            pipeline = Pipeline([pipeline], name=name)
        with pytest.raises(Complaint) as caught:
            await pipeline.arun(x=1)
        [note] = caught.value.__notes__
        assert "outer / middle / inner / complain" in note

    async def test_same_error_object_again(self):
        """An exception object that is raised run after run does not gather notes without end."""
        error = Complaint("shared")

        @node("y")
        async def complain(x):
            raise error

        pipeline = Pipeline([complain], name="p")
        for _ in range(5):
            with pytest.raises(Complaint):
                await pipeline.arun(x=1)
        assert len(set(error.__notes__)) == 1

    async def test_unnamed_pipeline(self):
        """An unnamed pipeline shows as "pipeline" in the path."""

        @node("y")
        async def complain(x):
            raise Complaint

        with pytest.raises(Complaint) as caught:
            await Pipeline([complain]).arun(x=1)
        assert "pipeline / complain" in caught.value.__notes__[0]

    async def test_frozen_exception(self):
        """An exception that takes no notes, such as a frozen dataclass, still leaves as itself."""

        @dataclass(frozen=True)
        class Frozen(Exception):
            code: int

        @node("y")
        async def complain(x):
            raise Frozen(7)

        with pytest.raises(Frozen) as caught:
            await Pipeline([complain]).arun(x=1)
        assert caught.value.code == 7

    async def test_stops_the_others(self):
        """A failing node cancels what runs beside it, whose cleanup has run when the error arrives."""
        entered, cleaned = anyio.Event(), []

        @node("patient")
        async def wait(x):
            try:
                entered.set()
                await anyio.sleep_forever()
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.lowlevel.checkpoint()
                cleaned.append(x)

        @node("y")
        async def complain(x):
            await entered.wait()
            raise Complaint("no")

        with anyio.fail_after(10), pytest.raises(Complaint):
            await Pipeline([wait, complain]).arun(x=1)
        assert cleaned == [1]

    async def test_nothing_starts_after_a_failure(self):
        """Once a node has failed, nothing new starts."""
        ran = []

        @node("a")
        async def complain(x):
            raise Complaint

        @node("b")
        async def after(a):
            ran.append("after")

        with pytest.raises(Complaint):
            await Pipeline([complain, after]).arun(x=1)
        assert ran == []

    async def test_two_fail_at_once(self):
        """When several fail together, one of them is raised as itself: never a group."""
        ready = [anyio.Event() for _ in range(2)]

        def failing(i):
            @node(f"y{i}")
            async def complain(x):
                ready[i].set()
                await ready[1 - i].wait()
                raise Complaint(i)

            return complain

        with anyio.fail_after(10), pytest.raises(Complaint):
            await Pipeline([failing(0), failing(1)]).arun(x=1)

    async def test_cleanup_that_fails_too(self):
        """A sibling whose cleanup raises while it is cancelled does not hide the first failure in a group."""
        entered = anyio.Event()

        @node("patient")
        async def wait(x):
            try:
                entered.set()
                await anyio.sleep_forever()
            finally:
                raise LookupError("cleanup")

        @node("y")
        async def complain(x):
            await entered.wait()
            raise Complaint("first")

        with anyio.fail_after(10), pytest.raises((Complaint, LookupError)):
            await Pipeline([wait, complain]).arun(x=1)

    async def test_users_group_stays(self):
        """An ExceptionGroup that a node raises is the user's exception: it leaves as it is."""

        @node("y")
        async def fail_twice(x):
            async with anyio.create_task_group() as group:
                group.start_soon(_complain)

        with pytest.raises(ExceptionGroup) as caught:
            await Pipeline([fail_twice]).arun(x=1)
        assert isinstance(caught.value.exceptions[0], Complaint)

    @pytest.mark.parametrize("error", [StopIteration, StopAsyncIteration, KeyError, TimeoutError])
    @pytest.mark.parametrize("form", ["loop", "thread", "async"])
    async def test_awkward_errors(self, error, form):
        """An exception that means something to Python's own machinery still ends the run, with a failure."""

        def fail(x):
            raise error("odd")

        async def afail(x):
            raise error("odd")

        failing = node("y")(afail) if form == "async" else node("y", run_in=form)(fail)
        with anyio.fail_after(10), pytest.raises((error, RuntimeError)):
            await Pipeline([failing, node("z")(lambda y: y)]).arun(x=1)

    async def test_users_timeout_is_not_ours(self):
        """A TimeoutError from a user's own deadline leaves as it is, not as a node timeout of ours."""

        @node("y", timeout=30)
        async def impatient(x):
            with anyio.fail_after(0):
                await anyio.sleep_forever()

        with pytest.raises(TimeoutError) as caught:
            await Pipeline([impatient], timeout=30).arun(x=1)
        assert not isinstance(caught.value, HyperNodesError)

    async def test_well_afterwards(self):
        """A run that failed leaves the pipeline as good as new."""
        pipeline = Pipeline([node("y")(lambda x: 1 // x)])
        for _ in range(10):
            with pytest.raises(ZeroDivisionError):
                await pipeline.arun(x=0)
            assert await pipeline.arun(x=1) == {"y": 1}


async def _complain():
    raise Complaint("in a task")


@pytest.mark.anyio
class TestCancel:
    async def test_stops_everything(self):
        """Cancelling the awaiting task cancels the nodes, and returns when their cleanup has run."""
        entered, cleaned = [anyio.Event(), anyio.Event()], []

        def waiting(i):
            @node(f"y{i}")
            async def wait(x):
                try:
                    entered[i].set()
                    await anyio.sleep_forever()
                finally:
                    cleaned.append(i)

            return wait

        pipeline = Pipeline([waiting(0), Pipeline([waiting(1)])])
        with anyio.fail_after(10):
            async with anyio.create_task_group() as group:
                group.start_soon(lambda: pipeline.arun(x=1))
                for event in entered:
                    await event.wait()
                group.cancel_scope.cancel()
        assert sorted(cleaned) == [0, 1]

    async def test_caller_sees_the_cancellation(self):
        """A cancelled arun does not come back with a value or another error."""
        outcome = []

        @node("y")
        async def wait(x):
            await anyio.sleep_forever()

        with anyio.move_on_after(0.05) as scope:
            outcome.append(await Pipeline([wait, node("z")(lambda x: x)]).arun(x=1))
        assert scope.cancelled_caught
        assert outcome == []

    async def test_before_it_starts(self):
        """In a scope that is cancelled already, an async node gets no further than its first await."""
        reached = []

        @node("y")
        async def work(x):
            await anyio.lowlevel.checkpoint()
            reached.append(x)

        with anyio.CancelScope() as scope:
            scope.cancel()
            await Pipeline([work]).arun(x=1)
        assert reached == []
        assert scope.cancelled_caught


@pytest.mark.asyncio
class TestPlainAsyncio:
    """The same, as someone sees it who uses asyncio and has never heard of anyio."""

    async def test_gather(self):
        """Runs go side by side under asyncio.gather."""
        pipeline, _ = recorded()
        results = await asyncio.gather(*(pipeline.arun(text=str(i), output_name="left") for i in range(20)))
        assert results == [f"{i}{i}l" for i in range(20)]

    async def test_cancel_a_task(self):
        """task.cancel() stops the run, leaves no task behind, and the task counts as cancelled."""
        entered, cleaned = asyncio.Event(), []

        @node("y")
        async def wait(x):
            try:
                entered.set()
                await asyncio.Event().wait()
            finally:
                cleaned.append(x)

        before = asyncio.all_tasks()
        task = asyncio.create_task(Pipeline([wait, node("z")(lambda x: x)]).arun(x=1))
        await asyncio.wait_for(entered.wait(), 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()
        assert cleaned == [1]
        assert asyncio.all_tasks() == before

    @pytest.mark.parametrize("beside", [0, 2], ids=["alone", "beside others"])
    async def test_cancel_waits_for_a_thread(self, beside):
        """task.cancel() waits for a sync node's thread, which Python can't stop: none is left running."""
        entered, release, ended = threading.Event(), threading.Event(), []

        @node("y")
        def block(x):
            entered.set()
            assert release.wait(30)
            ended.append(x)

        others = [node(f"other{i}")(lambda x: x) for i in range(beside)]
        task = asyncio.create_task(Pipeline([block, *others]).arun(x=1))
        await asyncio.to_thread(entered.wait)
        task.cancel()
        asyncio.get_running_loop().call_later(0.05, release.set)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended == [1]

    async def test_timeout(self):
        """asyncio.timeout around a run is a TimeoutError of asyncio's, and leaves no task behind."""

        @node("y")
        async def wait(x):
            await asyncio.Event().wait()

        before = asyncio.all_tasks()
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(0.05):
                await Pipeline([wait, node("z")(lambda x: x)]).arun(x=1)
        assert not isinstance(caught.value, HyperNodesError)
        assert asyncio.all_tasks() == before

    async def test_asyncio_inside_nodes(self):
        """Nodes use asyncio's own primitives freely."""

        @node("y")
        async def work(x):
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(asyncio.sleep(0, i)) for i in range(x)]
            return [task.result() for task in tasks]

        assert await Pipeline([work]).arun(x=3) == {"y": [0, 1, 2]}


class TestRun:
    def test_same_as_arun(self):
        """run gives what arun gives."""
        pipeline, _ = recorded()
        assert pipeline.run(text="a", right_option=5)["top"] == "aalaar"
        assert pipeline.run({"text": "a"}, right_option=5, output_name="top") == "aalaar"
        assert pipeline.run(text="a", output_name=["left"]) == {"left": "aal"}

    def test_same_refusals(self):
        """run refuses what arun refuses, in the same words."""
        pipeline, ran = recorded()
        with pytest.raises(DependencyError, match=r"(?i)txet.*did you mean.*text"):
            pipeline.run(txet="a", right_option=5)
        with pytest.raises(DependencyError, match="right_option"):
            pipeline.run(text="a")
        with pytest.raises(DependencyError, match=r"(?i)tpo.*did you mean.*top"):
            pipeline.run(text="a", right_option=5, output_name="tpo")
        assert ran == []

    def test_same_failure(self):
        """A user's exception leaves run as itself, with its note and its own traceback."""

        @node("y")
        def complain(x):
            raise Complaint("no")

        with pytest.raises(Complaint) as caught:
            Pipeline([complain], name="p").run(x=1)
        assert "p / complain" in caught.value.__notes__[0]
        assert caught.traceback[-1].name == "complain"


def test_a_traceback_shows_the_users_lines_and_no_others(monkeypatch):
    """An error leaves a sync call with the frames of the call and of the node; all of them on demand."""

    def divide(x):
        return 1 / x

    failing = Pipeline([node("y")(lambda x: divide(x)), node("z")(lambda y: y)], name="p")

    def frames():
        with pytest.raises(ZeroDivisionError) as raised:
            failing.run(x=0)
        return [entry.name for entry in traceback.extract_tb(raised.value.__traceback__)]

    assert frames() == ["frames", "run", "<lambda>", "divide"]
    monkeypatch.setenv("HYPERNODES_FULL_TRACEBACKS", "1")
    assert {"frames", "run", "arun", "run_steps", "divide"} <= set(frames())


def test_a_traceback_from_another_process_shows_the_users_lines_and_no_others():
    """So does the text that an error brings along, of its causes and of its group's members too."""

    def divide(x):
        try:
            return 1 / x
        except ZeroDivisionError as error:
            raise ExceptionGroup("several", [KeyError("a")]) from error

    failing = Pipeline([node("y")(lambda x: divide(x))], backend=LocalBackend(map_execution="parallel", max_workers=1))
    with pytest.raises(ExceptionGroup) as raised:
        failing.map({"x": [0]}, "x")
    text = str(raised.value.__cause__)
    assert re.findall(r", line \d+, in (.+)", text) == ["divide", "<lambda>", "divide"]
    assert "KeyError: 'a'" in text


class Odd(Exception):
    """One that has an attribute which groups of exceptions have."""

    exceptions = None


def test_any_error_comes_from_another_process():
    """Also one that looks like a group, and one at the end of a long chain of others."""

    def chain(x):
        last = None
        for count in range(2_000 * x + 1):
            error = Odd(str(count))
            error.__cause__, last = last, error
        raise last

    failing = Pipeline([node("y")(chain)], backend=LocalBackend(map_execution="parallel", max_workers=1))
    for x in (0, 1):
        with pytest.raises(Odd) as raised:
            failing.map({"x": [x]}, "x")
        assert str(raised.value) == str(2_000 * x)


class Refused(Exception):
    """One whose own pickling fails: it is made with a keyword."""

    def __init__(self, *, status):
        super().__init__(f"refused with {status}")
        self.status = status


def test_a_group_of_exceptions_comes_from_another_process_as_itself():
    """Also when one of its members cannot be pickled as it is, or not at all."""

    def work(x):
        held = ValueError("held")
        held.lock = threading.Lock()
        raise ExceptionGroup("several", [Refused(status=429), ExceptionGroup("inner", [KeyError("a"), held])])

    failing = Pipeline([node("y")(work)], backend=LocalBackend(map_execution="parallel", max_workers=1))
    with pytest.raises(ExceptionGroup, match="several") as raised:
        failing.map({"x": [0]}, "x")
    refused, inner = raised.value.exceptions
    assert (type(refused), refused.status, str(refused)) == (Refused, 429, "refused with 429")
    key, held = inner.exceptions
    assert repr(key) == "KeyError('a')"
    assert isinstance(held, RemoteExecutionError)
    assert "ValueError: held" in str(held)
    assert raised.value.__notes__ == ["in node 'work' at pipeline[0] / work"]

"""Sync calls, wherever they are made: in a script, beside or inside a running loop, in nodes and threads."""

import asyncio
import contextlib
import contextvars
import os
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

import hypernodes
from hypernodes import Pipeline, node
from hypernodes.errors import DependencyError
from hypernodes.events import NodeStarted, RunFinished

pytestmark = pytest.mark.usefixtures("no_leaks")


@node("y")
async def double(x):
    await anyio.lowlevel.checkpoint()
    return 2 * x


@node("z")
def plus_one(y):
    return y + 1


pipeline = Pipeline([double, plus_one], name="p")


class Complaint(Exception):
    """An error of the user's own."""


@node("y")
async def complain(x):
    await anyio.lowlevel.checkpoint()
    raise Complaint(x)


def all_calls(x: int) -> list[object]:
    """The answers of every sync call."""
    with pipeline.stream({"x": [x, x + 1]}, "x") as items:
        streamed = [item.outputs["z"] for item in items]
    with pipeline.events(x=x) as events:
        *_, last = events
    assert isinstance(last, RunFinished)
    return [
        pipeline.run(x=x, output_name="z"),
        pipeline.map({"x": [x, x + 1]}, "x", output_name="z")["z"],
        streamed,
        last.result["z"],
    ]


def expected(x: int) -> list[object]:
    return [2 * x + 1, [2 * x + 1, 2 * x + 3], [2 * x + 1, 2 * x + 3], 2 * x + 1]


class TestWhere:
    def test_from_sync_code(self):
        """Every sync call answers from code without a loop."""
        assert all_calls(3) == expected(3)

    @pytest.mark.anyio
    async def test_inside_a_running_loop(self):
        """Every sync call answers inside a running loop, as in a notebook cell."""
        assert all_calls(3) == expected(3)

    @pytest.mark.asyncio
    async def test_inside_a_running_asyncio_loop(self):
        """Inside asyncio's loop the calls answer, and the loop and its tasks are as before."""
        loop, tasks = asyncio.get_running_loop(), asyncio.all_tasks()
        assert all_calls(3) == expected(3)
        assert asyncio.get_running_loop() is loop
        assert asyncio.all_tasks() == tasks
        await asyncio.sleep(0)

    def test_in_a_plain_thread(self):
        """Every sync call answers from a thread that knows no loop."""
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(all_calls, 3).result(30) == expected(3)

    @pytest.mark.anyio
    async def test_in_a_thread_of_the_loop(self):
        """Every sync call answers from a worker thread of a running loop."""
        assert await anyio.to_thread.run_sync(all_calls, 3) == expected(3)

    @pytest.mark.anyio
    @pytest.mark.parametrize("run_in", ["loop", "thread", "auto"])
    async def test_in_a_sync_node(self, run_in):
        """Every sync call answers inside a sync node, wherever that one runs."""
        outer = Pipeline([node("answers", run_in=run_in)(all_calls)])
        assert await outer.arun(x=3) == {"answers": expected(3)}

    @pytest.mark.anyio
    async def test_in_an_async_node(self):
        """Every sync call answers inside an async node too; it holds the loop while it lasts, no more."""

        @node("answers")
        async def call(x):
            return all_calls(x)

        assert await Pipeline([call]).arun(x=3) == {"answers": expected(3)}

    def test_nodes_within_nodes(self):
        """Sync runs nest: a node that runs a pipeline whose node runs a pipeline."""
        innermost = pipeline

        @node("middle")
        def middle(x):
            return innermost.run(x=x, output_name="z") * 10

        @node("outer")
        def outer(x):
            return Pipeline([middle]).run(x=x, output_name="middle") * 10

        assert Pipeline([outer]).run(x=3) == {"outer": 700}

    def test_in_a_callback_of_the_loop(self):
        """A sync run inside a loop's plain callback, where no task runs, answers too."""
        answers = []

        async def main():
            done = asyncio.Event()

            def callback():
                try:
                    answers.append(pipeline.run(x=3, output_name="z"))
                finally:
                    done.set()

            asyncio.get_running_loop().call_soon(callback)
            await done.wait()

        asyncio.run(main())
        assert answers == [7]


class TestSeveralAtOnce:
    def test_threads(self):
        """Many plain threads run one pipeline at once, each in a loop of its own."""
        barrier = threading.Barrier(8, timeout=30)

        @node("y")
        def meet(x):
            barrier.wait()
            return x

        meeting = Pipeline([meet, node("z")(lambda y: y * 10)])
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda x: meeting.run(x=x, output_name="z"), range(8), timeout=60))
        assert answers == [x * 10 for x in range(8)]

    @pytest.mark.anyio
    async def test_beside_the_loop(self):
        """Sync runs in threads and async runs on the loop share one pipeline at the same time."""
        answers = {}

        async def in_thread(x):
            answers[x] = await anyio.to_thread.run_sync(lambda: pipeline.run(x=x, output_name="z"))

        async def on_loop(x):
            answers[x] = await pipeline.arun(x=x, output_name="z")

        async with anyio.create_task_group() as group:
            for x in range(0, 20, 2):
                group.start_soon(in_thread, x)
                group.start_soon(on_loop, x + 1)
        assert answers == {x: 2 * x + 1 for x in range(20)}

    @pytest.mark.anyio
    async def test_every_item_runs_a_pipeline(self):
        """Many items whose sync node runs a pipeline with threads of its own never deadlock."""

        inner_pipeline = Pipeline([node("a", run_in="thread")(lambda x: x + 1)])

        @node("b", run_in="thread")
        def outer(x):
            return inner_pipeline.run(x=x, output_name="a")

        with anyio.fail_after(50):
            result = await Pipeline([outer]).amap({"x": range(64)}, "x", max_concurrency=64)
        assert result == {"b": list(range(1, 65))}

    def test_streams_in_threads(self):
        """Sync streams in several threads, left early, keep apart."""

        def first(n):
            with pipeline.stream({"x": iter(int, 1)}, "x", max_concurrency=2) as items:
                return [next(items).index for _ in range(n)]

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(first, [1, 5, 10, 20], timeout=60)) == [list(range(n)) for n in (1, 5, 10, 20)]

    @pytest.mark.asyncio
    async def test_loop_goes_on_beside_a_threaded_run(self):
        """While a thread runs a pipeline, the loop that waits for the thread goes on."""
        ready = threading.Event()

        @node("y")
        def wait(x):
            assert ready.wait(30)
            return x

        task = asyncio.create_task(asyncio.to_thread(Pipeline([wait]).run, x=1))
        await asyncio.sleep(0)
        ready.set()
        assert await task == {"y": 1}


class TestLikeTheAsyncCalls:
    @pytest.mark.parametrize("inside", [False, True], ids=["no loop", "running loop"])
    def test_errors(self, inside):
        """Errors cross the bridge as themselves: user's with one note and their own traceback, and ours."""
        failing = Pipeline([complain], name="p")

        def calls():
            with pytest.raises(Complaint) as caught:
                failing.run(x=1)
            [note] = caught.value.__notes__
            assert "p / complain" in note
            assert caught.traceback[-1].name == "complain"
            with pytest.raises(Complaint):
                failing.map({"x": [1]}, "x")
            with pytest.raises(Complaint), failing.stream({"x": [1]}, "x") as items:
                next(items)
            with pytest.raises(Complaint), failing.events(x=1) as events:
                list(events)
            with pytest.raises(DependencyError):
                failing.run()

        async def main():
            calls()

        if inside:
            asyncio.run(main())
        else:
            calls()

    @pytest.mark.anyio
    async def test_context_variables(self):
        """Inside a running loop nodes see the context variables of the calling code."""
        user = contextvars.ContextVar("user", default="nobody")

        @node("name")
        async def name():
            await anyio.lowlevel.checkpoint()
            return user.get()

        reading = Pipeline([name, node("again")(lambda name: user.get())])
        user.set("Ada")
        assert reading.run() == {"name": "Ada", "again": "Ada"}
        with reading.events() as events:
            *_, last = events
        assert last.result == {"name": "Ada", "again": "Ada"}

    def test_loop_is_left_as_it_was(self):
        """A sync run sets and closes nobody else's loop, and leaves none behind."""
        loop = asyncio.new_event_loop()
        try:
            assert pipeline.run(x=1)["z"] == 3
            assert not loop.is_closed()
            assert loop.run_until_complete(pipeline.arun(x=1))["z"] == 3
        finally:
            loop.close()
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()

    def test_open_stream_and_other_calls(self):
        """While a sync stream is open, other sync calls of the same thread answer."""
        with pipeline.stream({"x": range(3)}, "x") as items:
            assert next(items).index == 0
            assert pipeline.run(x=5, output_name="z") == 11
            assert [item.index for item in items] == [1, 2]

    def test_events_left_early(self):
        """Leaving a sync event stream early stops the run."""
        cleaned = threading.Event()

        @node("y")
        async def wait(x):
            try:
                await anyio.sleep_forever()
            finally:
                cleaned.set()

        with Pipeline([wait]).events(x=1) as events:
            for event in events:
                if isinstance(event, NodeStarted):
                    break
        assert cleaned.wait(0)

    @pytest.mark.anyio
    async def test_cancelled_outer_run(self):
        """A cancelled run waits for its thread's sync run to end, then everything is gone."""
        entered, release, ended = threading.Event(), threading.Event(), []

        @node("inner")
        def inner(x):
            entered.set()
            assert release.wait(30)
            ended.append("inner")

        inner_pipeline = Pipeline([inner])

        @node("outer", run_in="thread")
        def outer(x):
            with contextlib.suppress(BaseException):
                inner_pipeline.run(x=x)
            ended.append("outer")

        with anyio.fail_after(30):
            async with anyio.create_task_group() as group:
                group.start_soon(lambda: Pipeline([outer]).arun(x=1))
                await anyio.to_thread.run_sync(entered.wait)
                group.cancel_scope.cancel()
                release.set()
        assert ended == ["inner", "outer"]


PREAMBLE = """
import asyncio, os, signal, sys, threading, time
import anyio
from hypernodes import Pipeline, node

def say(word):
    os.write(1, (word + "\\n").encode())

@node("y")
async def wait(x):
    say("ready")
    try:
        await anyio.sleep(60)
    finally:
        say("cleaned")

waiting = Pipeline([wait, node("z")(lambda x: x)])

def endless():
    try:
        i = 0
        while True:
            yield i
            i += 1
    finally:
        say("closed")

def stream():
    with waiting.stream({"x": endless()}, "x", max_concurrency=1) as items:
        next(items)

def events():
    with waiting.events(x=1) as events:
        for event in events:
            pass
"""

CALLS = {
    "run": "waiting.run(x=1)",
    "map": "waiting.map({'x': [1]}, 'x')",
    "stream": "stream()",
    "events": "events()",
}

SCRIPTS = {
    **CALLS,
    **{
        f"{name} inside a running loop": f"async def main(): {call}\nasyncio.run(main())"
        for name, call in CALLS.items()
    },
    "run in a sync node": "Pipeline([node('o')(lambda x: waiting.run(x=x))]).run(x=1)",
    "run in a node on the loop": "Pipeline([node('o', run_in='loop')(lambda x: waiting.run(x=x))]).run(x=1)",
    "arun in asyncio": "asyncio.run(waiting.arun(x=1))",
    "run inside trio": "async def main(): waiting.run(x=1)\nanyio.run(main, backend='trio')",
}


def start(script: str) -> subprocess.Popen:
    root = Path(hypernodes.__file__).parents[1]
    return subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root), "PYTHONUNBUFFERED": "1"},
    )


@contextlib.contextmanager
def started(script: str):
    """The script in a process of its own, once its node says that it is ready."""
    process = start(script)
    try:
        assert process.stdout.readline() == "ready\n", process.communicate(timeout=10)[1]
        yield process
    finally:
        process.kill()
        process.communicate()


class TestInterrupt:
    @pytest.mark.parametrize("name", SCRIPTS)
    def test_ctrl_c(self, name):
        """Ctrl-C during a sync call stops the nodes, lets their cleanup run, and is a KeyboardInterrupt alone."""
        with started(SCRIPTS[name]) as process:
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=15)
        assert "cleaned" in out
        assert err.rstrip().splitlines()[-1] == "KeyboardInterrupt"
        if name != "arun in asyncio":  # there the loop is the caller's
            assert "During handling" not in err, "what the loop did about it is no news"
        assert process.returncode in (130, -signal.SIGINT)
        if name.startswith("stream"):
            assert "closed" in out

    @pytest.mark.parametrize("inside", [False, True], ids=["no loop", "running loop"])
    @pytest.mark.parametrize("call", ["stream", "events"])
    def test_ctrl_c_between_items(self, call, inside):
        """Ctrl-C in the caller's own code between two items or events is no less a KeyboardInterrupt."""
        script = f"""
        @node("y")
        async def wait_from_the_second(x):
            if x == 0:
                return x
            say("ready")
            try:
                await anyio.sleep(60)
            finally:
                say("cleaned")

        def stream():
            pipeline = Pipeline([wait_from_the_second])
            with pipeline.stream({{"x": endless()}}, "x", max_concurrency=2) as items:
                for item in items:
                    os.kill(os.getpid(), signal.SIGINT)

        def events():
            with Pipeline([wait_from_the_second]).events(x=1) as events:
                for event in events:
                    if type(event).__name__ == "NodeStarted":
                        os.kill(os.getpid(), signal.SIGINT)

        async def main():
            {call}()

        {"asyncio.run(main())" if inside else f"{call}()"}
        """
        with start(script) as process:
            try:
                out, err = process.communicate(timeout=15)
            finally:
                process.kill()
        assert out.split().count("cleaned") == out.split().count("ready")
        assert call == "events" or "closed" in out
        assert err.rstrip().splitlines()[-1] == "KeyboardInterrupt"
        assert process.returncode in (130, -signal.SIGINT)

    def test_script_goes_on(self):
        """A script that catches the KeyboardInterrupt runs the next pipeline as if nothing had been."""
        script = """
        try:
            waiting.run(x=1)
        except KeyboardInterrupt:
            say("caught")
        assert Pipeline([node("y")(lambda x: x + 1)]).run(x=1) == {"y": 2}
        for thread in threading.enumerate():
            if thread is not threading.current_thread():
                thread.join(5)
                assert not thread.is_alive(), thread
        say("well")
        """
        with started(script) as process:
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=15)
        assert out.split() == ["cleaned", "caught", "well"], err
        assert process.returncode == 0

    def test_notebook_goes_on(self):
        """Inside a running loop, an interrupted cell leaves the loop alive for the next cell."""
        script = """
        async def main():
            try:
                waiting.run(x=1)
            except KeyboardInterrupt:
                say("caught")
            assert await Pipeline([node("y")(lambda x: x + 1)]).arun(x=1) == {"y": 2}
            assert Pipeline([node("y")(lambda x: x + 1)]).run(x=1) == {"y": 2}
            assert len(asyncio.all_tasks()) == 1
            say("well")

        # As in a notebook: the loop does not take SIGINT for itself.
        loop = asyncio.new_event_loop()
        loop.run_until_complete(main())
        loop.close()
        """
        with started(script) as process:
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=15)
        assert out.split() == ["cleaned", "caught", "well"], err
        assert process.returncode == 0

    def test_raised_by_a_node(self):
        """A KeyboardInterrupt inside a node's own code leaves run as itself, never in a group."""

        @node("y", run_in="loop")
        def interrupt(x):
            raise KeyboardInterrupt

        for interrupted in (
            Pipeline([interrupt]),
            Pipeline([interrupt, node("other")(double.func)]),
        ):
            with pytest.raises(KeyboardInterrupt):
                interrupted.run(x=1)

    def test_system_exit_in_a_node(self):
        """sys.exit in a node ends the call with SystemExit and its code."""

        @node("y", run_in="loop")
        def leave(x):
            sys.exit(3)

        with pytest.raises(SystemExit) as caught:
            Pipeline([leave]).run(x=1)
        assert caught.value.code == 3

    def test_on_collecting_map(self):
        """With collect, an interrupt is an interrupt and never one more failed item."""

        @node("y", run_in="loop")
        def interrupt(x):
            if x == 2:
                raise KeyboardInterrupt
            return x

        with pytest.raises(KeyboardInterrupt):
            Pipeline([interrupt]).map({"x": range(5)}, "x", on_error="collect")

"""Worker processes: what travels to them, what happens when they die, and that none outlives its run."""

import asyncio
import importlib
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback

import anyio
import numpy as np
import psutil
import pytest

from hypernodes import (
    ItemFailure,
    Pipeline,
    PipelineCallback,
    RemoteExecutionError,
    RetryPolicy,
    SerializationError,
    WorkerCrashedError,
    node,
)
from hypernodes.backend import LocalBackend

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

PATIENCE_S = 20  # only a hang takes this long


def parallel(**options):
    """A backend whose maps run in two worker processes."""
    return LocalBackend(map_execution="parallel", max_workers=2, **options)


def crash(how):
    """End this process as a crash would."""
    if how == "sigkill":
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(3)


def sign(folder, name, text=""):
    """Leave a file that appears whole."""
    (folder / f"{name}.part").write_text(str(text))
    (folder / f"{name}.part").rename(folder / name)


async def signs(folder, *names):
    """Wait until these files have been left."""
    while not all((folder / name).exists() for name in names):
        await anyio.sleep(0.005)
    return [(folder / name).read_text() for name in names]


async def gone(pids):
    """Wait until no process with these ids runs any more."""
    with anyio.fail_after(PATIENCE_S):
        while any(runs(pid) for pid in pids):
            await anyio.sleep(0.01)


def runs(pid):
    try:
        return psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# --- what travels -----------------------------------------------------------------------------------------


async def test_closures_and_lambdas_run_in_processes():
    """Functions that plain pickle refuses, with what they close over, run in processes."""
    offset = 10

    def closure(x):
        return x + offset

    class Local:
        def __init__(self, value):
            self.value = value

    pipeline = Pipeline(
        [
            node("a", run_in="process")(closure),
            node("b", run_in="process")(lambda a: a * 2),
            node("c", run_in="process")(lambda b: Local(b)),
            node("d", run_in="process")(lambda c: c.value + 1),
        ]
    )
    answer = await pipeline.arun(x=1)
    assert (answer["a"], answer["b"], answer["c"].value, answer["d"]) == (11, 22, 22, 23)
    assert type(answer["c"]) is Local
    mapped = await Pipeline([node("a")(closure)], backend=parallel()).amap({"x": range(5)}, "x")
    assert mapped["a"] == [10, 11, 12, 13, 14]


async def run_script(tmp_path, source, *, feed=None):
    """Run a script in a Python of its own; its output by line."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(source))
    command = [sys.executable, "-"] if feed else [sys.executable, str(script)]
    with anyio.fail_after(PATIENCE_S):
        done = await anyio.run_process(command, input=script.read_bytes() if feed else None, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().splitlines()


NOTEBOOK = """
    import os
    from dataclasses import dataclass
    from enum import Enum
    from hypernodes import Pipeline, node
    from hypernodes.backend import LocalBackend

    print("cell")

    class Colour(Enum):
        RED = 1

    @dataclass
    class Passage:
        text: str
        colour: Colour = Colour.RED

    class TooLong(Exception):
        pass

    LIMIT = 5

    @node("passage")
    def make(text):
        return Passage(text.upper())

    @node("checked")
    def check(passage):
        assert isinstance(passage, Passage) and passage.colour is Colour.RED
        if len(passage.text) > LIMIT:
            raise TooLong(passage.text)
        return passage, os.getpid()

    pipeline = Pipeline([make, check], backend=LocalBackend(map_execution="parallel", max_workers=1))
    result = pipeline.map({"text": ["a", "bc", "far too long"]}, "text", on_error="collect")
    print([checked[0] for checked in result["checked"][:2]])
    print(all(checked[1] != os.getpid() for checked in result["checked"][:2]))
    print(repr(result.failures[0].error), isinstance(result.failures[0].error, TooLong))
    one = Pipeline([node("p", run_in="process")(lambda text: Passage(text))]).run(text="x")["p"]
    print(one == Passage("x"))
"""


@pytest.mark.parametrize("feed", [False, True], ids=["script", "notebook"])
async def test_what_main_defines_travels(tmp_path, feed):
    """Classes, enums and errors of a script or a notebook go to workers and come back as themselves."""
    assert await run_script(tmp_path, NOTEBOOK, feed=feed) == [
        "cell",
        "[Passage(text='A', colour=<Colour.RED: 1>), Passage(text='BC', colour=<Colour.RED: 1>)]",
        "True",
        "TooLong('FAR TOO LONG') True",
        "True",
    ]


async def test_functions_of_a_module_beside_the_script_run_in_processes(tmp_path, monkeypatch):
    """A module that only this process's ``sys.path`` leads to is found by its workers."""
    (tmp_path / "my_own_module.py").write_text("def triple(x):\n    return 3 * x\n")
    monkeypatch.syspath_prepend(tmp_path)
    triple = importlib.import_module("my_own_module").triple
    assert await Pipeline([node("y", run_in="process")(triple)]).arun(x=2) == {"y": 6}
    assert (await Pipeline([node("y")(triple)], backend=parallel()).amap({"x": [1, 2]}, "x"))["y"] == [3, 6]
    del sys.modules["my_own_module"]


async def test_large_values_travel_both_ways():
    """Arrays of many megabytes go to a worker and come back whole."""
    array = np.arange(4_000_000, dtype=np.float64)
    pipeline = Pipeline([node("y", run_in="process")(lambda x: x[::-1] * 2)])
    with anyio.fail_after(PATIENCE_S):
        answer = (await pipeline.arun(x=array))["y"]
        assert np.array_equal(answer, array[::-1] * 2)
        mapped = await pipeline.with_backend(parallel()).amap({"x": [array, array[:10]]}, "x")
    assert np.array_equal(mapped["y"][0], answer)
    assert np.array_equal(mapped["y"][1], array[:10][::-1] * 2)


async def test_an_answer_from_a_process_may_be_written_to():
    """An array that came back from a worker is the user's own: it can be changed in place."""
    pipeline = Pipeline([node("y", run_in="process")(lambda x: x + 1)])
    answer = (await pipeline.arun(x=np.zeros(200_000)))["y"]
    answer[0] = 7
    assert answer[0] == 7


async def test_shared_inputs_reach_every_item():
    """A value that is not mapped is there for every item, in every worker."""
    table = {number: number * number for number in range(50_000)}
    pipeline = Pipeline([node("y")(lambda x, table: table[x])], backend=parallel())
    result = await pipeline.amap({"x": range(200), "table": table}, "x")
    assert result["y"] == [x * x for x in range(200)]


async def test_context_variables_stay_in_their_item(tmp_path, monkeypatch):
    """What an item sets in the context of its worker is not seen by the items after it."""
    (tmp_path / "my_context_module.py").write_text(
        textwrap.dedent(
            """
            from contextvars import ContextVar

            request_id = ContextVar("request_id", default="none")

            def read_and_set(x):
                before = request_id.get()
                request_id.set(f"item {x}")
                return before
            """
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("my_context_module")
    pipeline = Pipeline([node("seen")(module.read_and_set)])
    result = await pipeline.with_backend(parallel()).amap({"x": range(20)}, "x")
    assert result["seen"] == ["none"] * 20
    process = Pipeline([node("seen", run_in="process")(module.read_and_set)])
    async with LocalBackend(max_workers=1) as backend:
        result = await process.with_backend(backend).amap({"x": range(5)}, "x")
    assert result["seen"] == ["none"] * 5
    assert module.request_id.get() == "none"
    del sys.modules["my_context_module"]


@pytest.mark.parametrize("how", ["run_in", "parallel map", "parallel nodes"])
async def test_a_function_that_cannot_travel_is_named(how):
    """A function that holds something unpicklable is an error that says which, what it holds and why."""
    lock = threading.Lock()

    def guarded(x):
        with lock:
            return x

    if how == "run_in":
        call = Pipeline([node("y", run_in="process")(guarded)]).arun(x=1)
    elif how == "parallel nodes":
        call = Pipeline([node("y")(guarded)], backend=LocalBackend(node_execution="parallel")).arun(x=1)
    else:
        call = Pipeline([node("y")(guarded)], backend=parallel()).amap({"x": [1]}, "x")
    with pytest.raises(SerializationError) as refused:
        await call
    assert "guarded" in str(refused.value)
    assert "'lock'" in str(refused.value)  # the variable that holds it
    assert "cannot pickle" in str(refused.value)


@pytest.mark.parametrize("how", ["run_in", "parallel map", "parallel nodes"])
async def test_a_function_in_a_worker_may_run_a_loop_of_its_own(how):
    """A sync function that wraps async code by ``asyncio.run`` works in a worker as it does in a thread."""

    def fetch(x):
        async def ask():
            await asyncio.sleep(0)
            return x + 1

        return asyncio.run(ask())

    backend = {
        "run_in": LocalBackend(),
        "parallel map": parallel(),
        "parallel nodes": LocalBackend(node_execution="parallel", max_workers=2),
    }[how]
    pipeline = Pipeline([node("y", run_in="process" if how == "run_in" else "auto")(fetch)], backend=backend)
    assert (await pipeline.amap({"x": [1, 2, 3]}, "x"))["y"] == [2, 3, 4]


@pytest.mark.parametrize("ordered", [True, False])
async def test_finished_items_are_handed_over_while_others_run(tmp_path, ordered):
    """A stream's consumer gets an item as it finishes, not when the items after it in its worker do."""

    @node("y")
    def work(x, folder):
        give_up = time.monotonic() + PATIENCE_S / 2
        while x == 40 and not (folder / "39 seen").exists():
            assert time.monotonic() < give_up, "39 was never handed over"
            time.sleep(0.005)
        return x

    pipeline = Pipeline([work], backend=LocalBackend(map_execution="parallel", max_workers=1))
    seen = []
    with anyio.fail_after(PATIENCE_S):
        async with pipeline.astream({"x": range(80), "folder": tmp_path}, "x", ordered=ordered) as items:
            async for item in items:
                seen.append(item.outputs["y"])
                if item.index == 39:
                    sign(tmp_path, "39 seen")
    assert sorted(seen) == list(range(80))


async def test_a_cancelled_wait_for_a_limit_does_not_use_it_up(tmp_path):
    """An item in a worker that fails while it waits for a limit leaves it to the items after it."""

    @node("held", limit="api")
    async def hold(x, folder):
        if x == 0:
            sign(folder, "holding")
            await signs(folder, "failed")
            await anyio.sleep(0.05)
        return x

    @node("checked")
    async def fail_meanwhile(x, folder):
        if x == 1:
            await signs(folder, "holding")
            await anyio.sleep(0.05)
            sign(folder, "failed")
            raise LookupError(x)

    backend = LocalBackend(map_execution="parallel", max_workers=1)
    pipeline = Pipeline([hold, fail_meanwhile], limits={"api": 1}, backend=backend)
    with anyio.fail_after(PATIENCE_S):
        result = await pipeline.amap({"x": range(4), "folder": tmp_path}, "x", on_error="collect")
    assert result["held"] == [0, None, 2, 3]


@pytest.mark.parametrize("how", ["run_in", "parallel map"])
async def test_an_input_that_cannot_travel_is_named(how):
    """An unpicklable input is an error that says the input's name, the place inside it, and why."""
    config = {"name": "x", "clients": [1, threading.Lock()]}

    def use(x, config):
        return x

    if how == "run_in":
        call = Pipeline([node("y", run_in="process")(use)]).arun(x=1, config=config)
    else:
        call = Pipeline([node("y")(use)], backend=parallel()).amap({"x": [1], "config": config}, "x")
    with pytest.raises(SerializationError) as refused:
        await call
    assert "config" in str(refused.value)
    assert "clients" in str(refused.value)
    assert "lock" in str(refused.value)


async def test_an_item_that_cannot_travel_is_named():
    """An unpicklable item of a map says which item it is; a collecting map loses that one only."""
    pipeline = Pipeline([node("y")(lambda x: 1)], backend=parallel())
    xs = [0, 1, 2, threading.Lock(), 4]
    with pytest.raises(SerializationError, match="3"):
        await pipeline.amap({"x": xs}, "x")
    result = await pipeline.amap({"x": xs}, "x", on_error="collect")
    assert result["y"] == [1, 1, 1, None, 1]
    assert [(failure.index, type(failure.error)) for failure in result.failures] == [(3, SerializationError)]


@pytest.mark.parametrize("how", ["run_in", "parallel map"])
async def test_an_output_that_cannot_travel_is_named(how):
    """An unpicklable answer is an error of its node, not a dead worker; other items keep theirs."""

    @node("y", run_in="process" if how == "run_in" else "auto")
    def make(x):
        return threading.Lock() if x == 1 else x

    pipeline = Pipeline([make], backend=LocalBackend() if how == "run_in" else parallel())
    result = await pipeline.amap({"x": [0, 1, 2]}, "x", on_error="collect")
    assert result["y"] == [0, None, 2]
    (failure,) = result.failures
    assert isinstance(failure.error, SerializationError)
    assert "lock" in str(failure.error)
    assert "y" in str(failure.error) or "make" in str(failure.error)


class Unreadable(Exception):
    """An error that pickle cannot rebuild."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


class Unsendable(Exception):
    """An error that pickle cannot even write."""

    def __init__(self, message):
        super().__init__(message)
        self.lock = threading.Lock()


@pytest.mark.parametrize("how", ["run_in", "parallel map"])
@pytest.mark.parametrize(("kind", "came"), [(Unreadable, Unreadable), (Unsendable, RemoteExecutionError)])
async def test_an_error_that_pickle_refuses_is_still_told(how, kind, came):
    """An error comes as itself also when its own pickling fails; one that holds a lock is told with its message."""

    @node("y", run_in="process" if how == "run_in" else "auto")
    def fail(x):
        raise Unreadable("this", "that") if kind is Unreadable else Unsendable("this and that")

    pipeline = Pipeline([fail], name="p", backend=LocalBackend() if how == "run_in" else parallel())
    with pytest.raises(came) as raised:
        await pipeline.amap({"x": [0]}, "x")
    told = "".join(traceback.format_exception(raised.value))
    assert "this and that" in str(raised.value)
    assert f"{kind.__name__}: this and that" in told
    assert "p[0] / fail" in told
    assert "in fail" in told


async def test_an_error_from_a_worker_shows_where_it_was_raised():
    """A user's exception from a worker keeps its type and shows the lines of the worker's traceback."""

    def deep_inside(x):
        raise KeyError("missing", x)

    @node("y")
    def fail(x):
        return deep_inside(x)

    with pytest.raises(KeyError) as raised:
        await Pipeline([fail], name="p", backend=parallel()).amap({"x": [5]}, "x")
    assert raised.value.args == ("missing", 5)
    assert raised.value.__notes__[0] == "in node 'fail' at p[0] / fail"
    assert "deep_inside" in "".join(traceback.format_exception(raised.value))


# --- workers that die -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["sigkill", "exit"])
async def test_a_crash_in_a_process_node_names_the_node(how):
    """A process that dies under a node is an error that names it, never a hang."""

    @node("y", run_in="process")
    def fall_over(x):
        crash(x)

    with anyio.fail_after(PATIENCE_S), pytest.raises(WorkerCrashedError) as crashed:
        await Pipeline([fall_over], name="p").arun(x=how)
    told = "\n".join([str(crashed.value), *getattr(crashed.value, "__notes__", [])])
    assert "fall_over" in told
    assert "p / fall_over" in told
    assert ("SIGKILL" if how == "sigkill" else "3") in str(crashed.value)


@pytest.mark.parametrize("how", ["sigkill", "exit"])
async def test_a_crash_in_a_parallel_map_names_the_item(how):
    """A worker that dies under a map is an error that names the item it worked on."""

    @node("y")
    def work(x):
        if x == 13:
            crash(how)
        return x

    with anyio.fail_after(PATIENCE_S), pytest.raises(WorkerCrashedError) as crashed:
        await Pipeline([work], name="p", backend=parallel()).amap({"x": range(40)}, "x")
    told = "\n".join([str(crashed.value), *getattr(crashed.value, "__notes__", [])])
    assert "p[13]" in told


async def test_a_crash_loses_only_the_guilty_item():
    """In a collecting map a crash costs one item: its neighbours in the same worker get their answers."""

    @node("y")
    def work(x):
        if x in (3, 17):
            crash("sigkill")
        return x * 2

    with anyio.fail_after(PATIENCE_S):
        result = await Pipeline([work], backend=parallel()).amap({"x": range(30)}, "x", on_error="collect")
    assert [failure.index for failure in result.failures] == [3, 17]
    assert all(isinstance(failure, ItemFailure) for failure in result.failures)
    assert {type(failure.error) for failure in result.failures} == {WorkerCrashedError}
    assert [failure.inputs for failure in result.failures] == [{"x": 3}, {"x": 17}]
    assert result["y"] == [None if x in (3, 17) else x * 2 for x in range(30)]


def tmp_path_for(tmp_path):
    folder = tmp_path / "ran"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("how", ["run_in", "parallel map", "parallel nodes"])
async def test_a_crash_is_retried_when_the_policy_covers_it(tmp_path, how):
    """A node whose policy covers ``WorkerCrashedError`` has another attempt, in a new process."""
    policy = RetryPolicy(attempts=3, on=(WorkerCrashedError,), wait_s=0, jitter_s=0)

    @node("y", run_in="process" if how == "run_in" else "auto", retry=policy)
    def fall_over_twice(x, folder):
        attempts = len(list(folder.iterdir()))
        if x == 2 and attempts < 2:
            (folder / str(attempts)).touch()
            crash("sigkill")
        return x

    backend = {
        "run_in": LocalBackend(),
        "parallel map": parallel(),
        "parallel nodes": LocalBackend(node_execution="parallel", max_workers=2),
    }[how]
    with anyio.fail_after(PATIENCE_S):
        result = await Pipeline([fall_over_twice], backend=backend).amap(
            {"x": range(5), "folder": tmp_path_for(tmp_path)}, "x"
        )
    assert result["y"] == [0, 1, 2, 3, 4]
    assert len(list((tmp_path / "ran").iterdir())) == 2


async def test_a_crash_is_not_retried_when_the_policy_does_not_cover_it(tmp_path):
    """A policy for other errors leaves a crash to be an error at once."""

    @node("y", run_in="process", retry=RetryPolicy(attempts=3, on=(ConnectionError,), wait_s=0, jitter_s=0))
    def fall_over(folder):
        (folder / str(len(list(folder.iterdir())))).touch()
        crash("sigkill")

    with pytest.raises(WorkerCrashedError):
        await Pipeline([fall_over]).arun(folder=tmp_path_for(tmp_path))
    assert len(list((tmp_path / "ran").iterdir())) == 1


async def test_an_item_that_always_crashes_runs_out_of_attempts():
    """A hopeless item is given up after its attempts; the map goes on."""
    policy = RetryPolicy(attempts=2, on=(WorkerCrashedError,), wait_s=0, jitter_s=0)

    @node("y", retry=policy)
    def work(x):
        if x == 1:
            crash("exit")
        return x

    with anyio.fail_after(PATIENCE_S):
        result = await Pipeline([work], backend=parallel()).amap({"x": range(4)}, "x", on_error="collect")
    assert result["y"] == [0, None, 2, 3]
    assert [(f.index, type(f.error)) for f in result.failures] == [(1, WorkerCrashedError)]


async def test_a_worker_killed_from_outside_is_an_error(tmp_path):
    """A worker that somebody else kills while it works is told as crashed."""

    @node("y", run_in="process")
    def work(folder):
        sign(folder, "pid", os.getpid())
        time.sleep(3600)

    crashed = []

    async def call():
        with pytest.raises(WorkerCrashedError) as raised:
            await Pipeline([work]).arun(folder=tmp_path)
        crashed.append(raised.value)

    with anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call)
            (pid,) = await signs(tmp_path, "pid")
            os.kill(int(pid), signal.SIGKILL)
    assert len(crashed) == 1


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("how", ["run_in", "parallel map"])
def test_leaving_the_program_from_a_worker_gets_out(error, how):
    """``sys.exit()`` in a function leaves the program also when the function runs in a worker."""

    @node("y", run_in="process" if how == "run_in" else "auto")
    def leave(x):
        raise error("goodbye")

    pipeline = Pipeline([leave], backend=LocalBackend() if how == "run_in" else parallel())
    with pytest.raises(error, match="goodbye"):
        pipeline.map({"x": [1]}, "x", on_error="collect")


# --- what is left -----------------------------------------------------------------------------------------


def hang_with_child(me, folder):
    """Start a program, tell both ids, and never come back."""
    child = subprocess.Popen(["sleep", "3600"])
    sign(folder, f"pids{me}", f"{os.getpid()} {child.pid}")
    time.sleep(3600)


@pytest.mark.parametrize("how", ["run_in", "parallel map", "parallel nodes", "nested map", "worker of a worker"])
async def test_cancelling_kills_workers_and_what_they_started(tmp_path, how):
    """Cancelling ends the workers and the programs that the user's functions started in them."""
    in_process = how in ("run_in", "worker of a worker")
    hang = node("y", run_in="process" if in_process else "auto")(hang_with_child)
    if how == "parallel nodes":
        pipeline = Pipeline([hang], backend=LocalBackend(node_execution="parallel", max_workers=2))
    elif how == "run_in":
        pipeline = Pipeline([hang])
    else:
        pipeline = Pipeline([hang], backend=parallel(), name="inner")

    async def call():
        inputs = {"me": [0, 1], "folder": tmp_path}
        if how == "nested map":
            await Pipeline([pipeline.as_node(map_over="me")], name="outer").arun(inputs)
        else:
            await pipeline.amap(inputs, "me")

    with anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call)
            pids = " ".join(await signs(tmp_path, "pids0", "pids1")).split()
            assert all(runs(pid) for pid in pids)
            tasks.cancel_scope.cancel()
        assert len(set(pids)) == 4
        try:
            await gone(pids)
        finally:
            for pid in filter(runs, pids):
                os.kill(int(pid), signal.SIGKILL)


async def test_the_first_failing_item_kills_the_other_workers(tmp_path):
    """A failure in one worker ends the others, busy as they are."""

    @node("y")
    def work(x, folder):
        if x == 0:
            hang_with_child(0, folder)
        while not (folder / "pids0").exists():
            time.sleep(0.005)
        raise LookupError(x)

    with anyio.fail_after(PATIENCE_S):
        with pytest.raises(LookupError):
            await Pipeline([work], backend=parallel()).amap({"x": [0, 1], "folder": tmp_path}, "x")
        await gone((tmp_path / "pids0").read_text().split())


async def test_a_worker_that_ignores_signals_is_killed_all_the_same(tmp_path):
    """A function that ignores SIGTERM and SIGINT cannot keep its worker alive."""

    @node("y", run_in="process")
    def stubborn(folder):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sign(folder, "pid", os.getpid())
        time.sleep(3600)

    with anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: Pipeline([stubborn]).arun(folder=tmp_path))
            pids = await signs(tmp_path, "pid")
            tasks.cancel_scope.cancel()
        await gone(pids)


@pytest.mark.parametrize("ends", ["well", "badly"])
async def test_no_worker_outlives_its_run(ends):
    """When the answer is there, or the error, every worker of the run is gone."""

    @node("pid")
    def where(x):
        if ends == "badly" and x == 5:
            raise LookupError(os.getpid())
        return os.getpid()

    pipeline = Pipeline([where], backend=parallel())
    result = await pipeline.amap({"x": range(10)}, "x", on_error="collect")
    pids = {pid for pid in result["pid"] if pid} | {failure.error.args[0] for failure in result.failures}
    assert pids
    assert not any(runs(pid) for pid in pids)
    assert psutil.Process().children(recursive=True) == []


async def test_leaving_a_parallel_stream_early_leaves_no_worker():
    """Breaking out of a stream ends its workers, though the source has no end."""

    @node("pid")
    def where(x):
        return os.getpid()

    async def endless():
        number = 0
        while True:
            yield number
            number += 1

    pids = set()
    with anyio.fail_after(PATIENCE_S):
        async with Pipeline([where], backend=parallel()).astream({"x": endless()}, "x") as items:
            async for item in items:
                pids.add(item.outputs["pid"])
                if item.index == 50:
                    break
    assert not any(runs(pid) for pid in pids)


ORPHANS = """
    import os, sys, time
    from hypernodes import Pipeline, node
    from hypernodes.backend import LocalBackend

    @node("y", run_in="{run_in}")
    def hang(x):
        os.write(1, f"{{os.getpid()}}\\n".encode())
        time.sleep(3600)

    Pipeline([hang], backend=LocalBackend(map_execution="{mode}", max_workers=2)).map({{"x": [1, 2]}}, "x")
"""


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("run_in", "mode"), [("auto", "parallel"), ("process", "async")])
async def test_workers_die_with_their_parent(tmp_path, signum, run_in, mode):
    """When the program itself is killed, however, no worker stays behind."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(ORPHANS).format(run_in=run_in, mode=mode))
    children = []
    try:
        with anyio.fail_after(PATIENCE_S):
            async with await anyio.open_process([sys.executable, str(script)], stderr=subprocess.DEVNULL) as program:
                said = b""
                while said.count(b"\n") < 2:
                    said += await program.stdout.receive()
                children = [child.pid for child in psutil.Process(program.pid).children(recursive=True)]
                assert {int(pid) for pid in said.split()} <= set(children)
                program.send_signal(signum)
                await program.wait()
            await gone(children)
    finally:
        for pid in filter(runs, children):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("unbuffered", ["", "1"])
async def test_prints_in_workers_reach_the_users_terminal(tmp_path, unbuffered):
    """What functions print in workers comes out of the program, in full lines and on the right stream."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            from hypernodes import Pipeline, node
            from hypernodes.backend import LocalBackend

            @node("y")
            def speak(x):
                print("item", x)
                print("warning", x, file=sys.stderr)
                if x == "alone":
                    print("no end of line", end="")
                return x

            backend = LocalBackend(map_execution="parallel", max_workers=2)
            Pipeline([speak], backend=backend).map({"x": range(200)}, "x")
            Pipeline([node("y", run_in="process")(speak.func)]).run(x="alone")
            """
        )
    )
    with anyio.fail_after(PATIENCE_S):
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        done = await anyio.run_process([sys.executable, str(script)], env=environment)
    said = done.stdout.decode().splitlines()
    assert said[-1] == "no end of line"
    assert sorted(said[:-1]) == sorted([*(f"item {x}" for x in range(200)), "item alone"])
    assert sorted(done.stderr.decode().splitlines()) == sorted([*(f"warning {x}" for x in range(200)), "warning alone"])


# --- warm workers -----------------------------------------------------------------------------------------


@node("pid")
def where_am_i(x):
    return os.getpid()


async def test_a_backend_held_open_keeps_its_workers_warm():
    """Inside ``async with`` the runs share the same workers; they are gone when the block is left."""
    with anyio.fail_after(PATIENCE_S):
        async with parallel() as backend:
            pipeline = Pipeline([where_am_i], backend=backend)
            first = set((await pipeline.amap({"x": range(20)}, "x"))["pid"])
            both = first | set((await pipeline.amap({"x": range(20)}, "x"))["pid"])
            assert len(both) <= 2
            assert all(runs(pid) for pid in both)
        assert not any(runs(pid) for pid in both)


async def test_without_a_held_backend_each_run_has_its_own_workers():
    """A backend that is not held open starts workers for a run and ends them with it."""
    pipeline = Pipeline([where_am_i], backend=LocalBackend(map_execution="parallel", max_workers=1))
    first = (await pipeline.amap({"x": [0]}, "x"))["pid"]
    assert not any(runs(pid) for pid in first)
    assert (await pipeline.amap({"x": [0]}, "x"))["pid"] != first


async def test_warm_workers_survive_failures_and_crashes():
    """After a failed, a crashed and a cancelled run the held backend goes on with as many workers."""

    @node("y")
    def work(x):
        if x == "fail":
            raise LookupError
        if x == "crash":
            crash("sigkill")
        if x == "hang":
            time.sleep(3600)
        return x

    with anyio.fail_after(PATIENCE_S):
        async with parallel() as backend:
            pipeline = Pipeline([work], backend=backend)
            with pytest.raises(LookupError):
                await pipeline.amap({"x": ["fail", 1]}, "x")
            assert (await pipeline.amap({"x": [1, 2, 3]}, "x"))["y"] == [1, 2, 3]
            with pytest.raises(WorkerCrashedError):
                await pipeline.amap({"x": ["crash", 1]}, "x")
            assert (await pipeline.amap({"x": [1, 2, 3]}, "x"))["y"] == [1, 2, 3]
            with anyio.move_on_after(0.2):
                await pipeline.amap({"x": ["hang", "hang", 1]}, "x")
            assert (await pipeline.amap({"x": [1, 2, 3]}, "x"))["y"] == [1, 2, 3]
            assert len([child for child in psutil.Process().children() if runs(child.pid)]) <= 2


async def test_warm_workers_serve_several_runs_at_once():
    """Runs at the same time share the held workers and keep their answers apart."""
    results = {}
    pipeline = Pipeline([node("y")(lambda x, offset: x + offset)])

    async def run(offset):
        mapped = await pipeline.with_backend(backend).amap({"x": range(10), "offset": offset}, "x")
        results[offset] = mapped["y"]

    with anyio.fail_after(PATIENCE_S):
        async with parallel() as backend, anyio.create_task_group() as tasks:
            for offset in (0, 100, 200, 300):
                tasks.start_soon(run, offset)
    assert results == {offset: [x + offset for x in range(10)] for offset in (0, 100, 200, 300)}


async def test_warm_workers_forget_a_function_that_was_redefined():
    """A notebook that defines its function again gets the new one in the same workers."""
    with anyio.fail_after(PATIENCE_S):
        async with parallel() as backend:
            for factor in (2, 3):

                @node("y")
                def scale(x, factor=factor):
                    return x * factor

                pipeline = Pipeline([scale], backend=backend)
                assert (await pipeline.amap({"x": [1, 2]}, "x"))["y"] == [factor, 2 * factor]


async def test_warm_workers_die_when_the_block_is_cancelled():
    """Cancelling the task that holds a backend open ends its workers."""
    pids = set()
    with anyio.CancelScope() as scope:
        async with parallel() as backend:
            pids |= set((await Pipeline([where_am_i], backend=backend).amap({"x": range(8)}, "x"))["pid"])
            scope.cancel()
            await anyio.sleep_forever()
    assert pids
    assert not any(runs(pid) for pid in pids)


async def test_two_held_backends_have_their_own_workers():
    """Backends held open side by side do not share workers."""
    async with parallel() as one, parallel() as other:
        first = set((await Pipeline([where_am_i], backend=one).amap({"x": range(8)}, "x"))["pid"])
        second = set((await Pipeline([where_am_i], backend=other).amap({"x": range(8)}, "x"))["pid"])
    assert not first & second


async def test_a_backend_held_by_two_tasks_is_warm_until_both_have_left():
    """Tasks that hold one backend open at the same time share its workers; the last to leave ends them."""
    pids, first_left = {}, anyio.Event()
    backend = LocalBackend(map_execution="parallel", max_workers=1)
    pipeline = Pipeline([where_am_i], backend=backend)

    async def short():
        async with backend:
            pids["short"] = set((await pipeline.amap({"x": range(3)}, "x"))["pid"])
        first_left.set()

    async def long():
        async with backend:
            pids["before"] = set((await pipeline.amap({"x": range(3)}, "x"))["pid"])
            await first_left.wait()
            pids["after"] = set((await pipeline.amap({"x": range(3)}, "x"))["pid"])

    with anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(long)
            tasks.start_soon(short)
    assert pids["before"] == pids["short"] == pids["after"]
    assert psutil.Process().children(recursive=True) == []


async def test_a_run_that_outlasts_the_block_of_its_backend_leaves_no_worker(tmp_path):
    """When the block is left while another task's run goes on, the run ends well and its worker with it."""

    @node("y")
    def work(x, folder):
        sign(folder, "started")
        while not (folder / "left").exists():
            time.sleep(0.005)
        return x

    results = {}

    async def call():
        results.update(await Pipeline([work], backend=backend).amap({"x": [1, 2, 3], "folder": tmp_path}, "x"))

    with anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as tasks:
            async with LocalBackend(map_execution="parallel", max_workers=1) as backend:
                tasks.start_soon(call)
                await signs(tmp_path, "started")
            sign(tmp_path, "left")
    assert results == {"y": [1, 2, 3]}
    assert psutil.Process().children(recursive=True) == []


async def test_no_failure_is_lost_on_its_way():
    """Each of many failing items is reported, however failures and batches of results meet."""

    @node("y", run_in="loop")
    def fail(x):
        raise ValueError(x)

    count = 4000
    pipeline = Pipeline([fail], backend=LocalBackend(map_execution="parallel", max_workers=1))
    result = await pipeline.amap({"x": range(count)}, "x", on_error="collect")
    assert [failure.error.args for failure in result.failures] == [(index,) for index in range(count)]


class NeedsTwo(Exception):
    """Unpickles only with both of its arguments, and keeps one of them alone."""

    def __init__(self, first, second):
        super().__init__(first)


class RebuildsItself(Exception):
    """Comes back from its arguments, without the notes on it."""

    def __reduce__(self):
        return type(self), self.args


class Unspeakable(Exception):
    """Can neither be pickled nor said."""

    def __str__(self):
        raise RuntimeError("no words")

    def __reduce__(self):
        raise RuntimeError("no pickle")


@pytest.mark.parametrize(
    ("kind", "arguments", "came"),
    [
        (NeedsTwo, ("one", "two"), NeedsTwo("one", "two")),
        (RebuildsItself, ("one",), RebuildsItself("one")),
        (Unspeakable, (), Unspeakable()),
    ],
    ids=["needs two", "rebuilds itself", "unspeakable"],
)
async def test_an_error_arrives_with_its_note_and_is_heard_of_whatever_its_pickle(kind, arguments, came):
    """Errors that cannot be rebuilt, or lose their notes, end their item alone; callbacks hear of them too."""
    heard = []

    class Listener(PipelineCallback):
        def on_error(self, node_id, error, ctx):
            heard.append(repr(error))

    @node("y")
    def fail(x):
        if x == 1:
            raise kind(*arguments)
        return x

    pipeline = Pipeline([fail], name="p", callbacks=[Listener()], backend=parallel())
    with anyio.fail_after(PATIENCE_S):
        result = await pipeline.amap({"x": range(3)}, "x", on_error="collect")
    (failure,) = result.failures
    assert result == {"y": [0, None, 2]}
    assert heard == [repr(failure.error)] == [repr(came)]
    assert failure.error.__notes__ == ["in node 'fail' at p[1] / fail"]


async def test_max_concurrency_of_the_backend_holds_across_workers():
    """With more workers than max_concurrency, no more items than that run at once."""

    @node("span")
    def work(x):
        began = time.monotonic()
        time.sleep(0.05)
        return began, time.monotonic()

    pipeline = Pipeline([work], backend=parallel(max_concurrency=1))
    spans = sorted((await pipeline.amap({"x": range(6)}, "x"))["span"])
    assert all(ended <= began for (_, ended), (began, _) in itertools.pairwise(spans))


def refuse_to_come_back():
    """Stand for a constructor that works in the worker's process only."""
    raise LookupError("no such device here")


class StaysThere:
    """Can be pickled, and not unpickled."""

    def __reduce__(self):
        return refuse_to_come_back, ()


@pytest.mark.parametrize("how", ["node", "map"])
async def test_an_output_that_cannot_be_rebuilt_is_a_serialization_error(how):
    """It says what unpickling raised, which is also its cause."""
    make = node("y", run_in="process" if how == "node" else "auto")(lambda x: StaysThere())
    with anyio.fail_after(PATIENCE_S), pytest.raises(SerializationError, match="no such device here") as raised:
        if how == "node":
            await Pipeline([make]).arun(x=1)
        else:
            await Pipeline([make], backend=parallel()).amap({"x": [1]}, "x")
    assert isinstance(raised.value.__cause__, LookupError)


async def test_an_exit_in_a_worker_is_the_callers_exit():
    """SystemExit ends the whole map as it does without processes, and is nobody's failure."""

    @node("y")
    def leave(x):
        raise SystemExit(3)

    with pytest.raises(SystemExit) as raised:
        await Pipeline([leave], backend=parallel()).amap({"x": [1, 2]}, "x", on_error="collect")
    assert raised.value.code == 3
    assert not hasattr(raised.value, "__notes__")

"""A soak: thousands of runs that succeed, fail, time out and are cancelled, after which nothing is left.

The normal run does some hundreds of runs on each kind of event loop. The full form, 10,000 runs on each (some
minutes), is for releases:

    HYPERNODES_SOAK=10000 pytest tests/test_soak.py

The number of runs is free, and ``HYPERNODES_SOAK_SEED`` gives other random choices.
"""

import contextlib
import gc
import os
import random
import threading
import time
from pathlib import Path

import anyio
import psutil
import pytest

from hypernodes import NodeTimeoutError, Pipeline, RetryPolicy, TooManyFailuresError, WorkerCrashedError, node
from hypernodes.backend import LocalBackend

RUNS = int(os.environ.get("HYPERNODES_SOAK", "500"))
SEED = int(os.environ.get("HYPERNODES_SOAK_SEED", "20"))
AT_ONCE = 25
MODES = ["sequential", "async", "async", "threaded"]
PATIENCE_S = 120 + RUNS * 0.1  # only a hang takes this long
SETTLE_S = 10

LOOPS = {
    "asyncio": {"backend": "asyncio"},
    "asyncio+uvloop": {"backend": "asyncio", "backend_options": {"use_uvloop": True}},
    "trio": {"backend": "trio"},
}
on_every_loop = pytest.mark.parametrize("loop", LOOPS)
pytestmark = [pytest.mark.usefixtures("no_leaks"), pytest.mark.timeout(PATIENCE_S + 60)]


class Unlucky(Exception):
    """What a node of the soak raises."""


def fate(dice, chance=0.02):
    if dice.random() < chance:
        raise Unlucky


@node("cleaned", retry=RetryPolicy(attempts=2, on=(Unlucky,), wait_s=0.0005, jitter_s=0.0005))
async def clean(text, dice):
    await anyio.sleep(dice.random() * 0.002)
    fate(dice, 0.1)
    return text.strip()


@node("words")
def split(cleaned, dice):
    for word in cleaned.split():
        fate(dice, 0.005)
        yield word


@node("weight", limit="api")
async def weigh(word, dice):
    await anyio.sleep(dice.random() * 0.001)
    fate(dice)
    return len(word)


@node("hash", run_in="thread", max_concurrency=4)
def digest(word, dice):
    time.sleep(dice.random() * 0.001)
    fate(dice)
    return hash(word)


@node("slow", timeout=0.004)
async def sometimes_slow(cleaned, dice):
    await anyio.sleep(dice.random() * 0.005)
    return len(cleaned)


@node("letters")
async def spell(cleaned, dice):
    for letter in cleaned:
        if dice.random() < 0.05:
            await anyio.sleep(0)
        fate(dice, 0.001)
        yield letter


@node("total")
def add(weights):
    return sum(weight for weight in weights if weight is not None)


word_pipeline = Pipeline([weigh, digest], name="word")


def pipeline_for(dice):
    words = word_pipeline.as_node(
        {"words": "word"},
        {"weight": "weights", "hash": "hashes"},
        map_over="words",
        on_error=dice.choice(["raise", "collect"]),
        max_concurrency=dice.choice([None, 1, 3]),
    )
    nodes = [clean, split, words, add]
    if dice.random() < 0.3:
        nodes.append(sometimes_slow)
    if dice.random() < 0.5:
        nodes.append(spell)
    backend = LocalBackend(node_execution=dice.choice(MODES), map_execution=dice.choice(MODES), max_workers=2)
    timeout = dice.choice([None, None, 0.006])
    return Pipeline(nodes, name="soak", backend=backend, limits={"api": 2}, timeout=timeout)


TEXT = "in the beginning there was a word "


async def one_run(dice):
    """Do one run in one of the ways there are; its outcome in a word."""
    pipeline, inputs = pipeline_for(dice), {"text": TEXT, "dice": dice}
    way = dice.choice(["arun", "amap", "astream", "aevents"])
    outcome = "done"
    with anyio.CancelScope() as scope:
        if dice.random() < 0.25:
            scope.deadline = anyio.current_time() + dice.random() * 0.01
        try:
            if way == "arun":
                await pipeline.arun(inputs)
            elif way == "amap":
                await pipeline.amap(
                    {**inputs, "text": [TEXT] * 3},
                    "text",
                    on_error="collect",
                    max_failures=dice.choice([None, 2]),
                )
            elif way == "astream":
                async with pipeline.astream(
                    {**inputs, "text": iter([TEXT] * 4)},
                    "text",
                    ordered=dice.random() < 0.5,
                    max_concurrency=2,
                ) as items:
                    async for _ in items:
                        if dice.random() < 0.1:
                            break
            else:
                async with pipeline.aevents(inputs) as events:
                    async for _ in events:
                        if dice.random() < 0.01:
                            break
        except Unlucky:
            outcome = "failed"
        except NodeTimeoutError:
            outcome = "timed out"
        except TooManyFailuresError:
            outcome = "too many failures"
    return "cancelled" if scope.cancelled_caught else outcome


def held():
    """How many threads, child processes and file descriptors this process has.

    Idle threads that trio keeps for ten seconds do not count: it gives them this name.
    """
    gc.collect()
    return {
        "threads": sum(not thread.name.startswith("Trio thread") for thread in threading.enumerate()),
        "children": len(psutil.Process().children(recursive=True)),
        "descriptors": len(list(Path("/dev/fd").iterdir())),
    }


def settled(goal):
    """What is held once it is what it was, or after some patience."""
    give_up = time.monotonic() + SETTLE_S
    while (now := held()) != goal and time.monotonic() < give_up:
        time.sleep(0.05)
    return now


def under_way():
    """The tasks of this loop and the children of this process, which no run may leave for a moment."""
    children = psutil.Process().children(recursive=True)
    return {task.id for task in anyio.get_running_tasks()}, {child.pid for child in children}


async def run_all(count, run):
    """Do many runs, some at once; count their outcomes and see that no task and no process is left."""
    outcomes, numbers = {}, iter(range(count))
    before = under_way()

    async def work():
        for number in numbers:
            outcome = await run(random.Random(SEED * 1_000_003 + number))
            outcomes[outcome] = outcomes.get(outcome, 0) + 1

    with anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as tasks:
            for _ in range(AT_ONCE):
                tasks.start_soon(work)
    assert under_way() == before
    return outcomes


def soak(loop, count, run):
    """Do many runs on a loop of their own; their outcomes, if nothing is left."""
    anyio.run(anyio.sleep, 0, **LOOPS[loop])  # uvloop keeps the pipe of its first run
    before = held()
    outcomes = anyio.run(run_all, count, run, **LOOPS[loop])
    assert settled(before) == before
    assert sum(outcomes.values()) == count
    return outcomes


@on_every_loop
def test_nothing_is_left_after_thousands_of_runs(loop):
    """After thousands of mixed runs there are as many tasks, threads, children and files as before."""
    outcomes = soak(loop, RUNS, one_run)
    if RUNS >= 200:
        assert set(outcomes) == {"done", "failed", "timed out", "too many failures", "cancelled"}


@node("root", run_in="process", timeout=5)
def root(x, dice):
    time.sleep(dice.random() * 0.01)
    roll = dice.random()
    if roll < 0.15:
        raise Unlucky
    if roll < 0.25:
        os._exit(1)
    return x**0.5


async def one_process_run(dice):
    """A run in processes: alone or mapped, in ones of its own; some crash, some fail, some are cancelled."""
    outcome = "done"
    with anyio.CancelScope() as scope:
        if dice.random() < 0.3:
            scope.deadline = anyio.current_time() + dice.random() * 0.5
        try:
            if dice.random() < 0.5:
                await Pipeline([root]).arun(x=2, dice=dice)
            else:
                backend = LocalBackend(map_execution="parallel", max_workers=2)
                mapped = Pipeline([node("root")(root.func)], backend=backend)
                await mapped.amap({"x": range(5), "dice": dice}, "x")
        except Unlucky:
            outcome = "failed"
        except WorkerCrashedError:
            outcome = "crashed"
        except NodeTimeoutError:
            outcome = "timed out"  # on a busy machine even the start of a process may take so long
    return "cancelled" if scope.cancelled_caught else outcome


@on_every_loop
def test_no_process_is_left_after_many_runs(loop):
    """After many runs in processes, with crashes and cancellations, no process and no pipe is left."""
    outcomes = soak(loop, max(RUNS // 30, 15), one_process_run)
    assert len(outcomes) > 1


def test_nothing_is_left_after_many_sync_runs():
    """After many runs from sync code in several threads, loops and their files are gone."""
    pipeline = Pipeline([clean, split, word_pipeline.as_node({"words": "word"}, map_over="words")], limits={"api": 2})
    before = held()

    def work(number):
        dice = random.Random(SEED + number)
        for _ in range(RUNS // 20):
            with contextlib.suppress(Unlucky):
                pipeline.run(text=TEXT, dice=dice)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert settled(before) == before

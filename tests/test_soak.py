"""A soak: thousands of runs that succeed, fail, time out and are cancelled, after which nothing is left.

The normal run does some hundreds of runs on each kind of event loop. The full form, 10,000 runs on each
(about ten minutes), is for releases:

    HYPERNODES_SOAK=10000 pytest tests/test_soak.py

The number of runs is free, and ``HYPERNODES_SOAK_SEED`` repeats a run's random choices.
"""

import contextlib
import gc
import os
import random
import threading
import time
from pathlib import Path

import anyio
import anyio.to_thread
import psutil
import pytest

from hypernodes import NodeTimeoutError, Pipeline, RetryPolicy, TooManyFailuresError, WorkerCrashedError, node
from hypernodes.backend import LocalBackend

pytestmark = pytest.mark.anyio

RUNS = int(os.environ.get("HYPERNODES_SOAK", "300"))
SEED = int(os.environ.get("HYPERNODES_SOAK_SEED", "20"))
AT_ONCE = 25
MODES = ["sequential", "async", "async", "threaded"]
PATIENCE_S = max(120.0, RUNS * 0.5)  # only a hang takes this long


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
    """What this process holds: threads that work, children, file descriptors."""
    gc.collect()
    me = psutil.Process()
    descriptors = len(list(Path("/dev/fd").iterdir()))
    return {"children": len(me.children(recursive=True)), "descriptors": descriptors}


async def settled(goal, patience_s=10):
    """What is held once it is no more than the goal, or after some patience: threads take a moment to end."""
    give_up = anyio.current_time() + patience_s
    while (now := held()) != goal and anyio.current_time() < give_up:
        await anyio.sleep(0.02)
    return now


async def run_all(count, run):
    """Do many runs, some at once, and count their outcomes."""
    outcomes, numbers = {}, iter(range(count))

    async def work():
        for number in numbers:
            outcome = await run(random.Random(SEED * 1_000_003 + number))
            outcomes[outcome] = outcomes.get(outcome, 0) + 1

    async with anyio.create_task_group() as tasks:
        for _ in range(AT_ONCE):
            tasks.start_soon(work)
    return outcomes


def tasks_now():
    return {task.id for task in anyio.get_running_tasks()}


async def test_nothing_is_left_after_thousands_of_runs(no_leaks):
    """After thousands of mixed runs there are as many tasks, threads, children and files as before."""
    with anyio.fail_after(PATIENCE_S):
        await run_all(10, one_run)  # what is made once and kept, such as a thread pool, is made here
        threads, before, tasks = threading.active_count(), held(), tasks_now()
        outcomes = await run_all(RUNS, one_run)
        assert tasks_now() == tasks
        assert await settled(before) == before
        assert threading.active_count() <= threads + AT_ONCE
    assert sum(outcomes.values()) == RUNS
    assert {"done", "failed", "timed out", "cancelled"} <= set(outcomes), outcomes


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
    return "cancelled" if scope.cancelled_caught else outcome


async def test_no_process_is_left_after_many_runs(no_leaks):
    """After many runs in processes, with crashes and cancellations, no process and no pipe is left."""
    count = max(RUNS // 25, 12)
    with anyio.fail_after(PATIENCE_S):
        before, tasks = held(), tasks_now()
        outcomes = await run_all(count, one_process_run)
        assert tasks_now() == tasks
        assert await settled(before) == before
    assert sum(outcomes.values()) == count
    assert len(outcomes) > 1, outcomes


def test_nothing_is_left_after_many_sync_runs(no_leaks):
    """After many runs from sync code in several threads, loops and their files are gone."""
    pipeline = Pipeline(
        [clean, split, word_pipeline.as_node({"words": "word"}, map_over="words")], limits={"api": 2}
    )
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
    assert held() == before

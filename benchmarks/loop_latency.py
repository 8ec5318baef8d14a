"""P10: how long the event loop stalls while sync nodes of 200 ms run, against the loop idle."""

import time
from collections.abc import Awaitable, Callable

import anyio

from benchmarks import _workloads as work
from benchmarks._harness import Options, Report, Row, Target, ameasure, compared, main
from hypernodes import Pipeline, node

TICK_S = 0.001


def longest_stall(function: Callable[[], Awaitable[object]]) -> Callable[[], Awaitable[float]]:
    """A subject: the longest time, in seconds, that a task which sleeps 1 ms at a time was woken late."""

    async def stall() -> float:
        longest = 0.0

        async def tick() -> None:
            nonlocal longest
            while True:
                begun = time.perf_counter()
                await anyio.sleep(TICK_S)
                longest = max(longest, time.perf_counter() - begun - TICK_S)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(tick)
            await anyio.sleep(10 * TICK_S)
            await function()
            await anyio.sleep(10 * TICK_S)
            tasks.cancel_scope.cancel()
        return longest

    return stall


def sleeping(seconds: float) -> Pipeline:
    """Three sync nodes that sleep: two side by side, then one."""

    @node("left")
    def left(x: int) -> int:
        time.sleep(seconds)
        return x

    @node("right")
    def right(x: int) -> int:
        time.sleep(seconds)
        return x

    @node("both")
    def both(left: int, right: int) -> int:
        time.sleep(seconds)
        return left + right

    return Pipeline([left, right, both], name="sleeping")


def computing(seconds: float) -> Pipeline:
    """Three sync nodes of pure Python, which hold the interpreter: two side by side, then one."""
    rounds = work.rounds_for(seconds)

    @node("left")
    def left(x: int) -> int:
        work.burn(rounds)
        return x

    @node("right")
    def right(x: int) -> int:
        work.burn(rounds)
        return x

    @node("both")
    def both(left: int, right: int) -> int:
        work.burn(rounds)
        return left + right

    return Pipeline([left, right, both], name="computing")


async def _rows(options: Options) -> list[Row]:
    seconds = options.pick(0.2, 0.02)
    idle, sleeps, computes = lambda: anyio.sleep(2 * seconds), sleeping(seconds), computing(seconds)
    costs = await ameasure(
        {
            "sleep": longest_stall(lambda: sleeps.arun(x=1)),
            "cpu": longest_stall(lambda: computes.arun(x=1)),
            "the loop idle": longest_stall(idle),
        },
        options.n,
    )
    reference = {"the loop idle": costs["the loop idle"]}
    return [
        compared(
            "longest stall, sync nodes that sleep 200 ms",
            "ms",
            {"arun": costs["sleep"], **reference},
            figure=lambda stall: stall * 1e3,
            target=Target("≤ 20 ms", "median", at_most=20),
        ),
        compared(
            "longest stall, sync nodes of 200 ms of CPU",
            "ms",
            {"arun": costs["cpu"], **reference},
            figure=lambda stall: stall * 1e3,
            target=Target("≤ 50 ms", "median", at_most=50),
        ),
    ]


def run(options: Options) -> Report:
    """Nodes that let the interpreter go, and nodes that hold it."""
    return Report(anyio.run(_rows, options))


if __name__ == "__main__":
    main("P10", "Event loop latency", run)

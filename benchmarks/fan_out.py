"""P2: one node, 100 that need it, one that needs them all, against an anyio task for each of the 100."""

from collections.abc import Awaitable, Callable

import anyio

from benchmarks import _workloads as work
from benchmarks._harness import Options, Report, Row, Target, ameasure, atimed, compared, main
from hypernodes import Pipeline, node

WIDTH = 100
REFERENCE = "an anyio task group with 100 start_soon"


def pipeline(functions: list[work.Function]) -> Pipeline:
    """One node a function, each output named as its function."""
    return Pipeline([node(function.__name__)(function) for function in functions], name="fan_out")


def per_node(seconds: float) -> float:
    """Microseconds a node of the 102."""
    return seconds / (WIDTH + 2) * 1e6


async def _row(name: str, suspend: str, target: Target, runs: int, options: Options) -> Row:
    functions = work.fan_out(WIDTH, asynchronous=True, suspend=suspend)
    fan_out = pipeline(functions)
    subject: Callable[[], Awaitable[object]] = lambda: fan_out.arun(x=1)  # noqa: E731
    by_hand: Callable[[], Awaitable[object]] = lambda: work.acall_fan_out(functions, 1)  # noqa: E731
    assert await subject() == await by_hand()
    costs = await ameasure({"arun": atimed(subject, runs), REFERENCE: atimed(by_hand, runs)}, options.n, warm_up=2)
    return compared(name, "µs a node", costs, figure=per_node, target=target)


async def _rows(options: Options) -> list[Row]:
    trivial = Target("≤ 0.25 ×", "ratio", at_most=0.25)
    suspending = Target("≤ 1.25 ×", "ratio", at_most=1.25)
    runs = options.pick(30, 2)
    return [
        await _row("1 → 100 → 1 async nodes, trivial", "", trivial, runs, options),
        await _row("1 → 100 → 1 async nodes, each yields once", "await anyio.sleep(0)", suspending, runs, options),
        await _row("1 → 100 → 1 async nodes, each waits 5 ms", "await anyio.sleep(0.005)", suspending, runs, options),
    ]


def run(options: Options) -> Report:
    """Nodes that never suspend, and nodes that all do."""
    return Report(anyio.run(_rows, options))


if __name__ == "__main__":
    main("P2", "1 → 100 → 1", run)

"""P1: a chain of 100 trivial nodes, against calling the functions in a loop."""

import anyio

from benchmarks import _workloads as work
from benchmarks._harness import Options, Report, Row, Target, ameasure, atimed, compared, main, measure, timed
from hypernodes import Pipeline, node

LENGTH = 100
RUNS = 100


def pipeline(functions: list[work.Function]) -> Pipeline:
    """One node a function, each output named as its function."""
    return Pipeline([node(function.__name__)(function) for function in functions], name="chain")


def per_node(seconds: float) -> float:
    """Microseconds a node."""
    return seconds / LENGTH * 1e6


async def _awaited(options: Options) -> list[Row]:
    sync, asynchronous = work.chain(LENGTH), work.chain(LENGTH, asynchronous=True)
    sync_calls, async_calls = work.calls_of(sync), work.calls_of(asynchronous)
    of_sync, of_async = pipeline(sync), pipeline(asynchronous)
    runs = options.pick(RUNS, 5)

    async def loop() -> dict[str, int]:
        return work.call_in_turn(sync_calls, {"n0": 0})

    assert {"n0": 0, **await of_sync.arun(n0=0)} == await loop()
    sync_costs = await ameasure(
        {
            "arun": atimed(lambda: of_sync.arun(n0=0), runs),
            "the functions called by keyword in a loop": atimed(loop, runs),
        },
        options.n,
        warm_up=2,
    )
    async_costs = await ameasure(
        {
            "arun": atimed(lambda: of_async.arun(n0=0), runs),
            "the functions awaited by keyword in a loop": atimed(
                lambda: work.acall_in_turn(async_calls, {"n0": 0}), runs
            ),
        },
        options.n,
        warm_up=2,
    )
    return [
        compared(
            "chain of 100 sync nodes, arun",
            "µs a node",
            sync_costs,
            figure=per_node,
            target=Target("≤ 1.5 µs where the floor is 0.26: 5.77 ×", "ratio", at_most=1.5 / 0.26),
        ),
        compared(
            "chain of 100 async nodes, arun",
            "µs a node",
            async_costs,
            figure=per_node,
            target=Target("≤ 2.0 µs where the floor is 0.34: 5.88 ×", "ratio", at_most=2.0 / 0.34),
        ),
    ]


def _from_sync_code(options: Options) -> Row:
    functions = work.chain(LENGTH)
    calls, of_sync = work.calls_of(functions), pipeline(functions)
    runs = options.pick(RUNS, 5)
    costs = measure(
        {
            "run": timed(lambda: of_sync.run(n0=0), runs),
            "the functions called by keyword in a loop": timed(lambda: work.call_in_turn(calls, {"n0": 0}), runs),
        },
        options.n,
        warm_up=2,
    )
    return compared("chain of 100 sync nodes, run (starts an event loop)", "µs a node", costs, figure=per_node)


def run(options: Options) -> Report:
    """Sync and async nodes, awaited, and from sync code."""
    return Report([*anyio.run(_awaited, options), _from_sync_code(options)])


if __name__ == "__main__":
    main("P1", "Chain of 100 trivial nodes", run)

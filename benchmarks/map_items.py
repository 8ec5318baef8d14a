"""P3: a map of three trivial nodes over 10,000 items, against a loop that calls the three functions."""

import anyio

from benchmarks import _workloads as work
from benchmarks._harness import Options, Report, Row, Target, ameasure, atimed, compared, main
from hypernodes import Pipeline, node

ITEMS = 10_000


def pipeline(functions: list[work.Function]) -> Pipeline:
    """One node a function, each output named as its function."""
    return Pipeline([node(function.__name__)(function) for function in functions], name="three")


async def _rows(options: Options) -> list[Row]:
    sync, asynchronous = work.three(), work.three(asynchronous=True)
    of_sync, of_async = pipeline(sync), pipeline(asynchronous)
    items = list(range(options.pick(ITEMS, 200)))

    async def loop() -> object:
        return work.call_three(sync, items)

    def per_second(seconds: float) -> float:
        return len(items) / seconds

    assert await of_sync.amap({"x": items}, "x") == await loop()
    assert await of_async.amap({"x": items}, "x") == await loop()
    sync_costs = await ameasure(
        {
            "amap": atimed(lambda: of_sync.amap({"x": items}, "x")),
            "a loop that calls the three functions": atimed(loop),
        },
        options.n,
    )
    async_costs = await ameasure(
        {
            "amap": atimed(lambda: of_async.amap({"x": items}, "x")),
            "a loop that awaits the three functions": atimed(lambda: work.acall_three(asynchronous, items)),
        },
        options.n,
    )
    return [
        compared(
            "map of 3 sync nodes over 10,000 items",
            "items/s",
            sync_costs,
            figure=per_second,
            target=Target("≥ 200,000 items/s", "median", at_least=200_000),
        ),
        compared(
            "map of 3 async nodes over 10,000 items",
            "items/s",
            async_costs,
            figure=per_second,
            target=Target("≥ 150,000 items/s", "median", at_least=150_000),
        ),
    ]


def run(options: Options) -> Report:
    """Sync and async nodes."""
    return Report(anyio.run(_rows, options))


if __name__ == "__main__":
    main("P3", "Map of 3 trivial nodes", run)

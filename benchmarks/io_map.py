"""P4: a map that waits 10 ms an item, 10,000 items, 1,000 at once, against anyio workers on one iterator."""

import anyio

from benchmarks import _workloads as work
from benchmarks._harness import Options, Report, Row, Target, ameasure, atimed, compared, main
from hypernodes import Pipeline, node

ITEMS = 10_000
AT_ONCE = 1_000


async def _rows(options: Options) -> list[Row]:
    fetching = Pipeline([node("y")(work.fetch)], name="fetching")
    items = list(range(options.pick(ITEMS, 200)))
    at_once = options.pick(AT_ONCE, 50)

    async def subject() -> object:
        return (await fetching.amap({"x": items}, "x", max_concurrency=at_once))["y"]

    async def by_hand() -> object:
        return await work.amap_by_workers(work.fetch, items, at_once)

    assert await subject() == await by_hand() == items
    costs = await ameasure({"amap": atimed(subject), "1,000 anyio workers on one iterator": atimed(by_hand)}, options.n)
    target = Target("≤ 1.15 ×", "ratio", at_most=1.15)
    return [compared("map of 10,000 × 10 ms, 1,000 at once", "s", costs, figure=float, target=target)]


def run(options: Options) -> Report:
    """Ideal is 0.1 s."""
    return Report(anyio.run(_rows, options))


if __name__ == "__main__":
    main("P4", "I/O map", run)

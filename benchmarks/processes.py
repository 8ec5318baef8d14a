"""P9: 64 items of 50 ms of pure Python in 2 warm worker processes, against a warm ProcessPoolExecutor(2)."""

from concurrent.futures import ProcessPoolExecutor

import anyio

from benchmarks import _workloads as work
from benchmarks._harness import Options, Report, Row, Target, ameasure, atimed, compared, main
from hypernodes import Pipeline, node
from hypernodes.backend import LocalBackend

ITEMS = 64
SECONDS = 0.05
WORKERS = 2


async def _rows(options: Options) -> list[Row]:
    rounds = [work.rounds_for(options.pick(SECONDS, 0.002))] * options.pick(ITEMS, 8)
    with ProcessPoolExecutor(WORKERS) as pool:
        async with LocalBackend(map_execution="parallel", max_workers=WORKERS) as backend:
            burning = Pipeline([node("burned")(work.burn)], name="burning", backend=backend)

            async def subject() -> object:
                return (await burning.amap({"rounds": rounds}, "rounds"))["burned"]

            async def by_hand() -> object:
                return list(pool.map(work.burn, rounds))

            assert await subject() == await by_hand()
            costs = await ameasure(
                {"amap": atimed(subject), "a warm ProcessPoolExecutor(2)": atimed(by_hand)},
                options.pick(7, 2),
            )
    target = Target("≤ 1.05 ×", "ratio", at_most=1.05)
    return [compared("64 × 50 ms of CPU in 2 warm processes", "s", costs, figure=float, target=target)]


def run(options: Options) -> Report:
    """Ideal is 1.6 s on two idle cores."""
    return Report(anyio.run(_rows, options))


if __name__ == "__main__":
    main("P9", "Worker processes", run)

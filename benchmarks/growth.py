"""Cost by size: linear in items, nodes and depth, and flat in memory for streams.

Each size is measured against the one before it in its series, by the item, node or level: where cost grows
linearly the ratio stays at 1 or falls (what a call costs at all is shared by more).
"""

from collections.abc import Awaitable, Callable, Sequence

import anyio

from benchmarks import _workloads as work
from benchmarks._harness import Figure, Options, Report, Row, Target, ameasure, atimed, main
from benchmarks.build import built, nested
from benchmarks.fan_out import pipeline as fan_out_pipeline
from benchmarks.map_items import pipeline as map_pipeline
from benchmarks.stream import PROCESS_STATUS, memory_in_fresh_process, streamed

LINEAR = Target("linear: ≤ 1.5 × the size before", "ratio", at_most=1.5)
FLAT = Target("flat: ≤ 10 MB", "median", at_most=10)

Case = Callable[[], Awaitable[object]]


async def _series(
    name: str, unit: str, sizes: Sequence[int], case_of: Callable[[int], Case], options: Options
) -> list[Row]:
    """A row a size; small sizes are repeated within a turn, so that each turn does about the same work."""
    cases = {str(size): atimed(case_of(size), max(1, min(200, options.pick(10_000, 100) // size))) for size in sizes}
    costs = await ameasure(cases, options.pick(7, 2))
    rows: list[Row] = []
    before: Figure | None = None
    for size in sizes:
        figure = Figure(f"{name}: {size:,}", unit, [cost / size * 1e6 for cost in costs[str(size)]])
        ratios = [new / old for new, old in zip(figure.values, before.values, strict=True)] if before else []
        rows.append(Row(figure, before, ratios, LINEAR if before else None, name, size))
        before = figure
    return rows


def _mapping(size: int) -> Case:
    pipeline, items = map_pipeline(work.three()), list(range(size))
    return lambda: pipeline.amap({"x": items}, "x")


def _streaming(size: int) -> Case:
    return lambda: streamed(size)


def _chain(size: int) -> Case:
    pipeline = built(work.chain(size))
    return lambda: pipeline.arun(n0=0)


def _fan_out(size: int) -> Case:
    pipeline = fan_out_pipeline(work.fan_out(size, asynchronous=True))
    return lambda: pipeline.arun(x=1)


def _building(size: int) -> Case:
    functions = work.chain(size)

    async def build() -> object:
        return built(functions)

    return build


def _depth(size: int) -> Case:
    """Only the innermost output is wanted: all of them would be handed up through every level."""
    pipeline = nested(work.chain(size))
    return lambda: pipeline.arun(n0=0, output_name=f"n{size}")


async def _times(options: Options) -> list[Row]:
    def up_to(*sizes: int) -> Sequence[int]:
        return options.pick(sizes, sizes[:2])

    items = up_to(100, 1_000, 10_000, 100_000, 1_000_000)
    nodes = up_to(10, 100, 1_000, 10_000)
    return [
        *await _series("map of 3 sync nodes, items", "µs an item", items, _mapping, options),
        *await _series("stream of 1 sync node, items", "µs an item", items, _streaming, options),
        *await _series("chain of sync nodes, nodes", "µs a node", nodes, _chain, options),
        *await _series("1 → n → 1 async nodes, nodes", "µs a node", nodes, _fan_out, options),
        *await _series("build a chain, nodes", "µs a node", nodes, _building, options),
        *await _series("run a nest, levels", "µs a level", up_to(1, 3, 10, 30, 100), _depth, options),
    ]


def _memory(options: Options) -> list[Row]:
    name = "stream, peak memory over the import's, items"
    rows: list[Row] = []
    for size in options.pick((1_000, 10_000, 100_000, 1_000_000), (1_000,)):
        peaks = [memory_in_fresh_process(size)["peak"] for _ in range(options.pick(3, 2))]
        rows.append(Row(Figure(f"{name}: {size:,}", "MB", peaks), target=FLAT, series=name, size=size))
    return rows


def run(options: Options) -> Report:
    """Time by size, then memory by size."""
    rows = anyio.run(_times, options)
    if not PROCESS_STATUS.exists():
        return Report(rows, ["memory is left out: it is read from /proc, which this system does not have"])
    return Report([*rows, *_memory(options)])


if __name__ == "__main__":
    main("growth", "Cost by size", run)

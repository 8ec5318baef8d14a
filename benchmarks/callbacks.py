"""P14: P1 and P3 with one callback that counts every hook, against the same without."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import anyio

from benchmarks import _workloads as work
from benchmarks._harness import Figure, Options, Report, Row, Target, ameasure, atimed, main
from hypernodes import CallbackContext, Pipeline, PipelineCallback, node


class Counter(PipelineCallback):
    """Counts what it hears."""

    def __init__(self) -> None:
        self.count = 0

    def on_pipeline_start(self, pipeline_id: str, inputs: Mapping[str, Any], ctx: CallbackContext) -> None:
        self.count += 1

    def on_pipeline_end(
        self, pipeline_id: str, outputs: Mapping[str, Any], duration: float, ctx: CallbackContext
    ) -> None:
        self.count += 1

    def on_node_start(self, node_id: str, inputs: Mapping[str, Any], ctx: CallbackContext) -> None:
        self.count += 1

    def on_node_end(self, node_id: str, outputs: Mapping[str, Any], duration: float, ctx: CallbackContext) -> None:
        self.count += 1

    def on_map_start(self, total_items: int | None, ctx: CallbackContext) -> None:
        self.count += 1

    def on_map_end(self, total_duration: float, ctx: CallbackContext) -> None:
        self.count += 1

    def on_map_item_start(self, item_index: int, ctx: CallbackContext) -> None:
        self.count += 1

    def on_map_item_end(self, item_index: int, duration: float, ctx: CallbackContext) -> None:
        self.count += 1


def added(name: str, events: int, costs: Mapping[str, Sequence[float]]) -> Row:
    """What an event adds: the difference of the two costs in a turn, by the number of hooks called."""
    counted, without = costs["with a counting callback"], costs["without"]
    return Row(
        Figure(
            f"{name}: added by a callback",
            "µs an event",
            [(c - w) / events * 1e6 for c, w in zip(counted, without, strict=True)],
        ),
        Figure(
            "the same without a callback, by the same number",
            "µs an event",
            [w / events * 1e6 for w in without],
        ),
        [c / w for c, w in zip(counted, without, strict=True)],
        Target("≤ + 1.5 µs an event", "median", at_most=1.5),
    )


async def _row(
    name: str,
    functions: list[work.Function],
    call: Callable[[Pipeline], Awaitable[object]],
    times: int,
    options: Options,
) -> Row:
    counter = Counter()
    without = Pipeline([node(function.__name__)(function) for function in functions], name="counted")
    counted = without.with_callbacks([counter])
    assert await call(counted) == await call(without)
    events = counter.count
    costs = await ameasure(
        {
            "with a counting callback": atimed(lambda: call(counted), times),
            "without": atimed(lambda: call(without), times),
        },
        options.n,
        warm_up=2,
    )
    return added(f"{name} ({events:,} events)", events, costs)


async def _rows(options: Options) -> list[Row]:
    items = list(range(options.pick(10_000, 200)))
    return [
        await _row("chain of 100 sync nodes", work.chain(100), lambda p: p.arun(n0=0), options.pick(50, 2), options),
        await _row("map of 3 sync nodes", work.three(), lambda p: p.amap({"x": items}, "x"), 1, options),
    ]


def run(options: Options) -> Report:
    """The difference is taken turn by turn."""
    return Report(anyio.run(_rows, options))


if __name__ == "__main__":
    main("P14", "Callback overhead", run)

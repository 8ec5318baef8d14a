"""What ``hypernodes modal`` runs in a container: pipelines of growing size, each with the answer it must give."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import anyio

from hypernodes import Pipeline, node

__all__ = ["QUICKSTART", "SMOKE", "Step"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One run, and what it must give; ``map_over`` makes it a map of the pipeline.

    ``output`` is the name of the output that is looked at; its value must be ``expected``.
    """

    title: str
    pipeline: Pipeline
    inputs: dict[str, Any]
    output: str
    expected: Any
    map_over: str | None = None
    map_execution: Literal["async", "threaded"] = "async"
    also: tuple[str, ...] = field(default=())
    """Other outputs to print."""


@node("sum")
def add(a: int, b: int) -> int:
    return a + b


@node("where", cache=False)
def describe() -> str:
    """Say what this container is."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"Python {sys.version.split()[0]} on {platform.system()} {platform.machine()}, {cores} cores{_gpus()}"


def _gpus() -> str:
    """Name the GPUs that the driver's own tool lists, if there is one."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ", no GPU"
    return "".join(f", {line.strip()}" for line in listed.splitlines() if line.strip())


QUICKSTART = Step(
    title="one node",
    pipeline=Pipeline([add, describe], name="quickstart"),
    inputs={"a": 12, "b": 30},
    output="sum",
    expected=42,
    also=("where",),
)


@node("words")
def split(text: str) -> list[str]:
    return text.lower().split()


@node("lengths")
async def measure(words: list[str]) -> list[int]:
    await anyio.sleep(0.001)
    return [len(word) for word in words]


@node("longest")
def longest(words: list[str], lengths: list[int]) -> str:
    return words[lengths.index(max(lengths))]


@node("square")
async def square(number: int) -> int:
    await anyio.sleep(0.1)
    return number * number


@node("total")
def total(totals: list[int]) -> int:
    return sum(totals)


@node("waited")
def wait(number: int) -> int:
    time.sleep(0.02)  # as a request or a query would: other threads run meanwhile
    return -number


chain = Pipeline([split, measure, longest], name="chain")
squares = Pipeline([square], name="squares")
waits = Pipeline([wait], name="waits")


@node("row_total")
def row_total(row_squares: list[int]) -> int:
    return sum(row_squares)


row = Pipeline(
    [
        squares.as_node(
            input_mapping={"row": "number"}, output_mapping={"square": "row_squares"}, map_over="row", name="squares"
        ),
        row_total,
    ],
    name="row",
)
table = Pipeline(
    [
        row.as_node(
            input_mapping={"rows": "row"},
            output_mapping={"row_total": "totals", "row_squares": "squares"},
            map_over="rows",
            name="rows",
        ),
        total,
    ],
    name="table",
)

SMOKE = [
    QUICKSTART,
    Step(
        title="a chain of three, one of them async",
        pipeline=chain,
        inputs={"text": "Which of these words is longest"},
        output="longest",
        expected="longest",
    ),
    Step(
        title="a map of 20 items",
        pipeline=squares,
        inputs={"number": range(20)},
        map_over="number",
        output="square",
        expected=[number * number for number in range(20)],
    ),
    Step(
        title="5 × 10 items, a map inside a map",
        pipeline=table,
        inputs={"rows": [list(range(10))] * 5},
        output="total",
        expected=5 * sum(number * number for number in range(10)),
    ),
    Step(
        title="a map of 1,000 items in threads",
        pipeline=waits,
        inputs={"number": range(1_000)},
        map_over="number",
        map_execution="threaded",
        output="waited",
        expected=[-number for number in range(1_000)],
    ),
]

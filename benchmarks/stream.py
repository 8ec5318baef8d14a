"""P5: stream 1,000,000 items from an async generator, results dropped: speed, and a process's memory."""

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import anyio

from benchmarks._harness import ROOT, Figure, Options, Report, Row, Target, ameasure, atimed, compared, main
from hypernodes import Pipeline, node

ITEMS = 1_000_000
MB = 1e6
PROCESS_STATUS = Path("/proc/self/status")


def double(x: int) -> int:
    """The one node."""
    return x * 2


async def numbers(count: int) -> AsyncIterator[int]:
    """The source: nothing is held but the number."""
    for x in range(count):
        yield x


DOUBLED = Pipeline([node("doubled")(double)], name="stream")


async def by_hand(count: int) -> None:
    """Call the function on each item."""
    async for x in numbers(count):
        double(x=x)


async def streamed(count: int) -> None:
    """The same, as a stream."""
    async with DOUBLED.astream({"x": numbers(count)}, "x") as items:
        async for _ in items:
            pass


def resident_mb(key: str) -> float:
    """Resident memory of this process in MB: ``VmRSS`` is now, ``VmHWM`` the most there ever was."""
    line = next(line for line in PROCESS_STATUS.read_text(encoding="ascii").splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024 / MB


async def memory_of_stream(count: int) -> dict[str, float]:
    """MB over what the process held at the start: the most, after a tenth of the items, and at the end."""
    base = resident_mb("VmRSS")
    at_tenth = 0.0
    seen = 0
    async with DOUBLED.astream({"x": numbers(count)}, "x") as items:
        async for _ in items:
            seen += 1
            if seen == count // 10:
                at_tenth = resident_mb("VmRSS") - base
    assert seen == count
    end = resident_mb("VmRSS") - base
    return {"peak": resident_mb("VmHWM") - base, "at_tenth": at_tenth, "end": end}


def print_memory(count: int) -> None:
    """The entry of the fresh process."""
    print(json.dumps(anyio.run(memory_of_stream, count)))


def memory_in_fresh_process(count: int) -> dict[str, float]:
    """`memory_of_stream` where nothing ran before but the imports."""
    code = f"from benchmarks import stream; stream.print_memory({count})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


async def _speed(options: Options) -> Row:
    count = options.pick(ITEMS, 2_000)
    costs = await ameasure(
        {
            "astream": atimed(lambda: streamed(count)),
            "the function called on each item, by hand": atimed(lambda: by_hand(count)),
        },
        options.pick(7, 2),
    )
    return compared(
        "stream of 1,000,000 items, results dropped",
        "items/s",
        costs,
        figure=lambda seconds: count / seconds,
        target=Target("≥ 150,000 items/s", "median", at_least=150_000),
    )


def _memory(options: Options) -> list[Row]:
    count = options.pick(ITEMS, 2_000)
    found = [memory_in_fresh_process(count) for _ in range(options.pick(7, 2))]
    return [
        Row(
            Figure("the stream's peak memory over the import's", "MB", [each["peak"] for each in found]),
            target=Target("≤ 10 MB", "median", at_most=10),
        ),
        Row(
            Figure(
                "the stream's memory: growth from 100,000 to 1,000,000 items",
                "MB",
                [each["end"] - each["at_tenth"] for each in found],
            ),
            target=Target("flat: ≤ 1 MB", "median", at_most=1),
        ),
    ]


def run(options: Options) -> Report:
    """Speed first, then memory."""
    speed = anyio.run(_speed, options)
    if not PROCESS_STATUS.exists():
        return Report([speed], ["memory is left out: it is read from /proc, which this system does not have"])
    return Report([speed, *_memory(options)])


if __name__ == "__main__":
    main("P5", "Stream of 1,000,000 items", run)

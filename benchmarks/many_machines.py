"""Modal's seam by size: what 10³ to 10⁶ items cost the caller, in one call and in chunks over two containers.

The client and the containers are Modal's own; its servers are the loopback of the tests, on this machine. So calls,
connections, tasks and memory are those of a real run; seconds are not, since there is no network, and callers and
containers share this machine's cores.
"""

import asyncio
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks._harness import ROOT, Figure, Options, Report, Row, Target, main
from benchmarks.stream import PROCESS_STATUS, resident_mb

SIZES = (1_000, 10_000, 100_000, 1_000_000)
CONTAINERS = 2
LINEAR = Target("linear: ≤ 1.5 × the size before", "ratio", at_most=1.5)
WATCHED_S = 0.02


def needs() -> str | None:
    """What is missing for it to run, in words."""
    missing = [name for name in ("modal", "psutil", "pytest") if importlib.util.find_spec(name) is None]
    if missing:
        return f"Modal's seam is left out: it needs {', '.join(missing)} (--group test)"
    return None if PROCESS_STATUS.exists() else "Modal's seam is left out: memory is read from /proc"


# In a process of its own: the caller.


async def call(size: int, how: str) -> dict[str, float]:
    """Run a map, and watch what this process holds meanwhile."""
    import modal

    from hypernodes import Pipeline, node
    from hypernodes.backend import ModalBackend

    mode: Any = "single" if how == "one call" else "distributed"
    containers = None if mode == "single" else CONTAINERS
    backend = ModalBackend(modal.Image.debian_slim(), mode=mode, max_containers=containers)
    pipeline = Pipeline([node("half")(lambda x: x / 2)], name="halves", backend=backend)
    async with backend:
        await pipeline.amap({"x": range(10)}, "x")
        before = resident_mb("VmRSS")
        most = {"tasks": 0, "sockets": 0}
        watching = asyncio.create_task(_watch(most))
        began = time.perf_counter()
        total = 0.0
        if how == "a stream":
            async with pipeline.astream({"x": iter(range(size))}, "x", max_concurrency=4_000) as items:
                async for item in items:
                    assert item.outputs is not None
                    total += item.outputs["half"]
        else:
            total = sum((await pipeline.amap({"x": range(size)}, "x"))["half"])
        seconds = time.perf_counter() - began
        watching.cancel()
    assert total == sum(range(size)) / 2
    return {"seconds": seconds, "memory": resident_mb("VmHWM") - before, **most}


async def _watch(most: dict[str, int]) -> None:
    while True:
        most["tasks"] = max(most["tasks"], len(asyncio.all_tasks()) - 1)
        most["sockets"] = max(most["sockets"], sum(_sockets()))
        await asyncio.sleep(WATCHED_S)


def _sockets() -> Iterator[bool]:
    for name in os.listdir("/proc/self/fd"):
        try:
            yield os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
        except OSError:
            yield False


# In this process: the servers.


def called(size: int, how: str) -> dict[str, float]:
    """What one caller measured, and the calls that its servers counted."""
    from tests.loopback.plane import Plane

    with tempfile.TemporaryDirectory(prefix="loopback-") as directory, Plane(Path(directory)) as plane:
        script = f"import benchmarks.many_machines as it\nit.print_call({size}, {how!r})\n"
        process = plane.start_script(script, PYTHONDONTWRITEBYTECODE="1")
        out, err = process.communicate(timeout=600)
        if process.returncode:
            raise SystemExit(err)
        measured: dict[str, float] = json.loads(out)
        return {**measured, "calls": plane.calls["FunctionMap"] - 1}


def print_call(size: int, how: str) -> None:
    """The entry of the caller's process."""
    print(json.dumps(asyncio.run(call(size, how))))


def _series(
    name: str,
    unit: str,
    runs: dict[int, list[dict[str, float]]],
    of: Callable[[int, dict[str, float]], float],
    target: Target,
) -> list[Row]:
    rows: list[Row] = []
    before: Figure | None = None
    for size, measured in runs.items():
        figure = Figure(f"{name}: {size:,}", unit, [of(size, each) for each in measured])
        paired = zip(figure.values, before.values, strict=True) if before else ()
        ratios = [new / old for new, old in paired] if target.of == "ratio" else []
        wanted = target if target.of == "median" or before else None
        rows.append(Row(figure, before if ratios else None, ratios, wanted, name, size))
        before = figure
    return rows


def run(options: Options) -> Report:
    """Each way to run a map, by size."""
    if missing := needs():
        return Report([], [missing])
    sys.path.insert(0, str(ROOT))
    rows: list[Row] = []
    for how in ("one call", "chunks", "a stream"):
        sizes = options.pick(SIZES, (1_000,))
        runs = {size: [called(size, how) for _ in range(2)] for size in sizes}
        fewest = 1 if how == "one call" else SIZES[-1] / (1_000 if how == "a stream" else 5_000)
        rows += _series(f"{how}, items", "µs an item", runs, lambda size, each: each["seconds"] / size * 1e6, LINEAR)
        rows += _series(
            f"{how}, calls",
            "calls",
            runs,
            lambda _, each: each["calls"],
            Target(f"≤ {fewest:,g}", "median", at_most=fewest),
        )
        rows += _series(
            f"{how}, the caller's tasks",
            "tasks",
            runs,
            lambda _, each: each["tasks"],
            Target("flat: ≤ 12", "median", at_most=12),
        )
        rows += _series(
            f"{how}, the caller's sockets",
            "sockets",
            runs,
            lambda _, each: each["sockets"],
            Target("flat: ≤ 12", "median", at_most=12),
        )
        most = 40 if how == "a stream" else 500
        rows += _series(
            f"{how}, the caller's memory",
            "MB",
            runs,
            lambda _, each: max(each["memory"], 0.01),
            Target(f"≤ {most} MB", "median", at_most=most),
        )
    return Report(rows)


if __name__ == "__main__":
    main("many_machines", "Modal's seam by size, on the loopback", run)

"""How every benchmark here measures and reports.

A script measures its subject and its reference in one process and one run, in turns, after a warm-up; it
prints one JSON object with the environment and, for each figure, n, median, spread, reference, ratio, target
and whether the target was reached. A ratio is the median of the paired ratios of cost (time or memory) to the
reference's: below 1 is cheaper than the reference.
"""

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent
"""The checkout."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asked for. ``quick`` shows that a script works; its figures mean nothing."""

    quick: bool = False

    def pick(self, full: T, quick: T) -> T:
        """The size to use."""
        return quick if self.quick else full

    @property
    def n(self) -> int:
        """Repetitions of each measurement."""
        return self.pick(9, 2)


@dataclass(frozen=True, slots=True)
class Target:
    """What the median, or its ratio to the reference, has to reach; ``text`` is how the table says it."""

    text: str
    of: Literal["median", "ratio"]
    at_most: float | None = None
    at_least: float | None = None

    def reached(self, median: float, ratio: float | None) -> bool:
        """Whether the figures reach it."""
        value = median if self.of == "median" else ratio
        if value is None:
            return False
        over = self.at_most is not None and value > self.at_most
        under = self.at_least is not None and value < self.at_least
        return not (over or under)

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"text": self.text, "of": self.of, "at_most": self.at_most, "at_least": self.at_least}


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured thing: its name, its unit and a value for each repetition."""

    name: str
    unit: str
    values: Sequence[float]

    def as_json(self) -> dict[str, Any]:
        """Plain data: n, median and spread (quartiles and extremes)."""
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return {
            "name": self.name,
            "unit": self.unit,
            "n": len(self.values),
            "median": statistics.median(self.values),
            "spread": {"min": min(self.values), "q1": low, "q3": high, "max": max(self.values)},
        }


@dataclass(frozen=True, slots=True)
class Row:
    """A figure beside its reference and its target. ``ratios`` are paired, one a repetition.

    ``series`` and ``size`` say where a figure stands when it is one of several sizes of the same work.
    """

    figure: Figure
    reference: Figure | None = None
    ratios: Sequence[float] = ()
    target: Target | None = None
    series: str | None = None
    size: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        measured = self.figure.as_json()
        ratio = statistics.median(self.ratios) if self.ratios else None
        return {
            **measured,
            "reference": self.reference.as_json() if self.reference else None,
            "ratio": ratio,
            "target": self.target.as_json() if self.target else None,
            "reached": self.target.reached(measured["median"], ratio) if self.target else None,
            "series": self.series,
            "size": self.size,
        }


@dataclass(frozen=True, slots=True)
class Report:
    """What one script found. ``notes`` say what was left out or done otherwise, and why."""

    rows: Sequence[Row]
    notes: Sequence[str] = field(default_factory=tuple)


def compared(
    name: str,
    unit: str,
    costs: Mapping[str, Sequence[float]],
    *,
    figure: Callable[[float], float],
    target: Target | None = None,
) -> Row:
    """The row for two measured costs, the subject's first and then the reference's.

    ``figure`` turns a cost as measured (mostly seconds) into the value in ``unit``.
    """
    (_, subject), (reference_name, reference) = costs.items()
    return Row(
        Figure(name, unit, [figure(cost) for cost in subject]),
        Figure(reference_name, unit, [figure(cost) for cost in reference]),
        [cost / by for cost, by in zip(subject, reference, strict=True)],
        target,
    )


def measure(subjects: Mapping[str, Callable[[], float]], n: int, warm_up: int = 1) -> dict[str, list[float]]:
    """The costs that each subject returned, one call of each in turn, ``n`` turns after the warm-up."""
    costs: dict[str, list[float]] = {name: [] for name in subjects}
    for turn in range(warm_up + n):
        for name in _order(subjects, turn):
            gc.collect()
            cost = subjects[name]()
            if turn >= warm_up:
                costs[name].append(cost)
    return costs


async def ameasure(
    subjects: Mapping[str, Callable[[], Awaitable[float]]], n: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """As `measure`, for subjects that are awaited in the running event loop."""
    costs: dict[str, list[float]] = {name: [] for name in subjects}
    for turn in range(warm_up + n):
        for name in _order(subjects, turn):
            gc.collect()
            cost = await subjects[name]()
            if turn >= warm_up:
                costs[name].append(cost)
    return costs


def _order(subjects: Mapping[str, object], turn: int) -> list[str]:
    """Every other turn backwards, so that none always runs in another's wake."""
    names = list(subjects)
    return names if turn % 2 == 0 else names[::-1]


def timed(function: Callable[[], object], times: int = 1) -> Callable[[], float]:
    """A subject: seconds of one call, measured over ``times`` calls."""

    def seconds() -> float:
        begun = time.perf_counter()
        for _ in range(times):
            function()
        return (time.perf_counter() - begun) / times

    return seconds


def atimed(function: Callable[[], Awaitable[object]], times: int = 1) -> Callable[[], Awaitable[float]]:
    """As `timed`, for a coroutine function."""

    async def seconds() -> float:
        begun = time.perf_counter()
        for _ in range(times):
            await function()
        return (time.perf_counter() - begun) / times

    return seconds


def environment() -> dict[str, Any]:
    """Where and with what the figures were taken."""
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "event_loop": "asyncio",
        "hypernodes": version_of("hypernodes"),
        "anyio": version_of("anyio"),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def version_of(distribution: str) -> str:
    """The installed version, or "checkout" where the package is only on the path."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "checkout"


def main(row: str, title: str, run: Callable[[Options], Report]) -> None:
    """Parse the command line, measure, and print the report as JSON."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that the script works")
    options = Options(quick=parser.parse_args().quick)
    report = run(options)
    json.dump(
        {
            "row": row,
            "title": title,
            "quick": options.quick,
            "environment": environment(),
            "results": [each.as_json() for each in report.rows],
            "notes": list(report.notes),
        },
        sys.stdout,
        indent=2,
    )
    print()

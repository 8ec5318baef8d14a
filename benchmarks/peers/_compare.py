"""The workloads that every framework runs, each beside the same work by hand in the same process.

A framework's script has a function for each workload that it supports. The function gets the workload's
material and an exit stack for what has to be closed again, and returns what does the work once: a plain
function or a coroutine function, giving the result.
"""

import argparse
import contextlib
import functools
import inspect
import json
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import anyio

from benchmarks import _workloads as work
from benchmarks._harness import Options, Row, ameasure, atimed, compared, environment, measure, timed

Once = Callable[[], Any]
Case = Callable[[Any, contextlib.ExitStack], Once]


@dataclass(frozen=True, slots=True)
class Unit:
    """Seconds times ``scale``; of the whole workload, or of one of its nodes or items."""

    text: str
    scale: float
    whole: bool


NODE, ITEM = Unit("µs a node", 1e6, whole=False), Unit("µs an item", 1e6, whole=False)
SECONDS, MILLISECONDS = Unit("s", 1, whole=True), Unit("ms", 1e3, whole=True)


@dataclass(frozen=True, slots=True)
class Workload:
    """One line of the comparison.

    ``material`` makes what a framework gets, from the number of nodes, items or levels; ``by_hand`` does the
    work without a framework; ``times`` it is done in one repetition.
    """

    name: str
    title: str
    unit: Unit
    size: int
    quick_size: int
    material: Callable[[int], Any]
    by_hand: Case
    times: int = 1


@dataclass(frozen=True, slots=True)
class Peer:
    """A framework; ``smaller`` has sizes for what would take it too long, from which figures are scaled."""

    name: str
    version: str
    cases: Mapping[str, Case]
    smaller: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()


def _chain_by_hand(functions: Any, _: contextlib.ExitStack) -> Once:
    calls = work.calls_of(functions)
    return lambda: work.call_in_turn(calls, {"n0": 0})[f"n{len(calls)}"]


def _async_chain_by_hand(functions: Any, _: contextlib.ExitStack) -> Once:
    calls = work.calls_of(functions)

    async def once() -> object:
        return (await work.acall_in_turn(calls, {"n0": 0}))[f"n{len(calls)}"]

    return once


def _fan_out_by_hand(functions: Any, _: contextlib.ExitStack) -> Once:
    return lambda: work.call_fan_out(functions, 1)["sink"]


def _async_fan_out_by_hand(functions: Any, _: contextlib.ExitStack) -> Once:
    async def once() -> object:
        return (await work.acall_fan_out(functions, 1))["sink"]

    return once


def _map_by_hand(material: Any, _: contextlib.ExitStack) -> Once:
    functions, items = material
    return lambda: work.call_three(functions, items)["text"]


def _io_map_by_hand(material: Any, _: contextlib.ExitStack) -> Once:
    items, at_once = material

    async def once() -> object:
        return await work.amap_by_workers(work.fetch, items, at_once)

    return once


def _build_by_hand(functions: Any, _: contextlib.ExitStack) -> Once:
    return lambda: len(work.order_by_hand(functions))


def _nest_by_hand(functions: Any, _: contextlib.ExitStack) -> Once:
    """A graph a level."""
    return lambda: sum(len(work.order_by_hand([function])) for function in functions)


def _cpu_by_hand(rounds: Any, resources: contextlib.ExitStack) -> Once:
    pool = resources.enter_context(ProcessPoolExecutor(2))
    return lambda: list(pool.map(work.burn, rounds))


def _items_to_map(size: int) -> tuple[list[work.Function], list[int]]:
    return work.three(), list(range(size))


def _items_to_fetch(size: int) -> tuple[list[int], int]:
    """The items, and how many at once."""
    return list(range(size)), max(1, size // 10)


def _rounds_to_burn(size: int) -> list[int]:
    """50 ms each, or 2 ms in a quick run."""
    return [work.rounds_for(0.05 if size > 4 else 0.002)] * size


_async_chain = functools.partial(work.chain, asynchronous=True)
_async_fan_out = functools.partial(work.fan_out, asynchronous=True)

WORKLOADS = (
    Workload("chain", "chain of 100, sync", NODE, 100, 10, work.chain, _chain_by_hand, 20),
    Workload("async_chain", "chain of 100, async nodes", NODE, 100, 10, _async_chain, _async_chain_by_hand, 20),
    Workload("fan_out", "1 → 100 → 1, sync", NODE, 100, 10, work.fan_out, _fan_out_by_hand, 20),
    Workload("async_fan_out", "1 → 100 → 1, async nodes", NODE, 100, 10, _async_fan_out, _async_fan_out_by_hand, 20),
    Workload("map_items", "map of 3 nodes, 10,000 items", ITEM, 10_000, 50, _items_to_map, _map_by_hand),
    Workload("io_map", "I/O map, 10,000 × 10 ms at 1,000", SECONDS, 10_000, 50, _items_to_fetch, _io_map_by_hand),
    Workload("build", "build 1,000 nodes", MILLISECONDS, 1_000, 20, work.chain, _build_by_hand),
    Workload("nest", "nest 100 levels", MILLISECONDS, 100, 5, work.chain, _nest_by_hand),
    Workload("cpu_map", "64 × 50 ms of CPU on 2 processes", SECONDS, 64, 4, _rounds_to_burn, _cpu_by_hand),
)


def _compare(workload: Workload, peer: Peer, options: Options) -> dict[str, Any] | None:
    case = peer.cases.get(workload.name)
    if case is None:
        return None
    full = options.pick(workload.size, workload.quick_size)
    size = min(full, peer.smaller.get(workload.name, full))
    with contextlib.ExitStack() as resources:
        material = workload.material(size)
        subject = _Measured(case(material, resources), size)
        by_hand = _Measured(workload.by_hand(material, resources), size)
        _check(subject, by_hand)
        if size != full:
            by_hand = _Measured(workload.by_hand(workload.material(full), resources), full)
        row = _row(workload, subject, by_hand, options)
    scaled_from = size if size != workload.size else None
    return {"workload": workload.name, "scaled_from": scaled_from, **row.as_json()}


@dataclass(frozen=True, slots=True)
class _Measured:
    """Something that does ``size`` items, nodes or levels each time."""

    once: Once
    size: int

    @property
    def is_async(self) -> bool:
        return inspect.iscoroutinefunction(self.once)

    def seconds(self, times: int) -> Callable[[], float]:
        """Seconds of one item, node or level; the start of an event loop, if it needs one, is not counted."""
        if self.is_async:
            return lambda: anyio.run(self.aseconds(times))
        cost = timed(self.once, times)
        return lambda: cost() / self.size

    def aseconds(self, times: int) -> Callable[[], Awaitable[float]]:
        """The same in the running event loop."""
        cost = atimed(self.result, times)

        async def seconds() -> float:
            return await cost() / self.size

        return seconds

    async def result(self) -> Any:
        """What one time gives."""
        made = self.once()
        return await made if self.is_async else made


def _check(subject: _Measured, expected: _Measured) -> None:
    found, right = (each.once() if not each.is_async else anyio.run(each.result) for each in (subject, expected))
    if found != right:
        raise AssertionError(f"the framework's result differs from the one by hand: {found!r} != {right!r}")


def _row(workload: Workload, subject: _Measured, by_hand: _Measured, options: Options) -> Row:
    n, times = options.pick(7, 2), options.pick(workload.times, 1)
    if subject.is_async:
        costs = anyio.run(_awaited, subject, by_hand, times, n)
    else:
        costs = measure({"it": subject.seconds(times), "by hand": by_hand.seconds(times)}, n)
    unit = workload.unit
    scale = unit.scale * (workload.size if unit.whole else 1)
    return compared(workload.title, unit.text, costs, figure=lambda seconds: seconds * scale)


async def _awaited(subject: _Measured, by_hand: _Measured, times: int, n: int) -> Mapping[str, Sequence[float]]:
    return await ameasure({"it": subject.aseconds(times), "by hand": by_hand.aseconds(times)}, n)


def main(peer: Peer) -> None:
    """Parse the command line, run what the framework supports, and print JSON."""
    parser = argparse.ArgumentParser(description=f"The workloads in {peer.name}, beside the same by hand")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that the script works")
    parser.add_argument("workload", nargs="*", help=f"only these: {', '.join(w.name for w in WORKLOADS)}")
    arguments = parser.parse_args()
    options = Options(quick=arguments.quick)
    chosen = [w for w in WORKLOADS if not arguments.workload or w.name in arguments.workload]
    results = [found for workload in chosen if (found := _compare(workload, peer, options)) is not None]
    json.dump(
        {
            "peer": peer.name,
            "version": peer.version,
            "quick": options.quick,
            "environment": environment(),
            "results": results,
            "notes": list(peer.notes),
        },
        sys.stdout,
        indent=2,
    )
    print()

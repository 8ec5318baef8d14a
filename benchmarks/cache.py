"""P6: 3 nodes on 2,000 items with a cache on disk, a fresh process each time: all hits, and the first run."""

import importlib.util
import os
import statistics
from collections.abc import Callable, Mapping, Sequence

from benchmarks._caching import THREE, Cache, all_hits, first_run, folder, job, without
from benchmarks._harness import Figure, Options, Report, Row, Target, main, measure

HERE, BY_HAND, JOBLIB = Cache("by_hypernodes"), Cache("by_sqlite"), Cache("by_joblib")
NAMES = {HERE: "hypernodes", BY_HAND: "SQLite by hand, a query a hit", JOBLIB: "joblib.Memory"}
SLOWER = 10
"""joblib gets so many times fewer items: its first run takes milliseconds a call."""
HIT = Target("≤ 8 µs a node hit", "median", at_most=8)
FIRST = Target("≤ 25 µs a node", "median", at_most=25)

Costs = Mapping[str, Sequence[float]]


def _subjects(caches: Sequence[Cache], where: str, items: int) -> dict[str, Callable[[], float]]:
    subjects = {}
    for cache in caches:
        count = max(items // SLOWER, 10) if cache is JOBLIB else items
        name = cache.script
        subjects[f"{name}: hits"] = all_hits(cache, where, os.path.join(where, name), count)
        subjects[f"{name}: first"] = first_run(cache, where, count)
        subjects[f"{name}: none"] = without(cache, where, count)
    return subjects


def _hits(costs: Costs, cache: Cache) -> Sequence[float]:
    return costs[f"{cache.script}: hits"]


def _overhead(costs: Costs, cache: Cache) -> Sequence[float]:
    """What a first run takes longer than one without a cache, turn by turn."""
    first, none = costs[f"{cache.script}: first"], costs[f"{cache.script}: none"]
    return [with_cache - plain for with_cache, plain in zip(first, none, strict=True)]


def _row(name: str, unit: str, subject: Sequence[float], reference: Sequence[float], by: str, target: Target) -> Row:
    return Row(
        Figure(name, unit, [cost * 1e6 for cost in subject]),
        Figure(by, unit, [cost * 1e6 for cost in reference]),
        [cost / other for cost, other in zip(subject, reference, strict=True)],
        target,
    )


def run(options: Options) -> Report:
    """Each figure is beside SQLite by hand and, where it is installed, beside joblib."""
    items = options.pick(2_000, 50)
    caches = [HERE, BY_HAND]
    notes = []
    if importlib.util.find_spec("joblib"):
        caches.append(JOBLIB)
        notes.append(f"joblib.Memory gets {max(items // SLOWER, 10):,} items")
    else:
        notes.append("joblib is left out: it is not installed")
    with folder() as where:
        costs = measure(_subjects(caches, job(where, THREE), items), options.n)
    rows = []
    for reference in caches[1:]:
        by = NAMES[reference]
        hits, overhead = _hits(costs, reference), _overhead(costs, reference)
        rows.append(_row(f"3 nodes × {items:,} items, all hits", "µs a node", _hits(costs, HERE), hits, by, HIT))
        rows.append(
            _row(
                f"3 nodes × {items:,} items, what a first run adds",
                "µs a node",
                _overhead(costs, HERE),
                overhead,
                by,
                FIRST,
            )
        )
    plain = statistics.median(costs[f"{HERE.script}: none"]) * 1e6
    notes.append(f"without a cache hypernodes takes {plain:.3g} µs a node here, the engine's start included")
    notes.append(
        "the time is that of the call alone, in a process that has imported everything and has run another job"
    )
    return Report(rows, notes)


if __name__ == "__main__":
    main("P6", "A cache on disk", run)

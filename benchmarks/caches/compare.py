"""Caches on the same work: first whether what they give is right, then how fast they are, and what they leave.

python -m benchmarks.caches.compare [--quick] [--earlier COMMAND ...]
"""

import argparse
import importlib.metadata
import json
import os
import sys
from typing import Any

from benchmarks._caching import (
    EDITS,
    SAME,
    THREE,
    VALUES,
    Cache,
    all_hits,
    files_left,
    first_run,
    folder,
    job,
    told_apart,
    without,
)
from benchmarks._harness import Figure, Options, environment, measure

NAMES = {
    "by_sqlite": "SQLite by hand",
    "by_hypernodes": "hypernodes",
    "by_joblib": "joblib.Memory",
    "by_diskcache": "diskcache",
    "by_hypernodes_048": "hypernodes 0.4.8",
}
NEEDS = {"by_joblib": "joblib", "by_diskcache": "diskcache"}
"""Distributions that have to be installed."""
SLOW = {"by_joblib", "by_hypernodes_048"}
"""They take milliseconds a call in a first run, and get a tenth of the items."""


def _compared(cache: Cache, options: Options) -> dict[str, Any]:
    scale = 10 if cache.script in SLOW else 1
    items = max(options.pick(2_000, 20) // scale, 10)
    many = options.pick(100_000, 200)
    counted = max(many // (50 if scale > 1 else 1), 10)
    with folder() as where:
        job(where, THREE)
        costs = measure(
            {
                "hits": all_hits(cache, where, os.path.join(where, "cache"), items),
                "first": first_run(cache, where, items),
                "none": without(cache, where, items),
            },
            options.pick(7, 2),
        )
        version = cache("work", where, "none", 1)["version"]
    adds = [first - none for first, none in zip(costs["first"], costs["none"], strict=True)]
    return {
        "cache": NAMES[cache.script],
        "version": version,
        "by_hand": cache.script == "by_sqlite",
        "wrong": None if cache.script == "by_sqlite" else told_apart(cache),
        "hit": Figure("a hit", "µs a node", [cost * 1e6 for cost in costs["hits"]]).as_json(),
        "first": Figure("a first run adds", "µs a node", [cost * 1e6 for cost in adds]).as_json(),
        "items": items,
        "files": round(files_left(cache, counted) * many / counted) if scale > 1 else files_left(cache, counted),
        "counted": counted,
        "many": many,
    }


def main() -> None:
    """Parse the command line, run each cache that is installed, and print JSON."""
    parser = argparse.ArgumentParser(description="Caches on the same work, and whether what they give is right")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    parser.add_argument(
        "--earlier",
        nargs=argparse.REMAINDER,  # it has options of its own
        metavar="COMMAND",
        help="last: what starts a Python with hypernodes 0.4.8",
    )
    arguments = parser.parse_args()
    options = Options(quick=arguments.quick)
    caches, left_out = [], []
    for script in NAMES:
        try:
            importlib.metadata.version(NEEDS.get(script, "anyio"))
        except importlib.metadata.PackageNotFoundError:
            left_out.append(f"{NEEDS[script]} is left out: it is not installed")
            continue
        if script != "by_hypernodes_048":
            caches.append(Cache(script))
        elif arguments.earlier:
            caches.append(Cache(script, tuple(arguments.earlier)))
    report = {
        "quick": options.quick,
        "environment": environment(),
        "cases": {
            "edits": [case.name for case in EDITS],
            "values": [case.name for case in VALUES],
            "same": [case.name for case in SAME],
        },
        "caches": [_compared(cache, options) for cache in caches],
        "notes": left_out,
    }
    json.dump(report, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()

"""hypernodes 0.4.8 with its `DiskCache`. Needs an environment of its own; run this file by its path there."""

import importlib.metadata
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypernodes import DiskCache, Pipeline, node
from hypernodes.sequential_engine import SeqEngine

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))  # last: `hypernodes` stays the installed one

from benchmarks.caches._child import Function, main

VERSION = "0.4.8"


def run(functions: Sequence[Function], items: Sequence[Any], directory: str | None) -> list[Any]:
    """A map of a pipeline with a node a function."""
    nodes = [node(function.__name__)(function) for function in functions]
    engine = SeqEngine(cache=None if directory is None else DiskCache(directory))
    pipeline = Pipeline(nodes, engine=engine)
    name = next(iter(inspect.signature(functions[0]).parameters))
    return [made[functions[-1].__name__] for made in pipeline.map(inputs={name: list(items)}, map_over=name)]


if __name__ == "__main__":
    found = importlib.metadata.version("hypernodes")
    if found != VERSION:
        sys.exit(f"this needs an environment of its own with hypernodes {VERSION}; here it is {found}")
    main(found, run)

"""The workloads in hypernodes 0.4.8, the last release of an earlier line of the package.

It has this package's name, so it needs an environment of its own; run this file by its path there.
"""

import contextlib
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

from hypernodes import Pipeline, node
from hypernodes.engines import DaskEngine

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))  # last: `hypernodes` stays the installed one

from benchmarks import _workloads as work
from benchmarks.peers._compare import Once, Peer, main

VERSION = "0.4.8"


def pipeline_of(functions: list[work.Function]) -> Pipeline:
    """One node a function, each output named as its function."""
    return Pipeline([node(function.__name__)(function) for function in functions])


def chain(functions: Any, _: contextlib.ExitStack) -> Once:
    pipeline, last = pipeline_of(functions), functions[-1].__name__
    return lambda: pipeline.run(inputs={"n0": 0})[last]


def fan_out(functions: Any, _: contextlib.ExitStack) -> Once:
    pipeline = pipeline_of(functions)
    return lambda: pipeline.run(inputs={"x": 1})["sink"]


def map_items(material: Any, _: contextlib.ExitStack) -> Once:
    functions, items = material
    pipeline = pipeline_of(functions)
    return lambda: [made["text"] for made in pipeline.map(inputs={"x": items}, map_over="x")]


def io_map(material: Any, _: contextlib.ExitStack) -> Once:
    items, _at_once = material
    pipeline = pipeline_of([work.fetch])
    return lambda: [made["fetch"] for made in pipeline.map(inputs={"x": items}, map_over="x")]


def build(functions: Any, _: contextlib.ExitStack) -> Once:
    return lambda: len(pipeline_of(functions).nodes)


def nest(functions: Any, _: contextlib.ExitStack) -> Once:
    def once() -> object:
        *above, last = functions
        pipeline = pipeline_of([last])
        for function in reversed(above):
            pipeline = Pipeline([node(function.__name__)(function), pipeline.as_node()])
        return len(pipeline.graph.available_output_names)

    return once


def cpu_map(rounds: Any, _: contextlib.ExitStack) -> Once:
    """On its engine for dask, which starts the processes for each map."""
    engine = DaskEngine(scheduler="processes", num_workers=2, npartitions=len(rounds))
    pipeline = Pipeline([node("burn")(work.burn)], engine=engine)
    return lambda: [made["burn"] for made in pipeline.map(inputs={"rounds": rounds}, map_over="rounds")]


if __name__ == "__main__":
    found = importlib.metadata.version("hypernodes")
    if found != VERSION:
        sys.exit(f"this needs an environment of its own with hypernodes {VERSION}; here it is {found}")
    main(
        Peer(
            "hypernodes 0.4.8",
            VERSION,
            {
                "chain": chain,
                "async_chain": chain,
                "fan_out": fan_out,
                "async_fan_out": fan_out,
                "map_items": map_items,
                "io_map": io_map,
                "build": build,
                "nest": nest,
                "cpu_map": cpu_map,
            },
            smaller={"io_map": 50, "map_items": 2_000},
            notes=[
                "one node at a time, an event loop for each async node",
                "processes by its engine on dask, which starts them for each map",
            ],
        )
    )

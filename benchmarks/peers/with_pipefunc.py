"""The workloads in pipefunc: sync functions, one process; maps by MapSpec."""

import contextlib
import importlib.metadata
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

from pipefunc import PipeFunc, Pipeline

from benchmarks import _workloads as work
from benchmarks.peers._compare import Once, Peer, main


def pipeline_of(functions: list[work.Function]) -> Pipeline:
    """One PipeFunc a function, each output named as its function."""
    return Pipeline([PipeFunc(function, function.__name__) for function in functions])


def chain(functions: Any, _: contextlib.ExitStack) -> Once:
    pipeline, last = pipeline_of(functions), functions[-1].__name__
    return lambda: pipeline.run(last, kwargs={"n0": 0})


def fan_out(functions: Any, _: contextlib.ExitStack) -> Once:
    pipeline = pipeline_of(functions)
    return lambda: pipeline.run("sink", kwargs={"x": 1})


def map_items(material: Any, _: contextlib.ExitStack) -> Once:
    (double, plus_one, text), items = material
    pipeline = Pipeline(
        [
            PipeFunc(double, "double", mapspec="x[i] -> double[i]"),
            PipeFunc(plus_one, "plus_one", mapspec="double[i] -> plus_one[i]"),
            PipeFunc(text, "text", mapspec="plus_one[i] -> text[i]"),
        ]
    )
    return lambda: list(pipeline.map({"x": items}, parallel=False, storage="dict")["text"].output)


def io_map(material: Any, resources: contextlib.ExitStack) -> Once:
    items, at_once = material
    pool = resources.enter_context(ThreadPoolExecutor(at_once))
    pipeline = Pipeline([PipeFunc(work.fetch_blocking, "y", mapspec="x[i] -> y[i]")])
    return lambda: list(
        pipeline.map({"x": items}, executor=pool, storage="dict", chunksizes=1, show_progress=False)["y"].output
    )


def build(functions: Any, _: contextlib.ExitStack) -> Once:
    return lambda: len(pipeline_of(functions).functions)


def cpu_map(rounds: Any, resources: contextlib.ExitStack) -> Once:
    pool = resources.enter_context(ProcessPoolExecutor(2))
    pipeline = Pipeline([PipeFunc(work.burn, "burned", mapspec="rounds[i] -> burned[i]")])
    return lambda: list(
        pipeline.map({"rounds": rounds}, executor=pool, storage="dict", chunksizes=1, show_progress=False)[
            "burned"
        ].output
    )


if __name__ == "__main__":
    main(
        Peer(
            "pipefunc",
            importlib.metadata.version("pipefunc"),
            {
                "chain": chain,
                "fan_out": fan_out,
                "map_items": map_items,
                "io_map": io_map,
                "build": build,
                "cpu_map": cpu_map,
            },
            smaller={"build": 100},
            notes=[
                "no async functions; the I/O map holds 1,000 threads",
                "building takes longer by the node the more nodes there are: scaled from 100 flatters it",
            ],
        )
    )

"""The workloads in hypernodes itself: all outputs are computed and returned, as a plain call does."""

import contextlib
from typing import Any

import anyio.from_thread

from benchmarks import _workloads as work
from benchmarks._harness import version_of
from benchmarks.peers._compare import Once, Peer, main
from hypernodes import Pipeline, node
from hypernodes.backend import LocalBackend


def pipeline_of(functions: list[work.Function]) -> Pipeline:
    """One node a function, each output named as its function."""
    return Pipeline([node(function.__name__)(function) for function in functions])


def chain(functions: Any, _: contextlib.ExitStack) -> Once:
    pipeline, last = pipeline_of(functions), functions[-1].__name__

    async def once() -> object:
        return (await pipeline.arun(n0=0))[last]

    return once


def fan_out(functions: Any, _: contextlib.ExitStack) -> Once:
    pipeline = pipeline_of(functions)

    async def once() -> object:
        return (await pipeline.arun(x=1))["sink"]

    return once


def map_items(material: Any, _: contextlib.ExitStack) -> Once:
    functions, items = material
    pipeline = pipeline_of(functions)

    async def once() -> object:
        return (await pipeline.amap({"x": items}, "x"))["text"]

    return once


def io_map(material: Any, _: contextlib.ExitStack) -> Once:
    items, at_once = material
    pipeline = pipeline_of([work.fetch])

    async def once() -> object:
        return (await pipeline.amap({"x": items}, "x", max_concurrency=at_once))["fetch"]

    return once


def build(functions: Any, _: contextlib.ExitStack) -> Once:
    return lambda: len(pipeline_of(functions).nodes)


def nest(functions: Any, _: contextlib.ExitStack) -> Once:
    def once() -> object:
        *above, last = functions
        pipeline = pipeline_of([last])
        for function in reversed(above):
            pipeline = Pipeline([node(function.__name__)(function), pipeline])
        return len(pipeline.outputs)

    return once


def cpu_map(rounds: Any, resources: contextlib.ExitStack) -> Once:
    """Worker processes belong to an event loop: this one is kept open by a portal in a thread."""
    portal = resources.enter_context(anyio.from_thread.start_blocking_portal())
    backend = resources.enter_context(
        portal.wrap_async_context_manager(LocalBackend(map_execution="parallel", max_workers=2))
    )
    pipeline = Pipeline([node("burned")(work.burn)], backend=backend)

    async def mapped() -> object:
        return (await pipeline.amap({"rounds": rounds}, "rounds"))["burned"]

    return lambda: portal.call(mapped)


if __name__ == "__main__":
    main(
        Peer(
            "hypernodes",
            version_of("hypernodes"),
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
        )
    )

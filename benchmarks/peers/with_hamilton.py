"""The workloads in Apache Hamilton: its sync driver, and its async driver for async functions."""

import contextlib
import importlib.metadata
from collections.abc import Sequence
from typing import Any

from hamilton import ad_hoc_utils, async_driver, base, driver
from hamilton.execution import executors
from hamilton.htypes import Collect, Parallelizable

from benchmarks import _workloads as work
from benchmarks.peers._compare import Once, Peer, main


def driver_of(functions: Sequence[work.Function]) -> driver.Driver:
    """One function a node, named as the function."""
    module = ad_hoc_utils.create_temporary_module(*functions)
    return driver.Builder().with_modules(module).with_adapter(base.DictResult()).build()


def async_driver_of(functions: Sequence[work.Function]) -> async_driver.AsyncDriver:
    """The same for async functions."""
    module = ad_hoc_utils.create_temporary_module(*functions)
    return async_driver.AsyncDriver({}, module, result_builder=base.DictResult())


def _last_of(functions: Sequence[work.Function], inputs: dict[str, Any]) -> Once:
    built, last = driver_of(functions), functions[-1].__name__
    return lambda: built.execute([last], inputs=inputs)[last]


def _last_of_async(functions: Sequence[work.Function], inputs: dict[str, Any]) -> Once:
    built, last = async_driver_of(functions), functions[-1].__name__

    async def once() -> object:
        return (await built.execute([last], inputs=inputs))[last]

    return once


def chain(functions: Any, _: contextlib.ExitStack) -> Once:
    return _last_of(functions, {"n0": 0})


def async_chain(functions: Any, _: contextlib.ExitStack) -> Once:
    return _last_of_async(functions, {"n0": 0})


def fan_out(functions: Any, _: contextlib.ExitStack) -> Once:
    return _last_of(functions, {"x": 1})


def async_fan_out(functions: Any, _: contextlib.ExitStack) -> Once:
    return _last_of_async(functions, {"x": 1})


def map_items(material: Any, _: contextlib.ExitStack) -> Once:
    functions, items = material
    built = driver_of(functions)
    return lambda: [built.execute(["text"], inputs={"x": x})["text"] for x in items]


def io_map(material: Any, _: contextlib.ExitStack) -> Once:
    items, at_once = material
    built = async_driver_of([work.fetch])

    async def fetched(x: int) -> object:
        return (await built.execute(["fetch"], inputs={"x": x}))["fetch"]

    async def once() -> object:
        return await work.amap_by_workers(fetched, items, at_once)

    return once


def build(functions: Any, _: contextlib.ExitStack) -> Once:
    return lambda: sum(not v.is_external_input for v in driver_of(functions).list_available_variables())


def rounds(all_rounds: list[int]) -> Parallelizable[int]:
    """The items, one task each."""
    yield from all_rounds


def burned(rounds: int) -> int:
    """The work on one item."""
    return work.burn(rounds)


def collected(burned: Collect[int]) -> list[int]:
    """All results."""
    return list(burned)


def cpu_map(material: Any, _: contextlib.ExitStack) -> Once:
    module = ad_hoc_utils.create_temporary_module(rounds, burned, collected)
    built = (
        driver.Builder()
        .enable_dynamic_execution(allow_experimental_mode=True)
        .with_modules(module)
        .with_remote_executor(executors.MultiProcessingExecutor(max_tasks=2))
        .build()
    )
    return lambda: built.execute(["collected"], inputs={"all_rounds": material})["collected"]


if __name__ == "__main__":
    main(
        Peer(
            "Apache Hamilton",
            importlib.metadata.version("apache-hamilton"),
            {
                "chain": chain,
                "async_chain": async_chain,
                "fan_out": fan_out,
                "async_fan_out": async_fan_out,
                "map_items": map_items,
                "io_map": io_map,
                "build": build,
                "cpu_map": cpu_map,
            },
            smaller={"map_items": 2_000},
            notes=[
                "maps are one execute an item, in a loop or anyio workers; each run starts its processes",
                "no nesting to 100 levels: a subdag copies the functions below it",
            ],
        )
    )

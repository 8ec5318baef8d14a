"""The workloads in dask: delayed functions, bags for maps, a distributed client for async functions."""

import contextlib
import functools
import importlib.metadata
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import dask
from dask import bag

from benchmarks import _workloads as work
from benchmarks.peers._compare import Case, Once, Peer, main


def delayed_chain(functions: Sequence[work.Function]) -> Any:
    """The last of the chain."""
    value: Any = 0
    for function in functions:
        value = dask.delayed(function, pure=False)(value)
    return value


def delayed_fan_out(functions: Sequence[work.Function]) -> Any:
    """The sink."""
    first, *middle, last = (dask.delayed(function, pure=False) for function in functions)
    source = first(1)
    return last(*(function(source) for function in middle))


def chain(functions: Any, _: contextlib.ExitStack) -> Once:
    value = delayed_chain(functions)
    return lambda: value.compute(scheduler="synchronous")


def fan_out(functions: Any, _: contextlib.ExitStack) -> Once:
    value = delayed_fan_out(functions)
    return lambda: value.compute(scheduler="synchronous")


def map_items(material: Any, _: contextlib.ExitStack) -> Once:
    (double, plus_one, text), items = material
    mapped = bag.from_sequence(items, npartitions=10).map(double).map(plus_one).map(text)
    return lambda: list(mapped.compute(scheduler="synchronous"))


def io_map(material: Any, resources: contextlib.ExitStack) -> Once:
    items, at_once = material
    pool = resources.enter_context(ThreadPoolExecutor(at_once))
    mapped = bag.from_sequence(items, npartitions=at_once).map(work.fetch_blocking)
    return lambda: list(mapped.compute(scheduler="threads", pool=pool, num_workers=at_once))


def build(functions: Any, _: contextlib.ExitStack) -> Once:
    return lambda: len(delayed_chain(functions).dask)


def cpu_map(rounds: Any, resources: contextlib.ExitStack) -> Once:
    pool = resources.enter_context(ProcessPoolExecutor(2))
    burn = dask.delayed(work.burn, pure=False)
    return lambda: list(
        dask.compute(*(burn(each) for each in rounds), scheduler="processes", pool=pool, num_workers=2, chunksize=1)
    )


def _client(resources: contextlib.ExitStack) -> Any:
    from distributed import Client

    return resources.enter_context(Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None))


def _on_client(graph: Callable[[], Any], resources: contextlib.ExitStack) -> Once:
    """Each graph is computed once, since a client knows tasks by key; they are built beforehand."""
    client, graphs = _client(resources), [graph() for _ in range(200)]
    return lambda: client.compute(graphs.pop(), sync=True, optimize_graph=False)


def async_chain(functions: Any, resources: contextlib.ExitStack) -> Once:
    return _on_client(functools.partial(delayed_chain, functions), resources)


def async_fan_out(functions: Any, resources: contextlib.ExitStack) -> Once:
    return _on_client(functools.partial(delayed_fan_out, functions), resources)


def cases() -> dict[str, Case]:
    """What the installed parts of dask can do."""
    found: dict[str, Case] = {
        "chain": chain,
        "fan_out": fan_out,
        "map_items": map_items,
        "io_map": io_map,
        "build": build,
        "cpu_map": cpu_map,
    }
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("distributed")
        found |= {"async_chain": async_chain, "async_fan_out": async_fan_out}
    return found


if __name__ == "__main__":
    main(
        Peer(
            "dask",
            importlib.metadata.version("dask"),
            cases(),
            smaller={"async_chain": 20},
            notes=[
                "the I/O map holds 1,000 threads; async functions run in a `distributed` worker here",
                "a bag takes a part of the items through all functions at a time and keeps the last result",
            ],
        )
    )

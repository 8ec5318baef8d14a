"""hypernodes with a `DiskCache`."""

from collections.abc import Sequence
from typing import Any

from benchmarks.caches._child import Function, main
from hypernodes import DiskCache, Pipeline, __version__, node


def run(functions: Sequence[Function], items: Sequence[Any], directory: str | None) -> list[Any]:
    """A map of a pipeline with a node a function; every node's outputs are loaded and returned."""
    pipeline = Pipeline([node(function.__name__)(function) for function in functions])
    if directory is not None:
        pipeline = pipeline.with_cache(DiskCache(directory))
    (name,) = (name for name, each in pipeline.inputs.items() if each.required)
    return pipeline.map({name: items}, name)[functions[-1].__name__]


if __name__ == "__main__":
    main(__version__, run)

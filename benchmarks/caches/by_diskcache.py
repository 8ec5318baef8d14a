"""diskcache's `Cache.memoize`, around each function; it tells 1 and True apart when asked to (`typed=True`)."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import diskcache

from benchmarks.caches._child import Function, main


def run(functions: Sequence[Function], items: Sequence[Any], directory: str | None) -> list[Any]:
    """Loops, the functions inside; all results are loaded and kept."""
    with ExitStack() as resources:
        if directory is not None:
            cache = resources.enter_context(diskcache.Cache(directory))
            functions = [cache.memoize(typed=True)(function) for function in functions]
        columns: list[list[Any]] = [[] for _ in functions]
        for item in items:
            value = item
            for function, column in zip(functions, columns, strict=True):
                value = function(value)
                column.append(value)
    return columns[-1]


if __name__ == "__main__":
    main(diskcache.__version__, run)

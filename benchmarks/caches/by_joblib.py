"""joblib's `Memory`, around each function."""

import warnings
from collections.abc import Sequence
from typing import Any

import joblib

from benchmarks.caches._child import Function, main


def run(functions: Sequence[Function], items: Sequence[Any], directory: str | None) -> list[Any]:
    """Loops, the functions inside; all results are loaded and kept."""
    warnings.simplefilter("ignore")  # it tells of functions whose code has changed
    if directory is not None:
        memory = joblib.Memory(directory, verbose=0)
        functions = [memory.cache(function) for function in functions]
    columns: list[list[Any]] = [[] for _ in functions]
    for item in items:
        value = item
        for function, column in zip(functions, columns, strict=True):
            value = function(value)
            column.append(value)
    return columns[-1]


if __name__ == "__main__":
    main(joblib.__version__, run)

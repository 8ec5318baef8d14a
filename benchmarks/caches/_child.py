"""What each script here does when it is started: run jobs through its cache, and print what that gave.

python SCRIPT work FOLDER CACHE ITEMS    the functions of `FOLDER/job.py`, one after another, on so many items
python SCRIPT cases FOLDER CACHE         `step(VALUE)` of each `FOLDER/case_*.py`

CACHE is the directory to keep results in, or "none". Everything is run once with another job and another directory
first, so that the imports of a library do not count; what it has to learn about the job's own functions does.
Nothing here imports hypernodes, of which one script has another version.
"""

import importlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Function = Callable[..., Any]
Run = Callable[[Sequence[Function], Sequence[Any], str | None], list[Any]]
"""Calls functions in a row on each item, by way of a cache in a directory or without; gives the last one's results."""


def first(item: int) -> int:
    """Something to run before anything is measured."""
    return item + 1


def second(first: int) -> int:
    """What follows it."""
    return first + 1


def main(version: str, run: Run) -> None:
    """Do what the command line says, and print JSON."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    what, folder, cache, *more = sys.argv[1:]
    scratch = tempfile.mkdtemp()
    try:
        for directory in (None, scratch, scratch):
            run([first, second], [1, 2, 3], directory)
    finally:
        shutil.rmtree(scratch)
    sys.path.insert(0, folder)
    directory = None if cache == "none" else cache
    answer = _work(run, directory, int(more[0])) if what == "work" else _cases(run, Path(folder), directory)
    print(json.dumps({"version": version, **answer}))


def _work(run: Run, directory: str | None, items: int) -> dict[str, Any]:
    functions = importlib.import_module("job").STEPS
    begun = time.perf_counter()
    results = run(functions, list(range(items)), directory)
    return {"seconds": time.perf_counter() - begun, "last": results[-1], "count": len(results)}


def _cases(run: Run, folder: Path, directory: str | None) -> dict[str, Any]:
    """For each case what the cache gave, what the function itself gives, and whether it was called for the former."""
    found = {}
    for file in sorted(folder.glob("case_*.py")):
        module = importlib.import_module(file.stem)
        log = Path(module.LOG)
        before = log.stat().st_size if log.exists() else 0
        try:
            [given] = run([module.step], [module.VALUE], directory)
        except Exception as error:  # noqa: BLE001 - some caches cannot take some values
            found[file.stem] = {"error": f"{type(error).__name__}: {error}"}
            continue
        called = (log.stat().st_size if log.exists() else 0) > before
        found[file.stem] = {"given": given, "right": module.step(module.VALUE), "called": called}
    return {"cases": found}

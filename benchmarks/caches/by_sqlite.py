"""A cache by hand: a table in SQLite, looked up for each call; what is new is written in one transaction.

The key is the function's name and its argument, pickled: what it costs at least, not what is right.
"""

import pickle
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import Any

from benchmarks.caches._child import Function, main


def run(functions: Sequence[Function], items: Sequence[Any], directory: str | None) -> list[Any]:
    """Loops, the functions inside; all results are loaded and kept."""
    if directory is None:
        return _without(functions, items)
    Path(directory).mkdir(parents=True, exist_ok=True)
    columns: list[list[Any]] = [[] for _ in functions]
    with closing(sqlite3.connect(Path(directory, "cache.db"))) as database:
        database.execute("create table if not exists results (key blob primary key, value blob)")
        database.execute("pragma journal_mode = wal")
        select = "select value from results where key = ?"
        new = {}
        for item in items:
            value = item
            for function, column in zip(functions, columns, strict=True):
                key = sha256(function.__qualname__.encode() + pickle.dumps(value)).digest()
                row = database.execute(select, (key,)).fetchone()
                if row is None:
                    value = function(value)
                    new[key] = pickle.dumps(value)
                else:
                    value = pickle.loads(row[0])
                column.append(value)
        with database:
            database.executemany("insert or replace into results values (?, ?)", new.items())
    return columns[-1]


def _without(functions: Sequence[Function], items: Sequence[Any]) -> list[Any]:
    columns: list[list[Any]] = [[] for _ in functions]
    for item in items:
        value = item
        for function, column in zip(functions, columns, strict=True):
            value = function(value)
            column.append(value)
    return columns[-1]


if __name__ == "__main__":
    main(sqlite3.sqlite_version, run)

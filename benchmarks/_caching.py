"""Caches side by side: which process runs what, and the cases that a cache has to tell apart."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._harness import ROOT

THREE = """
def double(x):
    return x * 2


def plus_one(double):
    return double + 1


def text(plus_one):
    return str(plus_one)


STEPS = [double, plus_one, text]
"""
ONE = """
def double(x):
    return x * 2


STEPS = [double]
"""


@dataclass(frozen=True, slots=True)
class Cache:
    """A script under `benchmarks.caches`, and the interpreter for it."""

    script: str
    command: Sequence[str] = (sys.executable,)

    def __call__(self, *arguments: object) -> Any:
        """Run it in a process of its own; what it printed.

        Raises:
            subprocess.CalledProcessError: it ended with an error, which it printed.
        """
        # By its name the checkout comes first on the path: not where hypernodes is another version's.
        here = tuple(self.command) == (sys.executable,)
        module = ["-m", f"benchmarks.caches.{self.script}"]
        script = module if here else [os.path.join("benchmarks", "caches", f"{self.script}.py")]
        done = subprocess.run(
            [*self.command, *script, *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},  # sources are edited within a second
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return json.loads(done.stdout.splitlines()[-1])


def folder() -> AbstractContextManager[str]:
    """A temporary directory, for jobs and for what caches keep of them."""
    return tempfile.TemporaryDirectory()


def job(where: str, source: str) -> str:
    """Write the functions to run."""
    Path(where, "job.py").write_text(source, encoding="utf-8")
    return where


def first_run(cache: Cache, where: str, items: int) -> Callable[[], float]:
    """A subject: seconds a call of a run that finds an empty cache."""

    def seconds() -> float:
        with tempfile.TemporaryDirectory(dir=where) as directory:
            return _seconds(cache, where, os.path.join(directory, "cache"), items)

    return seconds


def without(cache: Cache, where: str, items: int) -> Callable[[], float]:
    """A subject: seconds a call without a cache."""
    return lambda: _seconds(cache, where, "none", items)


def all_hits(cache: Cache, where: str, directory: str, items: int) -> Callable[[], float]:
    """A subject: seconds a call where a process before has computed everything; it is made here."""
    _seconds(cache, where, directory, items)
    return lambda: _seconds(cache, where, directory, items)


def _seconds(cache: Cache, where: str, directory: str, items: int) -> float:
    answer = cache("work", where, directory, items)
    if answer["count"] != items or answer["last"] != str(2 * items - 1):
        raise AssertionError(f"{cache.script} gave {answer}")
    seconds: float = answer["seconds"] / (3 * items)
    return seconds


# What a cache has to tell apart, and what not.

_LOG = "LOG = __file__ + '.log'\n"
_COUNTED = "    with open(LOG, 'a') as log:\n        log.write('called')\n"


@dataclass(frozen=True, slots=True)
class Case:
    """Two versions of a module with ``step`` and ``VALUE``; ``same`` if the second must be a hit."""

    name: str
    before: str
    after: str
    same: bool = False
    helper: tuple[str, str] | None = None
    """The two versions of a module that it imports."""


def _step(body: str = "return x + 1", *, around: str = "", value: str = "3", doc: str = "") -> str:
    return f"{_LOG}{around}\ndef step(x):\n{doc}{_COUNTED}    {body}\n\nVALUE = {value}\n"


def _values(one: str, other: str, *, same: bool = False, around: str = "", body: str | None = None) -> tuple[str, str]:
    body = body or "return f'{type(x).__name__} {x!r}'"
    return _step(body, around=around, value=one), _step(body, around=around, value=other)


_CLASS = (
    "class Thing:\n    def __init__(self, n):\n        self.n = n\n    def __repr__(self):\n        return 'Thing()'\n"
)
_METHOD = "class Thing:\n    def value(self):\n        return {}\ndef make():\n    return Thing()\n"
_WRAPPER = (
    "import functools\ndef more(function):\n    @functools.wraps(function)\n    def inner(x):\n"
    "        return function(x) + {}\n    return inner\n"
)
_ARRAY = (
    "import array\ndef numbers(middle):\n    a = array.array('d', bytes(8 * 50_000))\n    a[25_000] = middle\n"
    "    return a\n"
)


def _wrapped(added: int) -> str:
    return _step(around=_WRAPPER.format(added)).replace("def step", "@more\ndef step")


EDITS = (
    Case("the function's body", _step("return x + 1"), _step("return x + 2")),
    Case(
        "a default",
        _step().replace("(x)", "(x, by=1)").replace("+ 1", "+ by"),
        _step().replace("(x)", "(x, by=2)").replace("+ 1", "+ by"),
    ),
    Case("a constant it reads", _step("return x + K", around="K = 1\n"), _step("return x + K", around="K = 2\n")),
    Case(
        "a function it calls",
        _step("return f(x)", around="def f(x):\n    return x + 1\n"),
        _step("return f(x)", around="def f(x):\n    return x + 2\n"),
    ),
    Case(
        "a constant of a function it calls",
        _step("return f(x)", around="K = 1\ndef f(x):\n    return x + K\n"),
        _step("return f(x)", around="K = 2\ndef f(x):\n    return x + K\n"),
    ),
    Case(
        "a function in another module",
        _step("return helper_module.f(x)", around="import helper_module\n"),
        _step("return helper_module.f(x)", around="import helper_module\n"),
        helper=("def f(x):\n    return x + 1\n", "def f(x):\n    return x + 2\n"),
    ),
    Case(
        "a method of a class it makes",
        _step("return make().value()", around=_METHOD.format(1)),
        _step("return make().value()", around=_METHOD.format(2)),
    ),
    Case("its decorator", _wrapped(1), _wrapped(2)),
)
VALUES = (
    Case("1, then True", *_values("1", "True")),
    Case("1, then 1.0", *_values("1", "1.0")),
    Case("1, then '1'", *_values("1", "'1'")),
    Case("[1], then (1,)", *_values("[1]", "(1,)")),
    Case("objects of one repr", *_values("Thing(1)", "Thing(2)", around=_CLASS, body="return x.n")),
    Case("50,000 numbers, one differs", *_values("numbers(1)", "numbers(2)", around=_ARRAY, body="return x[25_000]")),
)
SAME = (
    Case("a comment and a docstring", _step(), _step("return x + 1  # one", doc="    '''Adds.'''\n"), same=True),
    Case("other code in the module", _step(), _step(around="def unrelated():\n    return 3\n"), same=True),
    Case("an equal set of texts", *_values("{'a', 'b', 'c'}", "{'c', 'b', 'a'}", body="return len(x)"), same=True),
    Case("an equal object", *_values("Thing(1)", "Thing(1)", around=_CLASS, body="return x.n"), same=True),
)
CASES = (*EDITS, *VALUES, *SAME)


def told_apart(cache: Cache) -> dict[str, list[str]]:
    """Run all cases in one process, edit them, run them in another: names of what went wrong, by what it is.

    ``stale``: it gave the result of before the edit. ``again``: it computed what it had. ``refused``: an error.
    """
    with folder() as where:
        directory = os.path.join(where, "cache")
        _write(where, 0)
        cache("cases", where, directory)
        _write(where, 1)
        found = cache("cases", where, directory)["cases"]
    wrong: dict[str, list[str]] = {"stale": [], "again": [], "refused": []}
    for number, case in enumerate(CASES):
        answer = found[f"case_{number:02}"]
        if "error" in answer:
            wrong["refused"].append(case.name)
        elif answer["given"] != answer["right"]:
            wrong["stale"].append(case.name)
        elif case.same and answer["called"]:
            wrong["again"].append(case.name)
    return wrong


def _write(where: str, version: int) -> None:
    for number, case in enumerate(CASES):
        source = (case.before, case.after)[version]
        if case.helper:
            source = source.replace("helper_module", f"helper_{number:02}")
            Path(where, f"helper_{number:02}.py").write_text(case.helper[version], encoding="utf-8")
        Path(where, f"case_{number:02}.py").write_text(source, encoding="utf-8")


def files_left(cache: Cache, items: int) -> int:
    """How many files a map of one node over so many items leaves."""
    with folder() as where:
        directory = os.path.join(where, "cache")
        cache("work", job(where, ONE), directory, items)
        return sum(len(files) for _, _, files in os.walk(directory))

"""The functions that every benchmark runs, and the same work by hand: the floors. No framework is needed."""

import graphlib
import inspect
import itertools
import linecache
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

import anyio

Function = Callable[..., Any]
Calls = Sequence[tuple[Function, str, str]]
"""A chain as data: function, the name of its one input, the name of its output."""

_sources = itertools.count()


def defined(source: str) -> list[Function]:
    """The functions that this source defines, in order; their source can be inspected like a module's."""
    filename = f"<benchmark {next(_sources)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {"__name__": "benchmarks.defined", "anyio": anyio}
    exec(compile(source, filename, "exec"), namespace)
    return [value for value in namespace.values() if inspect.isfunction(value)]


def chain(length: int, *, asynchronous: bool = False) -> list[Function]:
    """``n1(n0)``, ``n2(n1)`` and so on: each adds one."""
    define = "async def" if asynchronous else "def"
    return defined("".join(f"{define} n{i + 1}(n{i}: int) -> int:\n    return n{i} + 1\n" for i in range(length)))


def fan_out(width: int, *, asynchronous: bool = False, suspend: str = "") -> list[Function]:
    """``source(x)``, then ``m0(source)`` to ``m99(source)``, then ``sink(m0, ..., m99)``, their sum.

    ``suspend`` is a statement that each of the functions in the middle begins with.
    """
    define = "async def" if asynchronous else "def"
    middle = "".join(
        f"{define} m{i}(source: int) -> int:\n    {suspend or 'pass'}\n    return source + {i}\n" for i in range(width)
    )
    parameters = ", ".join(f"m{i}: int" for i in range(width))
    total = ", ".join(f"m{i}" for i in range(width))
    return defined(
        f"{define} source(x: int) -> int:\n    return x + 1\n{middle}"
        f"{define} sink({parameters}) -> int:\n    return sum(({total},))\n"
    )


def three(*, asynchronous: bool = False) -> list[Function]:
    """Three trivial functions in a row: ``double(x)``, ``plus_one(double)``, ``text(plus_one)``."""
    define = "async def" if asynchronous else "def"
    return defined(
        f"{define} double(x: int) -> int:\n    return x * 2\n"
        f"{define} plus_one(double: int) -> int:\n    return double + 1\n"
        f"{define} text(plus_one: int) -> str:\n    return str(plus_one)\n"
    )


async def fetch(x: int) -> int:
    """Wait as for a remote service, 10 ms, without holding the event loop."""
    await anyio.sleep(0.01)
    return x


def fetch_blocking(x: int) -> int:
    """The same for a framework that has no async functions: it holds a thread."""
    time.sleep(0.01)
    return x


def burn(rounds: int) -> int:
    """Pure Python that holds the interpreter."""
    total = 0
    for i in range(rounds):
        total += i * i % 7
    return total


def rounds_for(seconds: float) -> int:
    """How many rounds of `burn` take so long here, alone."""
    rounds = 100_000
    took = min(_seconds(burn, rounds) for _ in range(5))
    return max(1, round(rounds * seconds / took))


def _seconds(function: Function, *arguments: Any) -> float:
    begun = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - begun


# By hand.


def calls_of(functions: Sequence[Function]) -> Calls:
    """A chain as data, for `call_in_turn`."""
    return [(function, next(iter(inspect.signature(function).parameters)), function.__name__) for function in functions]


def call_in_turn(calls: Calls, values: dict[str, Any]) -> dict[str, Any]:
    """Call each function by keyword from a dict of names."""
    for function, needed, made in calls:
        values[made] = function(**{needed: values[needed]})
    return values


async def acall_in_turn(calls: Calls, values: dict[str, Any]) -> dict[str, Any]:
    """The same for async functions."""
    for function, needed, made in calls:
        values[made] = await function(**{needed: values[needed]})
    return values


def call_fan_out(functions: Sequence[Function], x: int) -> dict[str, Any]:
    """Source, middle and sink in a plain loop."""
    first, *middle, last = functions
    source = first(x=x)
    made = {function.__name__: function(source=source) for function in middle}
    return {"source": source, **made, "sink": last(**made)}


async def acall_fan_out(functions: Sequence[Function], x: int) -> dict[str, Any]:
    """Source, an anyio task for each of the middle, sink."""
    first, *middle, last = functions
    source = await first(x=x)
    made: dict[str, Any] = {}

    async def call(function: Function) -> None:
        made[function.__name__] = await function(source=source)

    async with anyio.create_task_group() as tasks:
        for function in middle:
            tasks.start_soon(call, function)
    return {"source": source, **made, "sink": await last(**made)}


def call_three(functions: Sequence[Function], items: Iterable[int]) -> dict[str, list[Any]]:
    """A loop that calls the three functions and keeps what each made."""
    double, plus_one, text = functions
    made: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
    for x in items:
        doubled = double(x=x)
        added = plus_one(double=doubled)
        made[0].append(doubled)
        made[1].append(added)
        made[2].append(text(plus_one=added))
    return {"double": made[0], "plus_one": made[1], "text": made[2]}


async def acall_three(functions: Sequence[Function], items: Iterable[int]) -> dict[str, list[Any]]:
    """The same for async functions."""
    double, plus_one, text = functions
    made: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
    for x in items:
        doubled = await double(x=x)
        added = await plus_one(double=doubled)
        made[0].append(doubled)
        made[1].append(added)
        made[2].append(await text(plus_one=added))
    return {"double": made[0], "plus_one": made[1], "text": made[2]}


async def amap_by_workers(function: Callable[[int], Awaitable[Any]], items: Sequence[int], workers: int) -> list[Any]:
    """So many anyio tasks that pull from one iterator: results in the order of the items."""
    results: list[Any] = [None] * len(items)
    source = iter(enumerate(items))

    async def work() -> None:
        for index, item in source:
            results[index] = await function(item)

    async with anyio.create_task_group() as tasks:
        for _ in range(workers):
            tasks.start_soon(work)
    return results


def order_by_hand(functions: Sequence[Function]) -> list[str]:
    """What building a graph takes at least: every signature, and a topological order."""
    needs: Mapping[str, Iterable[str]] = {
        function.__name__: tuple(inspect.signature(function).parameters) for function in functions
    }
    return [name for name in graphlib.TopologicalSorter(needs).static_order() if name in needs]

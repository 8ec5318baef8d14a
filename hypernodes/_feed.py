"""Where a map's rows come from: lists, or iterables that may be slow, async or endless."""

from __future__ import annotations

import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import anyio

from hypernodes._cost import CHEAP_S, ON_LOOP, Cost
from hypernodes._mapping import MapSpec, Rows, listed_rows, refuse_unmappable
from hypernodes._threads import default_threads, in_thread
from hypernodes.errors import MapInputError

END: Any = object()


class Feed(Protocol):
    """Rows, one at a time; ``END`` when there are no more."""

    waits: bool
    """Whether rows must be awaited with :meth:`pull`; otherwise :meth:`next` gives them at once."""

    def next(self) -> Any: ...

    async def pull(self) -> Any: ...

    async def aclose(self) -> None: ...


class ListFeed:
    """Rows that are all there."""

    waits = False

    def __init__(self, rows: Rows) -> None:
        self._rows = iter(rows)

    def next(self) -> Any:
        return next(self._rows, END)

    async def pull(self) -> Any:
        return next(self._rows, END)

    async def aclose(self) -> None:
        """Nothing is held."""


class StreamFeed:
    """Rows from iterables of the user's, read one row ahead of what is asked, and closed at the end.

    A sync iterator that is slow is read in a worker thread, so that it does not hold the loop.
    """

    waits = True

    def __init__(self, names: Sequence[str], sources: Sequence[Any], where: str) -> None:
        self._names = tuple(names)
        self._where = where
        self._columns = [_column(source) for source in sources]

    def next(self) -> Any:
        raise TypeError("a stream's rows are awaited")

    async def pull(self) -> Any:
        if len(self._columns) == 1:
            value = await self._columns[0].pull()
            return END if value is END else (value,)
        row = [await column.pull() for column in self._columns]
        ended = [name for name, value in zip(self._names, row, strict=True) if value is END]
        if not ended:
            return tuple(row)
        if len(ended) < len(row):
            raise MapInputError(
                f"{self._where} streams inputs of unequal length: {', '.join(map(repr, ended))} ended first"
            )
        return END

    async def aclose(self) -> None:
        with anyio.CancelScope(shield=True):
            for column in self._columns:
                await column.aclose()


class _SyncColumn:
    def __init__(self, source: Iterable[Any]) -> None:
        self._iterator: Iterator[Any] = iter(source)
        self._cost = ON_LOOP if isinstance(source, list | tuple | range) else Cost()

    async def pull(self) -> Any:
        cost = self._cost
        if cost.inline:
            began = time.perf_counter()
            value = next(self._iterator, END)
            now = time.perf_counter()
            if now - began > CHEAP_S:
                cost.doubted(now - began, now)
            return value
        value, spent = await in_thread(lambda: next(self._iterator, END), default_threads())
        cost.measured(*spent)
        return value

    async def aclose(self) -> None:
        close = getattr(self._iterator, "close", None)
        if callable(close):
            close()


class _AsyncColumn:
    def __init__(self, source: AsyncIterable[Any]) -> None:
        self._iterator: AsyncIterator[Any] = aiter(source)

    async def pull(self) -> Any:
        return await anext(self._iterator, END)

    async def aclose(self) -> None:
        aclose = getattr(self._iterator, "aclose", None)
        if callable(aclose):
            await aclose()


def _column(source: Any) -> _SyncColumn | _AsyncColumn:
    return _AsyncColumn(source) if isinstance(source, AsyncIterable) else _SyncColumn(source)


def stream_feed(spec: MapSpec, inputs: Mapping[str, Any], where: str) -> tuple[Feed, int | None]:
    """Return the feed of a stream's rows, and how many there are where that is known."""
    if spec.mode == "product":
        rows = listed_rows(spec, inputs, where)
        return ListFeed(rows), rows.count
    for name in spec.over:
        refuse_unmappable(name, inputs[name], where)
    sources = [inputs[name] for name in spec.over]
    if all(isinstance(source, list | tuple | range) for source in sources):
        rows = listed_rows(spec, inputs, where)
        return ListFeed(rows), rows.count
    return StreamFeed(spec.over, sources, where), None

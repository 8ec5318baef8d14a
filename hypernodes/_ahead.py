"""Rows of a source that may be slow: read while those before them are looked up, and handed on together."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import anyio

from hypernodes._crew import Crew
from hypernodes._feed import END, Feed
from hypernodes._run import Run, Sink

Row = tuple[int, tuple[Any, ...]]


class Ahead:
    """Reads a feed in a task of its own, as far as the sink has room; whoever asks gets what has come so far."""

    def __init__(self, feed: Feed, sink: Sink, run: Run, first: int, most: int) -> None:
        self._feed = feed
        self._sink = sink
        self._run = run
        self._next = first
        self._most = most
        self._rows: list[Row] = []
        self._error: Exception | None = None
        self._ended = False
        self._asked: anyio.Event | None = None
        """Set when rows have been taken, while the reader waits because there are as many as may be."""
        self._came: anyio.Event | None = None
        """Set when there is something, while somebody waits for it."""

    async def read(self, _: Crew) -> None:
        """Read to the end of the feed, or until it raises."""
        try:
            while await self._read_one():
                self._tell()
                if perf_counter() > self._run.yield_at:
                    await self._run.breathe()
        except Exception as error:  # noqa: BLE001 - raised to whoever asks, after the rows before it
            self._error = error
        self._ended = True
        self._tell()

    async def _read_one(self) -> bool:
        while self._sink.bounded and self._sink.full(self._next):
            await self._sink.room()
        if len(self._rows) >= self._most:
            self._asked = anyio.Event()
            await self._asked.wait()
            self._asked = None
        row = await self._feed.pull()
        if row is END:
            return False
        self._rows.append((self._next, row))
        self._next += 1
        return True

    def _tell(self) -> None:
        if self._came is not None:
            self._came.set()

    async def rows(self) -> list[Row]:
        """Return the rows that have come with their positions, at least one; none at the end.

        Raises:
            Exception: what the source raised.
        """
        if not self._rows and not self._ended:
            self._came = anyio.Event()
            await self._came.wait()
            self._came = None
        rows, self._rows = self._rows, []
        if self._asked is not None:
            self._asked.set()
        if not rows and self._error is not None:
            raise self._error
        return rows

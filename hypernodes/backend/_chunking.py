"""The rows of a map in chunks: taken as there is room for their results, as long as measured time says."""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import anyio

from hypernodes._feed import END, Feed
from hypernodes._run import Sink

MOST_ITEMS = 1 << 14
SLOW_ROW_S = 0.005
_GROWTH = 4
_WORTHWHILE = 0.1
"""Of the time that a chunk should take, what the last ones of a map should take at least."""


@dataclass(slots=True)
class Chunk:
    """Rows on their way to where they run."""

    first: int
    rows: list[tuple[Any, ...]]
    crashes: int = 0
    """How often this chunk, alone, has ended what ran it."""
    done: set[int] = field(default_factory=set)
    """Items whose results or failures have arrived."""


class Chunks:
    """Gives out a map's rows in chunks, to several lanes that each run one at a time.

    Args:
        feed: where rows come from.
        sink: where results go; while it is full, no row is taken.
        total: how many rows there are, where that is known.
        lanes: how many chunks are under way at once.
        target_s: seconds that a chunk should take.
        target_bytes: how large the results of a chunk should be at most.
        least: rows of the smallest chunk.
        size: rows of every chunk; None to go by what is measured.
        first: the position of the first row.
    """

    def __init__(
        self,
        feed: Feed,
        sink: Sink,
        total: int | None,
        *,
        lanes: int,
        target_s: float,
        target_bytes: float = math.inf,
        least: int = 1,
        size: int | None = None,
        first: int = 0,
    ) -> None:
        self._feed = feed
        self._sink = sink
        self._end = None if total is None else first + total
        self._lanes = lanes
        self._target_s = target_s
        self._target_bytes = target_bytes
        self._fixed = size is not None
        self._least = least
        self._size = size or least
        self._worthwhile = 1
        self._taken = first
        self._taking = anyio.Lock()
        self._exhausted = False
        self.redo: deque[Chunk] = deque()
        """What is to be run once more."""
        self.fresh_first = False
        """Whether rows that were never run come before those to be run once more."""

    async def next(self) -> Chunk | None:
        """Return the next rows to run; None when there are none left."""
        # A consumer may be waiting for just these, and for the room that would be needed for others.
        if self.redo and (self._sink.bounded or not self.fresh_first):
            return self.redo.popleft()
        async with self._taking:
            if self.redo and (self._sink.bounded or not self.fresh_first):
                return self.redo.popleft()
            chunk = await self._fresh()
        if chunk.rows:
            return chunk
        return self.redo.popleft() if self.redo else None

    async def _fresh(self) -> Chunk:
        chunk = Chunk(self._taken, [])
        size = self._next_size()
        while len(chunk.rows) < size and not self._exhausted:
            if self._sink.bounded and self._sink.full(self._taken):
                if chunk.rows or self.redo:
                    break
                await self._sink.room()
                continue
            began = time.monotonic()
            row = await self._feed.pull() if self._feed.waits else self._feed.next()
            if row is END:
                self._exhausted = True
                break
            chunk.rows.append(row)
            self._taken += 1
            if time.monotonic() - began > SLOW_ROW_S:
                # A slow source should not keep the rows there are from running.
                break
        return chunk

    def _next_size(self) -> int:
        size = self._size
        if self._sink.window is not None:
            # One lane should not take all that the consumer has room for.
            size = min(size, math.ceil(self._sink.window / self._lanes))
        if self._end is None or self._fixed:
            return size
        # Towards the end chunks get smaller, so that lanes finish together; but not so small that a call costs more.
        share = (self._end - self._taken) / (self._lanes if self._least > 1 else 2 * self._lanes)
        return min(size, max(self._worthwhile, math.ceil(share)))

    def measured(self, items: int, seconds: float, size: int = 0) -> None:
        """Note how long a chunk took, and the bytes of its results; the next ones should be near the targets."""
        if self._fixed:
            return
        wanted = int(self._target_s * items / max(seconds, 1e-9))
        self._worthwhile = max(1, int(_WORTHWHILE * wanted))
        fitting = self._target_bytes * items / max(size, 1)
        self._size = int(max(self._least, min(wanted, fitting, self._size * _GROWTH, MOST_ITEMS)))

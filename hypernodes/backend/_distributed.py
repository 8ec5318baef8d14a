"""A map in chunks of items over other machines: several calls at once, dead ones tried again, the guilty found."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

from hypernodes._crew import Crew
from hypernodes._run import Job, Run, Sink
from hypernodes.backend._chunking import Chunk, Chunks
from hypernodes.backend._remote import Line, RemoteBackend, Taker, opened, packed_job, packed_rows
from hypernodes.backend._replay import Replay
from hypernodes.backend._shares import tokens_within
from hypernodes.backend._wire import load_error
from hypernodes.errors import RemoteExecutionError, RemoteTimeoutError, SerializationError, WorkerCrashedError
from hypernodes.events import Emit, ItemFailed, format_path

TARGET_BYTES = 32 * 2**20
"""How large what a call brings or takes should be at most."""
ATTEMPTS = 2
"""How often a chunk is tried whose container dies, before its items are told apart."""
_MOST_DEATHS = 12
"""How many containers may die before any of them has finished a chunk, besides two for each call under way at once."""


class DistributedMap:
    """The items of one map, run in chunks elsewhere.

    Limits are shared out: each call gets its part of every limit, and there are no more calls at once than the
    smallest limit has tokens.
    """

    def __init__(
        self, place: RemoteBackend, line: Line, job: Job, sink: Sink, emit: Emit | None, replay: Replay
    ) -> None:
        assert job.map is not None
        assert job.feed is not None
        self._place = place
        self._line = line
        self._job = job
        self._replay = replay
        self._calls = itertools.count()
        self._run = job.run or Run(job.run_id, emit)
        self._taker = Taker(self._run, job, sink)
        most = [line.width, *tokens_within(job), *(count for count in (job.map.max_concurrency, job.total) if count)]
        self._lanes = max(1, min(most))
        self._chunks = Chunks(
            job.feed,
            sink,
            job.total,
            lanes=self._lanes,
            target_s=line.target_s,
            target_bytes=TARGET_BYTES,
            size=place.chunk_size,
        )
        self._chunks.fresh_first = True
        self._deaths = 0
        self._proven = False

    async def run(self) -> None:
        """Run every item."""
        job, lanes = self._job, self._lanes
        assert job.map is not None
        most = job.map.max_concurrency
        spec = replace(job.map, max_failures=None, max_concurrency=None if most is None else max(1, most // lanes))
        shared = await packed_job(job, self._place, self._replay.kinds, spec=spec, parts=lanes)
        self._shared = await self._line.share(shared)
        await Crew.run(self._manage)

    async def _manage(self, crew: Crew) -> None:
        for _ in range(self._lanes - 1):
            crew.start(self._lane)
        await self._lane(crew)

    async def _lane(self, crew: Crew) -> None:
        """Send one chunk after another, until there is nothing left to do."""
        while (chunk := await self._chunks.next()) is not None:
            call = next(self._calls)
            self._replay.begin(call)
            try:
                payload = await packed_rows(self._job, chunk.first, chunk.rows, self._place, call)
                send = self._line.call_alone if chunk.crashes else self._line.call
                reply = await send(payload, self._shared)
            except (SerializationError, RemoteTimeoutError, WorkerCrashedError) as error:
                self._replay.died(call, error)
                if isinstance(error, WorkerCrashedError):
                    self._died(chunk, error)
                else:
                    self._divided(chunk, error)
            else:
                await self._finished(chunk, call, len(payload), reply)

    async def _finished(self, chunk: Chunk, call: int, sent: int, reply: bytes) -> None:
        try:
            kind, answer = await opened(reply, self._replay, call)
        except RemoteExecutionError as error:
            if self._taker.raises:
                raise
            self._replay.died(call, error)
            self._divided(chunk, error)
            return
        self._replay.done(call, chunk.first, len(chunk.rows))
        if kind == "raised":
            raise load_error(answer, self._run.blame)
        if kind == "unreadable":
            self._divided(chunk, load_error(answer))
            return
        self._proven = True
        self._chunks.fresh_first = False
        self._chunks.measured(len(chunk.rows), answer.seconds, max(sent, len(reply)))
        await self._taker.take(answer, chunk.first, chunk.rows)

    def _died(self, chunk: Chunk, error: WorkerCrashedError) -> None:
        """Try a chunk again whose container died; if it dies again, find out which item does it."""
        self._deaths += 1
        if not self._proven and self._deaths >= _MOST_DEATHS + 2 * self._lanes:
            raise WorkerCrashedError(
                f"{self._deaths} {self._line.machines} that ran {self._job.plan.label} died before one had finished a "
                f"chunk; the last one: {error}"
            ) from error
        chunk.crashes += 1
        if chunk.crashes < ATTEMPTS:
            self._chunks.redo.append(chunk)
        else:
            self._divided(chunk, error)

    def _divided(self, chunk: Chunk, error: BaseException) -> None:
        """Run the halves of a chunk that cannot be run as a whole; an item that is alone fails."""
        if len(chunk.rows) > 1:
            middle = len(chunk.rows) // 2
            # A half has died as often as needs be to be halved when it does so once more.
            before = max(0, chunk.crashes - 1)
            self._chunks.redo.extend(
                [
                    Chunk(chunk.first, chunk.rows[:middle], before),
                    Chunk(chunk.first + middle, chunk.rows[middle:], before),
                ]
            )
            return
        path = (*self._job.path, chunk.first)
        if isinstance(error, WorkerCrashedError | RemoteTimeoutError):
            named = f"item {chunk.first} ({format_path(path)}): {error}"
            told = type(error)(named)
            told.__cause__ = error
            error = told
        self._run.blame(error, path)
        self._replay.tell_own(ItemFailed(self._run.run_id, path, time.time(), chunk.first, error))
        self._taker.failed(chunk.first, chunk.rows[0], error)

"""The worker's end of Dask: a payload is run on an event loop of its own, in the thread of its task."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import anyio
from distributed import WorkerPlugin, get_worker

from hypernodes.backend._entry import Shared, run_payload
from hypernodes.backend._message import packed
from hypernodes.backend._wire import dump_error

_NAME = "hypernodes"
NOT_RUN = b""
"""The reply of a task that was begun before, by a worker that is gone, or that nobody waits for any more."""
T = TypeVar("T")


def kept(data: bytes) -> bytes:
    """Return what tasks need, as the result of a task: Dask makes it again if the worker that has it dies."""
    return data


def run_task(
    key: str, payload: Sequence[bytes], digest: str | None, shared: Sequence[bytes], queue: str | None
) -> tuple[int, bytes]:
    """Run a payload; return how many batches of events were sent meanwhile, and the reply.

    Args:
        key: of this task.
        payload: the job, or a chunk of one, in pieces.
        digest: of what chunks share; None for a job.
        shared: what chunks share, in pieces.
        queue: name of the ``distributed.Queue`` that events go to while the job runs.
    """
    task = _Task(get_worker(), key, queue)
    common = None if digest is None else Shared(digest, partial(_joined, shared))
    try:
        reply = anyio.run(task.run, payload, common)
    except (SystemExit, KeyboardInterrupt) as error:
        # Raised where the caller waits; here it would end the worker, which others use too.
        reply = packed("raised", dump_error(error, None), events=[])
    return task.sent, reply


async def _joined(pieces: Sequence[bytes]) -> bytes:
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


async def on_loop(loop: Any, work: Callable[..., Awaitable[T]], *arguments: Any, **options: Any) -> T:
    """Await something on a tornado loop: this one, or one of another thread, without blocking this one."""
    theirs = loop.asyncio_loop
    if theirs is asyncio.get_running_loop():
        return await work(*arguments, **options)

    async def there() -> T:
        return await work(*arguments, **options)

    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(there(), theirs))


class _Task:
    """One task on a worker."""

    def __init__(self, worker: Any, key: str, queue: str | None) -> None:
        self._worker = worker
        self._key = key
        self._queue = queue
        self.sent = 0

    async def run(self, payload: Sequence[bytes], shared: Shared | None) -> bytes:
        """Run a payload, unless a worker died of it before; stop when the task is released."""
        with anyio.CancelScope() as scope:
            loop = asyncio.get_running_loop()
            stop = partial(loop.call_soon_threadsafe, scope.cancel)
            await on_loop(self._worker.loop, self._watched, stop)
            try:
                # Dask itself would let a task that kills its worker kill several more.
                if await self._noted("event_is_set"):
                    return NOT_RUN
                try:
                    await self._noted("event_set")
                    post = None if self._queue is None else self._post
                    return await run_payload(await _joined(payload), post, shared)
                finally:
                    await self._noted("event_clear")
            finally:
                _watch_of(self._worker).stops.pop(self._key, None)
        return NOT_RUN

    async def _watched(self, stop: Callable[[], Any]) -> None:
        """Have the task stopped when the worker hears that it is released; on the worker's loop."""
        watch = _watch_of(self._worker)
        if watch is None:
            watch = _Watch()
            await self._worker.plugin_add(plugin=watch, name=_NAME)
        watch.stops[self._key] = stop
        task = self._worker.state.tasks.get(self._key)
        if task is None or task.state != "executing":
            stop()

    async def _noted(self, request: str) -> Any:
        """Ask the scheduler about the note that the task has begun; a request that is sent is waited for."""
        with anyio.CancelScope(shield=True):
            return await on_loop(self._worker.loop, getattr(self._worker.scheduler, request), name=self._key)

    async def _post(self, batch: bytes) -> None:
        put = self._worker.scheduler.queue_put
        await on_loop(self._worker.loop, put, name=self._queue, data=[self._key, batch], timeout=None)
        self.sent += 1


class _Watch(WorkerPlugin):
    """Stops tasks whose results nobody waits for: Dask cannot."""

    def __init__(self) -> None:
        self.stops: dict[str, Callable[[], Any]] = {}

    def transition(self, key: Any, start: str, finish: str, **more: Any) -> None:
        """Hear that a task of the worker is in another state; on the worker's loop."""
        if finish == "released" and (stop := self.stops.pop(key, None)) is not None:
            stop()


def _watch_of(worker: Any) -> Any:
    return worker.plugins.get(_NAME)

"""Runs, and maps in chunks of items, on the workers of a Dask cluster."""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from hypernodes._bridge import blocking
from hypernodes._crew import Crew, unbroken
from hypernodes._node import checked_count
from hypernodes._run import Mode
from hypernodes._threads import current_async_library
from hypernodes.backend._entry import Shared
from hypernodes.backend._remote import Line, Placing, RemoteBackend
from hypernodes.backend._replay import Receive
from hypernodes.errors import DefinitionError, RemoteExecutionError, SerializationError, WorkerCrashedError

if TYPE_CHECKING:
    from distributed import Client

_PIECE_BYTES = 8 << 20
"""How much of a message one task brings to the scheduler, which warns of more than 10 MB."""
_ALONE_S = 15.0
"""Seconds after which it is said that a run waits for workers, of which there are none."""
_CLOSING_S = 5.0
"""Seconds that the scheduler gets to take leave of a run."""
_log = logging.getLogger("hypernodes")
T = TypeVar("T")
SharedRef = tuple[str, list[Any]]
"""What chunks share: its digest, and the futures of its pieces."""


class DaskBackend(RemoteBackend):
    """Runs pipelines on the workers of a Dask cluster: a map goes out in chunks of items, a run is one task.

    The engine on a worker is the one that runs here, so nesting, retries, errors, caching and events are as they are
    locally; limits are shared out among the chunks that run at once. Client, scheduler and workers need the same
    version of hypernodes. Needs ``pip install "hypernodes[dask]"`` and asyncio.

    Dask cannot stop a thread: when a run is cancelled, what awaits on a worker ends at once, and a sync function runs
    to its end first, holding its worker's thread. A chunk whose worker dies is tried again, and an item that kills
    its worker fails alone; for that, workers must come back (a ``Nanny`` restarts them) or others be there.

    Args:
        client: a ``distributed.Client``, with ``asynchronous=True`` or without; it stays open.
        mode: ``"distributed"``: a map goes out in chunks of items, several tasks at once.
            ``"single"``: a whole map is one task, as a run always is.
        chunk_size: items of a chunk; None to go by the time that they take.
        max_tasks: how many tasks of a distributed map there may be at once; None for one for each thread that the
            workers have when it begins. A cluster that adapts its size grows only where more tasks wait than it has
            threads: say there how many it may have.
        node_execution: as for :class:`PipelineExecutionEngine`, which runs on the workers.
        map_execution: likewise.
        max_workers: likewise.
        max_concurrency: likewise; of a distributed map, for each chunk.

    Raises:
        DefinitionError: an option is not what it must be.
        RemoteExecutionError: Dask is not installed.
    """

    def __init__(
        self,
        client: Client,
        *,
        mode: Placing = "distributed",
        chunk_size: int | None = None,
        max_tasks: int | None = None,
        node_execution: Mode = "async",
        map_execution: Mode = "async",
        max_workers: int | None = None,
        max_concurrency: int | None = None,
    ) -> None:
        super().__init__(
            mode=mode,
            chunk_size=chunk_size,
            node_execution=node_execution,
            map_execution=map_execution,
            max_workers=max_workers,
            max_concurrency=max_concurrency,
        )
        if not isinstance(client, _distributed().Client):
            raise DefinitionError(
                f"DaskBackend takes a distributed.Client, such as Client(cluster) or "
                f"await Client(address, asynchronous=True), not {client!r}"
            )
        self._client = client
        self._max_tasks = checked_count(max_tasks, "max_tasks", "DaskBackend")

    async def connected(self, label: str, receive: Receive | None, work: Callable[[Line], Awaitable[T]]) -> T:
        """Do some work with the cluster; leaving early ends what runs there."""
        _need(self._client)
        line = DaskLine(self._client, label, self._max_tasks)
        try:
            await line.look()
            return await work(line) if receive is None else await line.hearing(receive, partial(work, line))
        finally:
            await unbroken(line.close)

    def __getstate__(self) -> dict[str, Any]:
        """Refuse: its client is this process's."""
        raise SerializationError(
            f"{self!r} cannot be sent to another process, since its client cannot: let the pipeline around it run its "
            f"items in this one, without map_execution='parallel'"
        )

    def __repr__(self) -> str:
        return f"DaskBackend({self._client!r}, mode={self.mode!r})"


class DaskLine(Line):
    """Tasks of one run on a cluster.

    Args:
        client: the cluster's; everything is asked of it on its own loop.
        label: what is run, for messages.
        max_tasks: how many there may be at once; None for one for each thread there is.
    """

    target_s = 1.0
    machines = "Dask workers"

    def __init__(self, client: Any, label: str, max_tasks: int | None) -> None:
        self._client = client
        self._label = label
        self._max_tasks = max_tasks
        self._turns = _Turns()
        self._crowded = False
        self._told = False
        self._shared: list[Any] = []
        self._queue: str | None = None
        self._heard: defaultdict[str, int] = defaultdict(int)
        self._news = anyio.Event()

    async def look(self) -> None:
        """See how many threads the cluster's workers have."""
        threads = await self._asked(self._client.nthreads)
        self.width = self._max_tasks or max(1, sum(threads.values()))
        # Those that are not there now may come back.
        self._crowded = self._crowded or any(count > 1 for count in threads.values())

    async def share(self, data: bytes) -> SharedRef:
        """Leave with the cluster what tasks share, while the run lasts."""
        self._shared += (pieces := await self._asked(self._placed, data))
        return Shared.name(data), pieces

    async def call(self, payload: bytes, shared: SharedRef | None = None) -> bytes:
        """Have a task run; a whole job once more if its worker dies."""
        async with self._turns.beside():
            reply = await self._tried(payload, shared)
        if reply is not None:
            return reply
        if shared is None:
            return await self.call_alone(payload)
        raise self._died()

    async def call_alone(self, payload: bytes, shared: SharedRef | None = None) -> bytes:
        """Have a task run again, with no other of this run on the same worker."""
        await self.look()
        async with self._turns.alone() if self._crowded else self._turns.beside():
            reply = await self._tried(payload, shared)
        if reply is None:
            raise self._died()
        return reply

    def _died(self) -> WorkerCrashedError:
        return WorkerCrashedError(
            f"the Dask worker that ran {self._label} died, and again when it was tried once more: out of memory, or a "
            f"crash; see the worker's log"
        )

    async def _tried(self, payload: bytes, shared: SharedRef | None) -> bytes | None:
        """Run one task and return its reply; None if its worker died."""
        from hypernodes.backend._dask_worker import NOT_RUN

        key = f"hypernodes-{uuid.uuid4().hex}"
        reply = NOT_RUN
        try:
            sent, reply = await self._asked(self._result, key, payload, shared)
        finally:
            if reply == NOT_RUN:
                # Nobody else may be there to take back that it has begun.
                await unbroken(partial(self._leaving, "event_clear", name=key))
        while self._heard[key] < sent:
            await self._news.wait()
        del self._heard[key]
        return reply or None

    async def _result(self, key: str, payload: bytes, shared: SharedRef | None) -> tuple[int, bytes]:
        """Submit a task and wait for it; on the client's loop."""
        from distributed.scheduler import KilledWorker

        from hypernodes.backend._dask_worker import NOT_RUN, run_task

        digest, common = shared or (None, [])
        pieces = [payload] if len(payload) <= _PIECE_BYTES else await self._placed(payload)
        arguments = (key, pieces, digest, common, self._queue)
        future = self._client.submit(run_task, *arguments, key=key, pure=False)
        try:
            return await self._made(future)
        except KilledWorker:
            return 0, NOT_RUN
        finally:
            # Nobody waits for it any more: if it runs still, its worker is told to stop.
            _release([future, *(pieces if pieces != [payload] else ())])

    async def _made(self, future: Any) -> tuple[int, bytes]:
        """Wait for a task; say so if there is nobody to run it, which may be so for as long as the cluster lives."""
        while True:
            with anyio.move_on_after(_ALONE_S):
                return await future  # type: ignore[no-any-return]
            if not self._told and not await self._client.nthreads():
                self._told = True
                _log.warning("the Dask cluster has no workers: %s waits until one comes", self._label)

    async def _placed(self, data: bytes) -> list[Any]:
        """Bring bytes to the cluster; on the client's loop. Return the futures of their pieces."""
        from hypernodes.backend._dask_worker import kept

        starts = range(0, len(data), _PIECE_BYTES)
        return [self._client.submit(kept, data[start : start + _PIECE_BYTES], pure=False) for start in starts]

    async def hearing(self, receive: Receive, work: Callable[[], Awaitable[T]]) -> T:
        """Do some work, and hand over meanwhile the events that tasks send."""
        self._queue = f"hypernodes-{uuid.uuid4().hex}"
        await self._asked(self._client.scheduler.queue_create, name=self._queue)
        made: list[T] = []

        async def hear(_: Crew) -> None:
            # Ended by a last record: the scheduler would keep a request that was left.
            with anyio.CancelScope(shield=True):
                while await self._hear(receive):
                    pass

        async def both(crew: Crew) -> None:
            crew.start(hear)
            try:
                made.append(await work())
            finally:
                await unbroken(partial(self._leaving, "queue_put", name=self._queue, data=None, timeout=None))

        await Crew.run(both)
        return made[0]

    async def _hear(self, receive: Receive) -> bool:
        """Hand over what has been sent, in order; say whether more may come."""
        get = partial(self._client.scheduler.queue_get, name=self._queue, timeout=None)
        records = [await self._asked(get, batch=False), *await self._asked(get, batch=True)]
        for sent in (record["value"] for record in records):
            if sent is None:
                return False
            key, batch = sent
            await receive(batch)
            self._heard[key] += 1
        self._news.set()
        self._news = anyio.Event()
        return True

    async def close(self) -> None:
        """Release what was left with the cluster."""
        await self._asked(self._closed)

    async def _closed(self) -> None:
        _release(self._shared)
        self._shared = []
        if self._queue is not None and self._client.status == "running":
            self._client._send_to_scheduler({"op": "queue_release", "name": self._queue})

    async def _leaving(self, request: str, **options: Any) -> None:
        """Ask a last thing of the scheduler, which may be gone."""
        with contextlib.suppress(RemoteExecutionError), anyio.move_on_after(_CLOSING_S):
            if self._client.status == "running":
                await self._asked(getattr(self._client.scheduler, request), **options)

    async def _asked(self, work: Callable[..., Awaitable[T]], *arguments: Any, **options: Any) -> T:
        """Await something on the client's loop."""
        from hypernodes.backend._dask_worker import on_loop

        with _translated(self._label):
            return await on_loop(self._client.loop, work, *arguments, **options)


class _Turns:
    """Lets many go side by side, or one alone."""

    def __init__(self) -> None:
        self._going = 0
        self._waiting = 0
        self._changed = anyio.Event()
        self._one = anyio.Lock()

    @contextlib.asynccontextmanager
    async def beside(self) -> Any:
        """Go beside others, when none waits to go alone."""
        while self._waiting:
            await self._changed.wait()
        self._going += 1
        try:
            yield
        finally:
            self._going -= 1
            self._tell()

    @contextlib.asynccontextmanager
    async def alone(self) -> Any:
        """Go alone, when those that go are done."""
        self._waiting += 1
        try:
            async with self._one:
                while self._going:
                    await self._changed.wait()
                yield
        finally:
            self._waiting -= 1
            self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()


def _release(futures: list[Any]) -> None:
    for future in futures:
        future.release()


def _distributed() -> Any:
    try:
        import distributed
    except ModuleNotFoundError as error:
        raise RemoteExecutionError('DaskBackend needs Dask: pip install "hypernodes[dask]"') from error
    return distributed


def _need(client: Any) -> None:
    """Raise an error that says what to do, if a client cannot be used from here."""
    if current_async_library() != "asyncio":
        raise RemoteExecutionError("Dask's client needs asyncio; under trio, call run() in a thread")
    if client.status != "running":
        advice = "await it first" if client._asynchronous else "make a new one"
        raise RemoteExecutionError(f"the Dask client is not connected ({client.status}): {advice}")
    if client._asynchronous and not client.asynchronous and blocking.get():
        raise RemoteExecutionError(
            "run() and map() hold the event loop that this Client(asynchronous=True) needs: await arun() or amap(), "
            "or take a Client without asynchronous=True, which has a loop of its own"
        )
    if not client.loop.asyncio_loop.is_running():
        raise RemoteExecutionError("the event loop of this Client(asynchronous=True) has ended: make a new one here")


@contextlib.contextmanager
def _translated(label: str) -> Iterator[None]:
    """Raise one clear error of ours for what Dask raises, with its own as the cause."""
    from concurrent.futures import CancelledError

    try:
        yield
    except CancelledError as error:
        raise RemoteExecutionError(
            f"{label} was given up by Dask ({error}): its scheduler is gone, or someone has cancelled or restarted it"
        ) from error
    except ModuleNotFoundError as error:
        raise RemoteExecutionError(
            f"{label} cannot run on the Dask cluster, which has no module {error.name!r}: install the same packages "
            f"for its scheduler and workers as here, hypernodes[dask] among them"
        ) from error
    except OSError as error:
        raise RemoteExecutionError(f"the connection to Dask's scheduler is lost ({error}): {label} ended") from error
    except Exception as error:
        raise RemoteExecutionError(f"Dask could not run {label}: {type(error).__name__}: {error}") from error

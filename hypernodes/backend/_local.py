"""The default place: this process, its threads, and worker processes on this machine."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import anyio
import anyio.lowlevel

from hypernodes._engine import DEFAULT_ITEMS, PipelineExecutionEngine
from hypernodes._run import Job, Mode, Run, Sink, Workers, saving
from hypernodes.backend._base import Backend
from hypernodes.events import Emit

if TYPE_CHECKING:
    from hypernodes.backend._process import WorkerPool


class LocalBackend(Backend):
    """Runs pipelines on the caller's event loop.

    Takes the options of :class:`PipelineExecutionEngine`. A run that needs worker processes starts them and
    stops them when it ends; inside ``async with backend:`` they are kept from run to run.

    >>> backend = LocalBackend(map_execution="threaded", max_workers=4)
    >>> backend
    LocalBackend(map_execution='threaded', max_workers=4)
    """

    def __init__(
        self,
        *,
        node_execution: Mode = "async",
        map_execution: Mode = "async",
        max_workers: int | None = None,
        max_concurrency: int | None = None,
    ) -> None:
        self.engine = PipelineExecutionEngine.of(self, node_execution, map_execution, max_workers, max_concurrency)
        self._kept: dict[object, tuple[WorkerPool, int]] = {}

    async def arun(self, job: Job, emit: Emit | None = None) -> dict[str, Any]:
        """Run a job on this event loop."""
        if job.run is not None:
            return await self.engine.arun(job, job.run, self)
        run = Run(job.run_id, emit, job.refresh, nested=job.nested)
        try:
            return await saving(run, job, lambda: self.engine.arun(job, run, self))
        finally:
            await run.aclose()

    async def amap(self, job: Job, sink: Sink, emit: Emit | None = None) -> None:
        """Run a mapped job on this event loop, or in worker processes."""
        if job.run is not None:
            await self.engine.amap(job, job.run, self, sink)
            return
        run = Run(job.run_id, emit, job.refresh, nested=job.nested)
        try:
            await saving(run, job, lambda: self.engine.amap(job, run, self, sink))
        finally:
            await run.aclose()

    def items_at_once(self) -> int:
        """Return how many items of a stream are on their way at once, where its caller does not say."""
        return self.engine.max_concurrency or DEFAULT_ITEMS

    async def __aenter__(self) -> Self:
        from hypernodes.backend._process import WorkerPool

        token = anyio.lowlevel.current_token()
        pool, holders = self._kept.get(token) or (WorkerPool(self.engine.max_workers), 0)
        self._kept[token] = pool, holders + 1
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        token = anyio.lowlevel.current_token()
        pool, holders = self._kept.pop(token)
        if holders > 1:
            self._kept[token] = pool, holders - 1
            return
        with anyio.CancelScope(shield=True):
            await pool.aclose()

    def start_workers(self) -> tuple[Workers, bool]:
        """Return worker processes, and whether the run that asks for them has to stop them."""
        from hypernodes.backend._process import WorkerPool

        kept = self._kept.get(anyio.lowlevel.current_token()) if self._kept else None
        return (kept[0], False) if kept is not None else (WorkerPool(self.engine.max_workers), True)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.engine,)

    def __repr__(self) -> str:
        default = PipelineExecutionEngine()
        names = ("node_execution", "map_execution", "max_workers", "max_concurrency")
        said = [
            f"{name}={getattr(self.engine, name)!r}"
            for name in names
            if getattr(self.engine, name) != getattr(default, name)
        ]
        return f"LocalBackend({', '.join(said)})"


def _rebuild(engine: PipelineExecutionEngine) -> LocalBackend:
    return LocalBackend(
        node_execution=engine.node_execution,
        map_execution=engine.map_execution,
        max_workers=engine.max_workers,
        max_concurrency=engine.max_concurrency,
    )

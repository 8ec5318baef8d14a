"""The state of one run, private to it: limits, threads, processes, and who failed where."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import anyio
from anyio.lowlevel import checkpoint

from hypernodes._cost import Cost
from hypernodes._crew import Crew
from hypernodes._feed import Feed
from hypernodes._mapping import ItemFailure, MapSpec, Path
from hypernodes._node import Node
from hypernodes._plan import INHERIT, ExecutionPlan
from hypernodes._program import BoundCall, Program
from hypernodes._threads import default_threads
from hypernodes.events import Emit, format_path

if TYPE_CHECKING:
    from hypernodes._engine import PipelineExecutionEngine
    from hypernodes._recipe import Tracer
    from hypernodes.backend._shares import Shares

T = TypeVar("T")

SLICE_S = 0.003
"""Seconds of work on the loop after which a run lets others have it."""

SAVE_S = 1.0
"""Seconds after which what is on its way to a cache is written."""

Bound = anyio.Semaphore | anyio.CapacityLimiter
BoundKey = Node[..., Any] | tuple[ExecutionPlan, str] | str
"""A node with ``max_concurrency``, a plan and the name of a limit that it sets, or a limit set further out."""
Mode = Literal["sequential", "async", "threaded", "parallel"]


class Sink(Protocol):
    """Where the results of a map go, as items finish; called on the loop's thread."""

    @property
    def lazy(self) -> bool:
        """Whether it takes values that are in a cache and not loaded, with their digests."""
        ...

    @property
    def bounded(self) -> bool:
        """Whether it can be full."""
        ...

    @property
    def window(self) -> int | None:
        """How many rows may be on their way at once; None for a sink that is never full."""
        ...

    def full(self, taken: int) -> bool:
        """Say whether the map, having taken so many rows, should wait for :meth:`room` before another."""
        ...

    async def room(self) -> None:
        """Wait until the sink may have room again."""
        ...

    def deliver(self, index: int, outputs: tuple[Any, ...], digests: Sequence[Any] | None = None) -> None:
        """Take an item's outputs, in the order of the wanted names, with their digests where there is a cache."""
        ...

    def fail(self, failure: ItemFailure) -> None:
        """Take an item's failure (``on_error="collect"``)."""
        ...

    def collected(self) -> Mapping[str, Any]:
        """Return what was gathered, by name; nothing for a sink that passes results on."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a backend is asked to run: a plan with its inputs, once or mapped."""

    plan: ExecutionPlan
    inputs: Mapping[str, Any]
    """Values by name; of a map those that all items share."""
    run_id: str
    path: Path
    wanted: tuple[str, ...] | None = None
    """The outputs to make; None for all."""
    map: MapSpec | None = None
    feed: Feed | None = None
    """Of a map: its :class:`~hypernodes._feed.Feed`."""
    limits: Mapping[str, Bound] | None = None
    """Limits that enclosing pipelines have set."""
    shares: Shares | None = None
    """Of a job that runs elsewhere: what it has of the run's bounds."""
    total: int | None = None
    """Of a map: how many rows there are, where that is known."""
    first: int | None = None
    """Of a part of a map: the position of its first row in the whole, whose start and end are told by others."""
    cache: Any = None
    """The store of the enclosing pipelines; None for no cache."""
    refresh: frozenset[str] = frozenset()
    """Names of the outputs that are recomputed although a cache has them."""
    given: frozenset[str] = frozenset()
    """Names of the inputs that are being recomputed, so that what depends on them is recomputed too."""
    nested: bool = False
    """Whether a function of a node asks for it."""
    run: Run | None = None
    """The run that this job is part of, when both are in this process."""


class Workers(Protocol):
    """Worker processes, started when first needed."""

    tokens: anyio.Semaphore
    """One for each worker; held around a :meth:`call`."""

    async def call(
        self,
        step: BoundCall,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
        path: Path,
        *,
        tell: Callable[[Any], None],
        ready: Callable[[], None],
    ) -> Any:
        """Call one function in a worker process.

        ``tell`` is called with the pieces of a generator as they come, ``ready`` when the worker is there.
        """
        ...

    async def map(self, work: MapWork, template: list[Any]) -> None:
        """Run a map's items in chunks in worker processes."""
        ...

    async def aclose(self) -> None:
        """Stop every worker."""
        ...


class Place(Protocol):
    """The backend that a scope runs on, as far as the engine asks it for something."""

    def start_workers(self) -> tuple[Workers, bool]:
        """Return worker processes, and whether the run that asks for them has to stop them."""
        ...


@dataclass(frozen=True, slots=True)
class MapWork:
    """One map, ready to run: what to run, on which rows, and where results go."""

    scope: Scope
    program: Program
    inputs: Mapping[str, Any]
    """What all items share, by name."""
    spec: MapSpec
    feed: Feed
    total: int | None
    """How many rows there are, where that is known."""
    sink: Sink
    origin: Origin | None = None
    """Of a nested map with a cache: what is known of its inputs."""
    first: int | None = None
    """Of a part of a map: the position of its first row in the whole."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a nested map's inputs come from, when they may be in a cache and not loaded."""

    digests: Iterator[tuple[Any, ...]] | None
    """For each row, the digests of its values; None where values are to be hashed."""
    reload: Callable[[], Awaitable[tuple[Mapping[str, Any], list[tuple[Any, ...]]]]]
    """Load all of it; return what all items share, and the rows."""


class Run:
    """What the parts of one run share."""

    __slots__ = (
        "_bounds",
        "_lanes",
        "_nested",
        "_own_workers",
        "_threads",
        "_tracers",
        "_workers",
        "blamed",
        "emit",
        "prefixes",
        "refresh",
        "run_id",
        "yield_at",
    )

    def __init__(
        self, run_id: str, emit: Emit | None, refresh: frozenset[str] = frozenset(), *, nested: bool = False
    ) -> None:
        self.run_id = run_id
        self._nested = nested
        self.emit = emit
        self.refresh = refresh
        self._tracers: dict[Any, Tracer] = {}
        self.blamed: dict[int, tuple[BaseException, Path]] = {}
        """Errors on their way out, by identity, with the path of the node where each began."""
        self.yield_at = time.perf_counter() + SLICE_S
        self.prefixes: dict[Node[..., Any], bytes] = {}
        """Of nodes whose results are kept: what stands for their code, found out once in a run."""
        self._bounds: dict[BoundKey, Bound] = {}
        self._lanes: dict[Cost, anyio.Semaphore] = {}
        self._threads: dict[int, anyio.CapacityLimiter] = {}
        self._workers: dict[Place, Workers] = {}
        self._own_workers: list[Workers] = []

    async def breathe(self) -> None:
        """Let the loop's other tasks have a turn, and be cancelled if that is due."""
        # Moved on before waiting, so that the run's other tasks do not all stop here in the same turn.
        self.yield_at = time.perf_counter() + SLICE_S
        await checkpoint()
        self.yield_at = time.perf_counter() + SLICE_S

    def bound(self, key: BoundKey, value: int | anyio.CapacityLimiter) -> Bound:
        """Return the bound that every use of a key in this run shares."""
        bound = self._bounds.get(key)
        if bound is None:
            bound = anyio.Semaphore(value, max_value=value, fast_acquire=True) if isinstance(value, int) else value
            self._bounds[key] = bound
        return bound

    def threads(self, max_workers: int | None) -> anyio.CapacityLimiter:
        """Return the limiter of worker threads: this run's own, or the default of this event loop."""
        if max_workers is not None:
            limiter = self._threads.get(max_workers)
            if limiter is None:
                limiter = self._threads[max_workers] = anyio.CapacityLimiter(max_workers)
            return limiter
        return default_threads()

    def lanes(self, cost: Cost, count: int) -> anyio.Semaphore:
        """Return what keeps a function that computes from running in more threads than help it."""
        lanes = self._lanes.get(cost)
        if lanes is None:
            lanes = self._lanes[cost] = anyio.Semaphore(count or cpu_count(), fast_acquire=True)
        return lanes

    def workers(self, place: Place) -> Workers:
        """Return the worker processes of a backend in this run."""
        workers = self._workers.get(place)
        if workers is None:
            workers, own = place.start_workers()
            self._workers[place] = workers
            if own:
                self._own_workers.append(workers)
        return workers

    def tracer(self, store: Any) -> Tracer | None:
        """Return what this run knows of a cache; None for no cache."""
        if store is None:
            return None
        from hypernodes.cache._buffer import identity

        tracer = self._tracers.get(identity(store))
        if tracer is None:
            from hypernodes._recipe import Tracer
            from hypernodes.cache._session import CacheSession

            tracer = self._tracers[identity(store)] = Tracer(CacheSession(store, nested=self._nested), self.refresh)
        return tracer

    async def save_late(self) -> None:
        """Write to caches what has waited for a while, for as long as the run takes."""
        while True:
            await anyio.sleep(SAVE_S)
            await self.save()

    async def save(self) -> None:
        """Write to caches what waits to be written."""
        with anyio.CancelScope(shield=True):
            for tracer in list(self._tracers.values()):
                await tracer.session.flush()

    def leave_thread(self) -> bool:
        """Say whether a running thread may be left behind when its node is cancelled: not in this process."""
        return False

    async def aclose(self) -> None:
        """Stop the worker processes that this run started; finish what it writes to caches."""
        closing = [tracer.session.aclose for tracer in self._tracers.values() if tracer.session.unwritten]
        closing += [workers.aclose for workers in self._own_workers]
        if closing:
            await Crew.run(partial(_finish, closing))

    def blame(self, error: BaseException, path: Path) -> bool:
        """Note on an error the innermost node it came from; say whether this was the first to note it."""
        if id(error) in self.blamed:
            return False
        self.blamed[id(error)] = error, path
        kind = "node" if isinstance(path[-1], str) else "item"
        note = f"in {kind} {path[-1]!r} at {format_path(path)}"
        if note not in getattr(error, "__notes__", ()):
            # An exception may refuse it, such as a frozen dataclass.
            with contextlib.suppress(Exception):
                error.add_note(note)
        return True

    def forgive(self, error: BaseException, place: Path) -> Path:
        """Return where an error began, and forget what went wrong at a place: someone has taken it."""
        began = self.blamed.pop(id(error), (error, place))[1]
        # The others are of nodes beside it, which failed while they were being cancelled.
        others = [key for key, (_, path) in self.blamed.items() if path[: len(place)] == place]
        for key in others:
            del self.blamed[key]
        return began


class Scope:
    """One pipeline within a run: its place, its engine, and the limits that hold in it."""

    __slots__ = ("backend", "cache", "emit", "engine", "limits", "path", "plan", "run", "timeout")

    def __init__(
        self,
        run: Run,
        plan: ExecutionPlan,
        path: Path,
        engine: PipelineExecutionEngine,
        backend: Place,
        limits: Mapping[str, Bound],
        cache: Tracer | None = None,
    ) -> None:
        self.run = run
        self.plan = plan
        self.path = path
        self.engine = engine
        self.backend = backend
        self.emit = run.emit
        settings = plan.settings
        self.cache = cache if settings.cache is INHERIT else run.tracer(settings.cache)
        self.limits = limits
        if settings.limits:
            own = {name: run.bound((plan, name), value) for name, value in settings.limits.items()}
            self.limits = {**limits, **own}
        # An inherited timeout is kept by the pipeline that set it: it encloses this one.
        self.timeout: float | None = None if settings.timeout is INHERIT else settings.timeout

    def at(self, index: int | None) -> Path:
        """Return the path of this pipeline, or of one of its items."""
        return self.path if index is None else (*self.path, index)

    def inside(self, plan: ExecutionPlan, path: Path) -> Scope:
        """Return the scope of a nested pipeline."""
        return Scope(self.run, plan, path, self.engine, self.backend, self.limits, self.cache)

    def wants(self, kind: type) -> bool:
        """Say whether anyone listens for a kind of event."""
        return self.emit is not None and kind in self.emit.kinds


async def _finish(closing: Iterable[Callable[[], Awaitable[None]]], crew: Crew) -> None:
    """Close things one after another, all of them, whoever cancels and whatever fails."""

    async def each(_: Crew) -> None:
        with anyio.CancelScope(shield=True):
            async with contextlib.AsyncExitStack() as stack:
                for close in reversed(list(closing)):
                    stack.push_async_callback(close)

    # In a task of its own: asyncio's own task.cancel() reaches into a shielded scope.
    crew.start(each)


async def saving(run: Run, job: Job, work: Callable[[], Awaitable[T]]) -> T:
    """Do the work of a run; where it has a cache, write what it makes as it goes along."""
    if job.cache is None and not job.plan.has_cache:
        return await work()
    made: list[T] = []

    async def both(crew: Crew) -> None:
        crew.start(lambda _: run.save_late())
        made.append(await work())
        crew.stop()

    await Crew.run(both)
    return made[0]


def in_order(bounds: Iterable[Bound]) -> list[Bound]:
    """Return bounds, each once, in the order in which all who need several take them: nobody waits in a circle then.

    In a worker process they have the parent's order.
    """
    return [bound for _, bound in sorted({getattr(each, "number", id(each)): each for each in bounds}.items())]


@contextlib.asynccontextmanager
async def held(bounds: Iterable[Bound]) -> AsyncIterator[None]:
    """Hold one token of each bound; only ever around a user's function."""
    taken: list[Callable[[], None]] = []
    try:
        for bound in bounds:
            if isinstance(bound, anyio.CapacityLimiter):
                # A borrower of our own: the task may hold the user's limiter already.
                borrower = object()
                await bound.acquire_on_behalf_of(borrower)
                taken.append(lambda bound=bound, borrower=borrower: bound.release_on_behalf_of(borrower))  # type: ignore[misc]
            else:
                await bound.acquire()
                taken.append(bound.release)
        yield
    finally:
        for release in reversed(taken):
            release()


def cpu_count() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

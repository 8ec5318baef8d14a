"""A map in chunks of items over worker processes: dead workers, and who was guilty."""

from __future__ import annotations

import contextlib
import signal
import time
from collections import deque
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio

from hypernodes._crew import Crew
from hypernodes._engine import PipelineExecutionEngine
from hypernodes._map_run import Failures
from hypernodes._plan import ExecutionPlan, PlanStep
from hypernodes._program import BoundPlan, Program
from hypernodes._run import Bound, BoundKey, MapWork, Mode, Scope, held, in_order
from hypernodes._trace import Trace
from hypernodes.backend._chunking import MOST_ITEMS, Chunk, Chunks
from hypernodes.backend._wire import Travelling, load_error, loads, packed, packed_checked, with_error
from hypernodes.errors import SerializationError, WorkerCrashedError
from hypernodes.events import Event, ItemFailed, format_path

if TYPE_CHECKING:
    from hypernodes.backend._process import WorkerPool, WorkerProcess

TARGET_S = 0.1
"""Seconds that a chunk should take: long against the 0.3 ms it costs to send, short against a wait."""
STARTED, DONE = 1, 2
"""What the worker's board says of an item of its chunk."""
_MOST_STILLBIRTHS = 3


class WorkerDied(Exception):  # noqa: N818 - never leaves this package
    """The worker's process ended while it was in use."""


class ChunkedMap:
    """The items of one map, run by worker processes."""

    def __init__(self, pool: WorkerPool, work: MapWork, template: list[Any]) -> None:
        self._pool = pool
        self.scope = scope = work.scope
        self._spec = spec = work.spec
        self._first = work.first or 0
        self._total = total = work.total
        self._sink = work.sink
        self._inputs = work.inputs
        self._template = template
        origin = work.origin
        self._digests = None if origin is None or origin.digests is None else list(origin.digests)
        """For each row, the digests of its values, where they are known."""
        self._plan = work.program.plan
        self._wanted = tuple(name for name, _ in work.program.outputs)
        self.saves = scope.cache is not None or self._plan.has_cache
        """Whether workers write to a cache."""
        self._failures = Failures(scope.run, scope.path, spec, work.sink, scope.plan.label)
        program = work.program
        self._attempts = _crash_attempts(program)
        self._stillbirths = 0
        items_at_once = scope.engine.items_at_once(spec)
        most = spec.max_concurrency or scope.engine.max_concurrency or pool.size
        lanes = min(pool.size, most, total if total is not None else pool.size)
        self._lanes = max(1, lanes)
        # Items that never wait run one at a time in each worker, and it is known which one killed it.
        self._limit = max(1, items_at_once // self._lanes) if _waits(program) else 1
        least = min(self._limit, MOST_ITEMS)
        self._chunks = Chunks(
            work.feed, work.sink, total, lanes=self._lanes, target_s=TARGET_S, least=least, first=self._first
        )
        self.next_chunk = self._chunks.next
        self._keys = _bounds(program.plan, scope)
        self.bounds = in_order(self._keys.values())
        """Bounds that workers ask for, by number."""
        self.described: list[Any] = []
        """What a worker needs to know before its first chunk, pickled once."""

    async def run(self) -> None:
        """Run every item."""
        if self._total == 0:
            return
        self.described = self._describe()
        tracer = self.scope.cache
        if tracer is None:
            await Crew.run(self._manage)
            return
        await tracer.session.flush()  # for workers to find
        try:
            await Crew.run(self._manage)
        finally:
            tracer.session.look_again()

    async def _manage(self, crew: Crew) -> None:
        for _ in range(self._lanes - 1):
            crew.start(self._lane)
        await self._lane(crew)

    def _describe(self) -> list[Any]:
        scope = self.scope
        number = {id(bound): number for number, bound in enumerate(self.bounds)}
        numbers = {key: number[id(bound)] for key, bound in self._keys.items()}
        description = {
            "plan": self._plan,
            "spec": replace(self._spec, max_failures=None),
            "inputs": self._inputs,
            "path": scope.path,
            "kinds": scope.emit.kinds if scope.emit is not None else frozenset(),
            "engine": PipelineExecutionEngine(
                _inner(scope.engine.node_execution), "async", 1, scope.engine.max_concurrency
            ),
            "bounds": numbers,
            "limits": {name: numbers[name] for name in scope.limits},
            "wanted": self._wanted,
            "run_id": scope.run.run_id,
            "refresh": scope.run.refresh,
            "limit": self._limit,
            "backend": scope.backend,
            **self._cache_described(),
        }
        named = {f"inputs[{name!r}]": value for name, value in self._inputs.items()}
        named |= _functions(self._plan)
        return packed_checked(description, named, self._plan.label)

    def _cache_described(self) -> dict[str, Any]:
        """Return what workers need to know of the cache, which they use themselves."""
        tracer = self.scope.cache
        if tracer is None:
            return {"cache": None}
        session = tracer.session
        if not getattr(session.store, "travels", False):
            session.warn(None, "worker processes cache nothing: they can share a DiskCache, and not this cache")
            return {"cache": None}
        assert isinstance(self._template, Trace)
        recipe = self._template.recipe
        slots = recipe.program.slots
        return {
            "cache": session.store,
            "given": recipe.given,
            "asked": recipe.asked,
            "digests": {name: self._template.digests[slots[name]] for name in self._inputs},
            "traced": getattr(self._sink, "traced", False),
        }

    def packed_rows(self, chunk: Chunk) -> list[Any] | None:
        """Return a chunk's rows, pickled; None when some cannot be: they fail, and the others are tried again."""
        try:
            return packed(chunk.rows)
        except Exception:  # noqa: BLE001 - pickling runs the user's code; find out which row it was
            for position, row in enumerate(chunk.rows):
                index = chunk.first + position
                named = {f"{name}[{index}]": value for name, value in zip(self._spec.over, row, strict=True)}
                try:
                    packed_checked(row, named, f"item {index} of {self._plan.label}")
                except SerializationError as error:
                    self.scope.run.blame(error, self.scope.at(index))
                    self.failed(chunk, index, error)
                else:
                    self._chunks.redo.append(Chunk(index, [row], chunk.crashes))
            return None

    async def _lane(self, crew: Crew) -> None:
        """Give chunks to one worker after another, until there is nothing left to do."""
        while (chunk := await self.next_chunk()) is not None:
            with contextlib.suppress(WorkerDied):
                async with held([self._pool.tokens]), self._pool.worker() as worker:
                    await _Lane(self, worker, chunk).run()

    def digests_of(self, chunk: Chunk) -> list[tuple[Any, ...]] | None:
        """Return the digests of a chunk's rows, where they are known."""
        start = chunk.first - self._first
        return None if self._digests is None else self._digests[start : start + len(chunk.rows)]

    def remember(self, noted: Any) -> None:
        """Take over what a worker has noted of the entries that it has written."""
        if noted and self.scope.cache is not None:
            self.scope.cache.session.remember(noted)
            self.scope.cache.session.look_again()

    def measured(self, items: int, seconds: float) -> None:
        """Note how long a chunk took; the next ones should take TARGET_S."""
        self._stillbirths = 0
        self._chunks.measured(items, seconds)

    def results(self, chunk: Chunk, items: list[Any], events: list[Event]) -> None:
        """Take what a worker has finished."""
        emit = self.scope.emit
        for event in events:
            if emit is not None:
                emit(with_error(event, load_error))
        for index, outputs, digests, error in items:
            chunk.done.add(index)
            if error is not None:
                self.failed(chunk, index, self.rebuilt(error))
                continue
            try:
                made = loads(outputs)
            except Exception as reason:  # noqa: BLE001 - unpickling runs the user's code
                unreadable = SerializationError(
                    f"an output of item {index} cannot be rebuilt here: {type(reason).__name__}: {reason}"
                )
                unreadable.__cause__ = reason
                self.scope.run.blame(unreadable, self.scope.at(index))
                self.failed(chunk, index, unreadable)
            else:
                self._sink.deliver(index, made, digests)

    def failed(self, chunk: Chunk, index: int, error: BaseException) -> None:
        """Hand an item's failure to the sink, or raise it."""
        if not isinstance(error, Exception):
            raise error
        row = chunk.rows[index - chunk.first]
        self._failures.take(index, dict(zip(self._spec.over, row, strict=True)), error)

    def rebuilt(self, error: Travelling) -> BaseException:
        """Return an error that a worker sent."""
        return load_error(error, self.scope.run.blame)

    def crashed(self, chunk: Chunk, board: bytes, pid: int, status: int) -> None:
        """Find out which item killed a worker; what it has not done goes to other workers."""
        left = [index for index in range(chunk.first, chunk.first + len(chunk.rows)) if index not in chunk.done]
        started = [index for index in left if board[index - chunk.first] == STARTED]
        self._chunks.redo.extend(
            Chunk(index, [chunk.rows[index - chunk.first]], chunk.crashes) for index in left if index not in started
        )
        if not started:
            self._stillbirths += 1
            if self._stillbirths >= _MOST_STILLBIRTHS:
                raise WorkerCrashedError(
                    f"worker processes of {self.scope.plan.label} end before they run an item; "
                    f"the last one (pid {pid}) {describe_end(status)}"
                )
        elif len(started) > 1:
            # Several ran side by side: each one alone will show which it was.
            alone = [Chunk(index, [chunk.rows[index - chunk.first]], chunk.crashes) for index in started]
            self._chunks.redo.extend(alone)
        elif chunk.crashes + 1 < self._attempts:
            index = started[0]
            self._chunks.redo.append(Chunk(index, [chunk.rows[index - chunk.first]], chunk.crashes + 1))
        else:
            index = started[0]
            path = self.scope.at(index)
            error = WorkerCrashedError(
                f"the worker process (pid {pid}) that ran item {index} ({format_path(path)}) {describe_end(status)}"
            )
            self.scope.run.blame(error, path)
            emit = self.scope.emit
            if emit is not None and ItemFailed in emit.kinds:
                emit(ItemFailed(self.scope.run.run_id, path, time.time(), index, error))
            self.failed(chunk, index, error)


class _Lane:
    """One worker with the chunks that it is given, one at a time."""

    def __init__(self, chunked: ChunkedMap, worker: WorkerProcess, chunk: Chunk) -> None:
        self._map = chunked
        self._worker = worker
        self._chunk: Chunk | None = chunk
        self._held: dict[int, deque[anyio.Event]] = {}

    async def run(self) -> None:
        await Crew.run(self._serve)

    async def _serve(self, crew: Crew) -> None:
        worker, chunked = self._worker, self._map
        try:
            worker.saves = chunked.saves
            await worker.send("map", chunked.described)
            kind, *message = await worker.receive()
            if kind == "raised":
                raise chunked.rebuilt(message[0])
            while self._chunk is not None and worker.alive:
                await self._run_chunk(crew, self._chunk)
                self._chunk = await chunked.next_chunk() if worker.alive else None
        except WorkerDied:
            assert self._chunk is not None
            board = bytes(worker.board[: len(self._chunk.rows)])
            status = await worker.aclose()
            chunked.crashed(self._chunk, board, worker.pid, status)
            raise
        finally:
            crew.stop()

    async def _run_chunk(self, crew: Crew, chunk: Chunk) -> None:
        worker, chunked = self._worker, self._map
        rows = chunked.packed_rows(chunk)
        if rows is None:
            return
        worker.board[: len(chunk.rows)] = bytes(len(chunk.rows))
        first = chunk.first
        known = chunked.digests_of(chunk)
        await worker.send("chunk", first, rows, known)
        while True:
            kind, *message = await worker.receive()
            match kind:
                case "results":
                    chunked.results(chunk, *message)
                case "acquire":
                    crew.start(partial(self._hold, message[0]))
                case "release":
                    self._held[message[0]].popleft().set()
                case "done":
                    seconds, error, spent, noted = message
                    chunked.remember(noted)
                    if spent:
                        # A thread that was given up runs on in it.
                        await worker.aclose()
                    if error is not None:
                        raise chunked.rebuilt(error)
                    chunked.measured(len(chunk.rows), seconds)
                    return

    async def _hold(self, number: int, crew: Crew) -> None:
        """Hold a token for the worker until it gives it back."""
        released = anyio.Event()
        async with held([self._map.bounds[number]]):
            self._held.setdefault(number, deque()).append(released)
            with contextlib.suppress(WorkerDied):  # who reads from it will see, and knows what it was running
                await self._worker.send("granted", number)
            await released.wait()


def _inner(mode: Mode) -> Mode:
    """Return how nodes run inside a worker: it is a process of its own already."""
    return "async" if mode == "parallel" else mode


def _waits(program: Program) -> bool:
    """Say whether items may wait, so that several should run side by side in one worker."""
    return any(
        _waits(step.program) if isinstance(step, BoundPlan) else step.node.kind in ("async", "async_generator")
        for step in program.steps
    )


def _functions(plan: ExecutionPlan) -> dict[str, Any]:
    """Return the functions of a plan by name, for finding the one that cannot be pickled."""
    named: dict[str, Any] = {}
    for step in plan.steps:
        named |= _functions(step.plan) if isinstance(step, PlanStep) else {step.name: step.node.func}
    return named


def _crash_attempts(program: Program) -> int:
    """Return how often an item may be tried whose worker dies: as its nodes' retry policies allow."""
    most = 1
    for step in program.steps:
        if isinstance(step, BoundPlan):
            most = max(most, _crash_attempts(step.program))
        elif step.node.retry is not None and step.node.retry.covers(WorkerCrashedError()):
            most = max(most, step.node.retry.attempts)
    return most


def _bounds(plan: ExecutionPlan, scope: Scope) -> dict[BoundKey, Bound]:
    """Return every bound that a plan's nodes may hold, by what both processes know it by."""
    bounds: dict[BoundKey, Bound] = dict(scope.limits.items())
    for step in plan.steps:
        if isinstance(step, PlanStep):
            bounds |= _bounds(step.plan, scope)
        elif step.node.max_concurrency is not None:
            bounds[step.node] = scope.run.bound(step.node, step.node.max_concurrency)
    for name, value in plan.settings.limits.items():
        bounds[plan, name] = scope.run.bound((plan, name), value)
    return bounds


def describe_end(status: int) -> str:
    """Say how a process ended."""
    if status >= 0:
        return f"exited with status {status} before it was done"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    hint = " (out of memory?)" if -status == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"

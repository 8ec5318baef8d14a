"""The seam to other machines: a payload of bytes goes out, a reply of bytes comes back; the same for every place."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import anyio
from anyio.lowlevel import checkpoint

from hypernodes._bridge import run_sync
from hypernodes._engine import DEFAULT_ITEMS, PipelineExecutionEngine, told_map
from hypernodes._feed import END
from hypernodes._map_run import Failures
from hypernodes._mapping import MapSpec, listed_rows
from hypernodes._node import checked_count
from hypernodes._plan import INHERIT, ExecutionPlan, PlanStep
from hypernodes._run import Job, Mode, Run, Sink
from hypernodes._threads import default_threads, in_thread
from hypernodes._traceback import user_frames
from hypernodes.backend._base import Backend
from hypernodes.backend._entry import ItemsReply
from hypernodes.backend._handle import RunHandle
from hypernodes.backend._message import packed, unpacked_reply
from hypernodes.backend._replay import Receive, Replay
from hypernodes.backend._shares import sharing
from hypernodes.backend._site import Site, is_local
from hypernodes.backend._wire import find_unpicklable, load_error
from hypernodes.errors import DefinitionError, NodeTimeoutError, RemoteExecutionError, SerializationError
from hypernodes.events import Emit

if TYPE_CHECKING:
    from hypernodes._pipeline import Pipeline
    from hypernodes.backend._preflight import Preflight

Placing = Literal["single", "distributed"]
T = TypeVar("T")


class Line(ABC):
    """An open connection to a place, for the calls of one run."""

    width: int = 1
    """How many calls may be under way at once."""
    target_s: float = 5.0
    """Seconds that a call should take for its own cost to be small."""
    machines: ClassVar[str] = "containers"
    """What calls run on, for messages."""

    @abstractmethod
    async def call(self, payload: bytes, shared: Any = None) -> bytes:
        """Have :func:`~hypernodes.backend._entry.run_payload` called there and return its reply.

        Args:
            payload: what to call it with.
            shared: of a chunk: what :meth:`share` returned.

        Raises:
            WorkerCrashedError: what ran it died.
            RemoteTimeoutError: it took longer than the place allows.
        """

    async def call_alone(self, payload: bytes, shared: Any = None) -> bytes:
        """Call again what died before, with no other call beside it that could be the cause.

        As :meth:`call` where each call has a process of its own.
        """
        return await self.call(payload, shared)

    @abstractmethod
    async def share(self, data: bytes) -> Any:
        """Leave there what several calls need, and return what to name it by in a call."""


class RemoteBackend(Backend):
    """A place on other machines: subclasses say how a payload gets there and its reply back.

    Takes the options of :class:`PipelineExecutionEngine`, for the engine that runs there.

    Args:
        mode: ``"single"``: a run, or a whole map, is one call. ``"distributed"``: a map goes out in chunks of items,
            as many at once as the place takes.
        chunk_size: items of a chunk; None to go by the time that they take.
        node_execution: as for the engine.
        map_execution: likewise.
        max_workers: likewise.
        max_concurrency: likewise; of a distributed map, for each chunk.
    """

    remote: ClassVar[bool] = True

    def __init__(
        self,
        *,
        mode: Placing = "single",
        chunk_size: int | None = None,
        node_execution: Mode = "async",
        map_execution: Mode = "async",
        max_workers: int | None = None,
        max_concurrency: int | None = None,
    ) -> None:
        if mode not in ("single", "distributed"):
            raise DefinitionError(f"mode of {type(self).__name__} is 'single' or 'distributed', not {mode!r}")
        checked_count(chunk_size, "chunk_size", type(self).__name__)
        if chunk_size is not None and mode == "single":
            raise DefinitionError(f"chunk_size of {type(self).__name__} is for mode='distributed'")
        self.mode = mode
        self.chunk_size = chunk_size
        self.engine = PipelineExecutionEngine.of(self, node_execution, map_execution, max_workers, max_concurrency)

    @abstractmethod
    async def connected(self, label: str, receive: Receive | None, work: Callable[[Line], Awaitable[T]]) -> T:
        """Do some work with a line that is open meanwhile; leaving early ends what runs there.

        Args:
            label: what is run, for messages.
            receive: takes batches of events while the job runs, where the place can send them; None when nobody
                listens.
            work: what to do.
        """

    async def arun(self, job: Job, emit: Emit | None = None) -> dict[str, Any]:
        """Run a job there and return the wanted outputs by name, within the timeout of its pipeline."""
        replay = Replay(emit)
        with replay.to_its_end(), self._in_time(job):
            async with sharing(job, self._at_once) as sharer:
                outputs: dict[str, Any] = await self._answer(sharer, replay)
        return outputs

    @contextlib.contextmanager
    def _in_time(self, job: Job) -> Iterator[None]:
        """Hold a pipeline's timeout: who waits does so no longer, whatever it is for."""
        seconds = job.plan.settings.timeout
        if seconds is INHERIT or seconds is None:
            yield
            return
        with anyio.move_on_after(seconds) as deadline:
            yield
        if deadline.cancelled_caught:
            error = NodeTimeoutError(
                f"{job.plan.label} did not finish within {seconds:g} s, the time until it could begin on {self!r} "
                f"included"
            )
            if job.run is not None:
                job.run.blame(error, job.path)
            raise error

    async def amap(self, job: Job, sink: Sink, emit: Emit | None = None) -> None:
        """Run a job there for each row of its feed: in one call, whose results come when all are done, or in chunks."""
        assert job.map is not None
        async with sharing(job, self._at_once) as sharer:
            if self.mode == "distributed":
                await self._distributed(sharer, sink, emit)
            else:
                await self._single(sharer, sink, emit)

    @property
    def _at_once(self) -> int | None:
        """How many items of a map may run at once; None where nobody knows on how many machines."""
        return None if self.mode == "distributed" else self.engine.max_concurrency or DEFAULT_ITEMS

    async def _single(self, job: Job, sink: Sink, emit: Emit | None) -> None:
        run = job.run or Run(job.run_id, emit)
        rows = await _all_rows(job, run)
        if not rows:
            await told_map(emit, job.run_id, job.path, job.inputs, 0, sink, checkpoint)
            return
        replay = Replay(emit)
        with replay.to_its_end():
            answer: ItemsReply = await self._answer(job, replay, rows)
        taker = Taker(run, job, sink)
        await taker.take(answer, 0, rows)

    def items_at_once(self) -> int:
        """Return how many items of a stream are on their way at once, where its caller does not say."""
        return self.engine.max_concurrency or DEFAULT_ITEMS

    async def asubmit(self, job: Job, bare: str | None = None) -> RunHandle:
        """Start a job that outlives this process, as one call; ``bare`` names the one output that is its result."""
        rows = None if job.map is None else await _all_rows(job, Run(job.run_id, None))
        payload = await packed_job(job, self, frozenset(), rows, bare=bare, detached=True)
        return RunHandle(await self.detached(payload, job.plan.label))

    async def detached(self, payload: bytes, label: str) -> str:
        """Start a call that outlives this process; return the id that :class:`RunHandle` finds it by."""
        raise RemoteExecutionError(f"what runs on {self!r} ends with this process: submit {label} to a ModalBackend")

    def site(self) -> Site | None:
        """Return what is known of where a run goes; None for nothing."""
        return None

    def require(self, modules: Iterable[str]) -> None:
        """Raise an error for modules of this project that are certainly not there."""
        own = [module for module in modules if is_local(module)]
        if own and (site := self.site()) is not None:
            site.require(own)

    async def acheck(
        self, pipeline: Pipeline, inputs: Mapping[str, Any] | None = None, map_over: str | Sequence[str] | None = None
    ) -> Preflight:
        """Say what a run would fail of, or suffer from, before anything is started.

        Everything is pickled as a run does it, and nothing is sent: which objects cannot be pickled, the bytes of each
        input, Python, packages and modules of yours against the image, caches that do not work there. What it says is
        data (:class:`~hypernodes.backend.Preflight`), and prints as a list.

        Args:
            pipeline: what would be run here, whatever its own backend is.
            inputs: values by name, as for ``arun``, or with ``map_over`` as for ``amap``.
            map_over: the inputs that take a list.

        Raises:
            DefinitionError: it is no pipeline.
            DependencyError: an input is missing or unknown.
            MapInputError: what is mapped is no list of items, or the lists are of unequal length.
        """
        from hypernodes.backend._preflight import preflight

        if not isinstance(getattr(pipeline, "_plan", None), ExecutionPlan):
            raise DefinitionError(f"check of {type(self).__name__} takes a Pipeline, not {pipeline!r}")
        given, spec = pipeline._checked(inputs, map_over)
        read: list[str] = []
        if spec is not None:
            read = [name for name in spec.over if isinstance(given[name], Iterator | AsyncIterable)]
            if not read:
                listed_rows(spec, given, pipeline._plan.label)
        sent = {name: value for name, value in given.items() if name not in read}
        found: Preflight
        plan = pipeline.with_backend(self)._plan
        found, _ = await in_thread(lambda: preflight(plan, sent, self, self.site()), default_threads())
        unread = [f"the items of inputs[{name!r}], which is read as it runs" for name in read]
        return replace(found, unknown=(*found.unknown, *unread))

    def check(
        self, pipeline: Pipeline, inputs: Mapping[str, Any] | None = None, map_over: str | Sequence[str] | None = None
    ) -> Preflight:
        """:meth:`acheck` from sync code."""
        with user_frames:
            return run_sync(lambda: self.acheck(pipeline, inputs, map_over))

    async def _answer(self, job: Job, replay: Replay, rows: list[tuple[Any, ...]] | None = None) -> Any:
        payload = await packed_job(job, self, replay.kinds, rows)
        reply = await self.connected(job.plan.label, replay.receive, lambda line: line.call(payload))
        kind, answer = await opened(reply, replay)
        if kind == "raised":
            raise load_error(answer, None if job.run is None else job.run.blame)
        return answer

    async def _distributed(self, job: Job, sink: Sink, emit: Emit | None) -> None:
        from hypernodes.backend._distributed import DistributedMap

        replay = Replay(emit, job.path)

        async def chunks(line: Line) -> None:
            await DistributedMap(self, line, job, sink, emit, replay).run()

        async def items() -> None:
            if job.total != 0:
                with replay.to_its_end():
                    await self.connected(job.plan.label, replay.receive, chunks)

        await told_map(emit, job.run_id, job.path, job.inputs, job.total, sink, items)


class Taker:
    """Hands what became of a map's rows to its sink."""

    def __init__(self, run: Run, job: Job, sink: Sink) -> None:
        assert job.map is not None
        self._run = run
        self._over = job.map.over
        self._sink = sink
        self.raises = job.map.on_error == "raise"
        """Whether an item's failure is raised."""
        self._failures = Failures(run, job.path, job.map, sink, job.plan.label)

    async def take(self, answer: ItemsReply, first: int, rows: list[tuple[Any, ...]]) -> None:
        """Hand over the results and failures of some rows."""
        failed = dict(answer.failures)
        run, sink, bounded = self._run, self._sink, self._sink.bounded
        deliver = sink.deliver
        for index, outputs in enumerate(zip(*answer.lists, strict=True), first):
            while bounded and sink.full(index):
                await sink.room()
            if index in failed:
                self.failed(index, rows[index - first], load_error(failed[index], run.blame))
            else:
                deliver(index, outputs)
            if perf_counter() > run.yield_at:
                await run.breathe()

    def failed(self, index: int, row: tuple[Any, ...], error: BaseException) -> None:
        """Hand over an item's failure, or raise it."""
        if not isinstance(error, Exception):
            raise error
        self._failures.take(index, dict(zip(self._over, row, strict=True)), error)


async def packed_job(
    job: Job,
    place: RemoteBackend,
    kinds: frozenset[type],
    rows: list[tuple[Any, ...]] | None = None,
    *,
    spec: MapSpec | None = None,
    **more: Any,
) -> bytes:
    """Return a job as a payload for a place; it is pickled in a thread.

    Args:
        job: what is to be run.
        place: where; pipelines inside that ask for it are there already.
        kinds: the events that are to be sent back.
        rows: of a map, unless they come in chunks.
        spec: of a map; None for the job's own.
        more: further entries of the description.

    Raises:
        SerializationError: part of it cannot be pickled; the message has its path, such as
            ``inputs['encoder']._lock``.
    """
    described = {
        "inputs": job.inputs,
        "run_id": job.run_id,
        "path": job.path,
        "wanted": job.wanted,
        "map": spec or job.map,
        "rows": rows,
        "shares": job.shares,
        "cache": job.cache if getattr(job.cache, "travels", False) else None,
        "refresh": job.refresh,
        "given": job.given,
        "engine": place.engine,
        "kinds": kinds,
        **more,
    }

    def pack() -> bytes:
        try:
            # By itself, so that a process that has run it before knows it again.
            plan = packed("plan", job.plan, place=place)
            return packed("job", {"plan": plan, **described}, place=place)
        except (SerializationError, RemoteExecutionError):
            raise
        except Exception as error:  # pickling runs the user's code
            raise _unpicklable(job, named_parts(job, rows or ()), error) from error

    data: bytes
    data, _ = await in_thread(pack, default_threads())
    return data


def named_parts(job: Job, rows: Iterable[tuple[Any, ...]] = (), first: int = 0) -> dict[str, Any]:
    """Return what a job is made of, by the names that its user knows the parts by."""
    named: dict[str, Any] = {f"inputs[{name!r}]": value for name, value in job.inputs.items()}
    if job.map is not None:
        for index, row in enumerate(rows, first):
            named |= {f"inputs[{name!r}][{index}]": value for name, value in zip(job.map.over, row, strict=True)}
    return named | _functions(job.plan)


def _unpicklable(job: Job, named: Mapping[str, Any], error: Exception) -> SerializationError:
    found = next((found for name, part in named.items() if (found := find_unpicklable(part, name))), None)
    where, culprit, reason = found or (job.plan.label, job.plan, error)
    return SerializationError(
        f"{job.plan.label} cannot be sent to another machine: {where} is a {type(culprit).__name__} ({reason}). "
        f"Make it inside the node, or give its class __getstate__/__reduce__"
    )


async def packed_rows(job: Job, first: int, rows: list[tuple[Any, ...]], place: RemoteBackend, call: int) -> bytes:
    """Return some rows of a map as the payload of a chunk, with the number of the call; pickled in a thread.

    Raises:
        SerializationError: one of them cannot be pickled; the message has its path.
    """

    def pack() -> bytes:
        try:
            return packed("chunk", {"rows": rows, "first": first, "call": call}, place=place)
        except (SerializationError, RemoteExecutionError):
            raise
        except Exception as error:  # pickling runs the user's code
            named = named_parts(replace(job, inputs={}), rows, first)
            raise _unpicklable(job, named, error) from error

    data: bytes
    data, _ = await in_thread(pack, default_threads())
    return data


async def opened(reply: bytes, replay: Replay, call: int | None = None) -> tuple[str, Any]:
    """Return what a reply says, after the events that came with it; it is unpickled in a thread.

    Raises:
        RemoteExecutionError: it cannot be rebuilt here.
    """
    (kind, answer, batches), _ = await in_thread(lambda: unpacked_reply(reply), default_threads())
    replay.tell(batches, call)
    return kind, answer


async def _all_rows(job: Job, run: Run) -> list[tuple[Any, ...]]:
    assert job.feed is not None
    rows = []
    while (row := await job.feed.pull() if job.feed.waits else job.feed.next()) is not END:
        rows.append(row)
        if perf_counter() > run.yield_at:
            await run.breathe()
    return rows


def _functions(plan: ExecutionPlan) -> dict[str, Any]:
    """Return the functions and bound values of a plan by name, for finding the one that cannot be pickled."""
    named: dict[str, Any] = {f"bind({name}=...)": value for name, value in plan.constants.items()}
    for step in plan.steps:
        named |= _functions(step.plan) if isinstance(step, PlanStep) else {step.name: step.node.func}
    return named

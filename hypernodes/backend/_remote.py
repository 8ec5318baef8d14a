"""The seam to other machines: a payload of bytes goes out, a reply of bytes comes back; the same for every place.

A payload is a plain header and a pickled job. The header is checked before anything is unpickled, since a pickle of
one Python's functions may crash another.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from io import BytesIO
from typing import Any, TypeVar

import anyio
import cloudpickle

from hypernodes._crew import Crew
from hypernodes._engine import PipelineExecutionEngine
from hypernodes._feed import END, ListFeed
from hypernodes._map_run import Columns
from hypernodes._mapping import Rows
from hypernodes._plan import INHERIT, ExecutionPlan, Inherit, PlanStep
from hypernodes._run import Job, Mode, Run, Sink, saving
from hypernodes._version import __version__
from hypernodes.backend._base import Backend
from hypernodes.backend._local import LocalBackend
from hypernodes.backend._wire import Parts, dump_error, find_unpicklable, load_error, loads, with_error
from hypernodes.cache._disk import KEY_VARIABLE, DiskCache
from hypernodes.errors import CacheError, RemoteExecutionError, SerializationError
from hypernodes.events import Emit, Emitter, Event

MAGIC = b"hypernodes"
FORMAT = 1
_COUNT = struct.Struct("<I")
_LENGTH = struct.Struct("<Q")
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
POST_S = 0.2
"""Seconds between two batches of events that are sent while a job runs."""
T = TypeVar("T")

Post = Callable[[bytes], Awaitable[None]]
"""Sends a batch of events to the caller while the job runs."""


class RemoteBackend(Backend):
    """A place on another machine: subclasses say how a payload gets there and its reply back.

    Takes the options of :class:`PipelineExecutionEngine`, for the engine that runs there.
    """

    def __init__(
        self,
        *,
        node_execution: Mode = "async",
        map_execution: Mode = "async",
        max_workers: int | None = None,
        max_concurrency: int | None = None,
    ) -> None:
        self.engine = PipelineExecutionEngine(node_execution, map_execution, max_workers, max_concurrency)

    @abstractmethod
    async def submit(self, payload: bytes, job: Job, receive: Callable[[bytes], None] | None) -> bytes:
        """Have :func:`run_payload` called there and return its reply.

        Args:
            payload: what to call it with.
            job: what the payload is made of.
            receive: takes batches of events while the job runs, where the place can send them; None when nobody
                listens.
        """

    async def arun(self, job: Job, emit: Emit | None = None) -> dict[str, Any]:
        """Run a job there and return the wanted outputs by name."""
        outputs: dict[str, Any] = await self._answer(job, emit)
        return outputs

    async def amap(self, job: Job, sink: Sink, emit: Emit | None = None) -> None:
        """Run a job there for each row of its feed; results are handed over when all are done."""
        columns, failures = await self._answer(job, emit)
        failed = {failure.index for failure in failures}
        for index, outputs in enumerate(zip(*columns, strict=True)):
            if index not in failed:
                if sink.bounded:
                    while sink.full(index):
                        await sink.room()
                sink.deliver(index, outputs)
        for failure in failures:
            sink.fail(failure)

    async def _answer(self, job: Job, emit: Emit | None) -> Any:
        payload = await pack_job(job, self, emit.kinds if emit is not None else frozenset())

        def receive(batch: bytes) -> None:
            assert emit is not None
            for event in unpacked(batch)[1]:
                emit(with_error(event, load_error))

        reply = await self.submit(payload, job, receive if emit is not None and emit.kinds else None)
        kind, answer, events = unpacked(reply)
        if emit is not None:
            for event in events:
                emit(with_error(event, load_error))
        if kind == "raised":
            raise load_error(answer, None if job.run is None else job.run.blame)
        return answer


async def pack_job(job: Job, place: RemoteBackend, kinds: frozenset[type]) -> bytes:
    """Return a job as a payload for a place.

    Raises:
        SerializationError: part of it cannot be pickled; the message has its path, such as
            ``inputs['encoder']._lock``.
    """
    rows = None
    if job.feed is not None:
        rows = []
        while (row := await job.feed.pull()) is not END:
            rows.append(row)
    cache = job.cache if getattr(job.cache, "travels", False) else None
    described = {
        "plan": job.plan,
        "inputs": job.inputs,
        "run_id": job.run_id,
        "path": job.path,
        "wanted": job.wanted,
        "map": job.map,
        "rows": rows,
        "limits": {name: _tokens(bound) for name, bound in (job.limits or {}).items()},
        "cache": cache,
        "refresh": job.refresh,
        "given": job.given,
        "engine": place.engine,
        "kinds": kinds,
    }
    try:
        return packed("job", described, place=place)
    except SerializationError:
        raise
    except Exception as error:  # pickling runs the user's code
        named: dict[str, Any] = {f"inputs[{name!r}]": value for name, value in job.inputs.items()}
        if job.map is not None and rows is not None:
            for position, name in enumerate(job.map.over):
                named |= {f"inputs[{name!r}][{index}]": row[position] for index, row in enumerate(rows)}
        named |= _functions(job.plan)
        found = next((found for name, part in named.items() if (found := find_unpicklable(part, name))), None)
        where, culprit, reason = found or (job.plan.label, job.plan, error)
        raise SerializationError(
            f"{job.plan.label} cannot be sent to another machine: {where} is a {type(culprit).__name__} ({reason}). "
            f"Make it inside the node, or give its class __getstate__/__reduce__"
        ) from error


async def run_payload(payload: bytes, post: Post | None = None) -> bytes:
    """Run a payload here and return the reply; whatever happens, it is a reply. The remote end of the seam.

    Args:
        payload: what :func:`pack_job` made.
        post: where to send events while the job runs; without it they come with the reply.
    """
    try:
        _, described = unpacked(payload)
    except RemoteExecutionError as error:
        return packed("raised", dump_error(error, None), [])
    except CacheError as error:
        return packed("raised", dump_error(error, None), [])
    except Exception as error:  # noqa: BLE001 - unpickling runs the user's code
        return packed("raised", dump_error(_unreadable(error), None), [])
    outbox = Outbox(described["kinds"], post)
    run = Run(described["run_id"], outbox if outbox.kinds else None, described["refresh"])
    try:
        answer = await outbox.while_posting(lambda: _run(described, run))
    except Exception as error:  # noqa: BLE001 - it is raised where the caller waits
        return packed("raised", dump_error(error, run.forgive(error, described["path"])), outbox.take())
    try:
        return packed("returned", answer, outbox.take())
    except Exception as error:  # noqa: BLE001 - pickling runs the user's code
        return packed("raised", dump_error(_unsendable(answer, error), None), outbox.take())


async def _run(described: Mapping[str, Any], run: Run) -> Any:
    engine: PipelineExecutionEngine = described["engine"]
    backend = LocalBackend(
        node_execution=engine.node_execution,
        map_execution=engine.map_execution,
        max_workers=engine.max_workers,
        max_concurrency=engine.max_concurrency,
    )
    spec, rows = described["map"], described["rows"]
    plan: ExecutionPlan = described["plan"]
    job = Job(
        plan=plan,
        inputs=described["inputs"],
        run_id=described["run_id"],
        path=described["path"],
        wanted=described["wanted"],
        map=spec,
        feed=None if rows is None else ListFeed(Rows(spec.over, rows, len(rows))),
        total=None if rows is None else len(rows),
        limits={name: anyio.CapacityLimiter(count) for name, count in described["limits"].items()},
        cache=described["cache"],
        refresh=described["refresh"],
        given=described["given"],
        run=run,
    )
    try:
        if rows is None:
            return await saving(run, job, lambda: backend.arun(job))
        columns = Columns(job.wanted or plan.outputs, len(rows))
        await saving(run, job, lambda: backend.amap(job, columns))
        return columns.lists, columns.failures
    finally:
        await run.aclose()


class Outbox(Emitter):
    """Events on their way to the caller: posted in batches while the job runs, or kept for the reply."""

    __slots__ = ("_events", "_post")

    def __init__(self, kinds: frozenset[type], post: Post | None) -> None:
        super().__init__(self._keep, kinds)
        self._events: list[Event] = []
        self._post = post

    def _keep(self, event: Event) -> None:
        self._events.append(with_error(event, lambda error: dump_error(error, None)))

    def take(self) -> list[Event]:
        """Return what has not been posted, without the events about values that cannot be sent."""
        events, self._events = self._events, []
        try:
            packed("events", events)
        except Exception:  # noqa: BLE001 - pickling runs the user's code
            return [event for event in events if _sendable(event)]
        return events

    async def while_posting(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do some work and post events meanwhile."""
        if self._post is None or not self.kinds:
            return await work()
        made: list[T] = []

        async def both(crew: Crew) -> None:
            crew.start(self._post_late)
            made.append(await work())
            crew.stop()

        await Crew.run(both)
        return made[0]

    async def _post_late(self, crew: Crew) -> None:
        assert self._post is not None
        while True:
            await anyio.sleep(POST_S)
            if events := self.take():
                await self._post(packed("events", events))


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # it has no types
    """Pickles what a GPU holds such that a machine without one can use it, and caches without their keys.

    Both wherever they hide. ``place`` is the backend that the message goes to: pipelines inside that ask for it are
    there already.
    """

    def __init__(self, file: BytesIO, buffers: list[pickle.PickleBuffer], place: Backend | None) -> None:
        super().__init__(file, protocol=5, buffer_callback=buffers.append)
        self._place = place

    def reducer_override(self, obj: Any) -> Any:
        """Return how to rebuild an object; tensors come to the CPU, and the keys of caches stay here."""
        if isinstance(obj, RemoteBackend):
            if obj is self._place:
                return _there_already, ()
            raise SerializationError(
                f"a pipeline inside of one that runs on {self._place!r} asks for {obj!r}: a container does not start "
                f"others; let the pipeline around them run locally"
            )
        if isinstance(obj, DiskCache):
            restore, (kind, path, key, *rest) = obj.__reduce__()
            return _cache_there, (restore, kind, path, key is not None, *rest)
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(obj, torch.Tensor) and obj.device.type not in ("cpu", "meta"):
            return obj.cpu().__reduce_ex__(5)
        return super().reducer_override(obj)


def _there_already() -> Inherit:
    return INHERIT


def _cache_there(
    restore: Callable[..., DiskCache], kind: type[DiskCache], path: str, signed: bool, *rest: Any
) -> DiskCache:
    """Open a cache on this machine, with the key that this machine has been given."""
    key = os.environb.get(KEY_VARIABLE.encode()) or None
    if signed and key is None:
        raise CacheError(
            f"the results in the cache at {path!r} are signed, and the other machine has no key: keys are not sent "
            f"along. Give it the key as the environment variable {KEY_VARIABLE}: "
            f'ModalBackend(secrets=[modal.Secret.from_dict({{"{KEY_VARIABLE}": ...}})]), or modal.Secret.from_name(...)'
        )
    return restore(kind, path, key if signed else None, *rest)


def packed(kind: str, *message: Any, place: Backend | None = None) -> bytes:
    """Return a message as bytes: a plain header, then its pickle with large arrays beside it."""
    buffers: list[pickle.PickleBuffer] = []
    file = BytesIO()
    _Pickler(file, buffers, place).dump((kind, *message))
    parts: list[Any] = [file.getbuffer(), *(buffer.raw() for buffer in buffers)]
    header = json.dumps({"format": FORMAT, "python": PYTHON, "hypernodes": __version__}).encode()
    lengths = b"".join(_LENGTH.pack(part.nbytes) for part in parts)
    return b"".join([MAGIC, _COUNT.pack(len(header)), header, _COUNT.pack(len(parts)), lengths, *parts])


def unpacked(data: bytes) -> Any:
    """Return a message from its bytes.

    Raises:
        RemoteExecutionError: it was written by another Python or version, or by something else.
        Exception: whatever unpickling runs into.
    """
    view = memoryview(data)
    if bytes(view[: len(MAGIC)]) != MAGIC:
        raise RemoteExecutionError("what came from the other machine is not a message of hypernodes")
    position = len(MAGIC)
    (length,) = _COUNT.unpack_from(view, position)
    position += _COUNT.size
    _check(json.loads(bytes(view[position : position + length])))
    position += length
    (count,) = _COUNT.unpack_from(view, position)
    position += _COUNT.size
    lengths = [_LENGTH.unpack_from(view, position + index * _LENGTH.size)[0] for index in range(count)]
    position += count * _LENGTH.size
    parts: Parts = []
    for length in lengths:
        # Arrays write into their buffers, as they could where they were made.
        parts.append(view[position : position + length] if not parts else bytearray(view[position : position + length]))
        position += length
    return loads(parts)


def _check(header: Mapping[str, Any]) -> None:
    """Raise an error that says what to do, if the two ends do not fit."""
    if header.get("python") != PYTHON:
        raise RemoteExecutionError(
            f"one end runs Python {header.get('python')} and the other Python {PYTHON}: functions can be sent between "
            f"equal versions only; choose the image's Python, as in debian_slim(python_version=...)"
        )
    if header.get("format") != FORMAT:
        raise RemoteExecutionError(
            f"one end has hypernodes {header.get('hypernodes')} and the other {__version__}, which do not fit: "
            f"install the same version in both"
        )


def _unreadable(error: Exception) -> RemoteExecutionError:
    """Return what to say when a payload cannot be unpickled where it is to run."""
    if isinstance(error, ModuleNotFoundError):
        advice = (
            f"there is no module {error.name!r}: add it to the image, an installed package with pip_install, "
            f"one of your own with add_local_python_source({(error.name or '').partition('.')[0]!r})"
        )
    else:
        advice = f"{type(error).__name__}: {error}"
    unreadable = RemoteExecutionError(f"the pipeline cannot be rebuilt on the other machine: {advice}")
    unreadable.__cause__ = error
    return unreadable


def _unsendable(answer: Any, error: Exception) -> SerializationError:
    named = {f"output {name!r}": value for name, value in answer.items()} if isinstance(answer, dict) else {}
    found = next((found for name, part in named.items() if (found := find_unpicklable(part, name))), None)
    where, culprit, reason = found or ("the answer", answer, error)
    return SerializationError(
        f"{where} is a {type(culprit).__name__} that cannot be sent back from the other machine ({reason}); "
        f"ask for other outputs with output_name=..."
    )


def _sendable(event: Event) -> bool:
    try:
        packed("events", event)
    except Exception:  # noqa: BLE001 - pickling runs the user's code
        return False
    return True


def _functions(plan: ExecutionPlan) -> dict[str, Any]:
    """Return the functions and bound values of a plan by name, for finding the one that cannot be pickled."""
    named: dict[str, Any] = {f"bind({name}=...)": value for name, value in plan.constants.items()}
    for step in plan.steps:
        named |= _functions(step.plan) if isinstance(step, PlanStep) else {step.name: step.node.func}
    return named


def _tokens(bound: Any) -> int:
    """Return how many may hold a bound at once."""
    return int(bound.total_tokens if isinstance(bound, anyio.CapacityLimiter) else bound.max_value)

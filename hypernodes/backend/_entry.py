"""The remote entry point: a payload of bytes comes in, the engine runs it here, a reply of bytes goes out."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import anyio

from hypernodes._crew import Crew
from hypernodes._engine import PipelineExecutionEngine
from hypernodes._feed import ListFeed
from hypernodes._map_run import Columns
from hypernodes._mapping import Rows
from hypernodes._plan import ExecutionPlan
from hypernodes._run import Bound, BoundKey, Job, Run, saving
from hypernodes._traceback import trimmed
from hypernodes.backend._local import LocalBackend
from hypernodes.backend._message import Batch, packed, unpacked
from hypernodes.backend._shares import Shares
from hypernodes.backend._wire import Travelling, dump_error, find_unpicklable, with_error
from hypernodes.errors import CacheError, RemoteExecutionError, SerializationError
from hypernodes.events import Emitter, Event

POST_S = 0.2
"""Seconds between two batches of events that are sent while a job runs."""
_POSTING_S = 5.0
"""Seconds that a batch gets to be sent when the job has ended."""
_LARGEST_PLAN = 16 << 20
"""Bytes of a plan that is worth knowing again: one with large values bound to it is not held for long."""
T = TypeVar("T")

Post = Callable[[bytes], Awaitable[None]]
"""Sends a batch of events to the caller while the job runs."""


@dataclass(frozen=True, slots=True)
class Shared:
    """What the chunks of one map have in common, fetched once by each process that runs some of them."""

    digest: str
    """SHA-256 of the bytes, in hexadecimal."""
    fetch: Callable[[], Awaitable[bytes]]

    @staticmethod
    def name(data: bytes) -> str:
        """Return the digest of some bytes."""
        return hashlib.sha256(data).hexdigest()


@dataclass(slots=True)
class ItemsReply:
    """What became of the rows of a map."""

    names: Sequence[str]
    lists: list[list[Any]]
    """The outputs, a list for each name; None where an item failed."""
    failures: list[tuple[int, Travelling]]
    """Positions of failed items within the whole map, and what they raised."""
    seconds: float
    """What running them took."""
    inputs: Mapping[int, dict[str, Any]]
    """The mapped inputs of failed items, where the caller may have forgotten them."""


async def run_payload(payload: bytes, post: Post | None = None, shared: Shared | None = None) -> bytes:
    """Run a payload here and return the reply; whatever happens, it is a reply. The remote end of the seam.

    Args:
        payload: a job, or a chunk of the rows of one.
        post: where to send events while the job runs; without it they come with the reply.
        shared: of a chunk: the job that it is part of.
    """
    try:
        described = await _described(payload, shared)
    except _UnreadableRows as error:
        return packed("unreadable", dump_error(_unreadable(error.reason), None), events=[])
    except (RemoteExecutionError, CacheError) as error:
        return packed("raised", dump_error(error, None), events=[])
    except Exception as error:  # noqa: BLE001 - unpickling runs the user's code
        return packed("raised", dump_error(_unreadable(error), None), events=[])
    outbox = Outbox(described["kinds"], post, described.get("call"))
    run = PartRun(described, outbox if outbox.kinds else None)
    try:
        answer = await outbox.while_posting(lambda: _run(described, run))
    except Exception as error:  # noqa: BLE001 - it is raised where the caller waits
        return packed("raised", dump_error(error, run.forgive(error, described["path"])), events=outbox.take())
    if isinstance(answer, ItemsReply):
        return _packed_items(answer, described, outbox)
    bare: str | None = described.get("bare")
    batches = outbox.take()
    try:
        return packed("returned", answer, events=batches)
    except Exception as error:  # noqa: BLE001 - pickling runs the user's code
        named = {f"output {name!r}": value for name, value in answer.items()} if bare is None else {bare: answer}
        return packed("raised", dump_error(_unsendable(named, error), None), events=batches)


async def _described(payload: bytes, shared: Shared | None) -> dict[str, Any]:
    """Return what is to be run; what chunks share is unpickled once, and so is a plan that has run here before."""
    if shared is None:
        return _with_plan(unpacked(payload)[1])
    job = _jobs.get(shared.digest)
    if job is None:
        job = _with_plan(unpacked(await shared.fetch())[1])
    _jobs.put(shared.digest, job)
    try:
        return job | unpacked(payload)[1]  # type: ignore[no-any-return]
    except Exception as error:  # unpickling runs the user's code
        raise _UnreadableRows(error) from error


def _with_plan(described: dict[str, Any]) -> dict[str, Any]:
    """Unpickle the plan, or use the one of an earlier job: what has been measured of its functions is known then."""
    data: bytes = described["plan"]
    if len(data) > _LARGEST_PLAN:
        return {**described, "plan": unpacked(data)[1]}
    name = Shared.name(data)
    plan = _plans.get(name)
    if plan is None:
        plan = unpacked(data)[1]
    _plans.put(name, plan)
    return {**described, "plan": plan}


class _UnreadableRows(Exception):  # noqa: N818 - never leaves this module
    """Rows of a chunk cannot be rebuilt here, while the job that they are of can."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(reason)
        self.reason = reason


class _Latest(Generic[T]):
    """The latest few of what this process has unpickled, by digest. Used by any thread."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._values: OrderedDict[str, T] = OrderedDict()

    def get(self, digest: str) -> T | None:
        with self._lock:
            return self._values.get(digest)

    def put(self, digest: str, value: T) -> None:
        with self._lock:
            self._values[digest] = value
            self._values.move_to_end(digest)
            dropped = [self._values.popitem(last=False) for _ in range(len(self._values) - self._most)]
        del dropped  # outside the lock: letting go of a value may run anything


_jobs: _Latest[dict[str, Any]] = _Latest(2)
_plans: _Latest[ExecutionPlan] = _Latest(16)


class PartRun(Run):
    """A run on this machine of a whole job, or of one of several parts that run side by side."""

    __slots__ = ("_own", "_parts", "limits")

    def __init__(self, described: Mapping[str, Any], outbox: Outbox | None) -> None:
        super().__init__(described["run_id"], outbox, described["refresh"])
        self._parts: int = described.get("parts", 1)
        shares: Shares | None = described["shares"]
        self.limits: Mapping[str, Bound] = {}
        self._own: Mapping[BoundKey, Bound] = {}
        if shares is not None:
            self.limits, self._own = shares.there(described["plan"], described["wanted"], self._parts)

    def bound(self, key: BoundKey, value: Any) -> Bound:
        """Return this part's share of a bound."""
        share = self._own.get(key)
        if share is not None:
            return share
        return super().bound(key, max(1, value // self._parts) if isinstance(value, int) else value)


async def _run(described: Mapping[str, Any], run: PartRun) -> Any:
    engine: PipelineExecutionEngine = described["engine"]
    backend = LocalBackend(
        node_execution=engine.node_execution,
        map_execution=engine.map_execution,
        max_workers=engine.max_workers,
        max_concurrency=engine.max_concurrency,
    )
    spec, rows, first = described["map"], described["rows"], described.get("first")
    plan = described["plan"]
    job = Job(
        plan=plan,
        inputs=described["inputs"],
        run_id=described["run_id"],
        path=described["path"],
        wanted=described["wanted"],
        map=spec,
        feed=None if rows is None else ListFeed(Rows(spec.over, rows, len(rows))),
        total=None if rows is None else len(rows),
        first=first,
        limits=run.limits,
        cache=described["cache"],
        refresh=described["refresh"],
        given=described["given"],
        run=run,
    )
    bare = described.get("bare")
    try:
        if rows is None:
            outputs = await saving(run, job, lambda: backend.arun(job))
            return outputs if bare is None else outputs[bare]
        names = job.wanted or plan.outputs
        columns = Columns(names, len(rows), first=first or 0)
        began = time.perf_counter()
        await saving(run, job, lambda: backend.amap(job, columns))
        seconds = time.perf_counter() - began
        failures = [(failed.index, dump_error(failed.error, failed.path)) for failed in columns.failures]
        inputs = {failed.index: failed.inputs for failed in columns.failures} if described.get("detached") else {}
        return ItemsReply(names, columns.lists, failures, seconds, inputs)
    finally:
        await run.aclose()


def _packed_items(answer: ItemsReply, described: Mapping[str, Any], outbox: Outbox) -> bytes:
    """Return the reply of a map; an item whose outputs cannot be sent fails, and the others do not."""
    batches = outbox.take()
    try:
        return packed("returned", answer, events=batches)
    except Exception:  # noqa: BLE001 - pickling runs the user's code; find out which item it was
        first, names = described.get("first") or 0, answer.names
        for position, outputs in enumerate(zip(*answer.lists, strict=True)):
            index = first + position
            error = _item_error(index, names, outputs)
            if error is None:
                continue
            raised = dump_error(error, (*described["path"], index))
            if described["map"].on_error == "raise":
                return packed("raised", raised, events=batches)
            answer.failures.append((index, raised))
            for column in answer.lists:
                column[position] = None
        return packed("returned", answer, events=batches)


def _item_error(index: int, names: Sequence[str], outputs: Sequence[Any]) -> SerializationError | None:
    try:
        packed("outputs", outputs)
    except Exception as error:  # noqa: BLE001 - pickling runs the user's code
        named = {f"output {name!r} of item {index}": value for name, value in zip(names, outputs, strict=True)}
        return _unsendable(named, error)
    return None


class Outbox(Emitter):
    """Events on their way to the caller: posted in batches while the job runs, or kept for the reply."""

    __slots__ = ("_call", "_events", "_numbers", "_post", "_posting", "_unsure")

    def __init__(self, kinds: frozenset[type], post: Post | None, call: int | None = None) -> None:
        super().__init__(self._keep, kinds)
        self._call = call
        self._events: list[Event] = []
        self._numbers = itertools.count()
        self._post = post
        self._posting: anyio.CancelScope | None = None
        self._unsure: list[Batch] = []
        """Those of which nobody knows whether they have arrived."""

    def _keep(self, event: Event) -> None:
        self._events.append(with_error(event, lambda error: dump_error(error, None)))

    def take(self) -> list[Batch]:
        """Return what may not have arrived, without the events about values that cannot be sent."""
        batches, self._unsure = [*self._unsure, self._next()], []
        return batches

    def _next(self) -> Batch:
        events, self._events = self._events, []
        try:
            packed("events", events)
        except Exception:  # noqa: BLE001 - pickling runs the user's code
            events = [event for event in events if _sendable(event)]
        return next(self._numbers), events

    async def while_posting(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do some work and post events meanwhile."""
        if self._post is None or not self.kinds:
            return await work()
        made: list[T] = []

        async def both(crew: Crew) -> None:
            crew.start(self._post_late)
            try:
                made.append(await work())
            finally:
                if self._posting is not None:
                    self._posting.deadline = anyio.current_time() + _POSTING_S
            crew.stop()

        await Crew.run(both)
        return made[0]

    async def _post_late(self, crew: Crew) -> None:
        assert self._post is not None
        while True:
            await anyio.sleep(POST_S)
            if not self._events:
                continue
            number, events = self._next()
            posted = False
            # They would be lost if the job ended meanwhile.
            with contextlib.suppress(Exception), anyio.CancelScope(shield=True) as self._posting:
                await self._post(packed("events", [(number, events)], self._call))
                posted = True
            self._posting = None
            if not posted:  # they come with the reply, and so do those to come
                self._unsure.append((number, events))
                return


def _sendable(event: Event) -> bool:
    try:
        packed("events", event)
    except Exception:  # noqa: BLE001 - pickling runs the user's code
        return False
    return True


def _unreadable(error: Exception) -> Exception:
    """Return what to say when a payload cannot be unpickled where it is to run."""
    if isinstance(error, RemoteExecutionError):
        return error
    if isinstance(error, ModuleNotFoundError):
        top = (error.name or "").partition(".")[0]
        advice = (
            f"there is no module {error.name!r}: add it to the image, an installed package with pip_install, "
            f"one of your own with add_local_python_source({top!r}); "
            f"on Dask, install it on the workers, or send them client.upload_file('{top}.py')"
        )
    else:
        advice = f"{type(error).__name__}: {error}"
    unreadable = RemoteExecutionError(f"the pipeline cannot be rebuilt on the other machine: {advice}")
    unreadable.__cause__ = error if error.__traceback__ is None else error.with_traceback(trimmed(error.__traceback__))
    return unreadable


def _unsendable(named: Mapping[str, Any], error: Exception) -> SerializationError:
    """Return what to say when outputs cannot be sent back."""
    found = next((found for name, part in named.items() if (found := find_unpicklable(part, name))), None)
    where, culprit, reason = found or ("the answer", named, error)
    return SerializationError(
        f"{where} is a {type(culprit).__name__} that cannot be sent back from the other machine ({reason}); "
        f"ask for other outputs with output_name=..."
    )

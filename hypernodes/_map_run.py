"""Running one map: workers that take rows from one feed, as many as there is waiting to do."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from time import perf_counter
from typing import Any

from hypernodes._crew import Crew
from hypernodes._feed import END
from hypernodes._mapping import ItemFailure, MapResult, MapSpec, Path
from hypernodes._program import Program
from hypernodes._run import MapWork, Run, Scope, Sink
from hypernodes.errors import TooManyFailuresError

RunItem = Callable[[Scope, Program, list[Any], int, "MapRun"], Awaitable[None]]


class Columns:
    """A sink that gathers a list for each output, in input order."""

    __slots__ = ("_first", "_names", "_only", "digests", "failures", "lazy", "lists", "traced")

    bounded = False
    window = None

    def __init__(
        self, names: Sequence[str], count: int, *, lazy: bool = False, traced: bool = False, first: int = 0
    ) -> None:
        self._names = names
        self._first = first
        self.lazy = lazy
        self.traced = traced
        """Whether it keeps digests."""
        self.digests: list[list[Any]] = [[None] * count for _ in names] if traced else []
        """Of items that have finished in a run with a cache."""
        self.lists: list[list[Any]] = [[None] * count for _ in names]
        self._only = self.lists[0] if len(self.lists) == 1 else None  # the usual case, for which zip() is slow
        self.failures: list[ItemFailure] = []

    def full(self, taken: int) -> bool:
        """Say no: lists have room for every item."""
        return False

    async def room(self) -> None:
        """Return at once."""

    def deliver(self, index: int, outputs: tuple[Any, ...], digests: Sequence[Any] | None = None) -> None:
        """Store an item's outputs at its position."""
        index -= self._first
        if digests is not None and self.traced:
            for known, digest in zip(self.digests, digests, strict=True):
                known[index] = digest
        if self._only is not None:
            self._only[index] = outputs[0]
        else:
            for column, value in zip(self.lists, outputs, strict=True):
                column[index] = value

    def fail(self, failure: ItemFailure) -> None:
        """Note a failure; its position holds None."""
        self.failures.append(failure)

    def collected(self) -> MapResult:
        """Return the lists by name."""
        return MapResult(dict(zip(self._names, self.lists, strict=True)), self.failures)


class Failures:
    """What a map does with a failing item: raise the error, or collect it, up to a bound."""

    __slots__ = ("_path", "_run", "_seen", "_sink", "_spec", "_what")

    def __init__(self, run: Run, path: Path, spec: MapSpec, sink: Sink, what: str) -> None:
        self._run = run
        self._path = path
        self._what = what
        self._spec = spec
        self._sink = sink
        self._seen: list[ItemFailure] = []

    def take(self, index: int, inputs: dict[str, Any], error: Exception) -> None:
        """Hand a failure to the sink, or raise its error."""
        if self._spec.on_error == "raise":
            raise error
        path = self._run.forgive(error, (*self._path, index))
        failure = ItemFailure(index, path, error, inputs)
        self._sink.fail(failure)
        most = self._spec.max_failures
        if most is None:
            return
        self._seen.append(failure)
        if len(self._seen) >= most:
            raise TooManyFailuresError(
                f"{self._what} was stopped at its failed item number {most} (max_failures); "
                f"the last failure is the cause of this error",
                self._seen,
            ) from error


class MapRun:
    """The items of one map on this loop.

    Workers take rows from one feed. A worker starts the next one when it is about to wait, none is waiting
    to begin, and there may be more: items that never wait cost no task at all, items that do get one slot
    each, up to ``limit``.
    """

    def __init__(self, work: MapWork, template: list[Any], run_item: RunItem, *, limit: int, first: int = 0) -> None:
        self._scope = work.scope
        self._program = work.program
        self._template = template
        self._spec = work.spec
        self._feed = work.feed
        self._sink = work.sink
        self._limit = limit
        self._run_item = run_item
        self._slots = tuple(work.program.slots[name] for name in work.spec.over)
        self._failures = Failures(work.scope.run, work.scope.path, work.spec, work.sink, work.scope.plan.label)
        self._quick = not work.feed.waits and not work.sink.bounded
        self._active = 1
        self._taken = first
        self._taking = False
        self._starting = 0
        self._burst = 1
        self._crew: Crew
        self.hungry = False
        """Whether a worker that is about to wait should start another one first."""

    async def run(self) -> None:
        """Run every item."""
        await Crew.run(self._work)

    def grow(self) -> None:
        """Start another worker; each time twice as many as the last, since those before had to wait too."""
        count = min(self._burst, self._limit - self._active)
        self.hungry = False
        self._burst *= 2
        self._starting += count
        self._active += count
        for _ in range(count):
            self._crew.start(self._member)

    async def _member(self, crew: Crew) -> None:
        self._starting -= 1
        await self._work(crew)

    async def _work(self, crew: Crew) -> None:
        self._crew = crew
        run_item, scope, program, template = self._run_item, self._scope, self._program, self._template
        slots, results, deliver = self._slots, program.results, self._sink.deliver
        only = slots[0] if len(slots) == 1 else -1
        # While another worker waits for a row, this one is not needed.
        while not self._taking:
            row = self._feed.next() if self._quick else await self._take()
            if row is END:
                self._limit = 0
                self.hungry = False
                break
            index = self._taken
            self._taken = index + 1
            self.hungry = self._active < self._limit and not self._starting
            values = template.copy()
            if only >= 0:
                values[only] = row[0]
            else:
                for slot, value in zip(slots, row, strict=True):
                    values[slot] = value
            try:
                await run_item(scope, program, values, index, self)
            except Exception as error:  # noqa: BLE001 - raised again, or handed to the user
                self._failures.take(index, dict(zip(self._spec.over, row, strict=True)), error)
                if perf_counter() > scope.run.yield_at:
                    await scope.run.breathe()
            else:
                deliver(index, results(values))
        self._active -= 1

    async def _take(self) -> Any:
        self._taking = True
        self.hungry = False
        try:
            while self._sink.full(self._taken):
                await self._sink.room()
            return await self._feed.pull()
        finally:
            self._taking = False

"""Running with a cache: what is there is not run, and loaded only when something needs it."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from time import perf_counter
from time import time as unix_time
from typing import Any

import anyio

from hypernodes import events as ev
from hypernodes._ahead import Ahead, Row
from hypernodes._cost import CHEAP_S
from hypernodes._crew import Crew
from hypernodes._digests import BY_VALUE
from hypernodes._feed import END
from hypernodes._map_run import MapRun, RunItem
from hypernodes._plan import INHERIT
from hypernodes._program import BoundCall, BoundPlan, BoundStep, Program
from hypernodes._recipe import Recipe
from hypernodes._run import Job, MapWork, Origin, Scope
from hypernodes._threads import default_threads, in_thread
from hypernodes._trace import Trace
from hypernodes._whole_map import keep_map, map_key, recall_map
from hypernodes.errors import CacheError
from hypernodes.events import NotLoaded

RunStep = Callable[[Scope, BoundStep, list[Any], int | None], Awaitable[None]]
BATCH = 512
"""Rows of a map that are looked up together."""
_MOST_REPAIRS = 100


async def trace_for(
    scope: Scope,
    program: Program,
    inputs: Mapping[str, Any],
    around: tuple[list[Any], BoundPlan] | None = None,
    job: Job | None = None,
) -> Trace:
    """Return the trace that a run of a program begins with.

    Args:
        scope: the pipeline that is run.
        program: the program.
        inputs: values by name.
        around: the values of the pipeline around it, which may know the digests of the inputs, and its step.
        job: what is run, where nothing is around it here.
    """
    tracer = scope.cache
    assert tracer is not None
    outer, step = around or (None, None)
    known: dict[str, Any] = {}
    if isinstance(outer, Trace) and step is not None:
        if outer.recipe.tracer is tracer and step.inner_map is None:
            return outer.child(step)
        known = {name: outer.known(slot) for name, slot in step.shared}
    await tracer.learn(program)
    if isinstance(outer, Trace) and step is not None:
        recipe = outer.recipe.inside(step, tracer)
    elif job is not None:
        recipe = tracer.recipe(program, job.given, job.refresh)
    else:
        recipe = tracer.recipe(program)
    # What another cache has cannot be loaded from the one around it.
    eager = not (isinstance(outer, Trace) and outer.recipe.tracer is tracer)
    trace = Trace(recipe, program.template, recipe.template.copy(), eager=eager)
    for name, value in inputs.items():
        slot = program.slots[name]
        trace[slot] = value
        trace.digests[slot] = known.get(name, BY_VALUE)
    return trace


async def run_traced(
    scope: Scope,
    trace: Any,
    index: int | None,
    window: MapRun | None,
    run_step: RunStep,
    side_by_side: Callable[..., Awaitable[None]] | None,
) -> None:
    """Run the steps of a trace that are not in the cache: in order, or by ``side_by_side`` every ready one at once."""
    run, program = scope.run, trace.recipe.program
    if None in trace.hits:
        await look_up([trace])
    if side_by_side is None or trace.complete:
        for position in range(len(program.steps)):
            if not trace.hits[position] and window is not None and window.hungry:
                window.grow()
            await cached_step(scope, trace, position, index, run_step)
            if perf_counter() > run.yield_at:
                await run.breathe()
    else:
        if trace.root.looking is None:
            trace.root.looking = anyio.Lock(fast_acquire=True)
        await side_by_side(
            scope, program, window, lambda position: cached_step(scope, trace, position, index, run_step)
        )
    if trace.eager:
        await load(scope, trace, [slot for _, slot in program.outputs], index, run_step)


async def look_up(traces: Iterable[Trace], *, wanted: bool = False) -> None:
    """Work out the keys of traces, as far as they follow from what is known, and find out which have an entry.

    With ``wanted`` the entries are fetched on the same occasion, for :meth:`CacheSession.load`.
    """
    traces = list(traces)
    if len(traces) == 1 and traces[0].root.looking is not None:
        async with traces[0].root.looking:
            await _look_up(traces, wanted=wanted)
    else:
        await _look_up(traces, wanted=wanted)


async def _look_up(traces: list[Trace], *, wanted: bool) -> None:
    session = traces[0].recipe.tracer.session
    cost = session.hashing
    if cost.inline and len(traces) == 1:
        began = perf_counter()
        asked = traces[0].predict()
        now = perf_counter()
        if now - began > CHEAP_S:
            cost.doubted(now - began, now)
    else:
        asked, spent = await in_thread(lambda: _predicted(traces), default_threads())
        cost.measured(spent.seconds / len(traces))
    there = await session.find(asked, fetch=wanted) if asked else set()
    for trace in traces:
        trace.found(there)


def _predicted(traces: Iterable[Trace]) -> list[str]:
    return [key for trace in traces for key in trace.predict()]


async def cached_step(scope: Scope, trace: Trace, position: int, index: int | None, run_step: RunStep) -> None:
    """Run one step of a trace, unless what it makes is in the cache."""
    step = trace.recipe.program.steps[position]
    if trace.hits[position]:
        _recall(scope, trace, position, index)
    elif isinstance(step, BoundPlan):
        whole = None if index is not None else await map_key(scope, trace, step)
        if whole is not None and await recall_map(scope, trace, step, whole, index):
            return
        await load(scope, trace, _needed_at_once(scope, trace, step), index, run_step)
        await run_step(scope, step, trace, index)
        if whole is not None:
            await keep_map(trace, step, whole)
    else:
        await _call(scope, trace, step, position, index, run_step)


def _needed_at_once(scope: Scope, trace: Trace, step: BoundPlan) -> list[int]:
    """Return the slots that a nested pipeline reads as it begins: all of them, but for a map on this loop.

    A map looks its items up first, and loads what those need that have to run.
    """
    settings, spec = step.program.plan.settings, step.step.map
    here = scope.engine.map_execution != "parallel" and settings.backend is INHERIT and settings.cache is INHERIT
    if spec is None or not here:
        return [slot for _, slot in step.parameters]
    return [slot for name, slot in step.parameters if name in spec.over and type(trace[slot]) is NotLoaded]


async def _call(
    scope: Scope, trace: Trace, step: BoundCall, position: int, index: int | None, run_step: RunStep
) -> None:
    recipe = trace.recipe
    session, code = recipe.tracer.session, recipe.codes[position]
    if code is not None and trace.hits[position] is None:
        await look_up([trace])
    key = trace.keys[position]
    slots = step.all_slots
    if code is None or key is None:
        await load(scope, trace, slots, index, run_step)
        if code is not None and scope.wants(ev.NodeUncacheable):
            reason = session.reason(step.node)
            scope.emit(ev.NodeUncacheable(scope.run.run_id, (*scope.at(index), step.name), unix_time(), reason))  # type: ignore[misc]
        await run_step(scope, step, trace, index)
        for target in step.targets:
            trace.digests[target] = BY_VALUE
        return
    if trace.hits[position] or session.has(key):
        _recall(scope, trace, position, index)
        return

    async def compute() -> Any:
        if trace.unloaded(slots):
            await load(scope, trace, slots, index, run_step)
        began = perf_counter()
        await run_step(scope, step, trace, index)
        seconds = code.clock.share(began)
        made = step.made(trace)
        if step.node.keep is not None:
            return made  # it is no data
        size = await session.save(code, key, made, seconds, trace.input_digests(position))
        if size is None:
            if scope.wants(ev.NodeUncacheable):
                path, reason = (*scope.at(index), step.name), session.reason(step.node)
                scope.emit(ev.NodeUncacheable(scope.run.run_id, path, unix_time(), reason))  # type: ignore[misc]
        elif scope.wants(ev.NodeStored):
            path = (*scope.at(index), step.name)
            scope.emit(ev.NodeStored(scope.run.run_id, path, unix_time(), key, size))  # type: ignore[misc]
        return made

    made, ours = await session.once(key, compute)
    if ours:
        return
    if await session.find([key]):
        _recall(scope, trace, position, index)
    else:
        # It could not be stored: there is one object for all who waited.
        step.put(trace, made)
        _tell_cached(scope, trace, position, index)


def _recall(scope: Scope, trace: Trace, position: int, index: int | None) -> None:
    trace.recall(position)
    _tell_cached(scope, trace, position, index)


def _tell_cached(scope: Scope, trace: Trace, position: int, index: int | None) -> None:
    emit = scope.emit
    if emit is not None and ev.NodeCached in emit.kinds:
        place, now = scope.at(index), unix_time()
        for path, key in trace.signatures(position):
            emit(ev.NodeCached(scope.run.run_id, (*place, *path), now, key))


async def load(scope: Scope, trace: Trace, slots: Iterable[int], index: int | None, run_step: RunStep) -> None:
    """Load what these slots have in the cache; what turns out not to be there, or is damaged, is computed again."""
    slots = list(slots)
    session = trace.recipe.tracer.session
    for _ in range(_MOST_REPAIRS):
        keys = trace.unloaded(slots)
        if not keys:
            return
        loaded, refused = await session.load(keys)
        trace.put_in_place(slots, loaded)
        if not refused:
            return
        _tell_refused(scope, refused, index)
        trace.forget(refused)
        for position in sorted({trace.recipe.producers[slot] for slot in slots if trace.unloaded([slot])}):
            await cached_step(scope, trace, position, index, run_step)
    raise CacheError(f"entries of the cache vanish again and again while {scope.plan.label} reads them")


def _tell_refused(scope: Scope, refused: Mapping[str, str], index: int | None) -> None:
    if scope.wants(ev.CacheRefused):
        for key, reason in refused.items():
            scope.emit(ev.CacheRefused(scope.run.run_id, scope.at(index), unix_time(), key, reason))  # type: ignore[misc]


class CachedMapRun(MapRun):
    """The items of a map that has a cache: looked up in batches, and only those run that are not there."""

    def __init__(self, work: MapWork, template: list[Any], run_item: RunItem, *, limit: int, first: int = 0) -> None:
        super().__init__(work, template, run_item, limit=limit, first=first)
        assert isinstance(template, Trace)
        self._origin: Origin | None = work.origin
        self._start = template
        if work.spec.mode == "product":
            template.repeated = {slot: {} for slot in self._slots}
        self._ready: deque[tuple[int, Trace]] = deque()
        self._ahead: Ahead | None = None
        self._wanted = tuple(slot for _, slot in work.program.outputs)
        self._given = (*work.program.slots.values(),)
        self._places = self._places_of_wanted(template.recipe)
        everything = self._places is not None and len(self._places) == len(work.program.steps)
        self._all_wanted = everything and not self._sink.lazy

    def _places_of_wanted(self, recipe: Recipe) -> list[tuple[int, int]] | None:
        """Return slots and positions where each wanted output is the one result of a step; None for other programs."""
        producers, steps = recipe.producers, recipe.program.steps
        places = [(slot, producers[slot]) for slot in self._wanted if slot in producers]
        plain = [isinstance(step := steps[position], BoundCall) and step.target >= 0 for _, position in places]
        return places if len(places) == len(self._wanted) and all(plain) else None

    async def _work(self, crew: Crew) -> None:
        self._crew = crew
        run_item, scope, program = self._run_item, self._scope, self._program
        while self._ready or not self._taking:
            if not self._ready and not await self._look_ahead():
                self._limit = 0
                self.hungry = False
                break
            if not self._ready:
                continue
            index, trace = self._ready.popleft()
            self.hungry = self._active < self._limit and not self._starting
            try:
                await run_item(scope, program, trace, index, self)
            except Exception as error:  # noqa: BLE001 - raised again, or handed to the user
                inputs = {name: trace[slot] for name, slot in zip(self._spec.over, self._slots, strict=True)}
                self._failures.take(index, inputs, error)
                if perf_counter() > scope.run.yield_at:
                    await scope.run.breathe()
            else:
                self._deliver(index, trace)
        self._active -= 1

    def _deliver(self, index: int, trace: Trace) -> None:
        results = self._program.results
        self._sink.deliver(index, results(trace), results(trace.digests))

    async def _look_ahead(self) -> bool:
        """Take some rows, hand on those that are in the cache, and make the others ready; False at the end."""
        self._taking = True
        self.hungry = False
        try:
            rows = await self._rows()
            if not rows:
                return False
            traces = self._traces(rows)
            await look_up(traces, wanted=self._all_wanted)
            taken = [(index, trace) for (index, _), trace in zip(rows, traces, strict=True)]
            complete = [each for each in taken if each[1].complete]
            if complete and not self._sink.lazy and not await self._load_complete([trace for _, trace in complete]):
                complete = [each for each in complete if each[1].complete]
            for index, trace in complete:
                if self._sink.lazy:
                    trace.recall_all()
                if self._scope.emit is not None:
                    self._tell_cached(index, trace)
                self._deliver(index, trace)
            if len(complete) < len(taken):
                missed = [each for each in taken if not each[1].complete]
                await self._load_inputs(missed)
                self._ready.extend(missed)
            if perf_counter() > self._scope.run.yield_at:
                await self._scope.run.breathe()
            return True
        finally:
            self._taking = False

    async def _rows(self) -> list[Row]:
        """Take up to a batch of rows, with their positions; none at the end."""
        feed, sink = self._feed, self._sink
        if feed.waits:
            if self._ahead is None:
                self._ahead = Ahead(feed, sink, self._scope.run, self._taken, BATCH)
                self._crew.start(self._ahead.read)
            return await self._ahead.rows()
        while sink.bounded and sink.full(self._taken):
            await sink.room()
        rows: list[Row] = []
        while len(rows) < BATCH and not (sink.bounded and sink.full(self._taken)) and (row := feed.next()) is not END:
            rows.append((self._taken, row))
            self._taken += 1
        return rows

    def _traces(self, rows: list[Row]) -> list[Trace]:
        start, slots = self._start, self._slots
        known = None if self._origin is None else self._origin.digests
        traces = []
        for _, row in rows:
            trace = Trace(start.recipe, start, start.digests.copy(), eager=not self._sink.lazy, start=start)
            digests = None if known is None else next(known)
            for position, slot in enumerate(slots):
                trace[slot] = row[position]
                trace.digests[slot] = BY_VALUE if digests is None else digests[position]
            traces.append(trace)
        return traces

    async def _load_complete(self, complete: list[Trace]) -> bool:
        """Load the outputs of items that are in the cache; say whether all of them could be."""
        wanted, session = self._wanted, self._start.recipe.tracer.session
        places = self._places
        keys: list[Any] = []
        for trace in complete:
            if places is not None:
                keys += [trace.keys[position] for _, position in places]
            else:
                trace.recall_all()
                keys += trace.unloaded(wanted)
        loaded, refused = await session.load(keys)
        if refused:
            _tell_refused(self._scope, refused, None)
            for trace in complete:
                trace.forget(refused)
            complete = [trace for trace in complete if trace.complete]
        for trace in complete:
            if places is not None:
                own = trace.keys
                for slot, position in places:
                    trace[slot] = loaded.take(own[position], None)  # type: ignore[arg-type]
            else:
                trace.put_in_place(wanted, loaded)
        return not refused

    async def _load_inputs(self, missed: list[tuple[int, Trace]]) -> None:
        """Load what the items need that have to run."""
        if self._origin is None:
            return
        given = self._given
        keys = set().union(*(trace.unloaded(given) for _, trace in missed))
        if not keys:
            return
        loaded, refused = await self._start.recipe.tracer.session.load(keys)
        if refused:
            shared, rows = await self._origin.reload()
            for name, value in shared.items():
                self._start[self._program.slots[name]] = value
            for index, trace in missed:
                for slot, value in zip(self._slots, rows[index], strict=True):
                    trace[slot] = value
                for name, value in shared.items():
                    trace[self._program.slots[name]] = value
            return
        shared_slots = [slot for slot in given if slot not in self._slots]
        self._start.put_in_place(shared_slots, loaded)
        for _, trace in missed:
            trace.put_in_place(self._slots, loaded)
            for slot in shared_slots:
                trace[slot] = self._start[slot]

    def _tell_cached(self, index: int, trace: Trace) -> None:
        scope, emit = self._scope, self._scope.emit
        assert emit is not None
        place, now = scope.at(index), unix_time()
        if ev.NodeCached in emit.kinds:
            for position in range(len(trace.keys)):
                for path, key in trace.signatures(position):
                    emit(ev.NodeCached(scope.run.run_id, (*place, *path), now, key))
        if ev.ItemCached in emit.kinds:
            emit(ev.ItemCached(scope.run.run_id, place, now, index, trace.signature()))

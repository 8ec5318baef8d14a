"""Running a plan: the steps of one run, one after another or side by side.

A step that does not wait costs no task. Where several could wait at once, workers take steps from one
frontier, and a worker starts the next one only when it is about to wait and none is waiting to begin.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextvars import copy_context
from dataclasses import astuple, dataclass
from functools import partial
from time import perf_counter
from time import time as unix_time
from types import CoroutineType
from typing import Any

import anyio

from hypernodes import events as ev
from hypernodes._calls import call_node, unpack
from hypernodes._context import await_in_copy
from hypernodes._cost import CHEAP_S
from hypernodes._crew import Crew
from hypernodes._feed import ListFeed
from hypernodes._frontier import Frontier
from hypernodes._map_run import Columns, MapRun, RunItem
from hypernodes._mapping import MapSpec, Path, listed_rows
from hypernodes._node import checked_count
from hypernodes._plan import INHERIT
from hypernodes._program import BoundCall, BoundPlan, BoundStep, Places, Program, bind
from hypernodes._run import Job, MapWork, Mode, Origin, Place, Run, Scope, Sink
from hypernodes._threads import DEFAULT_THREADS
from hypernodes.errors import DefinitionError, NodeTimeoutError

_MODES = ("sequential", "async", "threaded", "parallel")
DEFAULT_ITEMS = 100


@dataclass(frozen=True, slots=True)
class PipelineExecutionEngine:
    """How a plan is run, the same wherever it is placed. Frozen and picklable.

    Args:
        node_execution: the nodes of one run: ``"sequential"`` one at a time in topological order,
            ``"async"`` every ready node at once, ``"threaded"`` sync nodes in threads, ``"parallel"`` sync
            nodes in worker processes. Async nodes are always on the event loop.
        map_execution: the items of one map: ``"sequential"`` one at a time in order, ``"async"`` up to
            ``max_concurrency`` at once, ``"threaded"`` up to ``max_workers`` at once with their sync nodes
            in threads, ``"parallel"`` chunks of items in ``max_workers`` worker processes, each running
            this engine.
        max_workers: threads or processes; None for 64 threads per event loop, or a process per CPU.
        max_concurrency: items of one map at once; None for 100.

    >>> PipelineExecutionEngine(map_execution="parallel", max_workers=2).max_workers
    2
    """

    node_execution: Mode = "async"
    map_execution: Mode = "async"
    max_workers: int | None = None
    max_concurrency: int | None = None

    def __post_init__(self) -> None:
        _check_options(type(self).__name__, astuple(self))

    @classmethod
    def of(
        cls,
        backend: object,
        node_execution: Mode,
        map_execution: Mode,
        max_workers: int | None,
        max_concurrency: int | None,
    ) -> PipelineExecutionEngine:
        """Return the engine of a backend, whose user knows the options as the backend's."""
        options = node_execution, map_execution, max_workers, max_concurrency
        _check_options(type(backend).__name__, options)
        return cls(*options)

    @property
    def places(self) -> Places:
        """Where ``run_in="auto"`` nodes run under this engine."""
        match self.node_execution, self.map_execution:
            case "parallel", _:
                return Places("process", "process")
            case "threaded", _:
                return Places("thread", "thread")
            case _, "threaded":
                return Places("measure", "thread")
        return Places()

    def items_at_once(self, spec: MapSpec) -> int:
        """Return how many items of a map may run at once on this loop."""
        match self.map_execution:
            case "sequential":
                return 1
            case "threaded":
                most = self.max_workers or DEFAULT_THREADS
                return min(most, spec.max_concurrency or self.max_concurrency or most)
        return spec.max_concurrency or self.max_concurrency or DEFAULT_ITEMS

    async def arun(self, job: Job, run: Run, backend: Place) -> dict[str, Any]:
        """Run a job's plan once and return its outputs by name."""
        program = bind(job.plan, frozenset(job.inputs), job.wanted, self.places)
        scope = Scope(run, job.plan, job.path, self, backend, job.limits or {}, run.tracer(job.cache))
        values = await values_for(scope, program, job.inputs, job=job)
        await run.breathe()
        await _run_pipeline(scope, program, values, job.inputs)
        return program.outputs_of(values)

    async def amap(self, job: Job, run: Run, backend: Place, sink: Sink) -> None:
        """Run a job's plan for each row; results go to the sink as items finish."""
        assert job.map is not None
        assert job.feed is not None
        given = frozenset(job.inputs) | set(job.map.over)
        program = bind(job.plan, given, job.wanted, self.places.of_items())
        scope = Scope(run, job.plan, job.path, self, backend, job.limits or {}, run.tracer(job.cache))
        template = await values_for(scope, program, job.inputs, job=job)
        await run.breathe()
        await _run_map(
            MapWork(scope, program, job.inputs, job.map, job.feed, job.total, sink, first=job.first), template
        )


def _check_options(owner: str, options: tuple[Any, ...]) -> None:
    node_execution, map_execution, max_workers, max_concurrency = options
    for option, mode in (("node_execution", node_execution), ("map_execution", map_execution)):
        if mode not in _MODES:
            raise DefinitionError(f"{option} of {owner} must be one of {', '.join(map(repr, _MODES))}, not {mode!r}")
    checked_count(max_workers, "max_workers", owner)
    checked_count(max_concurrency, "max_concurrency", owner)


async def values_for(
    scope: Scope,
    program: Program,
    inputs: Mapping[str, Any],
    around: tuple[list[Any], BoundPlan] | None = None,
    job: Job | None = None,
) -> list[Any]:
    """Return what a run of a program begins with: its values by slot, or the trace of them where there is a cache."""
    if scope.cache is not None:
        # Imported by those alone who have a cache.
        from hypernodes._cached import trace_for

        return await trace_for(scope, program, inputs, around, job)
    values = program.template.copy()
    for name, value in inputs.items():
        values[program.slots[name]] = value
    return values


def _map_run(scope: Scope) -> type[MapRun]:
    if scope.cache is None:
        return MapRun
    from hypernodes._cached import CachedMapRun

    return CachedMapRun


async def _run_pipeline(scope: Scope, program: Program, values: list[Any], inputs: Mapping[str, Any]) -> None:
    emit = scope.emit
    if emit is None:
        await _in_time(scope, program, values, None, None)
        return
    run, path = scope.run, scope.path
    if ev.PipelineStarted in emit.kinds:
        emit(ev.PipelineStarted(run.run_id, path, unix_time(), inputs))
    began = perf_counter()
    try:
        await _in_time(scope, program, values, None, None)
    except BaseException as error:
        if ev.PipelineFailed in emit.kinds:
            emit(ev.PipelineFailed(run.run_id, path, unix_time(), error))
        raise
    if ev.PipelineFinished in emit.kinds:
        outputs = program.outputs_of(values)
        emit(ev.PipelineFinished(run.run_id, path, unix_time(), outputs, perf_counter() - began))


async def _run_map(work: MapWork, template: list[Any]) -> None:
    scope = work.scope
    engine = scope.engine

    async def items() -> None:
        if engine.map_execution == "parallel":
            await scope.run.workers(scope.backend).map(work, template)
        else:
            limit = engine.items_at_once(work.spec)
            kind = _map_run(scope)
            await kind(work, template, item_runner(scope), limit=limit, first=work.first or 0).run()

    if work.first is None:
        await told_map(scope.emit, scope.run.run_id, scope.path, work.inputs, work.total, work.sink, items)
    else:
        await items()


async def told_map(
    emit: ev.Emit | None,
    run_id: str,
    path: Path,
    inputs: Mapping[str, Any],
    total: int | None,
    sink: Sink,
    items: Callable[[], Awaitable[None]],
) -> None:
    """Run the items of a map, and tell of its beginning and its end."""
    emit = emit or ev.UNHEARD
    if ev.PipelineStarted in emit.kinds:
        emit(ev.PipelineStarted(run_id, path, unix_time(), inputs))
    if ev.MapStarted in emit.kinds:
        emit(ev.MapStarted(run_id, path, unix_time(), total))
    began = perf_counter()
    try:
        await items()
    except BaseException as error:
        if ev.PipelineFailed in emit.kinds:
            emit(ev.PipelineFailed(run_id, path, unix_time(), error))
        raise
    duration = perf_counter() - began
    if ev.MapFinished in emit.kinds:
        emit(ev.MapFinished(run_id, path, unix_time(), duration))
    if ev.PipelineFinished in emit.kinds:
        emit(ev.PipelineFinished(run_id, path, unix_time(), sink.collected(), duration))


def item_runner(scope: Scope) -> RunItem:
    """Return how one item of a map runs: with its events and timeout, where there are any."""
    unheard = scope.emit is None or not scope.emit.kinds & _ITEM_KINDS
    return run_steps if unheard and scope.timeout is None else _run_item


_ITEM_KINDS = frozenset({ev.ItemStarted, ev.ItemFinished, ev.ItemFailed})


async def _run_item(scope: Scope, program: Program, values: list[Any], index: int, window: MapRun | None) -> None:
    """Run one item of a map with its events, within the pipeline's timeout."""
    run = scope.run
    emit = scope.emit or ev.UNHEARD
    if ev.ItemStarted in emit.kinds:
        emit(ev.ItemStarted(run.run_id, (*scope.path, index), unix_time(), index))
    began = perf_counter()
    try:
        await _in_time(scope, program, values, index, window)
    except Exception as error:
        if ev.ItemFailed in emit.kinds:
            emit(ev.ItemFailed(run.run_id, (*scope.path, index), unix_time(), index, error))
        raise
    if ev.ItemFinished in emit.kinds:
        emit(ev.ItemFinished(run.run_id, (*scope.path, index), unix_time(), index, perf_counter() - began))


async def _in_time(scope: Scope, program: Program, values: list[Any], index: int | None, window: MapRun | None) -> None:
    seconds = scope.timeout
    if seconds is None:
        await run_steps(scope, program, values, index, window)
        return
    with anyio.move_on_after(seconds) as deadline:
        await run_steps(scope, program, values, index, window)
        return
    if deadline.cancelled_caught:
        error = NodeTimeoutError(f"{scope.plan.label} did not finish within {seconds:g} s")
        scope.run.blame(error, scope.at(index))
        raise error


async def run_steps(
    scope: Scope, program: Program, values: list[Any], index: int | None, window: MapRun | None
) -> None:
    """Run steps one after another; in a wide program side by side, from the first one that may wait."""
    run = scope.run
    watched = scope.emit is not None
    in_order = program.linear or scope.engine.node_execution == "sequential"
    if scope.cache is not None:
        from hypernodes._cached import run_traced

        await run_traced(scope, values, index, window, _run_step, None if in_order else _side_by_side)
        return
    path: Path = ()
    before = perf_counter()
    for done, bound in enumerate(program.steps):
        step: Any = bound  # only a BoundCall is direct
        inline = step.direct_sync and step.cost.inline
        if inline or (in_order and step.direct_async):
            # The hot paths, without a coroutine of ours in between: a cheap function is called right here,
            # an async one awaited right here.
            if watched:
                path = (*scope.at(index), step.name)
                _tell_started(scope, step, values, path)
                before = perf_counter()
            try:
                if inline:
                    if step.arity == 1:
                        result = copy_context().run(step.func, values[step.slots[0]])
                    else:
                        result = copy_context().run(
                            step.func, *step.arguments(values), **step.keyword_arguments(values)
                        )
                else:
                    if window is not None and window.hungry:
                        window.grow()
                    if step.arity == 1:
                        coroutine = step.func(values[step.slots[0]])
                    else:
                        coroutine = step.func(*step.arguments(values), **step.keyword_arguments(values))
                    result = await await_in_copy(coroutine)
                if inline and type(result) is CoroutineType:
                    result = await result
                if step.target >= 0:
                    values[step.target] = result
                else:
                    unpack(step, values, result)
            except Exception as error:
                _tell_failed(scope, (*scope.at(index), step.name), error)
                raise
            except BaseException:
                _tell_cancelled(scope, (*scope.at(index), step.name))
                raise
            now = perf_counter()
            if inline and now - before > CHEAP_S:
                step.cost.doubted(now - before, now)
            if watched:
                _tell_finished(scope, step, values, path, now - before)
                now = perf_counter()
            before = now
        elif in_order:
            if window is not None and window.hungry:
                window.grow()
            await _run_step(scope, step, values, index)
            before = now = perf_counter()
        else:
            one = partial(_run_positioned, scope, program, values, index)
            await _side_by_side(scope, program, window, one, done)
            return
        if now > run.yield_at:
            await run.breathe()
            before = perf_counter()


def _run_positioned(
    scope: Scope, program: Program, values: list[Any], index: int | None, position: int
) -> Awaitable[None]:
    return _run_step(scope, program.steps[position], values, index)


async def _side_by_side(
    scope: Scope,
    program: Program,
    window: MapRun | None,
    run_one: Callable[[int], Awaitable[None]],
    done: int = 0,
) -> None:
    """Run the steps after the first ``done`` ones, by their positions, every ready one at once."""
    run = scope.run
    frontier = Frontier(program, done)
    ready = frontier.ready
    starting = False

    async def work(crew: Crew) -> None:
        nonlocal starting
        starting = False
        while ready:
            position = ready.popleft()
            step = program.steps[position]
            if not (isinstance(step, BoundCall) and step.direct_sync and step.cost.inline):
                if ready and not starting:
                    starting = True
                    crew.start(work)
                if window is not None and window.hungry:
                    window.grow()
            await run_one(position)
            frontier.finish(position)
            if perf_counter() > run.yield_at:
                await run.breathe()

    await Crew.run(work)


async def _run_step(scope: Scope, step: BoundStep, values: list[Any], index: int | None) -> None:
    """Run one step, with its events, and store what it makes."""
    if scope.emit is None:
        try:
            await _perform(scope, step, values, index)
        except Exception as error:
            scope.run.blame(error, (*scope.at(index), step.name))
            raise
        return
    path = (*scope.at(index), step.name)
    _tell_started(scope, step, values, path)
    began = perf_counter()
    try:
        await _perform(scope, step, values, index)
    except Exception as error:
        _tell_failed(scope, path, error)
        raise
    except BaseException:
        _tell_cancelled(scope, path)
        raise
    _tell_finished(scope, step, values, path, perf_counter() - began)


_NodeStarted, _NodeFinished = ev.NodeStarted, ev.NodeFinished
_new: Any = tuple.__new__
"""Makes an event without the call that a NamedTuple's own constructor is (0.2 of 0.35 microseconds)."""


def _tell_started(scope: Scope, step: BoundStep, values: list[Any], path: Path) -> None:
    emit = scope.emit
    if emit is not None and _NodeStarted in emit.kinds:
        emit(_new(_NodeStarted, (scope.run.run_id, path, unix_time(), step.inputs(values))))


def _tell_finished(scope: Scope, step: BoundStep, values: list[Any], path: Path, seconds: float) -> None:
    emit = scope.emit
    if emit is not None and _NodeFinished in emit.kinds:
        emit(_new(_NodeFinished, (scope.run.run_id, path, unix_time(), step.outputs(values), seconds)))


def _tell_failed(scope: Scope, path: Path, error: Exception) -> None:
    """Note on an error where it began, and emit its event."""
    origin = scope.run.blame(error, path)
    if scope.emit is not None and ev.NodeFailed in scope.emit.kinds:
        scope.emit(ev.NodeFailed(scope.run.run_id, path, unix_time(), error, origin))


def _tell_cancelled(scope: Scope, path: Path) -> None:
    if scope.emit is not None and ev.NodeCancelled in scope.emit.kinds:
        scope.emit(ev.NodeCancelled(scope.run.run_id, path, unix_time()))


async def _perform(scope: Scope, step: BoundStep, values: list[Any], index: int | None) -> None:
    if isinstance(step, BoundPlan):
        await _run_nested(scope, step, values, index)
        return
    if step.direct_async:
        result = await await_in_copy(step.func(*step.arguments(values), **step.keyword_arguments(values)))
    else:
        result = await call_node(scope, step, values, index)
    if step.target >= 0:
        values[step.target] = result
    else:
        unpack(step, values, result)


async def _run_nested(scope: Scope, step: BoundPlan, values: list[Any], index: int | None) -> None:
    """Run a nested pipeline: on this engine, or on the backend that it asks for."""
    program, spec = step.program, step.inner_map
    path = (*scope.at(index), step.name)
    shared = {name: values[slot] for name, slot in step.shared}
    columns = feed = total = inside = None
    backend = program.plan.settings.backend
    elsewhere = backend is not INHERIT and backend is not scope.backend
    child = scope.inside(program.plan, path)
    traced = scope.cache is not None and child.cache is not None and not elsewhere
    lazy = traced and child.cache is scope.cache  # what another cache has cannot be loaded from this one
    if step.step.map is not None:
        rows = listed_rows(step.step.map, step.inputs(values), f"nested pipeline {step.name!r}")
        feed, total = ListFeed(rows), rows.count
        columns = Columns(step.wanted, total, lazy=lazy, traced=traced)
    if elsewhere:
        refresh, given = _refreshed(scope, values, step)
        job = Job(
            plan=program.plan,
            inputs=shared,
            run_id=scope.run.run_id,
            path=path,
            wanted=step.wanted,
            map=spec,
            feed=feed,
            total=total,
            limits=scope.limits,
            cache=None if scope.cache is None else scope.cache.session.store,
            refresh=refresh,
            given=given,
            run=scope.run,
        )
        if columns is None:
            outputs = await backend.arun(job, scope.emit)
            results = [outputs[name] for name in step.wanted]
        else:
            await backend.amap(job, columns, scope.emit)
            results = columns.lists
    else:
        inside = await values_for(child, program, shared, (values, step))
        if spec is None or feed is None or columns is None:
            await _run_pipeline(child, program, inside, shared)
            results = list(program.results(inside))
        else:
            origin = _origin(scope, step, values, index, total) if traced else None
            await _run_map(MapWork(child, program, shared, spec, feed, total, columns, origin), inside)
            results = columns.lists
    for target, result in zip(step.targets, results, strict=True):
        values[target] = result
    if scope.cache is not None:
        trace: Any = values
        trace.note(step, inside, columns)


def _refreshed(scope: Scope, values: Any, step: BoundPlan) -> tuple[frozenset[str], frozenset[str]]:
    """Return the outputs that a nested pipeline recomputes on another backend, and its inputs that are recomputed."""
    if scope.cache is None:
        return scope.run.refresh, frozenset()
    inside = values.recipe.inside(step)
    return inside.asked, inside.given


def _origin(scope: Scope, step: BoundPlan, trace: Any, index: int | None, total: int | None) -> Origin:
    """Return where a nested map's inputs come from, as far as a cache is concerned."""
    from hypernodes._cached import load

    spec = step.step.map
    assert spec is not None

    async def reload() -> tuple[Mapping[str, Any], list[tuple[Any, ...]]]:
        await load(scope, trace, [slot for _, slot in step.parameters], index, _run_step)
        rows = listed_rows(spec, step.inputs(trace), f"nested pipeline {step.name!r}")
        return {name: trace[slot] for name, slot in step.shared}, list(rows)

    return Origin(trace.rows_of_digests(step, total or 0), reload)

"""``Pipeline``: nodes joined by the names of what they need and make."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, overload

from hypernodes import events as ev
from hypernodes._bridge import iterate_sync, run_sync
from hypernodes._callbacks import CallbackDispatcher, PipelineCallback
from hypernodes._engine import DEFAULT_ITEMS
from hypernodes._feed import Feed, ListFeed, stream_feed
from hypernodes._map_run import Columns
from hypernodes._mapping import ItemResult, MapMode, MapResult, MapSpec, OnError, listed_rows
from hypernodes._node import Input, Node, checked_seconds, function_name
from hypernodes._plan import INHERIT, CallStep, ExecutionPlan, PlanStep, Settings, Step, compile_plan
from hypernodes._run import Job
from hypernodes._stream import EventStream, ItemStream
from hypernodes._options import (
    check_call,
    checked_backend,
    checked_callbacks,
    checked_limits,
    checked_name,
    merged_inputs,
    renamed_inputs,
    renamed_outputs,
    wanted_names,
)
from hypernodes.backend import Backend, LocalBackend
from hypernodes.errors import DefinitionError, DependencyError, PipelineRecursionError, did_you_mean, quoted

_DEFAULT_BACKEND = LocalBackend()
_MOST_RECURSION = 50
_running: ContextVar[tuple[object, ...]] = ContextVar("hypernodes_running", default=())


class NestedPipeline:
    """A pipeline as one node of another, with its names adapted; made by :meth:`Pipeline.as_node`."""

    __slots__ = ("_pipeline", "_step")

    def __init__(self, pipeline: Pipeline, step: PlanStep) -> None:
        self._pipeline = pipeline
        self._step = step

    @property
    def name(self) -> str:
        """The step's name in paths, events and errors."""
        return self._step.name

    @property
    def pipeline(self) -> Pipeline:
        """The pipeline inside."""
        return self._pipeline

    @property
    def inputs(self) -> Mapping[str, Input]:
        """What it needs, by the names outside."""
        return MappingProxyType(dict(self._step.typed_inputs()))

    @property
    def outputs(self) -> tuple[str, ...]:
        """What it makes, by the names outside."""
        return self._step.outputs

    def __repr__(self) -> str:
        mapped = f" mapped over {', '.join(self._step.map.over)}" if self._step.map else ""
        needs, makes = ", ".join(self._step.inputs), ", ".join(self.outputs)
        return f"<nested pipeline {self.name}({needs}) -> {makes}{mapped}>"


class Pipeline:
    """Nodes joined by the names of what they need and make. Immutable; may run many times at once.

    Args:
        nodes: nodes, pipelines, or pipelines adapted by :meth:`as_node`, in any order.
        name: how paths, events and errors call it.
        backend: where it runs; inherited when nested, else a :class:`~hypernodes.backend.LocalBackend`.
        callbacks: watchers of its runs; ``[]`` silences those it would inherit.
        limits: bounds by name for nodes that say ``limit=name``: how many may run at once in one run (int),
            or an ``anyio.CapacityLimiter`` of yours that every run shares.
        timeout: seconds that one run of it may take (of a map: one item).
        strict_types: check that what a node returns can be what its consumers' annotations ask for.

    Raises:
        DefinitionError: two nodes make one output, or an option is not what it must be.
        CycleError: nodes need each other in a circle.
        TypeMismatchError: with ``strict_types``.

    >>> from hypernodes import Pipeline, node
    >>> @node("cleaned")
    ... def clean(text: str) -> str:
    ...     return text.strip().lower()
    >>> @node("words")
    ... def split(cleaned: str) -> list[str]:
    ...     return cleaned.split()
    >>> pipeline = Pipeline([clean, split], name="text")
    >>> pipeline.run(text="  Shalom Olam ")
    {'cleaned': 'shalom olam', 'words': ['shalom', 'olam']}
    >>> pipeline.map({"text": ["A b", "C"]}, "text", output_name="words")
    MapResult({'words': [['a', 'b'], ['c']]})
    """

    __slots__ = ("_nodes", "_plan", "_said_name", "_strict")

    def __init__(
        self,
        nodes: Iterable[Node[..., Any] | Pipeline | NestedPipeline],
        *,
        name: str | None = None,
        backend: Any = INHERIT,
        callbacks: Any = INHERIT,
        limits: Mapping[str, Any] | None = None,
        timeout: Any = INHERIT,
        strict_types: bool = False,
    ) -> None:
        self._nodes = _checked_nodes(nodes)
        self._said_name = checked_name(name)
        self._strict = strict_types
        settings = Settings(
            backend=INHERIT if backend is INHERIT else checked_backend(backend),
            callbacks=INHERIT if callbacks is INHERIT else checked_callbacks(callbacks),
            timeout=INHERIT if timeout is INHERIT else checked_seconds(timeout, name),
            limits=checked_limits(limits or {}),
        )
        self._plan = compile_plan(name or "pipeline", [_step(each) for each in self._nodes], settings, {})
        if strict_types:
            from hypernodes._strict import check_types

            check_types(self._plan)

    # ---- what it is

    @property
    def name(self) -> str | None:
        """Its name, if it was given one."""
        return self._said_name

    @property
    def nodes(self) -> tuple[Node[..., Any] | Pipeline | NestedPipeline, ...]:
        """What it was made of."""
        return self._nodes

    @property
    def inputs(self) -> Mapping[str, Input]:
        """What a run must or may be given, by name, with annotations and defaults."""
        return MappingProxyType(dict(self._plan.typed_inputs()))

    @property
    def outputs(self) -> tuple[str, ...]:
        """What a run makes, in the order in which it is made."""
        return self._plan.outputs

    @property
    def plan(self) -> ExecutionPlan:
        """The steps in the order in which they run, as data."""
        return self._plan

    # ---- variations, each a new pipeline

    def with_name(self, name: str) -> Pipeline:
        """Return it under another name."""
        checked = checked_name(name) or "pipeline"
        return self._varied(self._plan.with_name(checked), name=checked)

    def with_backend(self, backend: Backend) -> Pipeline:
        """Return it running somewhere else."""
        return self._varied(self._plan.with_settings(backend=checked_backend(backend)))

    def with_callbacks(self, callbacks: Iterable[PipelineCallback]) -> Pipeline:
        """Return it with these callbacks in place of those it has; ``[]`` for none."""
        return self._varied(self._plan.with_settings(callbacks=checked_callbacks(callbacks)))

    def with_timeout(self, timeout: float | None) -> Pipeline:
        """Return it with a timeout in seconds, or with none."""
        return self._varied(self._plan.with_settings(timeout=checked_seconds(timeout, self._plan.name)))

    def with_limits(self, limits: Mapping[str, Any]) -> Pipeline:
        """Return it with these limits besides those it has; the same name is replaced."""
        merged = {**self._plan.settings.limits, **checked_limits(limits)}
        return self._varied(self._plan.with_settings(limits=merged))

    def bind(self, **values: Any) -> Pipeline:
        """Return it with some inputs fixed, such as a client or a model; they are inputs no longer."""
        return self._varied(self._plan.binding(values))

    def replace(self, **nodes: Any) -> Pipeline:
        """Return it with other nodes in the place of those that make these outputs.

        A replacement is a node or pipeline that makes the same outputs, or a plain function, which
        then makes what the replaced node made. Made for fakes in tests:

        >>> from hypernodes import Pipeline, node
        >>> @node("page")
        ... async def download(url): ...
        >>> @node("size")
        ... def measure(page): return len(page)
        >>> Pipeline([download, measure]).replace(page=lambda url: "x" * 3).run(url="u", output_name="size")
        3
        """
        changed = list(self._nodes)
        for output, new in nodes.items():
            position = next((i for i, old in enumerate(changed) if output in old.outputs), None)
            if position is None:
                raise DefinitionError(
                    f"replace(): {self._plan.label} has no output {output!r}{did_you_mean(output, self.outputs)}"
                    f"{self._inner_hint(output)}"
                )
            old = changed[position]
            if not isinstance(new, Node | Pipeline | NestedPipeline):
                made = old.output_name if isinstance(old, Node) else old.outputs
                new = Node(new, made if isinstance(made, str) or len(made) > 1 else made[0])
            lost = [name for name in old.outputs if name not in new.outputs]
            if lost:
                raise DefinitionError(
                    f"replace({output}=...): {_name_of(new)!r} makes {quoted(new.outputs)}, but the node it replaces "
                    f"also makes {quoted(lost)}"
                )
            changed[position] = new
        settings = self._plan.settings
        plan = compile_plan(self._plan.name, [_step(each) for each in changed], settings, self._plan.constants)
        copy = self._varied(plan)
        copy._nodes = tuple(changed)
        if self._strict:
            from hypernodes._strict import check_types

            check_types(plan)
        return copy

    def as_node(
        self,
        input_mapping: Mapping[str, str] | None = None,
        output_mapping: Mapping[str, str] | None = None,
        map_over: str | Sequence[str] | None = None,
        map_mode: MapMode = "zip",
        name: str | None = None,
        max_concurrency: int | None = None,
        on_error: OnError = "raise",
    ) -> NestedPipeline:
        """Return it as a node of another pipeline, under other names, once or for each item of a list.

        Args:
            input_mapping: ``{outer: inner}`` for inputs that go by another name outside.
            output_mapping: ``{inner: outer}`` for outputs that go by another name outside.
            map_over: outer inputs that take a list; every output is then a list, in the same order.
            map_mode: ``"zip"``, or ``"product"`` for all combinations, the last name fastest.
            name: the node's name in paths, events and errors.
            max_concurrency: items at once.
            on_error: ``"raise"`` the first failure, or ``"collect"``: a failed item's outputs are None.
        """
        step_name = checked_name(name) or self._said_name or "+".join(self.outputs)
        outer_to_inner = renamed_inputs(self._plan, input_mapping or {}, step_name)
        inner_to_outer = renamed_outputs(self._plan, output_mapping or {}, step_name)
        spec = None
        if map_over is not None:
            spec = MapSpec.checked(
                map_over,
                outer_to_inner,
                mode=map_mode,
                max_concurrency=max_concurrency,
                on_error=on_error,
                owner=f"nested pipeline {step_name!r}",
            )
        elif (map_mode, max_concurrency, on_error) != ("zip", None, "raise"):
            raise DefinitionError(
                f"nested pipeline {step_name!r}: map_mode, max_concurrency and on_error are for a map; "
                f"name its inputs with map_over"
            )
        return NestedPipeline(self, PlanStep(step_name, self._plan, outer_to_inner, inner_to_outer, spec))

    def _varied(self, plan: ExecutionPlan, *, name: str | None = None) -> Pipeline:
        copy = object.__new__(Pipeline)
        copy._nodes = self._nodes
        copy._said_name = name or self._said_name
        copy._strict = self._strict
        copy._plan = plan
        return copy

    def _inner_hint(self, output: str) -> str:
        for step in self._plan.steps:
            if isinstance(step, PlanStep) and output in step.plan.producers:
                return f" (nested pipeline {step.name!r} makes it inside: replace it there)"
        return ""

    # ---- calls

    @overload
    async def arun(self, inputs: Mapping[str, Any] | None = None, *, output_name: str, **kwargs: Any) -> Any: ...
    @overload
    async def arun(
        self, inputs: Mapping[str, Any] | None = None, *, output_name: Sequence[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]: ...
    async def arun(
        self,
        inputs: Mapping[str, Any] | None = None,
        *,
        output_name: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run once and return every output by name.

        Args:
            inputs: values by name; may also be given as keywords.
            output_name: run only what these outputs need; a str gives the bare value, a list a dict.

        Raises:
            DependencyError: an input is missing or unknown, or an output unknown, before anything runs.
            Exception: whatever a node raises, as itself, with a note that says where.

        Cancelling the awaiting task stops everything that the run has started.
        """
        job = self._job(merged_inputs(inputs, kwargs), output_name)
        outputs = await self._placed(job, self._emit(job))
        return outputs[output_name] if isinstance(output_name, str) else outputs

    @overload
    def run(self, inputs: Mapping[str, Any] | None = None, *, output_name: str, **kwargs: Any) -> Any: ...
    @overload
    def run(
        self, inputs: Mapping[str, Any] | None = None, *, output_name: Sequence[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]: ...
    def run(
        self,
        inputs: Mapping[str, Any] | None = None,
        *,
        output_name: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """:meth:`arun` from sync code: a script, a notebook cell, a sync node, any thread."""
        return run_sync(lambda: self.arun(inputs, output_name=output_name, **kwargs))  # type: ignore[call-overload,misc]

    async def amap(
        self,
        inputs: Mapping[str, Any],
        map_over: str | Sequence[str],
        *,
        map_mode: MapMode = "zip",
        max_concurrency: int | None = None,
        on_error: OnError = "raise",
        max_failures: int | None = None,
        output_name: str | Sequence[str] | None = None,
    ) -> MapResult:
        """Run once for each item and return a list for each output, in input order.

        Args:
            inputs: values by name; those in ``map_over`` are lists, the others are shared by all items.
            map_over: the inputs that take a list.
            map_mode: ``"zip"``, or ``"product"`` for all combinations, the last name fastest.
            max_concurrency: items at once.
            on_error: ``"raise"`` the first failure and cancel the rest, or ``"collect"``: failed positions
                hold None, and ``.failures`` of the result lists them.
            max_failures: with ``"collect"``, stop with TooManyFailuresError at this many.
            output_name: make only these outputs.

        Raises:
            MapInputError: lists of unequal length, or values that cannot be mapped.
        """
        spec = self._map_spec(inputs, map_over, map_mode, max_concurrency, on_error, max_failures, output_name)
        rows = listed_rows(spec, inputs, self._plan.label)
        job = self._job(inputs, output_name, spec, ListFeed(rows), rows.count)
        columns = Columns(job.wanted or self.outputs, rows.count)
        await self._placed(job, self._emit(job), columns)
        return columns.collected()

    def map(
        self,
        inputs: Mapping[str, Any],
        map_over: str | Sequence[str],
        *,
        map_mode: MapMode = "zip",
        max_concurrency: int | None = None,
        on_error: OnError = "raise",
        max_failures: int | None = None,
        output_name: str | Sequence[str] | None = None,
    ) -> MapResult:
        """:meth:`amap` from sync code."""
        return run_sync(
            lambda: self.amap(
                inputs,
                map_over,
                map_mode=map_mode,
                max_concurrency=max_concurrency,
                on_error=on_error,
                max_failures=max_failures,
                output_name=output_name,
            )
        )

    def astream(
        self,
        inputs: Mapping[str, Any],
        map_over: str | Sequence[str],
        *,
        ordered: bool = True,
        map_mode: MapMode = "zip",
        max_concurrency: int | None = None,
        on_error: OnError = "raise",
        max_failures: int | None = None,
        output_name: str | Sequence[str] | None = None,
    ) -> AbstractAsyncContextManager[AsyncIterator[ItemResult]]:
        """Run once for each item and hand results over as items finish.

        ``async with pipeline.astream({"url": urls}, "url") as items:`` gives an async iterator of
        ``ItemResult(index, outputs, error)``. The mapped inputs may be any iterables or async iterables,
        endless ones too: at most ``max_concurrency`` items are taken from them and not yet handed over, so a
        slow consumer slows the source. Leaving the block cancels what still runs and closes the source. A sync
        source is read in worker threads unless it is quick, so one that belongs to its thread (a sqlite3
        cursor) must be told otherwise (``check_same_thread=False``).

        Args:
            inputs: values by name; those in ``map_over`` are iterables.
            map_over: the inputs that are mapped.
            ordered: hand results over in input order; otherwise as they finish.
            map_mode: ``"zip"``, or ``"product"`` (of lists).
            max_concurrency: items at once, and in memory.
            on_error: ``"raise"``, or ``"collect"``: a failed item has ``error`` set and no outputs.
            max_failures: with ``"collect"``, stop with TooManyFailuresError at this many.
            output_name: make only these outputs.
        """
        spec = self._map_spec(inputs, map_over, map_mode, max_concurrency, on_error, max_failures, output_name)
        feed, total = stream_feed(spec, inputs, self._plan.label)
        job = self._job(inputs, output_name, spec, feed, total)
        window = max_concurrency or self._items_at_once()
        stream = ItemStream(job.wanted or self.outputs, window, ordered=ordered)

        async def produce() -> None:
            try:
                await self._placed(job, self._emit(job), stream)
            finally:
                await feed.aclose()

        return stream.fed_by(produce)

    def stream(
        self,
        inputs: Mapping[str, Any],
        map_over: str | Sequence[str],
        *,
        ordered: bool = True,
        map_mode: MapMode = "zip",
        max_concurrency: int | None = None,
        on_error: OnError = "raise",
        max_failures: int | None = None,
        output_name: str | Sequence[str] | None = None,
    ) -> AbstractContextManager[Iterator[ItemResult]]:
        """:meth:`astream` from sync code: ``with pipeline.stream(...) as items:``."""
        return iterate_sync(
            lambda: self.astream(
                inputs,
                map_over,
                ordered=ordered,
                map_mode=map_mode,
                max_concurrency=max_concurrency,
                on_error=on_error,
                max_failures=max_failures,
                output_name=output_name,
            )
        )

    def aevents(
        self,
        inputs: Mapping[str, Any] | None = None,
        *,
        output_name: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> AbstractAsyncContextManager[AsyncIterator[ev.Event]]:
        """Run once and watch: ``async with pipeline.aevents(...) as events:`` iterates over typed events.

        The last one is :class:`~hypernodes.events.RunFinished` with the answer that :meth:`arun` would have
        given; a failing run raises out of the iteration. Leaving the block cancels the run.
        """
        job = self._job(merged_inputs(inputs, kwargs), output_name)
        stream = EventStream()

        async def produce() -> None:
            outputs = await self._placed(job, ev.fan_out([self._emit(job), stream]))
            result = outputs[output_name] if isinstance(output_name, str) else outputs
            stream(ev.RunFinished(job.run_id, job.path, time.time(), result))

        return stream.fed_by(produce)

    def events(
        self,
        inputs: Mapping[str, Any] | None = None,
        *,
        output_name: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> AbstractContextManager[Iterator[ev.Event]]:
        """:meth:`aevents` from sync code."""
        return iterate_sync(lambda: self.aevents(inputs, output_name=output_name, **kwargs))

    # ---- from a call to a job

    def _job(
        self,
        inputs: Mapping[str, Any],
        output_name: str | Sequence[str] | None,
        spec: MapSpec | None = None,
        feed: Feed | None = None,
        total: int | None = None,
    ) -> Job:
        plan = self._plan
        wanted = None if output_name is None else wanted_names(output_name)
        if spec is None:
            check_call(plan, inputs, wanted)
        mapped = spec.over if spec else ()
        return Job(
            plan=plan,
            inputs={name: value for name, value in inputs.items() if name not in mapped},
            run_id=os.urandom(8).hex(),
            path=(plan.name,),
            wanted=wanted,
            map=spec,
            feed=feed,
            total=total,
        )

    def _map_spec(
        self,
        inputs: Mapping[str, Any],
        map_over: str | Sequence[str],
        map_mode: MapMode,
        max_concurrency: int | None,
        on_error: OnError,
        max_failures: int | None,
        output_name: str | Sequence[str] | None,
    ) -> MapSpec:
        inputs = merged_inputs(inputs, {})
        wanted = None if output_name is None else wanted_names(output_name)
        spec = MapSpec.checked(
            map_over,
            self._plan.inputs,
            mode=map_mode,
            max_concurrency=max_concurrency,
            on_error=on_error,
            max_failures=max_failures,
            owner=self._plan.label,
        )
        check_call(self._plan, inputs, wanted)
        missing = [name for name in spec.over if name not in inputs]
        if missing:
            raise DependencyError(f"{self._plan.label} is mapped over {quoted(missing)}, which is not among the inputs")
        return spec

    def _emit(self, job: Job) -> ev.Emit | None:
        said = self._plan.settings.callbacks
        dispatcher = CallbackDispatcher(job.run_id, self._plan, () if said is INHERIT else said)
        return dispatcher if dispatcher.kinds else None

    def _backend(self) -> Backend:
        said = self._plan.settings.backend
        return _DEFAULT_BACKEND if said is INHERIT else said

    def _items_at_once(self) -> int:
        backend = self._backend()
        return (isinstance(backend, LocalBackend) and backend.engine.max_concurrency) or DEFAULT_ITEMS

    async def _placed(self, job: Job, emit: ev.Emit | None, sink: Any = None) -> Any:
        """Hand a job to the backend; a pipeline that runs itself, deeper and deeper, is stopped."""
        around = _running.get()
        if around.count(self._plan) >= _MOST_RECURSION:
            raise PipelineRecursionError(
                f"{self._plan.label} runs itself from one of its own nodes, {_MOST_RECURSION} levels deep: "
                f"give the recursion an end"
            )
        token = _running.set((*around, self._plan))
        try:
            if sink is None:
                return await self._backend().arun(job, emit)
            return await self._backend().amap(job, sink, emit)
        finally:
            _running.reset(token)

    # ---- how it looks

    def __repr__(self) -> str:
        needs = ", ".join(name if each.required else f"{name}=..." for name, each in self.inputs.items())
        name = f" {self._said_name}" if self._said_name else ""
        return f"<Pipeline{name}({needs}) -> {', '.join(self.outputs)}>"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        """Return text and an HTML table of the steps, for notebooks."""
        from hypernodes._table import pipeline_table

        return {"text/plain": repr(self), "text/html": pipeline_table(self)}


def _checked_nodes(nodes: Any) -> tuple[Node[..., Any] | Pipeline | NestedPipeline, ...]:
    if isinstance(nodes, Node | Pipeline | NestedPipeline) or not isinstance(nodes, Iterable):
        raise DefinitionError(f"Pipeline takes a list of nodes, not {nodes!r}: write Pipeline([...])")
    checked = tuple(nodes)
    if not checked:
        raise DefinitionError("a pipeline needs at least one node")
    for each in checked:
        if not isinstance(each, Node | Pipeline | NestedPipeline):
            advice = f': decorate it with @node("{function_name(each)}_output")' if callable(each) else ""
            raise DefinitionError(f"a pipeline is made of nodes and pipelines, not {each!r}{advice}")
    return checked


def _step(each: Node[..., Any] | Pipeline | NestedPipeline) -> Step:
    """Lower a node to a step of a plan."""
    if isinstance(each, Node):
        return CallStep(each)
    return (each if isinstance(each, NestedPipeline) else each.as_node())._step


def _name_of(each: Node[..., Any] | Pipeline | NestedPipeline) -> str:
    return each.name or "pipeline"

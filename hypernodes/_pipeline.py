"""``Pipeline``: nodes joined by the names of what they need and make, and the ways to run them."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, overload

from hypernodes import events as ev
from hypernodes._bridge import Iteration, blocking, run_sync
from hypernodes._callbacks import CallbackDispatcher
from hypernodes._definition import PipelineDefinition
from hypernodes._feed import Feed, ListFeed, stream_feed
from hypernodes._map_run import Columns
from hypernodes._mapping import ItemResult, MapMode, MapResult, MapSpec, OnError, listed_rows
from hypernodes._options import check_call, merged_inputs, refreshed_names, wanted_names
from hypernodes._plan import IGNORED, INHERIT
from hypernodes._run import Job
from hypernodes._stream import EventStream, ItemStream
from hypernodes._traceback import user_frames
from hypernodes.backend import Backend, LocalBackend
from hypernodes.errors import DependencyError, PipelineRecursionError, quoted

if TYPE_CHECKING:
    from hypernodes._explanation import Explanation
    from hypernodes.backend._handle import RunHandle

_DEFAULT_BACKEND = LocalBackend()
_MOST_RECURSION = 50
_running: ContextVar[tuple[object, ...]] = ContextVar("hypernodes_running", default=())


class Pipeline(PipelineDefinition):
    """Nodes joined by the names of what they need and make. Immutable; may run many times at once.

    Args:
        nodes: nodes, pipelines, or pipelines adapted by :meth:`as_node`, in any order.
        name: how paths, events and errors call it.
        backend: where it runs; inherited when nested, else a :class:`~hypernodes.backend.LocalBackend`.
        cache: where results are kept: a :class:`~hypernodes.DiskCache`, any aiocache cache, or a store of your own;
            None for no caching. Inherited when nested.
        callbacks: watchers of its runs; ``[]`` silences those it would inherit.
        limits: bounds by name for nodes that say ``limit=name``: how many may run at once in one run (int),
            or an ``anyio.CapacityLimiter`` of yours that every run shares.
        timeout: seconds that one run of it may take (of a map: one item); on another machine, with all the waiting
            for it.
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

    __slots__ = ()

    @overload
    async def arun(
        self,
        inputs: Mapping[str, Any] | None = None,
        *,
        output_name: str,
        refresh: bool | Sequence[str] = False,
        **kwargs: Any,
    ) -> Any: ...
    @overload
    async def arun(
        self,
        inputs: Mapping[str, Any] | None = None,
        *,
        output_name: Sequence[str] | None = None,
        refresh: bool | Sequence[str] = False,
        **kwargs: Any,
    ) -> dict[str, Any]: ...
    async def arun(
        self,
        inputs: Mapping[str, Any] | None = None,
        *,
        output_name: str | Sequence[str] | None = None,
        refresh: bool | Sequence[str] = False,
        **kwargs: Any,
    ) -> Any:
        """Run once and return every output by name.

        Args:
            inputs: values by name.
            **kwargs: more of them, as keywords.
            output_name: run only what these outputs need; a str gives the bare value, a list a dict.
            refresh: True, or names of outputs: compute them, and what depends on them, although a cache has them.

        Raises:
            DependencyError: an input is missing or unknown, or an output unknown, before anything runs.
            Exception: whatever a node raises, as itself, with a note that says where.

        Cancelling the awaiting task stops everything that the run has started.
        """
        with user_frames:
            job = self._job(merged_inputs(inputs, kwargs), output_name, refresh)
            outputs = await self._placed(job, self._emit(job))
            return outputs[output_name] if isinstance(output_name, str) else outputs

    @overload
    def run(
        self,
        inputs: Mapping[str, Any] | None = None,
        *,
        output_name: str,
        refresh: bool | Sequence[str] = False,
        **kwargs: Any,
    ) -> Any: ...
    @overload
    def run(
        self,
        inputs: Mapping[str, Any] | None = None,
        *,
        output_name: Sequence[str] | None = None,
        refresh: bool | Sequence[str] = False,
        **kwargs: Any,
    ) -> dict[str, Any]: ...
    def run(
        self,
        inputs: Mapping[str, Any] | None = None,
        *,
        output_name: str | Sequence[str] | None = None,
        refresh: bool | Sequence[str] = False,
        **kwargs: Any,
    ) -> Any:
        """:meth:`arun` from sync code: a script, a notebook cell, a sync node, any thread."""
        with user_frames:
            return run_sync(lambda: self.arun(inputs, output_name=output_name, refresh=refresh, **kwargs))

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
        refresh: bool | Sequence[str] = False,
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
            refresh: as for :meth:`arun`.

        Raises:
            MapInputError: lists of unequal length, or values that cannot be mapped.
        """
        with user_frames:
            spec = self._map_spec(inputs, map_over, map_mode, max_concurrency, on_error, max_failures, output_name)
            rows = listed_rows(spec, inputs, self._plan.label)
            job = self._job(inputs, output_name, refresh, spec, ListFeed(rows), rows.count)
            columns = Columns(self.outputs if job.wanted is None else job.wanted, rows.count)
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
        refresh: bool | Sequence[str] = False,
    ) -> MapResult:
        """:meth:`amap` from sync code."""
        with user_frames:
            return run_sync(
                lambda: self.amap(
                    inputs,
                    map_over,
                    map_mode=map_mode,
                    max_concurrency=max_concurrency,
                    on_error=on_error,
                    max_failures=max_failures,
                    output_name=output_name,
                    refresh=refresh,
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
        refresh: bool | Sequence[str] = False,
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
            refresh: as for :meth:`arun`.
        """
        spec = self._map_spec(inputs, map_over, map_mode, max_concurrency, on_error, max_failures, output_name)
        feed, total = stream_feed(spec, inputs, self._plan.label)
        job = self._job(inputs, output_name, refresh, spec, feed, total)
        window = max_concurrency or self._backend().items_at_once()
        stream = ItemStream(self.outputs if job.wanted is None else job.wanted, window, ordered=ordered)

        async def produce() -> None:
            await self._placed(job, self._emit(job), stream)

        return stream.fed_by(produce, "pipeline.astream(...) as items:", feed.aclose)

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
        refresh: bool | Sequence[str] = False,
    ) -> AbstractContextManager[Iterator[ItemResult]]:
        """:meth:`astream` from sync code: ``with pipeline.stream(...) as items:``."""
        return Iteration(
            lambda: self.astream(
                inputs,
                map_over,
                ordered=ordered,
                map_mode=map_mode,
                max_concurrency=max_concurrency,
                on_error=on_error,
                max_failures=max_failures,
                output_name=output_name,
                refresh=refresh,
            ),
            "pipeline.stream(...) as items:",
        )

    def aevents(
        self,
        inputs: Mapping[str, Any] | None = None,
        *,
        output_name: str | Sequence[str] | None = None,
        refresh: bool | Sequence[str] = False,
        **kwargs: Any,
    ) -> AbstractAsyncContextManager[AsyncIterator[ev.Event]]:
        """Run once and watch: ``async with pipeline.aevents(...) as events:`` iterates over typed events.

        The last one is :class:`~hypernodes.events.RunFinished` with the answer that :meth:`arun` would have
        given; a failing run raises out of the iteration. Leaving the block cancels the run.
        """
        job = self._job(merged_inputs(inputs, kwargs), output_name, refresh)
        stream = EventStream()

        async def produce() -> None:
            outputs = await self._placed(job, ev.fan_out([self._emit(job), stream]))
            result = outputs[output_name] if isinstance(output_name, str) else outputs
            stream(ev.RunFinished(job.run_id, job.path, time.time(), result))

        return stream.fed_by(produce, "pipeline.aevents(...) as events:")

    def events(
        self,
        inputs: Mapping[str, Any] | None = None,
        *,
        output_name: str | Sequence[str] | None = None,
        refresh: bool | Sequence[str] = False,
        **kwargs: Any,
    ) -> AbstractContextManager[Iterator[ev.Event]]:
        """:meth:`aevents` from sync code."""
        written = "pipeline.events(...) as events:"
        return Iteration(lambda: self.aevents(inputs, output_name=output_name, refresh=refresh, **kwargs), written)

    async def explain(
        self,
        inputs: Mapping[str, Any] | None = None,
        map_over: str | Sequence[str] | None = None,
        *,
        map_mode: MapMode = "zip",
        output_name: str | Sequence[str] | None = None,
        refresh: bool | Sequence[str] = False,
        **kwargs: Any,
    ) -> Explanation:
        """Say what a run would do, before it does it: for each node and item a hit or a miss, and why.

        Nothing is run and nothing stored; lists that are mapped over are loaded from the cache. What is said of each
        node is data (:class:`~hypernodes.NodeExplanation`); the whole prints as a table.

        Args:
            inputs: values by name, as for :meth:`arun`, or with ``map_over`` as for :meth:`amap`.
            map_over: the inputs that take a list.
            map_mode: how they combine.
            output_name: explain only what these outputs need.
            refresh: as for :meth:`arun`.
            **kwargs: more inputs, as keywords.

        Raises:
            DependencyError: an input is missing or unknown, or an output unknown.
        """
        from hypernodes._explain import explain

        with user_frames:
            given = merged_inputs(inputs, kwargs)
            if map_over is None:
                return await explain(self._job(given, output_name, refresh))
            spec = self._map_spec(given, map_over, map_mode, None, "raise", None, output_name)
            rows = listed_rows(spec, given, self._plan.label)
            return await explain(self._job(given, output_name, refresh, spec, ListFeed(rows), rows.count))

    async def asubmit(
        self,
        inputs: Mapping[str, Any] | None = None,
        map_over: str | Sequence[str] | None = None,
        *,
        map_mode: MapMode = "zip",
        max_concurrency: int | None = None,
        on_error: OnError = "raise",
        max_failures: int | None = None,
        output_name: str | Sequence[str] | None = None,
        refresh: bool | Sequence[str] = False,
        **kwargs: Any,
    ) -> RunHandle:
        """Start a run that outlives this process, and return at once.

        ``await handle`` gives the result that :meth:`arun`, or with ``map_over`` :meth:`amap`, would have given;
        ``RunHandle.from_id(handle.id)`` finds the run again from another process. Needs a backend whose runs can
        outlive their caller, such as :class:`~hypernodes.backend.ModalBackend`; callbacks are not told.

        Args:
            inputs: values by name, as for :meth:`arun`, or with ``map_over`` as for :meth:`amap`.
            map_over: the inputs that take a list.
            map_mode: how they combine.
            max_concurrency: items at once.
            on_error: as for :meth:`amap`.
            max_failures: likewise.
            output_name: make only these outputs.
            refresh: as for :meth:`arun`.
            **kwargs: more inputs, as keywords.

        Raises:
            RemoteExecutionError: what runs on this pipeline's backend ends with this process.
        """
        with user_frames:
            given = merged_inputs(inputs, kwargs)
            if map_over is None:
                bare = output_name if isinstance(output_name, str) else None
                return await self._backend().asubmit(self._job(given, output_name, refresh), bare)
            spec = self._map_spec(given, map_over, map_mode, max_concurrency, on_error, max_failures, output_name)
            rows = listed_rows(spec, given, self._plan.label)
            return await self._backend().asubmit(
                self._job(given, output_name, refresh, spec, ListFeed(rows), rows.count)
            )

    def submit(
        self,
        inputs: Mapping[str, Any] | None = None,
        map_over: str | Sequence[str] | None = None,
        *,
        map_mode: MapMode = "zip",
        max_concurrency: int | None = None,
        on_error: OnError = "raise",
        max_failures: int | None = None,
        output_name: str | Sequence[str] | None = None,
        refresh: bool | Sequence[str] = False,
        **kwargs: Any,
    ) -> RunHandle:
        """:meth:`asubmit` from sync code."""
        with user_frames:
            return run_sync(
                lambda: self.asubmit(
                    inputs,
                    map_over,
                    map_mode=map_mode,
                    max_concurrency=max_concurrency,
                    on_error=on_error,
                    max_failures=max_failures,
                    output_name=output_name,
                    refresh=refresh,
                    **kwargs,
                )
            )

    # ---- from a call to a job

    def _job(
        self,
        inputs: Mapping[str, Any],
        output_name: str | Sequence[str] | None,
        refresh: bool | Sequence[str],
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
            inputs={
                name: value for name, value in inputs.items() if name not in mapped and plan.inputs[name] is not IGNORED
            },
            run_id=os.urandom(8).hex(),
            path=(plan.name,),
            wanted=wanted,
            map=spec,
            feed=feed,
            total=total,
            refresh=refreshed_names(plan, refresh),
            nested=bool(_running.get()) or blocking.get(),
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

    def _checked(
        self, inputs: Mapping[str, Any] | None, map_over: str | Sequence[str] | None
    ) -> tuple[Mapping[str, Any], MapSpec | None]:
        """Raise what a run or a map with these inputs would raise at once; return them, and how they are mapped."""
        given = merged_inputs(inputs, {})
        if map_over is None:
            self._job(given, None, False)
            return given, None
        return given, self._map_spec(given, map_over, "zip", None, "raise", None, None)

    def _emit(self, job: Job) -> ev.Emit | None:
        said = self._plan.settings.callbacks
        dispatcher = CallbackDispatcher(job.run_id, self._plan, () if said is INHERIT else said)
        return dispatcher if dispatcher.kinds else None

    def _backend(self) -> Backend:
        said = self._plan.settings.backend
        return _DEFAULT_BACKEND if said is INHERIT else said

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

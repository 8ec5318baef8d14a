"""From events to a user's hooks: ``PipelineCallback`` and the context it is called with."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hypernodes import events as ev
from hypernodes._mapping import Path
from hypernodes._plan import INHERIT, ExecutionPlan, PlanStep


class CallbackContext:
    """Where in the run a hook is called, and values that the callbacks of one run share.

    Each pipeline of a run, and each item of a map, has its own context, so what it says of depth and
    parents is right also when branches run at the same time. ``set`` and ``get`` reach one store per run.
    """

    __slots__ = ("_dispatcher", "_place")

    def __init__(self, dispatcher: CallbackDispatcher, place: Path) -> None:
        self._dispatcher = dispatcher
        self._place = place

    def set(self, key: str, value: Any) -> None:
        """Keep a value for the other callbacks and hooks of this run."""
        self._dispatcher.values[key] = value

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value that a callback of this run has set."""
        return self._dispatcher.values.get(key, default)

    @property
    def run_id(self) -> str:
        """The same in every hook of one run."""
        return self._dispatcher.run_id

    @property
    def depth(self) -> int:
        """How many pipelines enclose the current one: 0 in the outermost."""
        return len(self._place) - 1

    @property
    def hierarchy_path(self) -> list[str]:
        """The ids of the pipelines around this place, outermost first, this one last."""
        return [ev.format_path(self._place[: end + 1]) for end in range(len(self._place))]

    @property
    def current_pipeline_id(self) -> str:
        """The id of the pipeline (or map item) that this hook is about, such as ``"p / encode_all[17]"``."""
        return ev.format_path(self._place)

    @property
    def parent_pipeline_id(self) -> str | None:
        """The id of the pipeline around the current one; None for the outermost."""
        return ev.format_path(self._place[:-1]) if len(self._place) > 1 else None

    def get_pipeline_metadata(self, pipeline_id: str) -> dict[str, Any]:
        """Return ``total_nodes``, ``node_ids`` and ``pipeline_name``; empty for an id this run does not have."""
        plan = self._dispatcher.plans.get(_INDEX.sub("", pipeline_id))
        if plan is None:
            return {}
        node_ids = [step.name for step in plan.steps]
        return {"total_nodes": len(node_ids), "node_ids": node_ids, "pipeline_name": plan.name}

    def __repr__(self) -> str:
        return f"<CallbackContext {self.current_pipeline_id!r} depth={self.depth}>"


class PipelineCallback:
    """Hooks into a run: override those you need.

    They are plain functions, called on the event loop's thread and never concurrently, so keep them short.
    A callback that raises is switched off for the rest of the run and logged; it never fails the run.
    Durations are in seconds. ``node_id`` is the function's name, or a nested pipeline's step name.
    """

    def on_pipeline_start(self, pipeline_id: str, inputs: Any, ctx: CallbackContext) -> None:
        """The outermost pipeline, or a map of it, begins."""

    def on_pipeline_end(self, pipeline_id: str, outputs: Any, duration: float, ctx: CallbackContext) -> None:
        """The outermost pipeline, or a map of it, has made its outputs."""

    def on_node_start(self, node_id: str, inputs: Any, ctx: CallbackContext) -> None:
        """A node is handed its inputs, a mapping by name."""

    def on_node_end(self, node_id: str, outputs: Any, duration: float, ctx: CallbackContext) -> None:
        """A node has made its outputs, a mapping by name."""

    def on_node_cached(self, node_id: str, signature: str, ctx: CallbackContext) -> None:
        """A node was not run, as what it makes is in the cache; instead of its start and end."""

    def on_node_chunk(self, node_id: str, chunk: Any, ctx: CallbackContext) -> None:
        """A generator node has yielded a piece."""

    def on_error(self, node_id: str, error: BaseException, ctx: CallbackContext) -> None:
        """A node has failed; called once for each failure, with the innermost node."""

    def on_nested_pipeline_start(self, parent_id: str, child_pipeline_id: str, ctx: CallbackContext) -> None:
        """A nested pipeline begins."""

    def on_nested_pipeline_end(
        self, parent_id: str, child_pipeline_id: str, duration: float, ctx: CallbackContext
    ) -> None:
        """A nested pipeline has made its outputs."""

    def on_map_start(self, total_items: int | None, ctx: CallbackContext) -> None:
        """A map begins; ``total_items`` is None for a stream of unknown length."""

    def on_map_item_start(self, item_index: int, ctx: CallbackContext) -> None:
        """An item begins; ``ctx`` is the item's own."""

    def on_map_item_end(self, item_index: int, duration: float, ctx: CallbackContext) -> None:
        """An item has made its outputs."""

    def on_map_item_cached(self, item_index: int, signature: str, ctx: CallbackContext) -> None:
        """Every node of an item came from the cache; instead of its start and end."""

    def on_map_end(self, total_duration: float, ctx: CallbackContext) -> None:
        """Every item is done."""


Hook = Callable[..., None]

_HOOKS_OF: dict[type, tuple[str, ...]] = {
    # Of two, the second one is for nested pipelines.
    ev.PipelineStarted: ("on_pipeline_start", "on_nested_pipeline_start"),
    ev.PipelineFinished: ("on_pipeline_end", "on_nested_pipeline_end"),
    ev.NodeStarted: ("on_node_start",),
    ev.NodeFinished: ("on_node_end",),
    ev.NodeFailed: ("on_error",),
    ev.NodeChunk: ("on_node_chunk",),
    ev.NodeCached: ("on_node_cached",),
    ev.MapStarted: ("on_map_start",),
    ev.MapFinished: ("on_map_end",),
    ev.ItemStarted: ("on_map_item_start",),
    ev.ItemFinished: ("on_map_item_end",),
    ev.ItemCached: ("on_map_item_cached",),
}
HOOK_NAMES = tuple(name for names in _HOOKS_OF.values() for name in names)
_IN_A_NODE = frozenset({ev.NodeStarted, ev.NodeFinished, ev.NodeFailed, ev.NodeChunk, ev.NodeCached})
_MOST_PLACES = 32
_INDEX = re.compile(r"\[\d+\]")

Arguments = tuple[Any, ...]
Calls = dict[type, tuple[Callable[[Any, "CallbackContext"], Arguments], list[tuple[Hook, object]]]]


_ARGUMENTS: dict[str, Callable[[Any, CallbackContext], Arguments]] = {
    "on_pipeline_start": lambda event, ctx: (ctx.current_pipeline_id, event.inputs, ctx),
    "on_pipeline_end": lambda event, ctx: (ctx.current_pipeline_id, event.outputs, event.duration, ctx),
    "on_nested_pipeline_start": lambda event, ctx: (ctx.parent_pipeline_id, ctx.current_pipeline_id, ctx),
    "on_nested_pipeline_end": lambda event, ctx: (
        ctx.parent_pipeline_id,
        ctx.current_pipeline_id,
        event.duration,
        ctx,
    ),
    "on_node_start": lambda event, ctx: (event.path[-1], event.inputs, ctx),
    "on_node_end": lambda event, ctx: (event.path[-1], event.outputs, event.duration, ctx),
    "on_error": lambda event, ctx: (event.path[-1], event.error, ctx),
    "on_node_chunk": lambda event, ctx: (event.path[-1], event.chunk, ctx),
    "on_node_cached": lambda event, ctx: (event.path[-1], event.signature, ctx),
    "on_map_start": lambda event, ctx: (event.total_items, ctx),
    "on_map_end": lambda event, ctx: (event.duration, ctx),
    "on_map_item_start": lambda event, ctx: (event.index, ctx),
    "on_map_item_end": lambda event, ctx: (event.index, event.duration, ctx),
    "on_map_item_cached": lambda event, ctx: (event.index, event.signature, ctx),
}
"""What each hook is called with."""


class CallbackDispatcher:
    """Calls the hooks of the callbacks that a place in the run inherits; an :class:`~hypernodes.events.Emit`.

    Everything it needs besides the event comes from the plan, so events replayed from another process
    reach the same hooks with the same context.
    """

    def __init__(self, run_id: str, plan: ExecutionPlan, callbacks: Sequence[PipelineCallback]) -> None:
        self.run_id = run_id
        self.values: dict[str, Any] = {}
        """What callbacks have set."""
        self.plans = {plan.name: plan}
        """The plans of the pipelines that events have come from, by id without item indices."""
        self._broken: set[int] = set()
        self._levels: dict[Path, _Level] = {(): _Level(plan, callbacks, nested=False)}
        self._places: dict[Path, tuple[CallbackContext, Calls]] = {}
        everyone = [*callbacks, *_callbacks_below(plan)]
        self.kinds = frozenset(
            kind for kind, names in _HOOKS_OF.items() if any(_hook(each, name) for each in everyone for name in names)
        )

    def __call__(self, event: ev.Event, /) -> None:
        kind = type(event)
        place = event.path[:-1] if kind in _IN_A_NODE else event.path
        known = self._places.get(place)
        ctx, calls = self._place(place) if known is None else known
        if kind not in calls or (kind is ev.NodeFailed and not event.origin):  # type: ignore[union-attr]
            return
        make_arguments, hooks = calls[kind]
        arguments = make_arguments(event, ctx)
        broken = self._broken
        for hook, callback in hooks:
            if broken and id(callback) in broken:
                continue
            try:
                hook(*arguments)
            except Exception as error:  # noqa: BLE001 - a callback never fails the run
                self._switch_off(hook, callback, error)

    def _switch_off(self, hook: Hook, callback: object, error: Exception) -> None:
        import logging

        self._broken.add(id(callback))
        logging.getLogger("hypernodes").error(
            "callback %s raised in %s and is switched off for the rest of this run",
            type(callback).__name__,
            getattr(hook, "__name__", "a hook"),
            exc_info=error,
        )

    def _place(self, place: Path) -> tuple[CallbackContext, Calls]:
        """Return the context of a place and its hooks; both can be made again, so few are kept."""
        if len(self._places) >= _MOST_PLACES:
            self._places.clear()
        if type(place[-1]) is int:
            # An item of a map: its hooks are those of the map.
            _, calls = self._places.get(place[:-1]) or self._place(place[:-1])
        else:
            calls = self._level(tuple([part for part in place[1:] if type(part) is not int])).calls
        known = self._places[place] = CallbackContext(self, place), calls
        return known

    def _level(self, names: Path) -> _Level:
        """Return the plan at these names, with the callbacks that it has or inherits."""
        level = self._levels.get(names)
        if level is None:
            around = self._level(names[:-1])
            plan = around.plan.child(names[-1:]) or around.plan
            said = plan.settings.callbacks
            level = self._levels[names] = _Level(plan, around.callbacks if said is INHERIT else said, nested=True)
            self.plans[ev.format_path((self._levels[()].plan.name, *names))] = plan
        return level


class _Level:
    """One pipeline of a plan with the hooks that are called in it."""

    __slots__ = ("callbacks", "calls", "plan")

    def __init__(self, plan: ExecutionPlan, callbacks: Sequence[PipelineCallback], *, nested: bool) -> None:
        self.plan = plan
        self.callbacks = callbacks
        self.calls: Calls = {}
        """By kind of event: what makes the hooks' arguments, and the hooks."""
        for kind, names in _HOOKS_OF.items():
            name = names[-1] if nested else names[0]
            hooks: list[tuple[Hook, object]] = [
                (hook, callback) for callback in callbacks if (hook := _hook(callback, name)) is not None
            ]
            if hooks:
                self.calls[kind] = _ARGUMENTS[name], hooks


def _hook(callback: object, name: str) -> Hook | None:
    """Return a hook that the callback overrides."""
    hook = getattr(callback, name, None)
    same = getattr(hook, "__func__", None) is getattr(PipelineCallback, name)
    return None if hook is None or same else hook


def _callbacks_below(plan: ExecutionPlan) -> Iterable[PipelineCallback]:
    for step in plan.steps:
        if isinstance(step, PlanStep):
            said = step.plan.settings.callbacks
            yield from () if said is INHERIT else said
            yield from _callbacks_below(step.plan)

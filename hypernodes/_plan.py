"""The plan of a pipeline: steps in order, checked once at construction. Pure data, recursive."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from hypernodes._mapping import MapSpec, Path
from hypernodes._node import REQUIRED, Input, Node
from hypernodes.errors import CycleError, DefinitionError, DependencyError, did_you_mean, quoted

if TYPE_CHECKING:
    from hypernodes._program import Program


class Inherit:
    """The type of :data:`INHERIT`, for annotations."""

    def __repr__(self) -> str:
        return "<inherit>"

    def __reduce__(self) -> str:
        return "INHERIT"


INHERIT: Final = Inherit()
"""What a setting is that says nothing: the nearest enclosing pipeline that says something decides."""


class _Ignored:
    """The type of :data:`IGNORED`."""

    def __repr__(self) -> str:
        return "<ignored>"


IGNORED: Final = _Ignored()
"""The default of an input that no step needs since one was replaced: calls may give it, nothing reads it."""


EVERYTHING: Final = "*"
"""In place of the name of an output: all of them are to be recomputed."""


def tokens_of(limit: Any) -> int:
    """Return how many may hold a limit at once: a number itself, or anyio's semaphores and limiters."""
    if isinstance(limit, int):
        return limit
    tokens = limit.max_value if hasattr(limit, "max_value") else limit.total_tokens
    return int(min(tokens, sys.maxsize))  # a limiter may be endless


@dataclass(frozen=True, slots=True)
class Settings:
    """What a pipeline says of how its runs go; ``INHERIT`` where it says nothing."""

    backend: Any = INHERIT
    cache: Any = INHERIT
    """A store; None for no cache."""
    callbacks: Any = INHERIT
    timeout: Any = INHERIT
    limits: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class CallStep:
    """One function of a plan."""

    node: Node[..., Any]

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.node.outputs

    @property
    def inputs(self) -> Mapping[str, Any]:
        """Names and defaults of what it needs."""
        return {name: each.default for name, each in self.node.parameters.items()}

    def inputs_for(self, outputs: Collection[str]) -> Collection[str]:
        """Names of what it needs to make some of its outputs: a function needs everything."""
        return self.node.parameters

    def typed_inputs(self) -> Mapping[str, Input]:
        return self.node.inputs

    def output_type(self, name: str) -> Any:
        return _part_of(self.node.returns, self.node, name)


@dataclass(frozen=True, slots=True, eq=False)
class PlanStep:
    """A nested pipeline as one step: its plan, the names it goes by outside, and how it is mapped."""

    name: str
    plan: ExecutionPlan
    outer_to_inner: Mapping[str, str]
    inner_to_outer: Mapping[str, str]
    map: MapSpec | None = None
    ignored: tuple[str, ...] = ()
    """Names outside of inputs that nothing inside needs since a step there was replaced."""

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(self.inner_to_outer.values())

    @property
    def inputs(self) -> Mapping[str, Any]:
        """Names (outside) and defaults of what it needs."""
        inner = self.plan.inputs
        mapped = self.map.over if self.map else ()
        # A default is for a single item, so a mapped input is always required.
        return {outer: REQUIRED if outer in mapped else inner[name] for outer, name in self.outer_to_inner.items()}

    def inputs_for(self, outputs: Collection[str]) -> Collection[str]:
        """Names (outside) of what it needs to make some of its outputs; a map needs what it goes over."""
        _, inner = needed_outputs(self.plan, (name for name, outer in self.inner_to_outer.items() if outer in outputs))
        over = self.map.over if self.map else ()
        return [outer for outer, name in self.outer_to_inner.items() if name in inner or outer in over]

    def typed_inputs(self) -> Mapping[str, Input]:
        inner = self.plan.typed_inputs()
        mapped = self.map.over if self.map else ()
        typed = {}
        for outer, name in self.outer_to_inner.items():
            each = inner.get(name) or Input(name)  # one that is only mapped over says nothing of its type
            if outer in mapped:
                typed[outer] = Input(outer, list[each.annotation])  # type: ignore[name-defined]
            else:
                typed[outer] = Input(outer, each.annotation, each.default)
        return typed

    def output_type(self, name: str) -> Any:
        inner = next(inside for inside, outside in self.inner_to_outer.items() if outside == name)
        annotation = self.plan.producers[inner].output_type(inner)
        return list[annotation] if self.map else annotation  # type: ignore[valid-type]


Step = CallStep | PlanStep


@dataclass(frozen=True, slots=True, eq=False)
class ExecutionPlan:
    """Steps in topological order (the order given, where names allow it), with what they need and make."""

    name: str
    steps: tuple[Step, ...]
    inputs: Mapping[str, Any]
    outputs: tuple[str, ...]
    producers: Mapping[str, Step]
    open_limits: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    settings: Settings = field(default_factory=Settings)
    has_cache: bool = False
    """Whether it or a pipeline inside says where to cache."""
    programs: dict[Any, Program] = field(default_factory=dict, repr=False)
    """Derived from the rest, kept because it is asked for at every run."""

    def __reduce__(self) -> tuple[Any, ...]:
        # What only the caller's process can use stays there: callbacks, the user's own limiters, derived data.
        limits = {name: tokens_of(value) for name, value in self.settings.limits.items()}
        cache = self.settings.cache
        if cache is not INHERIT and not getattr(cache, "travels", False):
            cache = None
        settings = replace(self.settings, cache=cache, callbacks=INHERIT, limits=limits)
        ignored = tuple(name for name, default in self.inputs.items() if default is IGNORED)
        return compile_plan, (self.name, self.steps, settings, self.constants, ignored)

    @property
    def required(self) -> list[str]:
        return [name for name, default in self.inputs.items() if default is REQUIRED]

    @property
    def label(self) -> str:
        """How errors name this plan."""
        return f"pipeline {self.name!r}"

    def with_settings(self, **changes: Any) -> ExecutionPlan:
        """Return this plan with other settings; limits are added to those there are."""
        settings = replace(self.settings, **changes)
        open_limits = _open_limits(self.steps, settings.limits)
        has_cache = _has_cache(self.steps, settings)
        return replace(self, settings=settings, open_limits=open_limits, has_cache=has_cache, programs={})

    def with_name(self, name: str) -> ExecutionPlan:
        return replace(self, name=name, programs={})

    def binding(self, values: Mapping[str, Any]) -> ExecutionPlan:
        """Return this plan with some inputs fixed."""
        for name in values:
            if name not in self.inputs and name not in self.constants:
                raise DefinitionError(f"bind(): {self.label} has no input {name!r}{did_you_mean(name, self.inputs)}")
        inputs = {name: default for name, default in self.inputs.items() if name not in values}
        return replace(self, inputs=inputs, constants={**self.constants, **values}, programs={})

    def typed_inputs(self) -> Mapping[str, Input]:
        """Inputs with their annotations, as the first step that needs each one says."""
        typed: dict[str, Input] = {}
        for step in self.steps:
            for name, each in step.typed_inputs().items():
                if name in self.inputs and name not in typed:
                    typed[name] = Input(name, each.annotation, self.inputs[name])
        return typed

    def check_outputs(self, names: Iterable[str]) -> None:
        """Raise DependencyError for an output that no step makes."""
        for name in names:
            if name not in self.producers:
                raise DependencyError(f"{self.label} has no output {name!r}{did_you_mean(name, self.producers)}")

    def child(self, path: Path) -> ExecutionPlan | None:
        """Return the nested plan at a path below this plan, such as ``("encode_all", 17)``."""
        plan = self
        for name in path:
            if isinstance(name, int):
                continue
            step = next((step for step in plan.steps if step.name == name), None)
            if not isinstance(step, PlanStep):
                return None
            plan = step.plan
        return plan


def compile_plan(
    name: str,
    steps: Sequence[Step],
    settings: Settings,
    constants: Mapping[str, Any],
    accepted: Iterable[str] = (),
) -> ExecutionPlan:
    """Order steps by the names they need and make; calls may also give the ``accepted`` names.

    Raises:
        DefinitionError: two steps make the same output.
        CycleError: steps need each other in a circle.
    """
    producers = _producers(steps)
    ordered = _ordered(steps, producers)
    inputs: dict[str, Any] = {}
    for step in ordered:
        for each, default in step.inputs.items():
            if each in producers or each in constants:
                continue
            if each not in inputs or default is REQUIRED:
                inputs[each] = default
    unread = (*accepted, *(each for step in ordered if isinstance(step, PlanStep) for each in step.ignored))
    for each in unread:
        if each not in producers and each not in constants:
            inputs.setdefault(each, IGNORED)
    outputs = tuple(output for step in ordered for output in step.outputs)
    open_limits = _open_limits(ordered, settings.limits)
    has_cache = _has_cache(ordered, settings)
    return ExecutionPlan(name, ordered, inputs, outputs, producers, open_limits, constants, settings, has_cache)


def _has_cache(steps: Iterable[Step], settings: Settings) -> bool:
    own = settings.cache is not INHERIT and settings.cache is not None
    return own or any(isinstance(step, PlanStep) and step.plan.has_cache for step in steps)


def needed_outputs(plan: ExecutionPlan, wanted: Iterable[str]) -> tuple[dict[int, frozenset[str]], set[str]]:
    """Return what these outputs need.

    First, by the identity of each step, the outputs that it has to make; then the names of all values in play,
    inputs among them.
    """
    names = set(wanted)
    needed: dict[int, frozenset[str]] = {}
    for step in reversed(plan.steps):
        made = names.intersection(step.outputs)
        if made:
            needed[id(step)] = frozenset(made)
            names.update(step.inputs_for(made))
    return needed, names


def _producers(steps: Sequence[Step]) -> dict[str, Step]:
    producers: dict[str, Step] = {}
    for step in steps:
        for output in step.outputs:
            if output in producers:
                raise DefinitionError(
                    f"two nodes make the output {output!r}: {describe(producers[output])} and {describe(step)}; "
                    f"rename one (as_node(output_mapping=...) for a nested pipeline)"
                )
            producers[output] = step
    return producers


def _ordered(steps: Sequence[Step], producers: Mapping[str, Step]) -> tuple[Step, ...]:
    """Depth first in the given order, so that steps stay where they were written when names allow it."""
    ordered: list[Step] = []
    done: set[int] = set()
    for first in steps:
        if id(first) in done:
            continue
        trail = [first]
        open_ids = {id(first)}
        waiting = [iter(first.inputs)]
        while trail:
            for name in waiting[-1]:
                producer = producers.get(name)
                if producer is None or id(producer) in done:
                    continue
                if id(producer) in open_ids:
                    raise CycleError(_cycle_text([*trail[[id(s) for s in trail].index(id(producer)) :], producer]))
                trail.append(producer)
                open_ids.add(id(producer))
                waiting.append(iter(producer.inputs))
                break
            else:
                waiting.pop()
                step = trail.pop()
                open_ids.discard(id(step))
                done.add(id(step))
                ordered.append(step)
    return tuple(ordered)


def _cycle_text(trail: Sequence[Step]) -> str:
    """Print a cycle in the direction that data goes; each step of the trail needs the one after it."""
    names = " -> ".join(step.name for step in reversed(trail))
    needs = "; ".join(
        f"{needing.name!r} needs {quoted(name for name in needing.inputs if name in making.outputs)} of {making.name!r}"
        for needing, making in itertools.pairwise(trail)
    )
    return f"these nodes form a cycle: {names} ({needs}); break it by giving one of them another output name"


def _open_limits(steps: Iterable[Step], defined: Collection[str]) -> dict[str, str]:
    """Return the limit names that steps use and nobody below defines, each with a step that uses it."""
    used: dict[str, str] = {}
    for step in steps:
        if isinstance(step, PlanStep):
            used |= step.plan.open_limits
        elif step.node.limit is not None:
            used[step.node.limit] = step.name
    return {limit: name for limit, name in used.items() if limit not in defined}


def _part_of(annotation: Any, node: Node[..., Any], name: str) -> Any:
    """Return the annotation of one of a node's outputs."""
    import typing

    args = typing.get_args(annotation)
    if node.kind in ("generator", "async_generator"):
        return list[args[0]] if args else list  # type: ignore[valid-type]
    if not isinstance(node.output_name, tuple):
        return annotation
    if typing.get_origin(annotation) is not tuple:
        return Any
    if len(args) == 2 and args[1] is ...:
        return args[0]
    return args[node.outputs.index(name)] if len(args) == len(node.outputs) else Any


def describe(step: Step) -> str:
    """Name a step for an error: the function with its place, or the nested pipeline."""
    if isinstance(step, PlanStep):
        return f"nested pipeline {step.name!r}"
    code = getattr(step.node.func, "__code__", None)
    where = f" ({code.co_filename.rsplit('/', 1)[-1]}:{code.co_firstlineno})" if code else ""
    return f"node {step.name!r}{where}"

"""What a pipeline is: nodes, names and settings, checked at construction and never changed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

from hypernodes._callbacks import PipelineCallback
from hypernodes._mapping import MapMode, MapSpec, OnError
from hypernodes._node import Input, Node, checked_seconds, function_name
from hypernodes._options import (
    checked_backend,
    checked_cache,
    checked_callbacks,
    checked_limits,
    checked_name,
    renamed_inputs,
    renamed_outputs,
)
from hypernodes._plan import (
    IGNORED,
    INHERIT,
    CallStep,
    ExecutionPlan,
    Inherit,
    PlanStep,
    Settings,
    Step,
    compile_plan,
)
from hypernodes.backend import Backend
from hypernodes.errors import DefinitionError, did_you_mean, quoted

if TYPE_CHECKING:
    import anyio


class NestedPipeline:
    """A pipeline as one node of another, with its names adapted; made by :meth:`PipelineDefinition.as_node`."""

    __slots__ = ("_options", "_pipeline", "_step")

    def __init__(self, pipeline: PipelineDefinition, step: PlanStep, options: Mapping[str, Any]) -> None:
        self._pipeline = pipeline
        self._step = step
        self._options = options

    @property
    def name(self) -> str:
        """The step's name in paths, events and errors."""
        return self._step.name

    @property
    def pipeline(self) -> PipelineDefinition:
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

    def _replacing(self, nodes: Mapping[str, Any]) -> NestedPipeline:
        """Return it, adapted as it is, with other nodes inside."""
        return self._pipeline.replace(**nodes).as_node(**self._options)

    def __repr__(self) -> str:
        mapped = f" mapped over {', '.join(self._step.map.over)}" if self._step.map else ""
        needs, makes = ", ".join(self._step.inputs), ", ".join(self.outputs)
        return f"<nested pipeline {self.name}({needs}) -> {makes}{mapped}>"


class PipelineDefinition:
    """Nodes joined by the names of what they need and make; :class:`~hypernodes.Pipeline` adds the calls."""

    __slots__ = ("_nodes", "_plan", "_said_name", "_strict")

    def __init__(
        self,
        nodes: Iterable[Member],
        *,
        name: str | None = None,
        backend: Backend | Inherit = INHERIT,
        cache: Any = INHERIT,
        callbacks: Iterable[PipelineCallback] | Inherit = INHERIT,
        limits: Mapping[str, int | anyio.CapacityLimiter] | None = None,
        timeout: float | Inherit | None = INHERIT,
        strict_types: bool = False,
    ) -> None:
        self._nodes = _checked_nodes(nodes)
        self._said_name = checked_name(name)
        self._strict = strict_types
        settings = Settings(
            backend=backend if isinstance(backend, Inherit) else checked_backend(backend),
            cache=checked_cache(cache),
            callbacks=callbacks if isinstance(callbacks, Inherit) else checked_callbacks(callbacks),
            timeout=timeout if isinstance(timeout, Inherit) else checked_seconds(timeout, name),
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
    def nodes(self) -> tuple[Member, ...]:
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

    def with_name(self, name: str) -> Self:
        """Return it under another name."""
        checked = checked_name(name) or "pipeline"
        return self._varied(self._plan.with_name(checked), name=checked)

    def with_backend(self, backend: Backend) -> Self:
        """Return it running somewhere else."""
        return self._varied(self._plan.with_settings(backend=checked_backend(backend)))

    def with_cache(self, cache: Any) -> Self:
        """Return it with another cache: a DiskCache, an aiocache cache, a store of yours, or None for no caching."""
        return self._varied(self._plan.with_settings(cache=checked_cache(cache)))

    def with_callbacks(self, callbacks: Iterable[PipelineCallback]) -> Self:
        """Return it with these callbacks in place of those it has; ``[]`` for none."""
        return self._varied(self._plan.with_settings(callbacks=checked_callbacks(callbacks)))

    def with_timeout(self, timeout: float | None) -> Self:
        """Return it with a timeout in seconds, or with none."""
        return self._varied(self._plan.with_settings(timeout=checked_seconds(timeout, self._plan.name)))

    def with_limits(self, limits: Mapping[str, int | anyio.CapacityLimiter]) -> Self:
        """Return it with these limits besides those it has; the same name is replaced."""
        merged = {**self._plan.settings.limits, **checked_limits(limits)}
        return self._varied(self._plan.with_settings(limits=merged))

    def bind(self, **values: Any) -> Self:
        """Return it with some inputs fixed, such as a client or a model; they are inputs no longer."""
        return self._varied(self._plan.binding(values))

    def replace(self, **nodes: Member | Callable[..., Any]) -> Self:
        """Return it with other nodes in the place of those that make these outputs; made for fakes in tests.

        A replacement is a node or pipeline that makes the same outputs, or a plain function, which then makes
        what the replaced node made. One with ``**kwargs``, such as a ``Mock``, takes the inputs of the node
        that it replaces, by keyword. An output made inside a nested pipeline is replaced there. Inputs that
        nothing needs any longer may still be given and bound, and are ignored.

        Raises:
            DefinitionError: there is no such output, several nested pipelines make it, or a replacement
                leaves out an output of the node that it replaces.

        >>> from hypernodes import Pipeline, node
        >>> @node("page")
        ... async def download(url): ...
        >>> @node("size")
        ... def measure(page): return len(page)
        >>> Pipeline([download, measure]).replace(page=lambda: "x" * 3).run(url="u", output_name="size")
        3
        """
        changed = list(self._nodes)
        inside: dict[int, dict[str, Any]] = {}
        for output, new in nodes.items():
            if not isinstance(new, _MEMBERS) and not callable(new):
                raise DefinitionError(
                    f"replace({output}=...) takes a node or a function, not {new!r}: "
                    f"write replace({output}=lambda: value)"
                )
            position = self._position(output)
            old = self._nodes[position]
            if isinstance(old, Node):
                changed[position] = _replacement(output, old, new)
            elif isinstance(new, _MEMBERS) and set(old.outputs) <= set(new.outputs):
                changed[position] = new
            else:
                inside.setdefault(position, {})[_name_inside(old, output)] = new
        for position, swaps in inside.items():
            nest = changed[position]
            if isinstance(nest, Node) or nest is not self._nodes[position]:
                raise DefinitionError(f"replace(): {quoted(swaps)} is inside what is replaced as a whole")
            changed[position] = nest._replacing(swaps) if isinstance(nest, NestedPipeline) else nest.replace(**swaps)
        old_plan = self._plan
        steps = [_step(each) for each in changed]
        plan = compile_plan(old_plan.name, steps, old_plan.settings, old_plan.constants, old_plan.inputs)
        copy = self._varied(plan)
        copy._nodes = tuple(changed)
        if self._strict:
            from hypernodes._strict import check_types

            check_types(plan)
        return copy

    def _position(self, output: str) -> int:
        """Return the position of the node that makes an output, or of the only nest that makes it inside."""
        for position, each in enumerate(self._nodes):
            if output in each.outputs:
                return position
        nests = [(i, step) for i, step in enumerate(map(_step, self._nodes)) if _makes_inside(step, output)]
        if not nests:
            raise DefinitionError(
                f"replace(): {self._plan.label} has no output {output!r}{did_you_mean(output, self.outputs)}"
            )
        if len(nests) > 1:
            raise DefinitionError(
                f"replace({output}=...): the nested pipelines {quoted(step.name for _, step in nests)} all make it "
                f"inside: say the name that it has outside one of them"
            )
        return nests[0][0]

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
        ignored = tuple(
            outer
            for outer, inner in outer_to_inner.items()
            if self._plan.inputs[inner] is IGNORED and not (spec and outer in spec.over)
        )
        read = {outer: inner for outer, inner in outer_to_inner.items() if outer not in ignored}
        options = {
            "input_mapping": dict(input_mapping or {}),
            "output_mapping": dict(output_mapping or {}),
            "map_over": None if spec is None else spec.over,
            "map_mode": map_mode,
            "name": step_name,
            "max_concurrency": max_concurrency,
            "on_error": on_error,
        }
        return NestedPipeline(self, PlanStep(step_name, self._plan, read, inner_to_outer, spec, ignored), options)

    def _varied(self, plan: ExecutionPlan, *, name: str | None = None) -> Self:
        copy = object.__new__(type(self))
        copy._nodes = self._nodes
        copy._said_name = name or self._said_name
        copy._strict = self._strict
        copy._plan = plan
        return copy

    # ---- how it looks

    def __repr__(self) -> str:
        needs = ", ".join(name if each.required else f"{name}=..." for name, each in self.inputs.items())
        name = f" {self._said_name}" if self._said_name else ""
        return f"<Pipeline{name}({needs}) -> {', '.join(self.outputs)}>"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        """Return text and an HTML table of the steps, for notebooks."""
        from hypernodes._table import pipeline_table

        return {"text/plain": repr(self), "text/html": pipeline_table(self)}


Member = Node[..., Any] | PipelineDefinition | NestedPipeline
"""What a pipeline is made of."""
_MEMBERS: Any = Node | PipelineDefinition | NestedPipeline


def _checked_nodes(nodes: Any) -> tuple[Member, ...]:
    if isinstance(nodes, _MEMBERS) or not isinstance(nodes, Iterable):
        raise DefinitionError(f"Pipeline takes a list of nodes, not {nodes!r}: write Pipeline([...])")
    checked = tuple(nodes)
    if not checked:
        raise DefinitionError("a pipeline needs at least one node")
    for each in checked:
        if not isinstance(each, _MEMBERS):
            advice = f': decorate it with @node("{function_name(each)}_output")' if callable(each) else ""
            raise DefinitionError(f"a pipeline is made of nodes and pipelines, not {each!r}{advice}")
    return checked


def _step(each: Member) -> Step:
    """Lower a node to a step of a plan."""
    if isinstance(each, Node):
        return CallStep(each)
    return (each if isinstance(each, NestedPipeline) else each.as_node())._step


def _replacement(output: str, old: Node[..., Any], new: Any) -> Member:
    """Return what takes the place of a node: a node or pipeline as it is, a function as a node."""
    if not isinstance(new, _MEMBERS):
        made = old.output_name
        return Node(_taking_inputs_of(old, new), made if isinstance(made, str) or len(made) > 1 else made[0])
    lost = [name for name in old.outputs if name not in new.outputs]
    if lost:
        raise DefinitionError(
            f"replace({output}=...): {new.name or 'pipeline'!r} makes {quoted(new.outputs)}, but the node it "
            f"replaces also makes {quoted(lost)}"
        )
    checked: Member = new
    return checked


def _taking_inputs_of(old: Node[..., Any], func: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function with ``**kwargs`` as one that names the parameters of a node in their place."""
    try:
        own = inspect.signature(func).parameters
    except (ValueError, TypeError):
        return func  # Node says what is wrong with it
    kinds = {each.kind for each in own.values()}
    if inspect.Parameter.VAR_KEYWORD not in kinds or inspect.Parameter.POSITIONAL_ONLY in kinds:
        return func
    open_ended = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    named = {name: each for name, each in own.items() if each.kind not in open_ended}
    taken = {
        name: each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for name, each in {**old.parameters, **named}.items()
    }
    adapted = functools.partial(func)
    adapted.__signature__ = inspect.Signature(list(taken.values()))  # type: ignore[attr-defined]
    return adapted


def _makes_inside(step: Step, output: str) -> bool:
    if not isinstance(step, PlanStep):
        return False
    return output in step.plan.producers or any(_makes_inside(each, output) for each in step.plan.steps)


def _name_inside(nest: PipelineDefinition | NestedPipeline, output: str) -> str:
    """Return the name inside a nest of an output that it makes, or makes only inside."""
    if isinstance(nest, NestedPipeline):
        return next((inner for inner, outer in nest._step.inner_to_outer.items() if outer == output), output)
    return output

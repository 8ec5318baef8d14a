"""A plan bound to one way of calling it: which inputs are given, which outputs wanted. Pure data in slots.

Values of a run live in one list; a step reads and writes positions of it, so that running a step costs no
look-up by name.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from hypernodes._cost import ELSEWHERE, ON_LOOP, Cost, cost_of
from hypernodes._mapping import MapSpec
from hypernodes._node import REQUIRED, Node
from hypernodes._plan import CallStep, ExecutionPlan, PlanStep, needed_outputs

Auto = Literal["measure", "loop", "thread", "process"]


_NONE: dict[str, Any] = {}


class Places(NamedTuple):
    """What ``run_in="auto"`` means for the nodes of a run, and for those of the items of a map in it."""

    calls: Auto = "measure"
    items: Auto = "measure"

    def of_items(self) -> Places:
        """Return the places inside a map's items."""
        return Places(self.items, self.items)


@dataclass(frozen=True, slots=True, eq=False)
class BoundCall:
    """A function with the slots of its arguments and of its result."""

    node: Node[..., Any]
    name: str
    func: Callable[..., Any]
    direct_sync: bool
    """A sync function with no limit, timeout or retry: may be called without further ado when it is cheap."""
    direct_async: bool
    """Likewise an async one."""
    place: str
    cost: Cost
    slots: tuple[int, ...]
    arity: int
    """Number of positional arguments; -1 when some go by keyword."""
    arguments: Callable[[list[Any]], Any]
    keywords: tuple[tuple[str, int], ...]
    parameters: tuple[tuple[str, int], ...]
    target: int
    """Slot of the result; -1 when it is unpacked into ``targets``."""
    targets: tuple[int, ...]

    def inputs(self, values: list[Any]) -> dict[str, Any]:
        """Return the arguments by name."""
        if self.arity == 1:
            return {self.parameters[0][0]: values[self.slots[0]]}
        return {name: values[slot] for name, slot in self.parameters}

    def keyword_arguments(self, values: list[Any]) -> dict[str, Any]:
        """Return the arguments that go by keyword."""
        if not self.keywords:
            return _NONE
        return {name: values[slot] for name, slot in self.keywords}

    @property
    def all_slots(self) -> list[int]:
        """The slots of its arguments."""
        return [slot for _, slot in self.parameters]

    def made(self, values: list[Any]) -> Any:
        """Return what the function returned: one value, or a tuple of the values under its several names."""
        return values[self.target] if self.target >= 0 else tuple([values[target] for target in self.targets])

    def put(self, values: list[Any], made: Any) -> None:
        """Store what the function returned."""
        if self.target >= 0:
            values[self.target] = made
        else:
            for target, value in zip(self.targets, made, strict=True):
                values[target] = value

    def outputs(self, values: list[Any]) -> dict[str, Any]:
        """Return what it made, by name."""
        if self.target >= 0:
            return {self.node.outputs[0]: values[self.target]}
        return {name: values[slot] for name, slot in zip(self.node.outputs, self.targets, strict=True)}


@dataclass(frozen=True, slots=True, eq=False)
class BoundPlan:
    """A nested pipeline with the slots that go in and come out."""

    step: PlanStep
    name: str
    program: Program
    wanted: tuple[str, ...]
    """Outputs to make, by their names inside."""
    shared: tuple[tuple[str, int], ...]
    """Inputs by their names inside, mapped ones left out, and their slots."""
    inner_map: MapSpec | None
    """How it is mapped, by the names inside."""
    targets: tuple[int, ...]
    parameters: tuple[tuple[str, int], ...]
    names: tuple[str, ...]
    """Wanted outputs by their names outside."""
    direct_sync: bool = False
    direct_async: bool = False

    def inputs(self, values: list[Any]) -> dict[str, Any]:
        """Return the inputs by their names outside."""
        return {name: values[slot] for name, slot in self.parameters}

    def outputs(self, values: list[Any]) -> dict[str, Any]:
        """Return what it made, by names outside."""
        return {name: values[slot] for name, slot in zip(self.names, self.targets, strict=True)}


BoundStep = BoundCall | BoundPlan


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """Bound steps in topological order, and what the frontier needs to know of who waits for whom."""

    plan: ExecutionPlan
    steps: tuple[BoundStep, ...]
    template: list[Any]
    """Values before a run: constants and defaults; copied, never written to."""
    slots: Mapping[str, int]
    """Slots of the inputs that are given."""
    outputs: tuple[tuple[str, int], ...]
    results: Callable[[list[Any]], tuple[Any, ...]]
    waits_for: tuple[int, ...]
    """For each step, how many steps must finish before it."""
    unblocks: tuple[tuple[int, ...], ...]
    """For each step, the positions of the steps that wait for it."""
    given_slots: frozenset[int]
    linear: bool
    """Whether each step waits for the one before, so that nothing could run side by side."""

    def outputs_of(self, values: list[Any]) -> dict[str, Any]:
        """Return the wanted outputs by name."""
        return {name: values[slot] for name, slot in self.outputs}


def bind(plan: ExecutionPlan, given: frozenset[str], wanted: tuple[str, ...] | None, places: Places) -> Program:
    """Return the program for a call that gives these inputs and wants these outputs (None: all)."""
    key = (given, wanted, places)
    program = plan.programs.get(key)
    if program is None:
        program = plan.programs[key] = _Binder(plan, given, wanted, places).program()
    return program


class _Binder:
    def __init__(
        self, plan: ExecutionPlan, given: frozenset[str], wanted: tuple[str, ...] | None, places: Places
    ) -> None:
        self._plan = plan
        self._wanted = plan.outputs if wanted is None else wanted
        self._places = places
        self._template: list[Any] = []
        self._slots: dict[str, int] = {}
        self._given: dict[str, int] = {}
        for name, value in plan.constants.items():
            self._slots[name] = self._slot(value)
        for name in plan.inputs:
            if name in given:
                self._slots[name] = self._given[name] = self._slot(None)

    def program(self) -> Program:
        needed, _ = needed_outputs(self._plan, self._wanted)
        chosen = [step for step in self._plan.steps if id(step) in needed]
        made = {output: position for position, step in enumerate(chosen) for output in step.outputs}
        for output in made:
            self._slots[output] = self._slot(None)
        steps = tuple(
            self._call(step) if isinstance(step, CallStep) else self._nested(step, needed[id(step)]) for step in chosen
        )
        before = [{made[name] for name in step.inputs_for(needed[id(step)]) if name in made} for step in chosen]
        after: list[list[int]] = [[] for _ in chosen]
        for position, earlier in enumerate(before):
            for each in earlier:
                after[each].append(position)
        outputs = tuple((name, self._slots[name]) for name in self._wanted)
        return Program(
            plan=self._plan,
            steps=steps,
            template=self._template,
            slots=self._given,
            outputs=outputs,
            results=_tuple_getter(tuple(slot for _, slot in outputs)),
            waits_for=tuple(len(each) for each in before),
            unblocks=tuple(tuple(each) for each in after),
            given_slots=frozenset(self._given.values()),
            linear=all(position - 1 in earlier for position, earlier in enumerate(before) if position),
        )

    def _slot(self, value: Any) -> int:
        self._template.append(value)
        return len(self._template) - 1

    def _argument(self, name: str, default: Any) -> int:
        slot = self._slots.get(name)
        # Without a value, each function gets its own default.
        return self._slot(default) if slot is None else slot

    def _call(self, step: CallStep) -> BoundCall:
        node = step.node
        parameters = tuple((name, self._argument(name, default)) for name, default in step.inputs.items())
        by_position, by_keyword = _split(node, parameters)
        targets = tuple(self._slots[name] for name in node.outputs)
        single = not isinstance(node.output_name, tuple)
        guards = (node.limit, node.max_concurrency, node.timeout, node.retry, node.keep)
        unguarded = all(guard is None for guard in guards)
        place = _place(node, self._places.calls)
        return BoundCall(
            node=node,
            name=node.name,
            func=node.func,
            direct_sync=unguarded and node.kind == "sync",
            direct_async=unguarded and node.kind == "async",
            place=place,
            cost=_cost(node, place, unguarded=unguarded),
            slots=by_position,
            arity=-1 if by_keyword else len(by_position),
            arguments=_tuple_getter(by_position),
            keywords=by_keyword,
            parameters=parameters,
            target=targets[0] if single else -1,
            targets=targets,
        )

    def _nested(self, step: PlanStep, made: frozenset[str]) -> BoundPlan:
        available = {
            outer: step.outer_to_inner[outer]
            for outer in step.inputs_for(made)
            if outer in self._slots or step.plan.inputs[step.outer_to_inner[outer]] is REQUIRED
        }
        wanted = tuple(inner for inner, outer in step.inner_to_outer.items() if outer in made)
        places = self._places.of_items() if step.map else self._places
        program = bind(step.plan, frozenset(available.values()), wanted, places)
        over = step.map.over if step.map else ()
        return BoundPlan(
            step=step,
            name=step.name,
            program=program,
            wanted=wanted,
            shared=tuple((inner, self._slots[outer]) for outer, inner in available.items() if outer not in over),
            inner_map=step.map and replace(step.map, over=tuple(step.outer_to_inner[name] for name in over)),
            targets=tuple(self._slots[step.inner_to_outer[inner]] for inner in wanted),
            parameters=tuple((outer, self._slots[outer]) for outer in available),
            names=tuple(step.inner_to_outer[inner] for inner in wanted),
        )


def _split(
    node: Node[..., Any], parameters: tuple[tuple[str, int], ...]
) -> tuple[tuple[int, ...], tuple[tuple[str, int], ...]]:
    """Split arguments into those by position (cheaper) and those by keyword (always right)."""
    func: Any = node.func
    if not isinstance(func, types.FunctionType | types.MethodType) or hasattr(func, "__wrapped__"):
        return (), parameters
    kinds = node.parameters
    by_position = tuple(slot for name, slot in parameters if kinds[name].kind is not kinds[name].KEYWORD_ONLY)
    return by_position, parameters[len(by_position) :]


def _tuple_getter(slots: tuple[int, ...]) -> Callable[[list[Any]], tuple[Any, ...]]:
    if len(slots) == 0:
        return lambda values: ()
    if len(slots) == 1:
        (slot,) = slots
        return lambda values: (values[slot],)
    return operator.itemgetter(*slots)


def _place(node: Node[..., Any], auto: Auto) -> str:
    if node.run_in != "auto" or node.kind not in ("sync", "generator"):
        return node.run_in
    if node.keep is not None and auto == "process":
        return "thread"  # what is kept stays in the process that asks for it
    # A timeout can only be kept for a function that does not hold the loop.
    return "thread" if auto == "measure" and node.timeout is not None else auto


def _cost(node: Node[..., Any], place: str, *, unguarded: bool) -> Cost:
    if place == "measure":
        return cost_of(node)
    return ON_LOOP if place == "loop" else ELSEWHERE

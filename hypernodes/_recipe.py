"""What all calls of one program have in common in a run with a cache: code, slots, and what is to be recomputed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hypernodes._digests import BY_VALUE
from hypernodes._node import Node
from hypernodes._plan import EVERYTHING, INHERIT
from hypernodes._program import BoundCall, BoundPlan, BoundStep, Program
from hypernodes.cache._code import Code
from hypernodes.cache._session import CacheSession


class Tracer:
    """What the traces of one run share that use one cache."""

    __slots__ = ("_recipes", "learned", "refresh", "session")

    def __init__(self, session: CacheSession, refresh: frozenset[str]) -> None:
        self.session = session
        self.refresh = refresh
        """Names of the outputs that this run recomputes."""
        self.learned: set[Program] = set()
        """Programs whose functions have been fingerprinted."""
        self._recipes: dict[tuple[Program, frozenset[str], frozenset[str]], Recipe] = {}

    async def learn(self, program: Program) -> None:
        """Fingerprint the functions of a program, once in a run."""
        if program not in self.learned:
            await self.session.learn(cached_nodes(program, self.session.store))
            self.learned.add(program)

    def recipe(
        self, program: Program, given: frozenset[str] = frozenset(), asked: frozenset[str] | None = None
    ) -> Recipe:
        """Return what traces of a program need to know, worked out once.

        Args:
            program: the program.
            given: names of the inputs that are being recomputed, so that what depends on them is recomputed too.
            asked: names of the outputs that are to be recomputed, at any depth.
        """
        key = program, given, self.refresh if asked is None else asked
        recipe = self._recipes.get(key)
        if recipe is None:
            recipe = self._recipes[key] = Recipe(self, *key)
        return recipe


class Recipe:
    """What traces need to know of one program's calls in one run."""

    __slots__ = ("asked", "codes", "dirty", "given", "producers", "program", "refresh", "slots", "template", "tracer")

    def __init__(self, tracer: Tracer, program: Program, given: frozenset[str], asked: frozenset[str]) -> None:
        self.tracer = tracer
        self.program = program
        self.given = given
        self.asked = asked
        self.codes: list[Code | None] = []
        self.slots: list[tuple[int, ...]] = []
        """For each call, the slots of its arguments, by the sorted names of its parameters."""
        self.producers = {target: position for position, step in enumerate(program.steps) for target in step.targets}
        self.template: list[Any] = [
            None if slot in self.producers else BY_VALUE for slot in range(len(program.template))
        ]
        """Digests before a run: constants and defaults, hashed when first needed, once for all items of a map."""
        self.dirty = {slot for name, slot in program.slots.items() if name in given}
        """Slots of what is being recomputed."""
        self.refresh: list[bool] = []
        """For each step, whether it is to run although there is an entry."""
        for step in program.steps:
            code = tracer.session.code(step.node) if isinstance(step, BoundCall) and step.node.cache else None
            by_name = dict(step.parameters)
            self.codes.append(code)
            self.slots.append(tuple(by_name[name] for name in code.names) if code else ())
            self.refresh.append(self._refreshed(step))

    def _refreshed(self, step: BoundStep) -> bool:
        """Say whether a step is to run although there is an entry; note what it makes as being recomputed."""
        if isinstance(step, BoundPlan):
            inner = self.inside(step)
            made = zip(step.targets, step.program.outputs, strict=True)
            dirty = {target for target, (_, slot) in made if slot in inner.dirty}
        else:
            wanted = not self.asked.isdisjoint(step.node.outputs) or EVERYTHING in self.asked
            dirty = set(step.targets) if wanted or any(slot in self.dirty for _, slot in step.parameters) else set()
        self.dirty |= dirty
        return bool(dirty)

    def inside(self, step: BoundPlan, tracer: Tracer | None = None) -> Recipe:
        """Return the recipe of a nested pipeline, which may have another cache."""
        slots = dict(step.shared)
        if step.inner_map is not None and step.step.map is not None:
            outside = dict(step.parameters)
            names = zip(step.inner_map.over, step.step.map.over, strict=True)
            slots |= {inner: outside[outer] for inner, outer in names}
        given = frozenset(name for name, slot in slots.items() if slot in self.dirty)
        asked = {inner for inner, outer in zip(step.wanted, step.names, strict=True) if outer in self.asked}
        return (tracer or self.tracer).recipe(step.program, given, self.asked | asked)


def is_inside(step: BoundPlan, session: CacheSession) -> bool:
    """Say whether a nested pipeline is part of the same run of the same cache, once and not mapped."""
    settings = step.program.plan.settings
    same_cache = settings.cache is INHERIT or (settings.cache is not None and settings.cache == session.store)
    return step.inner_map is None and same_cache and settings.backend is INHERIT


def cached_nodes(program: Program, store: Any) -> Iterator[Node[..., Any]]:
    """Iterate over the nodes of a program, nested ones too, whose results a store may keep."""
    for step in program.steps:
        if isinstance(step, BoundCall):
            if step.node.cache:
                yield step.node
        elif (cache := step.program.plan.settings.cache) is INHERIT or cache == store:
            yield from cached_nodes(step.program, store)

"""What is known of the identity of a run's values, without running anything: digests for slots, keys for steps.

A call's signature is made of its code and the digests of its inputs; what it makes has digests that follow from the
signature alone. So a chain of calls is known to its end from the inputs on, and only what no cache has is run.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from hypernodes._digests import BY_VALUE, FAILED, NO_DIGEST, Listed, hashed
from hypernodes._program import BoundCall, BoundPlan
from hypernodes._recipe import Recipe, is_inside
from hypernodes._signature.keys import Digest, listed, part
from hypernodes.cache._loaded import Loaded
from hypernodes.errors import UncacheableError
from hypernodes.events import NotLoaded

if TYPE_CHECKING:
    import anyio


class Unneeded(Enum):
    """In place of a hit."""

    UNNEEDED = True
    """It is not in the cache, and nothing that has to run needs it."""


UNNEEDED = Unneeded.UNNEEDED


_NOTHING_REPEATED: dict[int, dict[int, tuple[Any, Any]]] = {}


class Trace(list[Any]):
    """The values of one run of a program, or of one item of a map of it, with what is known of their identity.

    As a list it holds values by slot; :class:`NotLoaded` where one is in the cache and nothing has needed it yet.
    """

    __slots__ = ("_root", "children", "digests", "eager", "hits", "keys", "looking", "recipe", "repeated", "start")

    def __init__(
        self,
        recipe: Recipe,
        values: Iterable[Any],
        digests: list[Any],
        *,
        eager: bool = False,
        start: Trace | None = None,
    ) -> None:
        super().__init__(values)
        self.start = start
        """Of an item of a map: what all items begin with."""
        self.repeated: dict[int, dict[int, tuple[Any, Any]]] = _NOTHING_REPEATED
        """Of what all items of a map begin with, where its rows repeat values: for each mapped slot, these by identity,
        with their digests."""
        self._root: Trace | None = None
        self.looking: anyio.Lock | None = None
        """Held while its keys are looked up, where steps run side by side; that of the root counts."""
        self.recipe = recipe
        self.digests = digests
        self.eager = eager
        """Whether the wanted outputs must be loaded at the end."""
        count = len(recipe.codes)
        self.keys: list[str | None] = [None] * count
        """For each step that is a call, the key of its entry, where it is known."""
        self.hits: list[bool | Unneeded | None] = [None] * count
        """For each step whether it is in the cache (a nested pipeline: all of it); None where it is not known."""
        self.children: dict[BoundPlan, Trace] = {}
        """Of nested pipelines that are not mapped."""

    @property
    def root(self) -> Trace:
        """The trace around nested pipelines that are not mapped."""
        # Not kept where it is this one: a trace that refers to itself is left to the garbage collector.
        return self if self._root is None else self._root

    def predict(self) -> list[str]:
        """Work out every key that follows from what is known now; return those not yet looked up. May block."""
        asked: list[str] = []
        digests, keys, recipe = self.digests, self.keys, self.recipe
        codes, all_slots = recipe.codes, recipe.slots
        for position, step in enumerate(recipe.program.steps):
            code = codes[position]
            if code is not None:
                if keys[position] is not None:
                    continue
                pieces = [code.prefix]
                for slot in all_slots[position]:
                    digest = digests[slot]
                    if type(digest) is not bytes:
                        digest = self._resolved(slot, step)
                        if digest is None:
                            break
                    pieces.append(digest)
                else:
                    made = sha256(b"".join(pieces)).digest()
                    key = keys[position] = made.hex()
                    asked.append(key)
                    target = step.target  # type: ignore[union-attr]
                    if target >= 0:
                        digests[target] = made
                    else:
                        for count, target in enumerate(step.targets):
                            digests[target] = part(made, count)
            elif isinstance(step, BoundPlan) and is_inside(step, recipe.tracer.session):
                asked += self._predict_inside(step)
        return asked

    def _predict_inside(self, step: BoundPlan) -> list[str]:
        child = self.child(step)
        asked = child.predict()
        for name, slot in step.shared:
            # What had to be hashed inside need not be hashed again outside.
            self._learned(slot, child.digests[step.program.slots[name]])
        for target, (_, inner) in zip(step.targets, step.program.outputs, strict=True):
            # While it runs, what is to be hashed is there and not here.
            if self.digests[target] is None and child.digests[inner] is not BY_VALUE:
                self.digests[target] = child.digests[inner]
        return asked

    def known(self, slot: int) -> Any:
        """Return the digest of a slot; what items of a map share is hashed by the first that needs it."""
        digest, start = self.digests[slot], self.start
        if digest is BY_VALUE and start is not None:
            value = self[slot]
            if start[slot] is value and start.digests[slot] is not None:
                digest = self.digests[slot] = start.digests[slot]
            elif start.repeated and (found := start.repeated.get(slot, {}).get(id(value))):
                digest = self.digests[slot] = found[1]
        return digest

    def _learned(self, slot: int, digest: Any) -> None:
        """Note the digest of a slot, also for the other items of a map if they share its value."""
        before, start = self.digests[slot], self.start
        self.digests[slot] = digest
        if before is BY_VALUE and digest is not BY_VALUE and start is not None:
            value = self[slot]
            if start[slot] is value and start.digests[slot] is BY_VALUE:
                start.digests[slot] = digest
            elif slot in start.repeated:
                start.repeated[slot][id(value)] = value, digest  # an address names it only while it lives

    def child(self, step: BoundPlan) -> Trace:
        """Return the trace of a nested pipeline that is not mapped, with what is known of its inputs now."""
        child = self.children.get(step)
        if child is None:
            recipe = self.recipe.inside(step)
            child = self.children[step] = Trace(recipe, step.program.template, recipe.template.copy())
            child._root = self.root
        for name, slot in step.shared:
            inner = step.program.slots[name]
            child[inner] = self[slot]
            if child.digests[inner] is None or child.digests[inner] is BY_VALUE:
                child.digests[inner] = self.known(slot)
        return child

    def settle(self, slot: int) -> None:
        """Hash the value of a slot, if that is due. May block."""
        if self.known(slot) is BY_VALUE:
            self._learned(slot, hashed(self[slot], self.recipe.tracer.session))

    def _resolved(self, slot: int, step: Any) -> Digest | None:
        """Return the digest of a slot as bytes; None when there is none (yet)."""
        digest = self.known(slot)
        if digest is BY_VALUE:
            try:
                digest = self.recipe.tracer.session.digest(self[slot])
            except UncacheableError as error:
                name = next(name for name, each in step.parameters if each == slot)
                said = str(error).removeprefix("value")
                self.recipe.tracer.session.uncacheable(step.node, f"input {name!r}{said}")
                digest = NO_DIGEST
            self._learned(slot, digest)
            template = self.recipe.template
            if template[slot] is BY_VALUE and slot not in self.recipe.program.given_slots:
                template[slot] = digest
        if isinstance(digest, Listed):
            digest = digest.digest
        return digest if type(digest) is bytes else None

    def input_digests(self, position: int) -> list[Digest]:
        """Return the digests of a call's inputs, by the sorted names of its parameters."""
        digests = (self.digests[slot] for slot in self.recipe.slots[position])
        return [each.digest if isinstance(each, Listed) else each for each in digests]

    def found(self, there: set[str]) -> None:
        """Note which of the keys that were asked for have an entry."""
        hits, recipe = self.hits, self.recipe
        for position, key in enumerate(self.keys):
            if key is not None and hits[position] is None:
                hits[position] = key in there and (not recipe.refresh[position] or recipe.tracer.session.has(key))
        if self.children:
            for position, step in enumerate(recipe.program.steps):
                child = self.children.get(step)  # type: ignore[arg-type]
                if child is not None:
                    child.found(there)
                    hits[position] = child.complete
        if False in hits:
            self._drop_unneeded()

    def _drop_unneeded(self) -> None:
        """Find the steps that are not in the cache, and whose results nothing needs that has to run."""
        program, hits = self.recipe.program, self.hits
        needed = {slot for _, slot in program.outputs}
        for position in range(len(hits) - 1, -1, -1):
            step = program.steps[position]
            if hits[position]:
                continue
            unneeded = needed.isdisjoint(step.targets) and not self.recipe.refresh[position]
            if unneeded and hits[position] is False and isinstance(step, BoundCall):
                hits[position] = UNNEEDED
            else:
                needed.update(slot for _, slot in step.parameters)

    def hit_keys(self) -> Iterator[str]:
        """Iterate over the keys of the entries that there are, inside too."""
        for key, hit in zip(self.keys, self.hits, strict=True):
            if hit is True and key is not None:
                yield key
        for child in self.children.values():
            yield from child.hit_keys()

    def forget(self, refused: Mapping[str, str]) -> None:
        """Note that entries cannot be used after all."""
        for position, key in enumerate(self.keys):
            if key in refused:
                self.hits[position] = False
        for position, step in enumerate(self.recipe.program.steps):
            child = self.children.get(step)  # type: ignore[arg-type]
            if child is not None:
                child.forget(refused)
                self.hits[position] = child.complete

    @property
    def complete(self) -> bool:
        """Whether nothing has to be run."""
        return all(self.hits)

    def recall(self, position: int) -> None:
        """Put in place of what a step makes that it is in the cache."""
        step: Any = self.recipe.program.steps[position]
        child = self.children.get(step)
        if child is not None:
            child.recall_all()
            for target, (_, inner) in zip(step.targets, step.program.outputs, strict=True):
                self[target] = child[inner]
            return
        key = self.keys[position]
        assert key is not None
        if step.target >= 0:
            self[step.target] = NotLoaded(key)
        else:
            for count, target in enumerate(step.targets):
                self[target] = NotLoaded(key, count)

    def recall_all(self) -> None:
        """Put in place of everything that it is in the cache."""
        for position in range(len(self.keys)):
            self.recall(position)

    def signatures(self, position: int) -> Iterator[tuple[tuple[str, ...], str]]:
        """Iterate over a step that is in the cache and what is inside: the names that lead there, and the key."""
        if self.hits[position] is UNNEEDED:
            return
        step = self.recipe.program.steps[position]
        child = self.children.get(step)  # type: ignore[arg-type]
        if child is None:
            yield (step.name,), self.keys[position] or ""
            return
        for inner in range(len(child.keys)):
            for path, key in child.signatures(inner):
                yield (step.name, *path), key
        yield (step.name,), child.signature()

    def signature(self) -> str:
        """Return one signature for all wanted outputs."""
        wanted = [self.digests[slot] for _, slot in self.recipe.program.outputs]
        if len(wanted) == 1 and type(wanted[0]) is bytes:
            return wanted[0].hex()
        flat = [each.digest if isinstance(each, Listed) else each for each in wanted]
        return listed(each for each in flat if type(each) is bytes).hex()

    def note(self, step: BoundPlan, inside: list[Any] | None, columns: Any) -> None:
        """Note the digests of what a nested pipeline has made."""
        for count, (target, (_, slot)) in enumerate(zip(step.targets, step.program.outputs, strict=True)):
            if columns is not None:
                self.digests[target] = BY_VALUE
                if columns.traced:
                    items = [FAILED if each is None else each for each in columns.digests[count]]
                    self.digests[target] = Listed(items, columns.lists[count], self.recipe.tracer.session)
            else:
                self.digests[target] = inside.digests[slot] if type(inside) is Trace else BY_VALUE

    def rows_of_digests(self, step: BoundPlan, count: int) -> Iterator[tuple[Any, ...]] | None:
        """Iterate over the digests of the rows of a nested map; None when all values are to be hashed."""
        assert step.step.map is not None
        slots = dict(step.parameters)
        columns = []
        for name in step.step.map.over:
            digest = self.digests[slots[name]]
            length = count if step.step.map.mode == "zip" else len(self[slots[name]])
            columns.append(digest.items if isinstance(digest, Listed) else [BY_VALUE] * length)
        if not any(isinstance(self.digests[slots[name]], Listed) for name in step.step.map.over):
            return None
        return iter(zip(*columns, strict=True) if step.step.map.mode == "zip" else itertools.product(*columns))

    def unloaded(self, slots: Iterable[int]) -> set[str]:
        """Return the keys of what must be loaded before these slots can be read."""
        keys: set[str] = set()
        for slot in slots:
            value = self[slot]
            if type(value) is NotLoaded:
                keys.add(value.key)
            elif type(digest := self.digests[slot]) is Listed:
                _collect(value, digest, keys)
        return keys

    def put_in_place(self, slots: Iterable[int], loaded: Loaded) -> None:
        """Replace what has been loaded; lists that maps have made are changed themselves."""
        for slot in slots:
            self[slot] = _replaced(self[slot], self.digests[slot], loaded)


def _collect(values: Sequence[Any], digest: Listed, keys: set[str]) -> None:
    if values is not digest.values:
        return  # not the list that the map made: the user's code has it already
    for value, inner in zip(values, digest.items, strict=False):
        if type(value) is NotLoaded:
            keys.add(value.key)
        elif type(inner) is Listed:
            _collect(value, inner, keys)


def _replaced(value: Any, digest: Any, loaded: Loaded) -> Any:
    if type(value) is NotLoaded:
        return loaded.take(value.key, value.position) if value.key in loaded else value
    if type(digest) is Listed and value is digest.values:
        for index, (item, inner) in enumerate(zip(value, digest.items, strict=False)):
            value[index] = _replaced(item, inner, loaded)
    return value

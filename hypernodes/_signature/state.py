"""Which variables and objects are state: what code itself writes to is memory between its calls, not input."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping
from types import FunctionType, ModuleType
from typing import Any, TypeAlias

from hypernodes._signature.captured import takes_over
from hypernodes._signature.code import code_of
from hypernodes._signature.members import ABSENT, MUTABLE, written_on_self
from hypernodes._signature.origin import foreign_class
from hypernodes._signature.scope import cells_of, resolve
from hypernodes._signature.stream import SCALARS

Variable: TypeAlias = tuple[object, ...]
"""What holds a value: a cell, or a namespace and a name."""

_UNCHANGING = (*SCALARS, tuple, frozenset, range)


class State:
    """What the code of one fingerprint writes to, as far as it has been followed."""

    def __init__(self) -> None:
        self.mentioned: set[str] = set()
        """Attributes that code names: a method that writes counts once something may call it."""
        self.names: set[str] = set()
        """Names outside of functions that these read."""
        self._variables: set[Variable] = set()
        self._changed: set[int] = set()  # objects whose content it changes, by address
        self._stored: defaultdict[int, set[str]] = defaultdict(set)  # attributes that it sets, by object
        self._on_self: dict[tuple[int, ...], set[str]] = {}

    def note(self, func: FunctionType, *, when_made: bool = False) -> None:
        """Take note of what a function names and writes; what it writes when classes are made is there from then on."""
        uses = code_of(func).uses
        self.mentioned |= uses.attributes
        self.names.update(chain[0] for chain in uses.reads)
        if when_made:
            return
        writes = uses.outer
        cells = cells_of(func)
        for name in writes.rebound:
            self._variables.add(("cell", id(cells[name])) if name in cells else (id(func.__globals__), name))
        for chain in filter(functools.partial(takes_over, writes), writes.stored):
            self._note_attribute(resolve(func, chain[:-1]), chain[-1])
        for chain in (*writes.mutated, *writes.called, *writes.called_inside):
            value = resolve(func, chain)
            if chain not in writes.mutated:
                by_call = chain in writes.called and isinstance(value, MUTABLE)
                if not by_call and not (chain in writes.called_inside and _holds_containers(value)):
                    continue
            if value is not ABSENT and not isinstance(value, (*_UNCHANGING, ModuleType)):
                self._changed.add(id(value))
            if len(chain) > 1:
                self._note_attribute(resolve(func, chain[:-1]), chain[-1])
            else:
                self._variables.add(
                    ("cell", id(cells[chain[0]])) if chain[0] in cells else (id(func.__globals__), chain[0])
                )

    def _note_attribute(self, owner: Any, attribute: str) -> None:
        if isinstance(owner, ModuleType):
            self._variables.add((id(vars(owner)), attribute))
        elif owner is not ABSENT and not isinstance(owner, _UNCHANGING):
            self._stored[id(owner)].add(attribute)
            self._variables.add((id(owner), attribute))

    def is_memory(self, func: FunctionType, name: str, value: Any) -> bool:
        """Say whether a default is memory between calls, as in `def f(x, seen={})`."""
        writes = code_of(func).uses.parameters
        if isinstance(value, _UNCHANGING):
            return False
        changed = any(chain[0] == name for chain in writes.mutated | writes.stored)
        return changed or (isinstance(value, MUTABLE) and (name,) in writes.called)

    def holds(self, value: Any, variable: Variable, owner: type | None, attribute: str) -> bool:
        """Say whether a value, or the variable or attribute that holds it, is state."""
        if variable in self._variables or id(value) in self._changed:
            return True
        return owner is not None and attribute in self._written_on_self(owner)

    def written_attributes(self, value: Any) -> frozenset[str]:
        """Return the attributes of an object that are state, while the others are not."""
        kind = type(value)
        if foreign_class(kind) is not None:
            return frozenset(self._stored.get(id(value), ()))
        return frozenset(self._stored.get(id(value), set()) | self._written_on_self(kind, value))

    def _written_on_self(self, cls: type, instance: Any = None) -> set[str]:
        """Return what methods write, among those that are mentioned so far."""
        key = id(cls), id(instance), len(self.mentioned)
        known = self._on_self.get(key)
        if known is None:
            known = self._on_self[key] = written_on_self(cls, self.mentioned, instance)
        return known


def _holds_containers(value: Any) -> bool:
    """Say whether all that a container holds at present are containers too."""
    items = value.values() if isinstance(value, Mapping) else value
    return isinstance(value, MUTABLE) and all(isinstance(each, MUTABLE) for each in items)

"""Values that code reads: digests of what they hold, with names in the place of code, and what is opaque."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import operator
import re
import types
import typing
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType, MappingProxyType
from typing import Any

from hypernodes._node import Node
from hypernodes._signature.kinds import private_state
from hypernodes._signature.origin import class_module, foreign_class
from hypernodes._signature.state import State, Variable
from hypernodes._signature.stream import SCALARS
from hypernodes._signature.values import hash_value
from hypernodes.errors import UncacheableError

_MAPPINGS = (dict, MappingProxyType)
_CONTAINERS = (*_MAPPINGS, list, tuple, set, frozenset)
_LOGGERS = (logging.Logger, logging.LoggerAdapter, logging.Handler)
"""What these hold says how results are told of, not what they are."""
_DEEP = 100
"""Containers inside of containers that are searched for code one by one; deeper, they count as a whole."""
_REGISTRY = 1000
"""Items of a container that code writes to; with more it is a memory of calls, and no code is looked for in it."""
_CODE = "hypernodes: code"
"""Marks what stands in the place of code in a value."""


@dataclass(slots=True)
class Captured:
    """A value that code reads, in the part that it counts in; its label tells the values of one part apart."""

    part: str
    value: Any
    variable: Variable = ()
    label: str = ""
    owner: type | None = None
    without: frozenset[str] | None = None
    """The attributes that were left out when its digest was taken."""
    is_code: bool = False
    """Whether it is the `self` of code, or called itself: its private attributes are read by its own methods."""
    digest: bytes = b""


class Captures(ABC):
    """The values of one walk, which is asked for the names of code that they hold, and follows it."""

    def __init__(self) -> None:
        self._pieces: defaultdict[str, list[bytes]] = defaultdict(list)
        self._captured: list[Captured] = []
        self._state = State()
        self._opaque: set[str] = set()
        self._whole: set[int] = set()  # objects whose private attributes count, by address
        self._followed: set[tuple[object, str]] = set()  # functions, by module and name

    @abstractmethod
    def _reference(self, value: Any) -> str | None:
        """Return what code is called, to be followed; None for a value that is no code."""

    @abstractmethod
    def _class(self, cls: type) -> str:
        """Return what a class is called, to be followed."""

    @abstractmethod
    def tell(self, value: Any) -> None:
        """Note that a function is held as data."""

    @contextlib.contextmanager
    def _whatever_it_is(self, part: str, value: Any = None) -> Iterator[None]:
        """An object may raise whatever it likes when it is looked at; it is opaque then, and the others count."""
        try:
            yield
        except UncacheableError:
            raise
        except Exception as error:  # noqa: BLE001 - a fingerprint is taken of what the user has, odd or not
            kind = type(error if value is None else value)
            name = f"{class_module(kind)}.{kind.__qualname__}"
            self._opaque.add(f"{part}: {name}")
            self._pieces[part].append(name.encode())

    def _capture(
        self,
        part: str,
        value: Any,
        variable: Variable = (),
        label: str = "",
        owner: type | None = None,
        *,
        is_self: bool = False,
    ) -> None:
        is_code = type(value) not in SCALARS and (is_self or callable(value)) and foreign_class(type(value)) is None
        if is_code:
            self._whole.add(id(value))
        self._captured.append(Captured(part, value, variable, label, owner, is_code=is_code))

    def _is_state(self, captured: Captured) -> bool:
        return self._state.holds(captured.value, captured.variable, captured.owner, captured.label)

    def _weigh(self, captured: Captured) -> None:
        """Take the digest of a captured value, unless it is state or was taken already."""
        value = captured.value
        if type(value) in SCALARS:
            captured.digest = captured.digest or hash_value(value)
        elif self._is_state(captured):
            if captured.without is None:
                captured.without = frozenset()
                with self._whatever_it_is(captured.part, value):
                    self._code_inside(value)
        else:
            without = self._state.written_attributes(value)
            if captured.without != without:
                captured.without = without
                with self._whatever_it_is(captured.part, value):
                    captured.digest = self._digest(value, captured.part, without)
                    for name in sorted(without):
                        self._code_inside(getattr(value, "__dict__", {}).get(name))
                    if captured.is_code:
                        captured.digest = self._with_private(captured.digest, value, captured.part, without)

    def _code_inside(self, state: Any, within: tuple[int, ...] = ()) -> None:
        """Follow the functions and classes in a container that is state: their code counts, if not which are in it.

        What the code itself makes and puts there, as in `made[x] = lambda: x`, counts where it is written.
        """
        if isinstance(state, _CONTAINERS) and id(state) not in within and len(within) < _DEEP:
            large = len(state) > _REGISTRY
            for each in () if large else list(state.values() if isinstance(state, _MAPPINGS) else state):
                if type(each) not in SCALARS:
                    self._code_inside(each, (*within, id(state)))
            return
        while isinstance(state, functools.partial | Node | staticmethod | classmethod):
            state = state.__func__ if isinstance(state, staticmethod | classmethod) else state.func
        if isinstance(state, types.MethodType):
            state = state.__self__ if isinstance(state.__self__, type) else type(state.__self__)
        if isinstance(state, FunctionType | type):
            makers = [state.__qualname__[: each.start()] for each in re.finditer(r"\.<locals>", state.__qualname__)]
            if not any((state.__module__, each) in self._followed for each in makers):
                self._reference(state)

    def _digest(self, value: Any, name: str, without: frozenset[str]) -> bytes:
        classes: set[type] = set()
        if isinstance(value, _LOGGERS):
            return hash_value(self._by_class(value, name, ()))
        try:
            # What holds state that the code changes counts by its other attributes.
            plain = self._attributes_of(value, name, without) if without else self._plain(value)
            return hash_value(plain, classes=classes)
        except UncacheableError:
            return hash_value(self._plain(value, name), classes=classes)
        finally:
            self._follow_classes(classes)

    def _with_private(self, digest: bytes, value: Any, name: str, without: frozenset[str]) -> bytes:
        """Add private attributes to the digest of an object: by value, and by class what cannot be hashed."""
        pieces = [
            joined(key.encode(), self._digest(each, f"{name}.{key}", self._state.written_attributes(each)))
            for key, each in sorted(private_state(value).items())
            if key not in without
        ]
        return joined(digest, *pieces)

    def _plain(self, value: Any, opaque: str = "", within: tuple[int, ...] = ()) -> Any:
        """Return a value with names in the place of code.

        With a name to give to what is `opaque`, what cannot be hashed counts by its class.
        """
        kind = type(value)
        if kind in SCALARS:
            return value
        if kind in _CONTAINERS and id(value) not in within and len(within) < _DEEP:
            return self._plain_container(value, opaque, (*within, id(value)))
        if (name := self._reference(value)) is not None:
            if within:
                self.tell(value)
            return _CODE, name
        if (origin := typing.get_origin(value)) is not None:
            return _CODE, *(self._plain(each, opaque, within) for each in (origin, *typing.get_args(value)))
        return self._by_class(value, opaque, within) if opaque else value

    def _plain_container(self, value: Any, opaque: str, within: tuple[int, ...]) -> Any:
        kind = type(value)
        if set(map(type, value)) <= SCALARS.keys() and (
            kind not in _MAPPINGS or set(map(type, value.values())) <= SCALARS.keys()
        ):
            return value
        if kind in _MAPPINGS:
            plain = {
                self._plain(key, opaque, within): self._plain(each, opaque and f"{opaque}[{key!r:.40}]", within)
                for key, each in value.items()
            }
            return plain if any(plain.get(key, _CODE) is not each for key, each in value.items()) else value
        items = [self._plain(each, opaque and f"{opaque}[{n}]", within) for n, each in enumerate(value)]
        if all(map(operator.is_, items, value)):
            return value
        return _CODE, kind.__name__, frozenset(items) if kind in (set, frozenset) else tuple(items)

    def _by_class(self, value: Any, opaque: str, within: tuple[int, ...]) -> Any:
        classes: set[type] = set()
        kind = type(value)
        try:
            if not isinstance(value, _LOGGERS):
                return _CODE, hash_value(value, classes=classes)
        except UncacheableError:
            if foreign_class(kind) is None and hasattr(value, "__dict__") and id(value) not in within:
                return self._attributes_of(value, opaque, self._state.written_attributes(value), (*within, id(value)))
        finally:
            self._follow_classes(classes)
        self._opaque.add(f"{opaque}: {class_module(kind)}.{kind.__qualname__}")
        return _CODE, self._class(kind)

    def _attributes_of(self, value: Any, name: str, without: frozenset[str], within: tuple[int, ...] = ()) -> Any:
        """Return the class of an object and its public attributes, but for some.

        One that has private attributes only may be anything: it is opaque, unless these count as well.
        """
        attributes = getattr(value, "__dict__", {})
        hidden = all(key.startswith("_") for key in attributes) and not private_state(value).keys() <= without
        if hidden and id(value) not in self._whole:
            self._opaque.add(f"{name}: {class_module(type(value))}.{type(value).__qualname__}")
        state = {
            key: self._plain(each, f"{name}.{key}", within)
            for key, each in attributes.items()
            if not key.startswith("_") and key not in without
        }
        return _CODE, self._class(type(value)), tuple(sorted(state.items()))

    def _follow_classes(self, classes: set[type]) -> None:
        for each in sorted(classes, key=lambda each: (class_module(each), each.__qualname__)):
            self._class(each)


def joined(*pieces: bytes) -> bytes:
    """Return the digest of pieces in their order; one that is a digest is its own."""
    if len(pieces) == 1 and len(pieces[0]) == 32:
        return pieces[0]
    return hashlib.sha256(b"".join([b"%d:%b" % (len(piece), piece) for piece in pieces])).digest()

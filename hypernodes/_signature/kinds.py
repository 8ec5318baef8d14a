"""How each type is written: builtins and the standard library by their content, objects by their public state.

A type is looked up as it is; one that is not known is read once: an enum, a subclass of a known type, or a class whose
instances are plain objects. What keeps its content in C, is used up by reading, or is all private, is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from itertools import islice
from types import MemberDescriptorType
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

from hypernodes._signature.builtin import CODE, EXACT, OPEN, TABLE, Written, hash_of_code
from hypernodes._signature.origin import foreign_class
from hypernodes._signature.packages import KNOWN, STATELESS, WHOLE
from hypernodes._signature.stream import SCALARS, Composite, Encoded, head, identity, names, text
from hypernodes.errors import UncacheableError

ADVICE = (
    "give its class a `__cache_key__()` that returns a str naming all that results depend on; inside an object of "
    "your own, hold what no result depends on in an attribute whose name starts with '_', which does not count"
)

Handler: TypeAlias = Callable[[Any], Encoded]


def handler_of(cls: type) -> Handler:
    """Return what writes the instances of a class."""
    handler = TABLE.get(cls)
    if handler is not None:
        return handler
    if getattr(cls, "__cache_key__", None) is not None:  # asked each time: a notebook may add it to a class
        return _by_cache_key
    handler = _kinds.get(cls)
    if handler is None:
        handler = _kinds[cls] = hash_of_code if issubclass(cls, CODE) else Kind(cls)
    return handler


class Kind:
    """How the instances of one class are written: its identity, its content as a known type, and its public state.

    It holds no reference to the class, which may be replaced in a notebook and must be free to go.
    """

    __slots__ = (
        "_content",
        "_declared",
        "_derived",
        "_has_dict",
        "_header",
        "_identity",
        "_refused",
        "_slots",
        "_stateful",
        "_whole",
        "own",
    )

    def __init__(self, cls: type) -> None:
        base, self._content = _known(cls)
        self._refused = _refusal(cls, base)
        self._identity = identity(cls)
        self._stateful = base is not cls and (base is None or _package(base) not in STATELESS)
        package = _package(cls)  # is it the user's own?
        if package == "builtins":
            self.own = foreign_class(cls) is None
        else:
            self.own = package not in sys.stdlib_module_names and (base is None or package != _package(base))
        self._whole = base is None and _keeps_content_private(cls)
        self._has_dict = cls.__dictoffset__ != 0
        self._slots = _slots(cls)
        self._declared = _declared(cls)
        self._derived = _derived(cls)
        self._header: tuple[list[str], bytes] = ([], self._identity + head(b"o", 0))

    def __call__(self, value: Any) -> Encoded:
        if self._refused:
            raise UncacheableError(f"a {_name(type(value))} {self._refused}")
        state, private = self._read(value) if self._stateful else ({}, [])
        keys = sorted(state)
        known, header = self._header
        if keys != known:
            header = self._identity + head(b"o", len(keys)) + names(keys)
            self._header = keys, header  # mostly the next instance has the same attributes
        if self._content is not None:
            content = self._content(value)
            if keys:
                return Composite(header, [*map(state.__getitem__, keys), Written(content)], keys, ".{}")
            if isinstance(content, bytes):
                return header + content
            content.header = header + content.header
            return content
        if private and not keys:
            raise UncacheableError(
                f"a {_name(type(value))} has no state but in attributes whose names start with '_' "
                f"({', '.join(islice(sorted(private), 3))}), which do not count; {ADVICE}"
            )
        return Composite(header, map(state.__getitem__, keys), keys, ".{}")

    def _read(self, value: Any) -> tuple[dict[str, Any], list[str]]:
        """Return the attributes that count, and the names of private ones."""
        found = dict(value.__dict__) if self._has_dict else {}
        for name in self._slots:
            try:
                found[name] = object.__getattribute__(value, name)
            except AttributeError:
                continue  # not set
        for name in self._derived:
            found.pop(name, None)
        if self._whole:
            return found, []
        private = [name for name in found if name[:1] == "_" and name not in self._declared]
        for name in private:
            del found[name]
        return found, private


def private_state(value: Any) -> dict[str, Any]:
    """Return the private attributes of an object whose class says nothing of what counts.

    Without those that `__cache_key__()`, a dataclass or attrs class leaves out, and what cached properties found.
    """
    cls = type(value)
    if getattr(cls, "__cache_key__", None) is not None or _known(cls)[0] is not None:
        return {}
    found = dict(getattr(value, "__dict__", {}))
    for name in _slots(cls):
        found[name] = getattr(value, name, None)
    fields = {field.name for field in getattr(cls, "__dataclass_fields__", {}).values()}
    fields |= {field.name for field in getattr(cls, "__attrs_attrs__", ())}
    left_out = _derived(cls) | fields
    return {name: each for name, each in found.items() if name[:1] == "_" and name not in left_out}


_kinds: WeakKeyDictionary[type, Handler] = WeakKeyDictionary()


def _by_cache_key(value: Any) -> bytes:
    key = value.__cache_key__()
    if not isinstance(key, str):
        raise UncacheableError(f"`__cache_key__()` of a {_name(type(value))} returned a {_name(type(key))}, not a str")
    return identity(type(value)) + b"K" + text(key)


def _known(cls: type) -> tuple[type | None, Handler | None]:
    """Return the nearest known base of a class, and how its content is written."""
    if issubclass(cls, Enum):
        return Enum, _enum
    if issubclass(cls, tuple) and hasattr(cls, "_fields"):
        return tuple, _named_tuple(cls._fields)
    if issubclass(cls, tuple) and hasattr(cls, "n_sequence_fields"):  # such as os.stat_result, which hides some fields
        return cls, lambda value: Composite(b"q", value.__reduce__()[1])
    for base in cls.__mro__:
        known = KNOWN.get((_package(base), base.__qualname__))
        if known is not None:
            return base, known
        if base in EXACT:
            return base, _exactly(base)
    return None, None


def _named_tuple(fields: Sequence[str]) -> Handler:
    header = head(b"n", len(fields)) + names(fields)
    return lambda value: Composite(header, tuple.__iter__(value), fields, ".{}")


def _exactly(base: type) -> Handler:
    """Return what writes an instance of a subclass as if it were exactly of its base."""
    exact, handler = EXACT[base], TABLE.get(base) or SCALARS[base]
    return lambda value: handler(exact(value))


def _enum(value: Any) -> Encoded:
    return Composite(b"m" + text(value._name_ or ""), (value._value_,), ("value",), ".{}")


def _refusal(cls: type, base: type | None) -> str:
    """Return why no instance of a class can be hashed, or nothing."""
    if base is cls or base is Enum:
        return ""
    for method, why in _USED_UP.items():
        if hasattr(cls, method):
            return f"{why}, so it cannot be hashed; pass a list of what it gives, or what it is made from"
    if cls is object:
        return f"is told from another only by its address; {ADVICE}"
    if base is None or (base in EXACT and base not in OPEN):
        root = base or object
        if cls.__basicsize__ - root.__basicsize__ > _POINTER * (_places(cls) - _places(root)):
            return f"keeps its content outside of Python, and there is no telling what it is; {ADVICE}"
    return ""


_USED_UP = {
    "__next__": "is used up by reading it",
    "__anext__": "is used up by reading it",
    "__await__": "can be awaited once",
}
_POINTER = tuple.__itemsize__
_MANAGED_DICT = 1 << 4  # of CPython's type flags: the dict has no place in the instance's own size


def _places(cls: type) -> int:
    """Return how many references the memory of an instance has room for, as far as Python shows them."""
    slots = sum(
        isinstance(each, MemberDescriptorType)
        for base in cls.__mro__
        if "__slots__" in vars(base)
        for each in vars(base).values()
    )
    own_dict = cls.__dictoffset__ != 0 and not cls.__flags__ & _MANAGED_DICT
    return slots + own_dict + (cls.__weakrefoffset__ > 0)


def _slots(cls: type) -> tuple[str, ...]:
    """Return the names of the slots of a class and its bases, and of what exceptions keep in C."""
    found: dict[str, None] = {}
    for base in cls.__mro__:
        if "__slots__" in vars(base) or (issubclass(base, BaseException) and base.__module__ == "builtins"):
            found.update((name, None) for name, each in vars(base).items() if isinstance(each, MemberDescriptorType))
    return tuple(found)


def _declared(cls: type) -> frozenset[str]:
    """Return the fields of a dataclass or attrs class by which it compares: these count, also with private names."""
    dataclass = getattr(cls, "__dataclass_fields__", {}).values()
    attrs: Iterable[Any] = getattr(cls, "__attrs_attrs__", ())
    return frozenset([field.name for field in dataclass if field.compare] + [field.name for field in attrs if field.eq])


def _derived(cls: type) -> frozenset[str]:
    """Return the names under which cached properties keep what they found: whether they were asked does not count."""
    attributes = [item for base in cls.__mro__ for item in vars(base).items()]
    return frozenset(name for name, each in attributes if type(each).__name__ == "cached_property")


def _keeps_content_private(cls: type) -> bool:
    """Say whether private attributes are content, as in many classes of the standard library, or of bases of it."""
    bases = [base for base in cls.__mro__ if _package(base) in WHOLE and base is not object]
    return cls in bases or any("__init__" in vars(base) for base in bases)


def _package(cls: type) -> str:
    return str(cls.__module__).partition(".")[0]


def _name(cls: type) -> str:
    """Return a class's name for messages: ``_thread.lock``, ``Client``."""
    return cls.__qualname__ if cls.__module__ in ("builtins", "__main__") else f"{cls.__module__}.{cls.__qualname__}"

"""What a class of the project is made of, as it is in memory: its file may say something else by now."""

from __future__ import annotations

import enum
import functools
import inspect
import types
from collections import namedtuple
from collections.abc import Collection, Iterator, MutableMapping, MutableSequence, MutableSet
from types import FunctionType
from typing import Any

from hypernodes._node import Node
from hypernodes._signature.captured import Chain, Writes, takes_over
from hypernodes._signature.code import code_of
from hypernodes._signature.origin import class_module

MUTABLE = (MutableSequence, MutableMapping, MutableSet)
"""What a method such as `append` or `update` changes; elsewhere, such as on a tensor, it may change nothing."""

_MAKING = frozenset({"__init__", "__new__", "__post_init__", "__setstate__", "__init_subclass__", "__set_name__"})
_TELLING = frozenset({"__repr__", "__str__"})
_SLOTS = (types.MemberDescriptorType, types.GetSetDescriptorType, type(namedtuple("_One", "field").__dict__["field"]))
_FIELD_MARKS = frozenset({"__dataclass_fields__", "__attrs_attrs__", "_field_defaults"})
_FIELD_OPTIONS = ("default", "default_factory", "init", "repr", "hash", "compare", "kw_only")
_DATACLASS_OPTIONS = ("init", "repr", "eq", "order", "unsafe_hash", "frozen")


def functions_of(member: Any) -> list[Any]:
    """Return the functions that a member of a class consists of; empty for one that holds data."""
    match member:
        case FunctionType():
            return [member]
        case Node() | functools.cached_property():
            return functions_of(member.func)
        case staticmethod() | classmethod():
            return functions_of(member.__func__) or [member.__func__]
        case property():
            return [each for each in (member.fget, member.fset, member.fdel) if each is not None]
        case functools.partialmethod():
            return []
    return []


def is_own(func: Any, cls: type) -> bool:
    """Say whether a function was written in the body of a class."""
    return (
        isinstance(func, FunctionType)
        and func.__code__.co_qualname.startswith(f"{cls.__qualname__}.")
        and func.__globals__.get("__name__", "builtins") == class_module(cls)
    )


def makes_classes(cls: type, name: str) -> bool:
    """Say whether a method runs when a class is made: what it fills then, as a registry, is no memory of calls."""
    return name in ("__init_subclass__", "__set_name__") or (
        issubclass(cls, type) and name in ("__init__", "__new__", "__prepare__")
    )


def is_generated(func: Any, cls: type) -> bool:
    """Say whether a function was written by a class decorator from the fields of the class."""
    if not isinstance(func, FunctionType) or _FIELD_MARKS.isdisjoint(cls.__dict__):
        return False
    code = getattr(func, "__wrapped__", func).__code__
    return func.__name__.startswith("__") and code.co_filename.startswith(("<string>", "<attrs generated"))


def data_of(cls: type) -> Iterator[tuple[str, Any]]:
    """Yield what a class holds besides functions, by labels: attributes, fields and their options, enum members."""
    own = cls.__dict__
    is_enum = isinstance(cls, enum.EnumMeta)
    for name in sorted(own):
        value = own[name]
        hidden = (name.startswith("__") and name.endswith("__")) or name == "_abc_impl"
        if hidden or functions_of(value) or isinstance(value, _SLOTS):
            continue
        if not (is_enum and (isinstance(value, cls | property) or name.startswith("_"))):
            yield name, value
    if isinstance(cls, enum.EnumMeta):
        yield "enum members", [(name, cls[name].value) for name in cls.__members__]
    annotations = own.get("__annotations__", {})
    if annotations:
        yield "annotations", dict(annotations)
    if "__dataclass_params__" in own:
        yield "dataclass", [getattr(own["__dataclass_params__"], option) for option in _DATACLASS_OPTIONS]
    if fields := {name: options for name, options in _own_fields(cls) if name in annotations}:
        yield "fields", fields
    if "__pydantic_decorators__" in own and isinstance(doc := own.get("__doc__"), str):
        yield "docstring", inspect.cleandoc(doc)  # it is part of the schema that a model is made to follow
    for kind, decorators in _fields(own.get("__pydantic_decorators__")).items():
        if isinstance(decorators, dict) and decorators:
            yield kind, {name: _fields(each.info) for name, each in decorators.items()}


def _own_fields(cls: type) -> Iterator[tuple[str, Any]]:
    """Yield the options of the fields of a dataclass, a pydantic model or an attrs class."""
    own = cls.__dict__
    for name, field in own.get("__dataclass_fields__", {}).items():
        options = [_said(getattr(field, option)) for option in _FIELD_OPTIONS]
        yield name, [*options, dict(field.metadata)] if field.metadata else options
    for name, field in own.get("__pydantic_fields__", {}).items():
        yield name, {slot: getattr(field, slot, None) for slot in field.__slots__ if slot[0] != "_"}
    for field in own.get("__attrs_attrs__", ()):
        yield field.name, {slot: getattr(field, slot) for slot in field.__slots__}


def _fields(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass's instance, as they are."""
    return {name: getattr(value, name) for name in getattr(type(value), "__dataclass_fields__", ())}


def _said(value: Any) -> Any:
    """Return an option of a field; None for dataclasses' mark that it was not given."""
    return None if type(value).__module__ == "dataclasses" else value


def written_on_self(cls: type, mentioned: Collection[str], instance: Any = None) -> set[str]:
    """Return the attributes that methods set or change on their first argument, among methods that code mentions.

    Without an instance, the attributes of the class itself: those that a class method sets, or that are changed
    in place.
    """
    written: set[str] = set()
    replaced: set[Chain] = set()
    all_of_them = Writes()
    for owner in cls.__mro__[:-1]:
        for name, member in owner.__dict__.items():
            called = name in mentioned or (name.startswith("__") and name.endswith("__") and name not in _MAKING)
            for func in functions_of(member) if called and not isinstance(member, staticmethod) else ():
                if is_own(func, owner):
                    sets = instance is not None or isinstance(member, classmethod)
                    written |= _written(func, cls if instance is None else instance)
                    writes, first = code_of(func).uses.parameters, func.__code__.co_varnames[:1]
                    replaced |= {each[1:] for each in writes.stored if each[:1] == first and (sets or len(each) > 2)}
                    all_of_them.augmented |= {each[1:] for each in writes.augmented if each[:1] == first}
                    if name not in _TELLING:
                        all_of_them.read_first |= {each[1:] for each in writes.read_first if each[:1] == first}
    return written | {each[0] for each in replaced if takes_over(all_of_them, each)}


def _written(func: FunctionType, owner: Any) -> set[str]:
    """Return the attributes that a method changes in place."""
    writes = code_of(func).uses.parameters
    first = func.__code__.co_varnames[:1]
    found = {chain[1] for chain in writes.mutated if chain[:1] == first and len(chain) > 1}
    for chain in writes.called | writes.called_inside:
        if chain[:1] == first and len(chain) > 1 and isinstance(member(owner, chain[1]), MUTABLE):
            found.add(chain[1])
    return found


ABSENT: Any = object()
"""What a name stands for that stands for nothing."""


def member(owner: Any, name: str) -> Any:
    """Return an attribute without running anything of the user's, such as a property."""
    try:
        own = object.__getattribute__(owner, "__dict__")
    except AttributeError:
        own = {}
    if name in own:
        return own[name]
    for each in type.mro(owner)[1:] if isinstance(owner, type) else type(owner).__mro__:
        if name in each.__dict__:
            found = each.__dict__[name]
            if isinstance(found, types.MemberDescriptorType):
                return getattr(owner, name, ABSENT)
            return ABSENT if hasattr(type(found), "__get__") else found
    return ABSENT

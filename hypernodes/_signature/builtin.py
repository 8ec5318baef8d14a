"""How values of builtin types and of a few of the standard library are written."""

from __future__ import annotations

import datetime
import functools
import operator
import re
import types
from array import array
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from struct import Struct
from typing import Any

from hypernodes._signature.stream import (
    BULK,
    Composite,
    Encoded,
    block,
    bulk,
    fields,
    head,
    identity,
    raw,
    sequence,
    text,
    whole,
)
from hypernodes.errors import UncacheableError

_day = Struct("<HBB").pack
_time = Struct("<BBBIB").pack
_span = Struct("<iii").pack


class Written:
    """Content that is written already, as a part of a composite."""

    __slots__ = ("content",)

    def __init__(self, content: Encoded) -> None:
        self.content = content


class _Item:
    """A key and its value, as a part of a dict whose keys cannot be sorted."""

    __slots__ = ("pair",)

    def __init__(self, pair: tuple[Any, Any]) -> None:
        self.pair = pair

    def written(self) -> Composite:
        key = self.pair[0]
        shown = repr(key) if type(key) in (str, int, float, bool, type(None)) else type(key).__name__
        return Composite(b"e", self.pair, (" (a key)", f"[{shown}]"), "{}")


def hash_of_code(value: Any) -> bytes:
    """Write a function, class, module or other code by what it would do."""
    from hypernodes._signature.code import hash_code  # it hashes the values that code refers to

    return b"c" + hash_code(value)


def _dict(value: dict[Any, Any]) -> Encoded:
    keys = list(value)
    size = len(keys)
    kinds = set(map(type, keys))
    if not (kinds <= {str} or kinds == {int}):
        return Composite(head(b"x", size), map(_Item, value.items()), style="", unordered=True)
    keys.sort()
    written = bulk(b"*", keys) if size >= BULK else None
    if written is None:
        written = b"".join(map(whole if kinds == {int} else text, keys))
    header = head(b"d", size) + written
    values = [value[key] for key in keys]
    every = bulk(b"*" + header, values) if size >= BULK else None
    return Composite(header, values, keys, "[{!r}]") if every is None else every


def _set(tag: bytes) -> Callable[[Any], Encoded]:
    def handler(value: set[Any] | frozenset[Any]) -> Encoded:
        size = len(value)
        if size >= BULK and set(map(type, value)) in ({str}, {int}, {bytes}):
            written = bulk(b"*" + head(tag, size), sorted(value))
            if written is not None:
                return written
        return Composite(head(tag, size), value, style="{{…}}", unordered=True)

    return handler


def _with_identity(cls: type, handler: Callable[[Any], Encoded]) -> Callable[[Any], Encoded]:
    """Return a handler that writes the type first, for types without a tag of their own."""
    own = identity(cls)

    def handle(value: Any) -> Encoded:
        written = handler(value)
        if isinstance(written, bytes):
            return own + written
        written.header = own + written.header
        return written

    return handle


def _memoryview(value: memoryview) -> bytes:
    flat = value.cast("B") if value.contiguous and value.c_contiguous and value.nbytes else value.tobytes()
    header = text(value.format) + head(b"n", value.ndim) + b"".join(map(whole, value.shape or ()))
    return block(header + head(b"b", len(flat)), flat)


def _deque(value: deque[Any]) -> Composite:
    return Composite(head(b"l", len(value) + 1), [*value, value.maxlen])


def _ordered(value: OrderedDict[Any, Any]) -> Composite:
    return Composite(head(b"x", len(value)), map(_Item, value.items()), style="")


def _date(value: datetime.date) -> bytes:
    return _day(value.year, value.month, value.day)


def _clock(value: datetime.time | datetime.datetime) -> Encoded:
    data = _time(value.hour, value.minute, value.second, value.microsecond, value.fold)
    return data + b"N" if value.tzinfo is None else Composite(data, (value.tzinfo,), ("tzinfo",), ".{}")


def _datetime(value: datetime.datetime) -> Encoded:
    written = _clock(value)
    if isinstance(written, bytes):
        return _date(value) + written
    written.header = _date(value) + written.header
    return written


def _tzinfo(value: datetime.tzinfo) -> Composite:
    """Write a time zone by its name and, where it has one at all times, its offset."""
    name = getattr(value, "key", None) or getattr(value, "zone", None)  # zoneinfo's and pytz's
    offset = value.utcoffset(None)
    if name is None and offset is None:
        raise UncacheableError("a time zone without name and fixed offset cannot be hashed; use `zoneinfo.ZoneInfo`")
    of_pytz = getattr(value, "_utcoffset", None) if name else None  # one zone of pytz has an object for each offset
    return Composite(b"z", (name, offset, value.tzname(None), of_pytz))


def _exception(value: BaseException) -> Composite:
    return Composite(b"p", (value.args,), ("args",), ".{}")


def _reduced(value: Any) -> Composite:
    return Composite(b"r", value.__reduce__()[:2])


_PLAIN: dict[type, Callable[[Any], Encoded]] = {
    bytearray: raw,
    memoryview: _memoryview,
    array: lambda value: block(text(value.typecode) + head(b"n", value.itemsize), _memoryview(memoryview(value))),
    range: lambda value: whole(value.start) + whole(value.stop) + whole(value.step),
    slice: fields("start", "stop", "step"),
    deque: _deque,
    defaultdict: lambda value: Composite(b"v", (dict(value), value.default_factory), ("", ".default_factory"), "{}"),
    OrderedDict: _ordered,
    types.MappingProxyType: lambda value: Composite(b"v", (dict(value),), ("",), "{}"),
    type({}.keys()): lambda value: Composite(head(b"x", len(value)), value, style="{{…}}", unordered=True),
    type({}.items()): lambda value: Composite(head(b"x", len(value)), value, style="{{…}}", unordered=True),
    type({}.values()): lambda value: sequence(b"l", list(value)),
    datetime.date: _date,
    datetime.datetime: _datetime,
    datetime.time: _clock,
    datetime.timedelta: lambda value: _span(value.days, value.seconds, value.microseconds),
    datetime.tzinfo: _tzinfo,
    BaseException: _exception,
    re.Pattern: fields("pattern", "flags"),
    operator.itemgetter: _reduced,
    operator.attrgetter: _reduced,
    operator.methodcaller: _reduced,
    types.GenericAlias: fields("__origin__", "__args__"),
    types.UnionType: lambda value: Composite(head(b"x", len(value.__args__)), value.__args__, unordered=True),
    functools._lru_cache_wrapper: fields("__wrapped__"),
}

CODE = (
    functools.partial,
    types.BuiltinFunctionType,
    types.ClassMethodDescriptorType,
    types.FunctionType,
    types.MethodDescriptorType,
    types.MethodType,
    types.MethodWrapperType,
    types.ModuleType,
    types.WrapperDescriptorType,
    type,
)
"""Types whose instances are code; so are those of their subclasses."""

TABLE: dict[type, Callable[[Any], Encoded]] = {
    list: lambda value: sequence(b"l", value),
    tuple: lambda value: sequence(b"t", value),
    dict: _dict,
    set: _set(b"u"),
    frozenset: _set(b"z"),
    _Item: _Item.written,
    Written: lambda value: value.content,
    **{cls: _with_identity(cls, handler) for cls, handler in _PLAIN.items()},
    **dict.fromkeys(CODE, hash_of_code),
}
"""What writes the instances of exactly these types."""

EXACT: dict[type, Callable[[Any], Any]] = {
    bytes: lambda value: bytes(memoryview(value)),
    bytearray: lambda value: bytearray(memoryview(value)),
    complex: complex.__complex__,
    float: float.__float__,
    int: int.__int__,
    str: str.__str__,
    list: lambda value: list.__getitem__(value, slice(None)),
    tuple: lambda value: tuple.__getitem__(value, slice(None)),
    dict: lambda value: dict(dict.items(value)),
    OrderedDict: lambda value: OrderedDict(OrderedDict.items(value)),
    defaultdict: lambda value: defaultdict(value.default_factory, dict.items(value)),
    set: lambda value: set(set.__iter__(value)),
    frozenset: lambda value: frozenset(frozenset.__iter__(value)),
    deque: lambda value: deque(deque.__iter__(value), value.maxlen),
    **{cls: lambda value: value for cls in (datetime.date, datetime.datetime, datetime.time, datetime.timedelta)},
    datetime.tzinfo: lambda value: value,
    BaseException: lambda value: value,
}
"""For types with subclasses: the same content as an instance of exactly that type, whatever the subclass overrides."""

OPEN = {datetime.tzinfo, BaseException}
"""Of these, what subclasses keep in C is known as well: a zone's offset, an exception's attributes."""

"""What values must hash as: pairs that are equal, lists whose members all differ, and values that are refused.

Run as a program, it prints the hashes of all cases, with its classes in `__main__`; `serve` hashes pickled values that
come through a pipe. `test_values.py` compares what several processes say.
"""

import array
import collections
import configparser
import contextvars
import dataclasses
import datetime as dt
import decimal
import email.message
import enum
import fractions
import functools
import importlib.util
import io
import ipaddress
import json
import math
import operator
import pathlib
import pickle
import random
import re
import socket
import sqlite3
import struct
import sys
import threading
import time
import types
import typing
import unicodedata
import uuid
import weakref
import zoneinfo
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pydantic

from hypernodes._signature.values import hash_value

EQUAL: dict[str, tuple[Callable[[], Any], str]] = {}
DIFFER: dict[str, tuple[Callable[[], Any], str]] = {}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {}


def equal(make: Callable[[], Any]) -> Callable[[], Any]:
    EQUAL[make.__name__] = make, ""
    return make


def differ(make: Callable[[], Any]) -> Callable[[], Any]:
    DIFFER[make.__name__] = make, ""
    return make


def needing(package: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """For cases of packages that need not be installed: placed above `@equal` or `@differ`."""

    def mark(make: Callable[[], Any]) -> Callable[[], Any]:
        table = EQUAL if make.__name__ in EQUAL else DIFFER
        table[make.__name__] = make, package
        return make

    return mark


def refused(message: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """The message is that of a value called `value`, as far as it is given."""

    def mark(make: Callable[[], Any]) -> Callable[[], Any]:
        REFUSED[make.__name__] = make, message
        return make

    return mark


def evaluate() -> dict[str, Any]:
    """The hashes of each case in hexadecimal, by name; None where its package is missing."""
    return {
        name: None if missing(package) else [hash_value(value).hex() for value in make()]
        for name, (make, package) in (EQUAL | DIFFER).items()
    }


def missing(package: str) -> bool:
    return bool(package) and importlib.util.find_spec(package) is None


# --- classes ----------------------------------------------------------------------------------------------


class Plain:
    def __init__(self, **state: Any) -> None:
        self.__dict__.update(state)


class Child(Plain):
    pass


class Slotted:
    __slots__ = ("__hidden", "_private", "first")

    def __init__(self, first: Any, private: Any = None, hidden: Any = None) -> None:
        self.first, self._private, self.__hidden = first, private, hidden


class SlottedChild(Slotted):
    __slots__ = ("second",)


class Keyed:
    def __init__(self, name: str) -> None:
        self.name = name
        self.lock = threading.Lock()

    def __cache_key__(self) -> str:
        return self.name


class KeyedTuple(tuple):
    __slots__ = ()

    def __cache_key__(self) -> str:
        return str(len(self))


class OtherKeyed(Keyed):
    pass


class Upper:
    def __call__(self, text: str) -> str:
        return text.upper()


class Lower(Upper):
    pass


class Reducing(Plain):
    def __reduce__(self) -> Any:
        return (Reducing, (), {"pickled": id(self)})

    def __getstate__(self) -> Any:
        raise AssertionError("how it is pickled has no say")


class Lying(Plain):
    """Its methods would mislead whoever asked them."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 1

    def __repr__(self) -> str:
        return "the same"

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"asked for {name}")


class Measured:
    def __init__(self, items: list[int]) -> None:
        self.items = items

    @functools.cached_property
    def total(self) -> int:
        return sum(self.items)


class Words(list):
    pass


class Table(dict):
    pass


class Grams(int):
    pass


class Label(str):
    __slots__ = ()


class Point(NamedTuple):
    x: Any
    y: Any


class Vector(NamedTuple):
    x: Any
    y: Any


@dataclasses.dataclass
class Doc:
    id: Any
    text: Any
    _note: str = dataclasses.field(default="", compare=False)


@dataclasses.dataclass(frozen=True, slots=True)
class SlottedDoc:
    id: Any
    text: Any
    _weight: float = 1.0


@dataclasses.dataclass(order=True)
class Prioritized:
    priority: int
    item: Any = dataclasses.field(compare=False)


class Color(enum.Enum):
    RED = 1
    BLUE = 2


class Paint(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


class Mode(enum.StrEnum):
    FAST = "fast"


class Rights(enum.Flag):
    READ = 1
    WRITE = 2


class Passage(pydantic.BaseModel):
    id: int
    text: str
    _cached: Any = pydantic.PrivateAttr(default=None)

    @pydantic.computed_field
    @functools.cached_property
    def size(self) -> int:
        return len(self.text)


class Query(pydantic.BaseModel):
    id: int
    text: str


class Loose(pydantic.BaseModel, extra="allow"):
    id: int


class Settings(pydantic.BaseModel):
    key: pydantic.SecretStr
    at: dt.datetime


class Empty(pydantic.BaseModel):
    pass


class Private:
    def __init__(self) -> None:
        self._token, self._session = "secret", "s"


class SlottedPrivate:
    __slots__ = ("_token",)

    def __init__(self) -> None:
        self._token = 1


class Countdown:
    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        raise AssertionError("an iterator was consumed")


class Loader:
    def __await__(self) -> Any:
        raise AssertionError("it was awaited")


class BadKey:
    def __cache_key__(self) -> Any:
        return 7


class RaisingKey:
    def __cache_key__(self) -> str:
        raise KeyError("no name yet")


class NamedSocket(socket.socket):
    pass


Renamed = collections.namedtuple("Point", ["y", "x"], module=__name__)
Revalued = enum.Enum("Color", {"RED": 3}, module=__name__)
Elsewhere = type("Upper", (), {"__module__": "elsewhere"})


class Failure(Exception):
    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def numbers() -> Iterator[int]:
    raise AssertionError("a generator was consumed")
    yield 1


class Wired:
    """Its attributes are methods of its own, and functions that hold it."""

    def __init__(self, name: str, size: int = 30) -> None:
        self.name = name
        self.handlers = [functools.partial(self.handle, i) for i in range(size)]
        self.bound = [self.handle] * size
        self.closures = [lambda: self.name for _ in range(size)]

    def handle(self, number: int) -> str:
        return self.name * number


def shout(text: str) -> str:
    return text.upper() + "!"


def whisper(text: str) -> str:
    return text.lower()


# --- must be equal ----------------------------------------------------------------------------------------

WORDS = ["beth", "aleph", "gimel", "daleth", "he", "waw", "zayin", "heth", "teth", "yod", "kaph", "lamed"]


@equal
def dicts_in_any_order() -> Any:
    return {"a": 1, "b": [2]}, {"b": [2], "a": 1}


@equal
def long_dicts_in_any_order() -> Any:
    return {str(i): i for i in range(99)}, {str(i): i for i in reversed(range(99))}


@equal
def dicts_with_mixed_keys_in_any_order() -> Any:
    return {1: "a", "1": "b", None: "c", (1, 2): "d"}, {(1, 2): "d", None: "c", "1": "b", 1: "a"}


@equal
def sets_in_any_order() -> Any:
    return set(WORDS), {*WORDS[6:], *WORDS[:6]}


@equal
def long_sets_of_text() -> Any:
    return {word * n for word in WORDS for n in range(1, 9)}, {word * n for n in range(8, 0, -1) for word in WORDS}


@equal
def sets_of_mixed_items() -> Any:
    return {1, "1", None, (2, "x"), frozenset(WORDS)}, {frozenset(WORDS[::-1]), (2, "x"), None, "1", 1}


@equal
def sets_of_objects() -> Any:
    first, second = SlottedDoc(1, "a"), SlottedDoc(2, "b")
    return {first, second, Color.RED}, {Color.RED, second, first}


@equal
def equal_text_of_two_makings() -> Any:
    return "".join(["he", "llo"]), "hello"


@equal
def shared_and_unshared_items() -> Any:
    one = ["x", {"k": [1.5, None]}]
    return [one, one], [["x", {"k": [1.5, None]}], ["x", {"k": [1.5, None]}]]


@equal
def shared_and_unshared_large_items() -> Any:
    one = [["text", i] for i in range(100)]
    return {"a": one, "b": [one, one]}, {"a": [*map(list, one)], "b": [[*map(list, one)], [*map(list, one)]]}


@equal
def shared_doubling() -> Any:
    return doubled(200), doubled(200)


def doubled(levels: int) -> list[Any]:
    """Written out it would have 2 ** levels leaves."""
    value: list[Any] = ["leaf"]
    for _ in range(levels):
        value = [value, value]
    return value


@equal
def cycles() -> Any:
    return cycle(*WORDS), cycle(*WORDS)


def cycle(*words: str) -> list[Any]:
    value: list[Any] = [*words, {"k": None}]
    value[-1]["k"] = value
    value.append(value)
    return value


@equal
def shared_and_unshared_cycles() -> Any:
    """At several depths, also inside another cycle, whole and entered elsewhere."""
    long, nodes = cycle(*WORDS * 5), graph(5)
    fresh = [cycle(*WORDS * 5) for _ in range(2)]
    return (
        [long, [long], nodes[0], nodes[3], ring(nodes, nodes)],
        [fresh[0], [fresh[1]], graph(5)[0], graph(5)[3], ring(graph(5), graph(5))],
    )


def ring(first: Any, last: Any) -> list[Any]:
    outer: list[Any] = [first]
    outer += [Plain(up=outer), last]
    return outer


@equal
def trees_with_parents() -> Any:
    return tree(3), tree(3)


def tree(depth: int, parent: Any = None, leaf: str = "leaf") -> Plain:
    node = Plain(parent=parent, name=leaf)
    node.children = [tree(depth - 1, node, leaf) for _ in range(3)] if depth else []
    return node


@equal
def sets_in_cycles() -> Any:
    return hub(WORDS), hub(WORDS[::-1])


def hub(names: list[str]) -> Plain:
    """Members know the hub and share a club, which knows it too; the set has them in the order of their addresses."""
    center = Plain(name="center")
    club = Plain(of=center)
    center.members = {Plain(name=name, club=club) for name in names}
    return center


@equal
def dense_graphs() -> Any:
    return graph(30), graph(30)


def graph(size: int) -> list[Plain]:
    """Every node knows all others: its paths are beyond counting."""
    nodes = [Plain(number=i) for i in range(size)]
    for node in nodes:
        node.others = [other for other in nodes if other is not node]
    return nodes


@equal
def deep_nesting() -> Any:
    return nested(10_000), nested(10_000)


def nested(levels: int, leaf: Any = "leaf") -> list[Any]:
    value = [leaf]
    for _ in range(levels):
        value = [value]
    return value


@equal
def nans_of_equal_bits() -> Any:
    return [math.nan, {"x": float("nan")}], [float("nan"), {"x": math.nan}]


@equal
def private_attributes_do_not_count() -> Any:
    return Plain(dim=3, _lock=threading.Lock(), _calls=7), Plain(dim=3)


@equal
def private_slots_do_not_count() -> Any:
    return Slotted(1, "p", "h"), Slotted(1)


@equal
def attributes_in_any_order() -> Any:
    return Plain(a=1, b=2), Plain(b=2, a=1)


@equal
def cached_properties_do_not_count() -> Any:
    asked = Measured([1, 2])
    assert asked.total == 3
    return asked, Measured([1, 2])


@equal
def cache_keys_come_first() -> Any:
    return Keyed("model-1"), Keyed("model-1")


@equal
def cache_keys_of_builtin_subclasses() -> Any:
    return KeyedTuple("ab"), KeyedTuple("cd")


@equal
def stateless_objects() -> Any:
    return Upper(), Upper()


@equal
def pickling_has_no_say() -> Any:
    return Reducing(a=1), Reducing(a=1)


@equal
def uncompared_private_fields() -> Any:
    return Doc(1, "a", "seen"), Doc(1, "a")


@equal
def models() -> Any:
    first, second = Passage(id=1, text="a"), Passage.model_validate({"text": "a", "id": "1"})
    first._cached = object()
    assert first.size == 1
    return first, second


@equal
def empty_models() -> Any:
    return Empty(), Empty()


@equal
def models_with_secrets_and_times() -> Any:
    return Settings(key="k", at="2026-01-02T03:04:05Z"), Settings(at="2026-01-02T03:04:05+00:00", key="k")


@equal
def unions_in_any_order() -> Any:
    return [int | str, list[int]], [str | int, list[int]]


@equal
def enum_members() -> Any:
    return [Color(1), Level(1), Rights(3)], [Color.RED, Level.LOW, Rights.READ | Rights.WRITE]


@equal
def strided_views() -> Any:
    base = np.arange(2000).reshape(40, 50)
    return base[::2, 1::3], base[::2, 1::3].copy()


@equal
def pickled_arrays() -> Any:
    """Their dtypes are objects of their own."""
    return pickle.loads(pickle.dumps(np.arange(3.0))), np.arange(3.0)


@equal
def fortran_order() -> Any:
    base = np.arange(2000.0).reshape(40, 50)
    return np.asfortranarray(base), base


@equal
def structured_arrays() -> Any:
    """What lies between aligned fields is no content."""
    aligned = np.dtype([("a", "i1"), ("b", "f8")], align=True)
    arrays = []
    for garbage in (b"\0", b"\xff"):
        array = np.frombuffer(garbage * aligned.itemsize * 3, dtype=aligned).copy()
        array["a"], array["b"] = [1, 2, 3], [0.5, 1.5, 2.5]
        arrays.append(array)
    return tuple(arrays)


@equal
def object_arrays() -> Any:
    return np.array(["a", None, [1]], dtype=object), np.array(["".join("a"), None, [1]], dtype=object)[::-1][::-1]


@equal
def long_doubles() -> Any:
    """Some of their bytes are no content either."""
    arrays = []
    for garbage in (0, 255):
        array = np.full(32, garbage, np.uint8).view(np.longdouble)
        for at in range(array.size):
            array[at] = at + 0.1
        arrays.append(array)
    return tuple(arrays)


@equal
def string_dtype_arrays() -> Any:
    """They hold addresses."""
    words = [word * 9 for word in WORDS]
    kind = np.dtypes.StringDType() if hasattr(np.dtypes, "StringDType") else object  # new in numpy 2
    return np.array(words, kind), np.array([w[:] for w in words], kind)


@equal
def random_generators() -> Any:
    return [np.random.default_rng(7), random.Random(7)], [np.random.default_rng(7), random.Random(7)]


@equal
def functions() -> Any:
    return [shout, len, math.sqrt, Plain], [shout, len, math.sqrt, Plain]


@equal
def objects_that_hold_their_own_methods() -> Any:
    return Wired("a"), Wired("a")


@equal
def partials() -> Any:
    return functools.partial(int, base=2), functools.partial(int, base=2)


@equal
def sparse_matrices() -> Any:
    import scipy.sparse

    data, indices, indptr = [1.0, 2.0, 3.0], [2, 0, 1], [0, 2, 3]
    sorted_ = [2.0, 1.0, 3.0], [0, 2, 1], indptr
    return scipy.sparse.csr_matrix((data, indices, indptr), (2, 3)), scipy.sparse.csr_matrix(sorted_, (2, 3))


needing("scipy")(sparse_matrices)


def frame(**changed: Any) -> Any:
    import pandas as pd

    columns = {
        "id": [1, 2, 3],
        "text": ["a", None, "c"],
        "at": pd.to_datetime(["2026-01-01", "2026-01-02", None]),
        "kind": pd.Categorical(["x", "y", "x"]),
        "count": pd.array([1, None, 3], dtype="Int64"),
    }
    return pd.DataFrame(columns | changed)


@equal
def frames() -> Any:
    whole = frame()
    return whole, whole.iloc[::-1].iloc[::-1].reset_index(drop=True)


needing("pandas")(frames)


@equal
def polars_frames() -> Any:
    import polars as pl

    columns = {"id": [1, 2], "text": ["a", None], "tags": [["x"], []], "at": [dt.date(2026, 1, 1), None]}
    return pl.DataFrame(columns), pl.concat([pl.DataFrame(columns)[:1], pl.DataFrame(columns)[1:]])


needing("polars")(polars_frames)


@equal
def tensors() -> Any:
    import torch

    whole = torch.arange(12.0).reshape(3, 4)
    return [whole.t(), whole.bfloat16()], [whole.t().contiguous(), whole.bfloat16()]


needing("torch")(tensors)


# --- must differ ------------------------------------------------------------------------------------------


@differ
def scalars_of_different_types() -> Any:
    return [1, 1.0, True, 1 + 0j, "1", b"1", np.int32(1), np.int64(1), np.float32(1), np.float64(1),
            np.True_, Grams(1), decimal.Decimal(1), fractions.Fraction(1), Level.LOW, bytearray(b"1"),
            memoryview(b"1"), array.array("b", b"1"), Label("1"), np.str_("1"), np.bytes_(b"1"),
            dt.timedelta(1), None, Ellipsis, NotImplemented, np.array(1)]  # fmt: skip


@differ
def empty_values() -> Any:
    return ["", b"", [], (), {}, set(), frozenset(), None, False, 0, 0.0, bytearray(), range(0),
            collections.deque(), collections.OrderedDict(), collections.defaultdict(list),
            collections.Counter(), Words(), Table(), np.array([]), np.array([], "f4"), np.zeros((0, 1)),
            types.MappingProxyType({}), {}.keys(), {}.values(), Upper()]  # fmt: skip


@differ
def zeros_with_a_sign() -> Any:
    return [0.0, -0.0, [0.0] * 20, [-0.0] * 20, np.array([0.0]), np.array([-0.0]), complex(0.0, -0.0),
            complex(0.0, 0.0)]  # fmt: skip


@differ
def nans_of_different_bits() -> Any:
    payload = struct.unpack("<d", b"\x01\0\0\0\0\0\xf8\x7f")[0]
    return [math.nan, payload, [math.nan] * 20, [payload] * 20, math.inf]


@differ
def ints_of_any_size() -> Any:
    return [0, 1, -1, 127, 128, 255, 256, 2**31, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64,
            10**400, -(10**400), 10**4000]  # fmt: skip


@differ
def texts() -> Any:
    return ["a", "A", "a ", "a\0", "\ud800", "\udfff", "\ud800\udc00", "\U00010000", "שלום", "x" * 1000, "x" * 1001]


@differ
def unicode_forms() -> Any:
    return [unicodedata.normalize(form, "שָׁלוֹם é") for form in ("NFC", "NFD")]


@differ
def where_one_text_ends() -> Any:
    return [["ab", "c"], ["a", "bc"], ["abc"], ["ab", "c", ""], [["ab"], "c"], [["ab", "c"]],
            ["asb", ""], ["a", "bs"], [b"abb", b""], [b"a", b"bb"]]  # fmt: skip


@differ
def where_one_text_ends_in_bulk() -> Any:
    return [["ab", "c"] * 20, ["a", "bc"] * 20, [b"ab", b"c"] * 20, [b"a", b"bc"] * 20,
            ["\ud800", "\udc00"] * 20, ["\ud800\udc00", ""] * 20]  # fmt: skip


@differ
def items_one_leaf_apart_in_bulk() -> Any:
    found: list[Any] = []
    for make in (int, float, str, bool, lambda i: b"%d" % i):
        items = [make(i) for i in range(99)]
        found += [items, items[1:], [*items[:-1], None], [*items[:-1], make(0)]]
    return found


@differ
def bulk_of_different_types() -> Any:
    return [[1] * 99, [1.0] * 99, [True] * 99, ["1"] * 99, [b"1"] * 99, (1,) * 99, [1] * 100,
            [2**64] * 99, [1] * 98 + [1.0], [1] * 98 + [True], np.ones(99, int),
            array.array("q", [1] * 99), Words([1] * 99)]  # fmt: skip


@differ
def lists_in_another_order() -> Any:
    return [[1, 2, 3], [1, 3, 2], (1, 2, 3), {1, 2, 3}, frozenset((1, 2, 3)),
            collections.deque([1, 2, 3]), collections.deque([1, 2, 3], 3), [[1, 2, 3]], [1, [2, 3]],
            [1, [2], 3]]  # fmt: skip


@differ
def nesting() -> Any:
    return [[], [[]], [[], []], [[[]]], [[[]], []], [[], [[]]], ((),), [()], {(): ()}, [{}], [None],
            nested(5000), nested(5001)]  # fmt: skip


@differ
def deep_leaves() -> Any:
    return [nested(10_000, "leaf"), nested(10_000, "leaves"), doubled(100), doubled(101)]


@differ
def dicts() -> Any:
    return [{"a": 1}, {"a": 2}, {"b": 1}, {"a": 1, "b": 1}, {1: "a"}, {"1": "a"}, {True: "a"},
            {1.0: "a"}, {b"1": "a"}, {"a": "b", "c": "d"}, {"a": "d", "c": "b"}, [("a", 1)],
            {"a": None}, {None: "a"}, Table(a=1), collections.Counter(a=1),
            collections.defaultdict(int, a=1), collections.defaultdict(list, a=1),
            collections.UserDict(a=1), collections.ChainMap({"a": 1})]  # fmt: skip


@differ
def long_dicts() -> Any:
    some = {str(i): i for i in range(99)}
    return [some, some | {"5": 6}, some | {"5": "5"}, {int(key): value for key, value in some.items()}, {**some, 5: 5}]


@differ
def ordered_dicts_in_another_order() -> Any:
    return [collections.OrderedDict(a=1, b=2), collections.OrderedDict(b=2, a=1), {"a": 1, "b": 2}]


@differ
def cycles_of_different_shape() -> Any:
    one: list[Any] = []
    one.append(one)
    two: list[Any] = [[]]
    two[0].append(two)
    inner: list[Any] = [[]]
    inner[0].append(inner[0])
    up, down = looped("up"), looped("down")
    return [up, down, one, two, inner, [[]], cycle("x"), cycle("y"), tree(2), tree(3), tree(2, leaf="other"),
            hub(WORDS), hub(WORDS[1:])]  # fmt: skip


def looped(which: str) -> list[Any]:
    """The last list in it refers to the outermost one, or to the one around it."""
    outer: list[Any] = []
    around: list[Any] = []
    first = [outer, "x" * 300]
    around.append(first if which == "up" else [around, "x" * 300])
    outer += [first, around]
    return outer


@differ
def plain_objects() -> Any:
    return [Plain(a=1), Plain(a=2), Plain(b=1), Plain(a=1, b=None), Child(a=1), Plain(a=1.0), {"a": 1},
            types.SimpleNamespace(a=1), Reducing(a=1), Reducing(a=2)]  # fmt: skip


@differ
def objects_whose_methods_mislead() -> Any:
    return [Lying(a=1), Lying(a=2)]


@differ
def slotted_objects() -> Any:
    unset = SlottedChild(1)
    given = SlottedChild(1)
    given.second = None
    return [Slotted(1), Slotted(2), unset, given]


@differ
def cache_keys() -> Any:
    return [Keyed("a"), Keyed("b"), OtherKeyed("a"), "a"]


@differ
def stateless_objects_of_different_classes() -> Any:
    return [Upper(), Lower(), Upper, Lower, Elsewhere()]


@differ
def named_tuples() -> Any:
    return [Point(1, 2), Vector(1, 2), Renamed(1, 2), (1, 2), Point(2, 1), Point(1, "2")]


@differ
def dataclass_instances() -> Any:
    return [Doc(1, "a"), Doc(2, "a"), Doc("1", "a"), Doc("a", 1), SlottedDoc(1, "a"),
            SlottedDoc(1, "a", 2.0), (1, "a"), Prioritized(1, "a"), Prioritized(1, "b")]  # fmt: skip


@differ
def enums() -> Any:
    return [
        Color.RED,
        Revalued.RED,
        Color.BLUE,
        Paint.RED,
        1,
        Level.LOW,
        Mode.FAST,
        "fast",
        Rights.READ,
        Rights(3),
        "RED",
    ]


@differ
def pydantic_models() -> Any:
    return [Passage(id=1, text="a"), Passage(id=2, text="a"), Passage(id=1, text="b"),
            Query(id=1, text="a"), Loose(id=1), Loose(id=1, more=2), Loose(id=1, more=3),
            {"id": 1, "text": "a"}, Settings(key="k", at=0), Settings(key="l", at=0)]  # fmt: skip


@differ
def builtin_subclasses() -> Any:
    tagged = Words([1])
    tagged.tag = "x"
    return [[1], Words([1]), Words([2]), tagged, {1: 2}, Table({1: 2}), 5, Grams(5), "x", Label("x")]


@differ
def dates_and_times() -> Any:
    utc, fixed = dt.UTC, dt.timezone(dt.timedelta(0), "GMT")
    noon = dt.datetime(2026, 1, 2, 12)
    return [dt.date(2026, 1, 2), dt.datetime(2026, 1, 2), noon, noon.replace(tzinfo=utc),
            noon.replace(tzinfo=fixed), noon.replace(tzinfo=zoneinfo.ZoneInfo("UTC")),
            noon.replace(tzinfo=zoneinfo.ZoneInfo("Europe/London")), noon.replace(fold=1),
            noon.replace(microsecond=1), dt.time(12), dt.time(12, tzinfo=utc), dt.timedelta(1),
            dt.timedelta(seconds=1), dt.timedelta(-1), noon.timestamp(), noon.isoformat()]  # fmt: skip


@differ
def decimals_and_fractions() -> Any:
    return [decimal.Decimal("1.0"), decimal.Decimal("1.00"), decimal.Decimal("-1.0"),
            decimal.Decimal("NaN"), decimal.Decimal("sNaN"), decimal.Decimal("Infinity"),
            fractions.Fraction(1, 2), fractions.Fraction(1, 3), 0.5]  # fmt: skip


@differ
def ranges_and_slices() -> Any:
    return [range(3), range(4), range(0, 3, 2), range(0, 4, 2), slice(3), slice(0, 3), slice(0, 3, 1), [0, 1, 2]]


@differ
def memory_views() -> Any:
    view = memoryview(bytes(range(16)))
    return [view, view.cast("i"), view.cast("I"), view.cast("B", (4, 4)), view[::2], view[:8], bytes(range(16))]


@differ
def paths() -> Any:
    return [pathlib.PurePosixPath("a/b"), pathlib.PureWindowsPath("a/b"), pathlib.Path("a/b"),
            pathlib.Path("a"), "a/b", pathlib.Path("/a/b")]  # fmt: skip


@differ
def other_values_of_the_library() -> Any:
    return [uuid.UUID(int=1), uuid.UUID(int=2), ipaddress.ip_address("10.0.0.1"),
            ipaddress.ip_network("10.0.0.1"), re.compile("a"), re.compile("a", re.IGNORECASE),
            re.compile(b"a"), operator.itemgetter(1), operator.itemgetter(2), operator.attrgetter("x"),
            int | str, int | None, list[int], list[str], typing.Literal["a"], typing.Literal["b"],
            types.MappingProxyType({"a": 1}), {"a": 1}.keys(), {"a": 1}.items(), time.gmtime(0),
            time.gmtime(1)]  # fmt: skip


@differ
def objects_of_the_library_whose_content_is_private() -> Any:
    found: list[Any] = []
    for word in ("a", "b"):
        config = configparser.ConfigParser()
        config.read_dict({"section": {"key": word}})
        message = email.message.EmailMessage()
        message["Subject"] = word
        found += [config, message, types.SimpleNamespace(_key=word), types.SimpleNamespace(key=word)]
    return found


@differ
def exceptions() -> Any:
    return [ValueError("a"), ValueError("b"), KeyError("a"), OSError(2, "no", "x"),
            OSError(2, "no", "y"), Failure("a", 1), Failure("a", 2)]  # fmt: skip


@differ
def random_states() -> Any:
    moved = np.random.default_rng(7)
    moved.random()
    return [random.Random(1), random.Random(2), np.random.default_rng(7), np.random.default_rng(8),
            moved, np.random.RandomState(1), np.random.RandomState(2), np.random.PCG64(1)]  # fmt: skip


@differ
def arrays() -> Any:
    base = np.arange(6)
    return [base, base.astype("i4"), base.astype("f8"), base.astype("f4"), base.astype(">i8"),
            base.reshape(2, 3), base.reshape(3, 2), base.reshape(2, 3).T, base[::-1], base.tolist(),
            base.astype("u8"), base.view("M8[s]"), base.view("M8[ns]"), base.view("m8[s]"),
            base.astype(object), base.astype("U1"), base.astype("U2"), base.astype(bool),
            np.ma.masked_array(base, base > 3), np.ma.masked_array(base, base > 4), base.tobytes()]  # fmt: skip


@differ
def large_arrays_one_item_apart() -> Any:
    base = np.zeros(1_000_000)
    changed = base.copy()
    changed[777_777] = 1e-300
    return [base, changed]


@differ
def structured_dtypes() -> Any:
    return [np.zeros(2, [("a", "i4"), ("b", "i4")]), np.zeros(2, [("b", "i4"), ("a", "i4")]),
            np.zeros(2, [("a", "i8")]), np.zeros(2, [("a", "i4", (2,))]),
            np.zeros(2, [("a", "i4"), ("b", object)])]  # fmt: skip


@differ
def numpy_types() -> Any:
    return [np.dtype("i4"), np.dtype("f4"), np.float32, np.float64, np.sin, np.cos,
            np.datetime64(1, "s"), np.datetime64(1, "m"), np.datetime64("NaT", "s"),
            np.timedelta64(1, "s")]  # fmt: skip


@differ
def different_functions() -> Any:
    return [Wired("a"), Wired("b"), Wired("a").handle, Wired("b").handle,
            shout, whisper, len, abs, functools.partial(shout, "a"), functools.partial(shout, "b"),
            Plain, Child, "".upper, "a".upper, lambda: 1, lambda: 2, math, functools.lru_cache(shout)]  # fmt: skip


@differ
def different_frames() -> Any:
    import pandas as pd

    one = frame()
    at = pd.Timestamp("2026-01-01")
    return [one, frame(id=[1, 2, 4]), frame(id=[1.0, 2.0, 3.0]), frame(text=["a", "", "c"]),
            frame(kind=["x", "y", "x"]), frame(count=[1, 2, 3]),
            one[["text", "id", "at", "kind", "count"]], one.set_index("id"),
            one.rename(columns={"id": "no"}), one["id"], one["id"].rename("no"), one["id"].to_list(),
            pd.Index([1, 2, 3]), pd.RangeIndex(3), at, at.as_unit("ns"), at.tz_localize("UTC"),
            at + pd.Timedelta(1, "ns"), at.to_pydatetime(), pd.NaT, pd.NA, pd.Timedelta(1, "s"),
            pd.Period("2026-01"), pd.Period("2026-01-01"), pd.MultiIndex.from_tuples([(1, 2)]),
            pd.Interval(0, 1)]  # fmt: skip


needing("pandas")(different_frames)


@differ
def different_polars_frames() -> Any:
    import polars as pl

    return [pl.DataFrame({"a": [1, 2]}), pl.DataFrame({"a": [1, 3]}), pl.DataFrame({"b": [1, 2]}),
            pl.DataFrame({"a": [1.0, 2.0]}), pl.DataFrame({"a": [1, None]}), pl.Series("a", [1, 2]),
            pl.Series("a", [1, 2], pl.Int8), pl.Series([1, 2]), pl.Series(["x", "y"]),
            pl.Series([{"x": 1}]), pl.Series([{"x": 2}])]  # fmt: skip


needing("polars")(different_polars_frames)


@differ
def different_sparse_matrices() -> Any:
    import scipy.sparse as sparse

    eye = np.eye(3)
    return [sparse.csr_matrix(eye), sparse.csc_matrix(eye), sparse.csr_array(eye),
            sparse.csr_matrix(eye * 2), sparse.csr_matrix(eye.astype("f4")), sparse.coo_matrix(eye),
            sparse.csr_matrix(eye[:, ::-1]), eye]  # fmt: skip


needing("scipy")(different_sparse_matrices)


@differ
def different_estimators() -> Any:
    from sklearn.linear_model import LinearRegression
    from sklearn.neighbors import KNeighborsRegressor

    x, y = np.arange(10.0).reshape(5, 2), np.arange(5.0)
    near, line = KNeighborsRegressor, LinearRegression
    return [near(2).fit(x, y), near(2).fit(x * 3, y), near(3).fit(x, y), near(2), line(), line().fit(x, y)]


needing("sklearn")(different_estimators)


@differ
def different_images() -> Any:
    from PIL import Image

    black = Image.new("RGB", (4, 4))
    dotted = black.copy()
    dotted.putpixel((3, 3), (0, 0, 1))
    return [black, dotted, Image.new("RGB", (2, 8)), Image.new("L", (4, 12))]


needing("PIL")(different_images)


@differ
def different_tensors() -> Any:
    import torch

    one = torch.arange(6.0)
    torch.manual_seed(1)
    return [one, one + 1, one.double(), one.half(), one.bfloat16(), one.reshape(2, 3),
            one.clone().requires_grad_(), one.numpy(), torch.nn.Linear(2, 2), torch.nn.Linear(2, 2),
            torch.nn.Dropout(0.1), torch.nn.Dropout(0.2), torch.float32]  # fmt: skip


needing("torch")(different_tensors)


# --- must be refused --------------------------------------------------------------------------------------


@refused("value['a'][3].client: a _thread.lock keeps its content outside of Python")
def a_lock_far_inside() -> Any:
    return {"a": [0, 1, 2, Plain(client=threading.Lock())]}


@refused(
    "value: a _thread.lock keeps its content outside of Python, and there is no telling what it is; "
    "give its class a `__cache_key__()`"
)
def a_lock() -> Any:
    return threading.Lock()


@refused("value: a generator is used up by reading it, so it cannot be hashed; pass a list of what it gives")
def a_generator() -> Any:
    return numbers()


@refused("value[0]: a list_iterator is used up")
def an_iterator() -> Any:
    return [iter([1])]


@refused("value: a map is used up")
def a_lazy_map() -> Any:
    return map(str, [1])


@refused("value: a tests._values_cases.Countdown is used up")
def an_iterator_of_the_users() -> Any:
    return Countdown(3)


@refused("value: a tests._values_cases.Loader can be awaited once")
def an_awaitable() -> Any:
    return Loader()


@refused("value['file']: a _io.BytesIO is used up")
def a_file() -> Any:
    return {"file": io.BytesIO(b"x")}


@refused("value: a socket.socket keeps its content outside")
def a_socket() -> Any:
    return closed(socket.socket())


@refused("value.peer: a tests._values_cases.NamedSocket keeps its content outside")
def a_subclass_of_a_socket() -> Any:
    return Plain(peer=closed(NamedSocket()))


@refused("value: a sqlite3.Connection keeps its content outside")
def a_database_connection() -> Any:
    return closed(sqlite3.connect(":memory:"))


@refused(
    "value: a tests._values_cases.Private has no state but in attributes whose names start with '_' (_session, _token)"
    ", which do not count"
)
def private_state_alone() -> Any:
    return Private()


@refused("value[1][2]: a tests._values_cases.SlottedPrivate has no state but")
def private_slots_alone() -> Any:
    return [0, (1, 2, SlottedPrivate())]


@refused("value._cond._lock: a _thread.lock keeps its content outside")
def an_event() -> Any:
    return threading.Event()


@refused("value: a object is told from another only by its address")
def a_sentinel() -> Any:
    return object()


@refused("value.x: a weakref.ReferenceType keeps its content outside")
def a_weak_reference() -> Any:
    return Point(weakref.ref(Plain), 1)


@refused("value: a _contextvars.ContextVar keeps")
def a_context_variable() -> Any:
    return contextvars.ContextVar("x")


@refused("value{…}: a object is told")
def a_sentinel_in_a_set() -> Any:
    return {object(), 1}


@refused("value (a key): a object is told")
def a_sentinel_as_a_key() -> Any:
    return {object(): 1}


@refused("value[SlottedDoc][0]: a object is told")
def under_a_key_that_is_no_scalar() -> Any:
    return {SlottedDoc(1, 2): [object()]}


@refused("value[5000]: a object is told")
def far_along_a_list() -> Any:
    return [*[[i] for i in range(5000)], object()]


@refused("value[1]: a object is told")
def in_an_array_of_objects() -> Any:
    return np.array([1, object()], dtype=object)


@refused("value: `__cache_key__()` of a tests._values_cases.BadKey returned a int, not a str")
def a_cache_key_that_is_no_text() -> Any:
    return BadKey()


@refused("value.model: it cannot be hashed: KeyError: 'no name yet'")
def a_cache_key_that_raises() -> Any:
    return Plain(model=RaisingKey())


@refused("value: it cannot be hashed: NotImplementedError")
def a_generator_of_the_operating_system() -> Any:
    return random.SystemRandom()


def closed(resource: Any) -> Any:
    resource.close()
    return resource


def rebuilt(value: Any) -> Any:
    """An equal value of other objects, whose dicts and sets were filled in another order."""
    match value:
        case list() | tuple() | set() | frozenset() if type(value) in (list, tuple, set, frozenset):
            items = [rebuilt(item) for item in value]
            return type(value)(items if isinstance(value, list | tuple) else reversed(items))
        case Point():
            return Point(*map(rebuilt, value))
        case dict():
            return {rebuilt(key): rebuilt(each) for key, each in reversed(value.items())}
        case Plain():
            return type(value)(**rebuilt(value.__dict__))
        case SlottedDoc() | Doc():
            return type(value)(rebuilt(value.id), rebuilt(value.text))
        case np.ndarray():
            return np.asfortranarray(value)
        case _:
            return value


def serve() -> None:
    """For each pickled value, in hexadecimal on a line, print the hash of it and of one that is built anew."""
    for line in sys.stdin:
        value = pickle.loads(bytes.fromhex(line))
        print(hash_value(value).hex(), hash_value(rebuilt(value)).hex(), flush=True)  # noqa: T201


if __name__ == "__main__":
    print(json.dumps(evaluate()))  # noqa: T201

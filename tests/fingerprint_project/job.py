"""A project of which every part is edited in turn: `job` is what is fingerprinted."""

import functools
import re
from collections import namedtuple
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import consts
import tools
from pkg import sub
from pkg.deep import bottom
from tools import helper
from tools import scaled as resized

from hypernodes import Pipeline, node

LIMIT = 3
CONFIG = {"k": 1, "words": ["a", "b"]}
ALLOWED = frozenset({"x", "y", "z"})
WORD = re.compile("[a-z]+")
UNUSED = 1


def unused(x):
    return x


def make_tags():
    return ["new"]


@dataclass
class Doc:
    """A document."""

    text: str
    score: float = 0.5
    tags: list = field(default_factory=make_tags)


class Color(Enum):
    RED = 1
    GREEN = 2


class Point(NamedTuple):
    x: int
    y: int = 7


Pair = namedtuple("Pair", "left right", defaults=(8,))


class Meta(type):
    def __call__(cls, *args):
        return super().__call__(*args)


class Base:
    ratio = 0.1

    def size(self):
        return 10


class Encoder(Base, metaclass=Meta):
    """Encodes."""

    dim = 4
    make = staticmethod(tools.build)

    def __init__(self, seed):
        self.seed = seed

    def encode(self, word):
        """Encode."""
        return word * self.dim + self.suffix

    @property
    def suffix(self):
        return "suffix"

    @classmethod
    def named(cls):
        return "named"

    @staticmethod
    def plain(salt="salt"):
        return "plain" + salt


class Scorer:
    def __init__(self, weight):
        self.weight = weight

    def __call__(self, word):
        return len(word) * self.weight


ENCODER = Encoder(11)
encode = Encoder(12).encode
SCORER = Scorer(13)


def logged(prefix):
    def decorate(function):
        @functools.wraps(function)
        def wrapper(*args):
            return prefix, function(*args)

        return wrapper

    return decorate


@logged("prefix")
def decorated(x):
    return x + "decorated"


@functools.lru_cache(maxsize=16)
def remembered(x):
    return x + "remembered"


@functools.singledispatch
def shown(x):
    return "any"


@shown.register
def _(x: int):
    return "int"


def upper(x):
    return x.upper()


def lower(x):
    return x.lower()


TABLE = {"up": upper, "down": [lower]}
tagged = functools.partial(tools.tag, 14, mark="mark")
times = tools.multiplier(15)


def even(n):
    return n == 0 or odd(n - 1)


def odd(n):
    return n != 0 and even(n - 1)


async def fetch(x):
    return x


def pieces(x):
    yield "piece"


@node("cleaned", retry=2)
def clean(text):
    return text.strip()


@node("words")
def cut(cleaned):
    return cleaned.split()


inner_pipeline = Pipeline([clean, cut], name="inner").bind(text="bound")


def job(text, top_k=5, *, sep=" "):
    """Use everything."""
    import lazy_names as names
    from lazy import late

    # A comment.
    def inner(word):
        return word.strip(".")

    words: list = [inner(word) for word in text.split(sep) if word != "the"]
    words.sort(key=lambda word: (len(word), word))
    label = f"{text!r:>10}"
    async_part = [fetch(word) for word in words]
    return (
        (LIMIT, CONFIG["k"], ALLOWED, WORD.match(text), consts.RATE, consts.nested.DEPTH),
        (helper(words), resized(label), sub.trim(text), bottom(text), late(text), names.K),
        (Doc(text), Color.RED, Point(1), Pair(2), ENCODER.encode(text), encode(text), SCORER(text)),
        (decorated(text), remembered(text), shown(text), TABLE["up"](text), tagged(text), times(top_k)),
        (even(3), async_part, list(pieces(text)), clean(text), inner_pipeline, Encoder.named(), top_k),
    )

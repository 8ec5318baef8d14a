"""What tests of runs with a cache share: fixtures, values that tell when they are unpickled, and what a run told.

```python
from tests import _caching

cache, ran = _caching.cache, _caching.ran  # pytest finds fixtures among a module's names
```
"""

import logging
import os
from collections import Counter

import anyio
import pytest

from hypernodes import DiskCache, Pipeline, node
from hypernodes.backend import LocalBackend
from hypernodes.cache._session import _FLIGHTS
from hypernodes.events import CacheRefused, NodeCached, NodeStarted, NodeStored, NodeUncacheable, RunFinished

PATIENCE_S = 20  # only a hang takes this long
REBUILT = []
"""Names of the values that have been unpickled in this process."""


class Telling:
    """A value that tells when it is unpickled."""

    def __init__(self, name):
        self.name = name

    def __setstate__(self, state):
        REBUILT.append(state["name"])
        self.__dict__.update(state)

    def __eq__(self, other):
        return type(other) is Telling and other.name == self.name

    def __hash__(self):
        return hash(self.name)

    def __repr__(self):
        return f"<{self.name}>"


def rebuilt():
    """Names of what has been unpickled since this was last asked, sorted."""
    names = sorted(REBUILT)
    REBUILT.clear()
    return names


class Ran:
    """Which calls were made, in whatever process: one line each in a file."""

    def __init__(self, file):
        self._file = file

    def __cache_key__(self):
        return "where calls are noted"

    def note(self, *what):
        """Add a line, whole even when several processes write."""
        line = " ".join(map(str, what)) + "\n"
        file = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)

    def take(self):
        """Return the lines since this was last asked, sorted."""
        try:
            with open(self._file) as file:
                lines = file.read().splitlines()
            os.unlink(self._file)
        except FileNotFoundError:
            lines = []
        return sorted(lines)


async def watched(pipeline, inputs=None, **options):
    """The answer of a run, and its events."""
    seen = []
    with anyio.fail_after(PATIENCE_S):
        async with pipeline.aevents(inputs or {}, **options) as events:
            async for event in events:
                seen.append(event)  # noqa: PERF401 - keeps what came before an error
    assert isinstance(seen[-1], RunFinished)
    return seen[-1].result, seen


def of(seen, kind):
    """The paths of the events of a kind, below the pipeline, in order; indexes and names joined by dots."""
    return [".".join(map(str, event.path[1:])) for event in seen if type(event) is kind]


def tally(seen):
    """How many calls were started, came from the cache, were stored, refused and not cacheable."""
    kinds = Counter(type(event) for event in seen)
    named = {
        "started": NodeStarted,
        "cached": NodeCached,
        "stored": NodeStored,
        "refused": CacheRefused,
        "uncacheable": NodeUncacheable,
    }
    return {name: kinds[kind] for name, kind in named.items() if kinds[kind]}


def waiting():
    """How many callers wait for what another one in this process computes."""
    return sum(len(flight.waiters) for flight in list(_FLIGHTS._flying.values()))


async def until(true):
    """Return once a condition holds that others bring about."""
    with anyio.fail_after(PATIENCE_S):
        while not true():
            await anyio.sleep(0.001)


def opened(path, **options):
    """A cache as another process would open it: nothing in memory."""
    return DiskCache(path, **options)


def warnings_of(caplog):
    """What the library has warned of."""
    return [each.getMessage() for each in caplog.records if each.name == "hypernodes" and each.levelname == "WARNING"]


in_order = LocalBackend(node_execution="sequential", map_execution="sequential")


# ---- fixtures


@pytest.fixture
def cache(tmp_path):
    """A cache in a directory of the test."""
    return DiskCache(tmp_path / "cache")


@pytest.fixture
def ran(tmp_path):
    """Where functions note that they ran."""
    rebuilt()
    return Ran(str(tmp_path / "ran"))


@pytest.fixture
def text(ran):
    """Three nodes in a row, each of which makes a value that tells when it is unpickled."""

    @node("cleaned")
    async def clean(raw):
        ran.note("clean", raw)
        return Telling(f"cleaned {raw}")

    @node("words")
    def cut(cleaned):
        ran.note("cut", cleaned.name)
        return Telling(f"words of {cleaned.name}")

    @node("count")
    async def count(words):
        ran.note("count", words.name)
        return Telling(f"count of {words.name}")

    return Pipeline([clean, cut, count], name="text")


@pytest.fixture
def nested(text):
    """A map of the pipeline `text`, between two other nodes."""

    @node("raws")
    async def load(corpus):
        return corpus.split()

    @node("report")
    async def report(counts):
        return [each.name for each in counts]

    every = text.as_node({"raws": "raw"}, {"count": "counts"}, map_over="raws", name="every")
    return Pipeline([load, every, report], name="corpus")


@pytest.fixture
def picky(ran, tmp_path):
    """Fails for odd items until a file is there."""
    mended = tmp_path / "mended"

    @node("checked")
    async def check(x):
        ran.note("check", x)
        return x

    @node("doubled")
    async def double(checked):
        ran.note("double", checked)
        if checked % 2 and not mended.exists():
            raise ValueError(f"odd: {checked}")
        return checked * 2

    return Pipeline([check, double], name="picky"), mended


@pytest.fixture
def warned(caplog):
    """What the library warns of."""
    caplog.set_level(logging.DEBUG, "hypernodes")
    return lambda: warnings_of(caplog)

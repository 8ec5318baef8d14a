"""Values that cannot be kept or known, whose class has gone, or that someone changes: runs with a cache are right."""

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest

from hypernodes import Pipeline, node
from hypernodes.events import NodeUncacheable
from tests import _caching
from tests._caching import in_order, of, watched

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

cache, ran, warned = _caching.cache, _caching.ran, _caching.warned  # pytest finds fixtures among a module's names

ROOT = Path(__file__).parent.parent


# ---- values that cannot be kept, and inputs that cannot be known


async def test_what_cannot_be_pickled_is_returned_and_not_kept(cache, ran, warned):
    """An output that cannot be pickled costs one warning, however many items there are; what follows runs too."""

    @node("lock")
    async def make(x):
        ran.note("make")
        return (lock for lock in [threading.Lock()])

    @node("used")
    async def use(lock):
        ran.note("use")
        return type(lock).__name__

    @node("last")
    async def last(used):
        ran.note("last")
        return used

    nested = Pipeline([make, use, last]).as_node({"xs": "x"}, map_over="xs", name="every")
    pipeline = Pipeline([nested]).with_cache(cache)
    answer, seen = await watched(pipeline, {"xs": [1, 2]}, output_name="last")
    assert answer == ["generator", "generator"]
    assert len(of(seen, NodeUncacheable)) == 2
    assert len(warned()) == 1
    assert "'make'" in warned()[0]
    assert len(ran.take()) == 6
    # What follows is known by how its input was made, so it hits although that value cannot be kept; and then
    # nothing needs that value.
    assert await pipeline.arun(xs=[1, 2], output_name="last") == ["generator", "generator"]
    assert ran.take() == []


@pytest.mark.parametrize("kind", ["lock", "generator", "iterator"])
async def test_an_input_without_identity_means_no_caching_for_that_node(kind, cache, ran, warned):
    """A lock or a generator as input is not consumed and not hashed: the node runs, with one warning."""
    value = {"lock": threading.Lock(), "generator": (each for each in "abc"), "iterator": iter("abc")}[kind]

    @node("first")
    async def first(thing, x):
        ran.note("first")
        return x

    @node("other")
    async def other(x):
        ran.note("other")
        return x

    @node("after")
    async def after(first):
        ran.note("after")
        return first + 1

    pipeline = Pipeline([first, other, after]).with_cache(cache)
    answer, seen = await watched(pipeline, {"thing": value, "x": 1})
    assert answer == {"first": 1, "other": 1, "after": 2}
    assert of(seen, NodeUncacheable) == ["first"]
    assert len(ran.take()) == 3
    assert await pipeline.arun(thing=value, x=1) == answer
    assert ran.take() == ["first"]
    assert len(warned()) == 1  # in all, however many runs
    assert all("'thing'" in each and "'first'" in each for each in warned())
    if kind != "lock":
        assert list(value) == ["a", "b", "c"]


async def test_an_input_without_identity_warns_once_in_a_map(cache, ran, warned):
    """A map of 100 items that share a lock gives one warning."""
    lock = threading.Lock()

    @node("y")
    async def work(lock, x):
        with lock:
            return x

    pipeline = Pipeline([work]).with_cache(cache)
    assert (await pipeline.amap({"lock": lock, "x": range(100)}, "x"))["y"] == list(range(100))
    assert len(warned()) == 1


async def test_a_list_with_an_item_without_identity(cache, ran, warned):
    """What one item cannot be known by does not touch the others."""

    @node("y")
    async def work(x):
        ran.note("work")
        return repr(type(x))

    @node("n")
    async def count(ys):
        ran.note("count")
        return len(ys)

    every = Pipeline([work]).as_node({"xs": "x"}, {"y": "ys"}, map_over="xs", name="every")
    pipeline = Pipeline([every, count]).with_cache(cache)
    given = {"xs": [1, threading.Lock(), "a"]}
    first = await pipeline.arun(given)
    assert ran.take() == ["count", "work", "work", "work"]
    assert await pipeline.arun(given) == first
    assert ran.take() == ["work"]


async def test_an_object_that_raises_while_it_is_hashed_or_pickled(cache, ran, warned):
    """Whatever the user's own code does in __cache_key__ or __reduce__ fails no run."""

    class Hostile:
        def __cache_key__(self):
            raise ZeroDivisionError("in __cache_key__")

    class Unpicklable:
        def __reduce__(self):
            raise ZeroDivisionError("in __reduce__")

    @node("y")
    async def work(x):
        return Unpicklable() if x == 1 else x

    pipeline = Pipeline([work]).with_cache(cache)
    hostile = Hostile()
    assert await pipeline.arun(x=hostile) == {"y": hostile}
    assert type((await pipeline.arun(x=1))["y"]) is Unpicklable
    assert len(warned()) == 2


RENAMED = """
    import sys
    from hypernodes import DiskCache, Pipeline, node
    {definition}

    @node("made")
    async def make(x):
        print("make", flush=True)
        return globals()[x](3)

    @node("size")
    async def measure(made):
        print("measure", flush=True)
        return made.size

    pipeline = Pipeline([make, measure], cache=DiskCache("cache"))
    print(pipeline.run(x="Box", output_name=sys.argv[1:]))
"""


def test_a_class_that_is_gone_means_a_miss(tmp_path):
    """An entry of a class that has been removed since cannot be rebuilt: the node runs again."""

    def run(definition, *outputs):
        (tmp_path / "script.py").write_text(textwrap.dedent(RENAMED).format(definition=definition))
        done = subprocess.run(
            [sys.executable, "script.py", *outputs],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.splitlines()

    (tmp_path / "boxes.py").write_text("class Box:\n    def __init__(self, size):\n        self.size = size\n")
    (tmp_path / "other.py").write_text("class Box:\n    def __init__(self, size):\n        self.size = -size\n")
    assert run("from boxes import Box", "size") == ["make", "measure", "{'size': 3}"]
    assert run("from boxes import Box", "size", "made")[-1].startswith("{'size': 3, 'made': <boxes.Box")
    # `make` names its class in a string, so it is the same code although the class is another one now.
    (tmp_path / "boxes.py").unlink()
    lines = run("from other import Box", "size", "made")
    assert lines[0] == "make"
    assert "<other.Box" in lines[-1]


# ---- values that someone changes


async def test_what_a_consumer_does_to_its_input_does_not_change_what_is_stored(cache, ran):
    """A node that changes its input in place gets the same input when it runs again later."""

    @node("a")
    async def make(x):
        return [x]

    @node("b", cache=False)
    async def spoil(a):
        a.append("spoiled")
        return len(a)

    pipeline = Pipeline([make, spoil], backend=in_order).with_cache(cache)
    for _ in range(3):
        assert await pipeline.arun(x=1) == {"a": [1, "spoiled"], "b": 2}
        assert (await pipeline.amap({"x": [1, 1, 2]}, "x"))["b"] == [2, 2, 2]
        assert await pipeline.arun(x=1, output_name="a") == [1]


async def test_what_the_caller_does_to_a_result_does_not_change_what_is_stored(cache):
    """Results belong to the caller, small ones that are not written yet too."""

    @node("a")
    async def make(x):
        return {"list": [x], "array": np.zeros(20_000)}

    pipeline = Pipeline([make]).with_cache(cache)
    for _ in range(3):
        for made in (await pipeline.amap({"x": [1, 1]}, "x"))["a"]:
            assert made["list"] == [1]
            assert made["array"].sum() == 0
            made["list"].append(2)
            made["array"][:] = 1


async def test_items_that_change_their_inputs_in_place_do_not_change_each_others(cache):
    """Equal items of a list that comes from the cache are values of their own for the items of the next map."""

    @node("vector")
    async def encode(word):
        return np.ones(3)

    @node("scaled")
    async def scale(vector, weight):
        vector *= weight
        return float(vector.sum())

    first = Pipeline([encode]).as_node({"words": "word"}, {"vector": "vectors"}, map_over="words", name="first")
    then = Pipeline([scale]).as_node(
        {"vectors": "vector", "weights": "weight"},
        {"scaled": "totals"},
        map_over=["vectors", "weights"],
        name="then",
    )
    pipeline = Pipeline([first, then]).with_cache(cache)
    for weights in ([2.0, 3.0, 5.0], [7.0, 11.0, 13.0]):
        assert await pipeline.arun(words=["a", "a", "b"], weights=weights, output_name="totals") == [
            3 * weight for weight in weights
        ]

"""Hashes of values: equal for equal values in every process, different for all others, refused where none can hold."""

import gc
import json
import math
import os
import pickle
import subprocess
import sys
import threading
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from hypernodes._signature.values import hash_value
from hypernodes.errors import CacheError, UncacheableError
from tests import _values_cases as cases
from tests._values_cases import DIFFER, EQUAL, REFUSED, Color, Doc, Passage, Plain, Point, SlottedDoc

ROOT = Path(__file__).parents[1]


def python(seed: int, *arguments: str) -> "subprocess.Popen[str]":
    """A fresh interpreter with its own seed for the hashes of str."""
    environment = {**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-P", *arguments],
        env=environment,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


class Helper:
    """A process that first says its hashes of all cases, and then those of values that it is sent."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.cases = json.loads(process.stdout.readline())

    def hashes(self, value: Any) -> list[str]:
        """The hash of a value as it arrives there, and that of one built anew."""
        self.process.stdin.write(pickle.dumps(value).hex() + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().split()


@pytest.fixture(scope="module")
def helper() -> Iterator[Helper]:
    """A process with a seed of its own, for the whole module."""
    code = "import json, tests._values_cases as c; print(json.dumps(c.evaluate()), flush=True); c.serve()"
    with python(3, "-c", code) as process:
        yield Helper(process)
        process.stdin.close()
        assert process.wait(timeout=20) == 0


@pytest.fixture(scope="module")
def in_main() -> list[dict[str, Any]]:
    """The hashes of all cases in two processes whose classes are in `__main__`."""
    program = str(ROOT / "tests" / "_values_cases.py")
    processes = [python(seed, program) for seed in (1, 2)]
    return [json.loads(process.communicate(timeout=50)[0]) for process in processes]


@pytest.fixture(scope="module")
def here() -> dict[str, Any]:
    """The hashes of all cases, in this process."""
    return cases.evaluate()


Hashes = dict[str, Any]


def hashes(here: Hashes, in_main: list[Hashes], helper: Helper, name: str) -> list[list[str]]:
    """What this process, one with classes in `__main__`, and their like with other seeds say of a case."""
    if here[name] is None:
        pytest.skip(f"needs {(EQUAL | DIFFER)[name][1]}")
    assert here[name] == helper.cases[name]
    assert in_main[0][name] == in_main[1][name]
    return [here[name], in_main[0][name]]


@pytest.mark.parametrize("name", EQUAL)
def test_equal_values_have_one_hash_in_every_process(here, in_main, helper, name: str) -> None:
    """Whatever the seed, the sharing, the order of insertion, the layout in memory or the place of the class."""
    for found in hashes(here, in_main, helper, name):
        assert len(found) == 2
        assert found[0] == found[1]


@pytest.mark.parametrize("name", DIFFER)
def test_different_values_have_different_hashes_in_every_process(here, in_main, helper, name: str) -> None:
    """Each two of the case's values, however alike; and each has the same hash in all processes."""
    for found in hashes(here, in_main, helper, name):
        assert len(found) > 1
        alike = [(i, j) for j in range(len(found)) for i in range(j) if found[i] == found[j]]
        assert not alike, "these are of one hash, by their positions"


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_identity_is_refused_with_its_path(name: str) -> None:
    """The message begins with where in the value it is, and what it is."""
    make, message = REFUSED[name]
    with pytest.raises(UncacheableError) as raised:
        hash_value(make())
    assert str(raised.value).startswith(message)
    assert isinstance(raised.value, CacheError)


def test_the_path_begins_with_the_name_of_the_input() -> None:
    """A message calls the value as it is called in the pipeline, and says what to do."""
    with pytest.raises(UncacheableError, match=r"^encoder\.client: a _thread\.lock .*`__cache_key__\(\)`.*'_'"):
        hash_value(Plain(client=threading.Lock()), "encoder")


def test_a_hash_is_32_bytes() -> None:
    """Short and long values, scalars and containers: always a whole SHA-256."""
    for value in (None, 1, "x" * 10_000, [], ["x"] * 10_000, np.zeros(10_000), {"a": [1]}):
        assert len(hash_value(value)) == 32


# --- found by generating ----------------------------------------------------------------------------------

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.text(st.characters(categories=["Cs", "Lo", "Mn"])),
    st.binary(),
    st.sampled_from(Color),
    st.complex_numbers(allow_nan=False),
)
hashables = st.recursive(
    scalars,
    lambda inner: st.one_of(st.tuples(inner), st.tuples(inner, inner), st.frozensets(inner, max_size=3)),
    max_leaves=4,
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner, max_size=4).map(tuple),
        st.one_of(st.lists(st.integers(), min_size=14, max_size=18), st.lists(st.text(), min_size=14, max_size=18)),
        st.dictionaries(st.text(), inner),
        st.dictionaries(hashables, inner, max_size=4),
        st.sets(hashables, max_size=4),
        st.builds(Point, inner, inner),
        st.builds(Doc, inner, inner),
        st.builds(SlottedDoc, inner, inner),
        st.builds(Passage, id=st.integers(), text=st.text()),
        st.dictionaries(st.sampled_from(["a", "b", "c"]), inner).map(lambda state: Plain(**state)),
        st.lists(st.floats(), min_size=2).map(np.array),
        st.lists(st.floats(), min_size=4, max_size=4).map(lambda items: np.array(items).reshape(2, 2)),
    ),
    max_leaves=12,
)
thorough = settings(deadline=None, max_examples=200, suppress_health_check=list(HealthCheck))


@thorough
@given(values)
def test_any_value_has_the_hash_of_an_equal_one_in_another_process(helper: Helper, value: Any) -> None:
    """As it arrives there, and built anew with dicts and sets filled in another order."""
    assert helper.hashes(value) == [hash_value(value).hex()] * 2


@thorough
@given(values, st.data())
def test_changing_any_one_leaf_changes_the_hash(value: Any, data: st.DataObject) -> None:
    """A scalar anywhere inside, a key too, becomes the one next to it or one of another type that compares equal."""
    count = len(leaves(value))
    assume(count)
    before = hash_value(value)
    at = data.draw(st.integers(0, count - 1))
    assert hash_value(replaced(value, at)) != before


def leaves(value: Any) -> list[Any]:
    found: list[Any] = []
    edited(value, lambda leaf: found.append(leaf) or leaf)
    return found


def replaced(value: Any, at: int) -> Any:
    numbers = iter(range(1_000_000))
    return edited(value, lambda leaf: another(leaf) if next(numbers) == at else leaf)


def edited(value: Any, edit: Callable[[Any], Any]) -> Any:
    """The value with each of its leaves as `edit` has it."""
    match value:
        case Color():
            return edit(value)
        case Point():
            return Point(*(edited(item, edit) for item in value))
        case list() | tuple() | set() | frozenset():
            return type(value)([edited(item, edit) for item in value])
        case dict():
            return {edited(key, edit): edited(each, edit) for key, each in value.items()}
        case Plain():
            return Plain(**{key: edited(each, edit) for key, each in value.__dict__.items()})
        case Doc() | SlottedDoc():
            return type(value)(edited(value.id, edit), edited(value.text, edit))
        case Passage():
            return Passage(id=edit(value.id), text=edit(value.text))
        case np.ndarray():
            return np.array([edit(item) for item in value.ravel().tolist()]).reshape(value.shape)
        case _:
            return edit(value)


def another(leaf: Any) -> Any:
    match leaf:
        case None:
            return False
        case bool():
            return int(leaf)
        case Color():
            return Color.RED if leaf is Color.BLUE else Color.BLUE
        case int():
            return leaf + 1
        case float():
            return 0.0 if math.isnan(leaf) else math.nextafter(leaf, 0.0 if leaf else 1.0)
        case str():
            return leaf + "\0"
        case bytes():
            return leaf + b"\0"
        case complex():
            return complex(leaf.real, another(leaf.imag))
    raise AssertionError(leaf)


# --- how it works -----------------------------------------------------------------------------------------


def test_large_buffers_are_not_copied() -> None:
    """An array, bytes and a memory view of 16 MB are hashed where they lie."""
    array = np.zeros(2_000_000)
    data = bytes(16_000_000)
    tracemalloc.start()
    try:
        for value in (array, [array], data, memoryview(data), Plain(data=array)):
            hash_value(value)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_a_long_list_is_not_written_out_in_memory() -> None:
    """40,000 small tuples, of which only a stretch is held as bytes at a time."""
    rows = [(i, "x" * 100) for i in range(40_000)]
    tracemalloc.start()
    try:
        hash_value(rows)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_threads_agree() -> None:
    """Many threads hash one value, of classes that nobody has hashed before, and all say the same."""
    kinds = [type(f"Kind{i}", (Plain,), {}) for i in range(50)]
    value = [kind(items=[Point(1, {"a": 2.5})] * 10) for kind in kinds]
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: hash_value(value), range(40)))
    assert len(found) == 1


def test_a_class_may_get_its_cache_key_later() -> None:
    """As in a notebook, after the message said so."""
    Late = type("Late", (), {"__init__": lambda self: setattr(self, "_token", 1)})  # noqa: N806
    value = Late()
    with pytest.raises(UncacheableError):
        hash_value(value)
    Late.__cache_key__ = lambda self: "late"
    assert hash_value(value) == hash_value(Late())


def test_a_hashed_class_is_free_to_go() -> None:
    """What is known of a class that a notebook cell defines anew goes with it."""
    Cell = type("Cell", (Plain,), {"__slots__": ("more",)})  # noqa: N806
    hash_value(Cell(a=1))
    gone = weakref.ref(Cell)
    del Cell
    gc.collect()
    assert gone() is None


def test_the_users_classes_are_told() -> None:
    """Those whose instances count by their state, at any depth: their code may matter to the caller."""
    classes: set[type] = set()
    value = {"a": [Plain(doc=Doc(1, Point(2, np.zeros(2)))), Path("x")], "b": (Passage(id=1, text=""), Color.RED)}
    hash_value([value, cases.Keyed("key"), ValueError("a")], classes=classes)
    assert classes == {Plain, Doc, Point, Passage, Color}


def test_packages_are_not_imported_for_it() -> None:
    """A process that hashes values of the standard library loads none of the packages whose types are known."""
    code = """if True:
        import sys
        from hypernodes._signature.values import hash_value
        hash_value([{"a": (1.5, None)}, {"x"}])
        print(sorted({"numpy", "pandas", "polars", "torch", "scipy", "PIL", "pydantic"} & set(sys.modules)))
    """
    assert python(0, "-c", code).communicate(timeout=20)[0].strip() == "[]"


def test_the_hashes_of_this_release_are_kept() -> None:
    """A change of what is hashed, and how, needs another `ALGORITHM`, or entries of old would be met by chance."""
    value = {
        "text": "שלום",
        "n": [1, 2**70, -0.5, True, None],
        "s": {"b", "a"},
        "long": list(range(100)),
        "p": range(3),
    }
    assert hash_value(value).hex() == "e7e245fe2482cce344df85ecfeea06125a25bf7b2218f9978916769460e47c54"

"""strict_types=True: a producer whose annotation can't satisfy its consumer's is refused at construction."""

import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal, NewType, Optional, TypeVar, Union

import pytest

from hypernodes import Pipeline, node
from hypernodes.errors import DefinitionError, TypeMismatchError

pytest.importorskip("beartype")

T = TypeVar("T")
UserId = NewType("UserId", int)


class Animal:
    pass


class Dog(Animal):
    pass


def chain(produced: Any, wanted: Any) -> list:
    """Two nodes: one that returns ``produced``, one that takes ``wanted``; None leaves the annotation out."""

    def make(x):
        return x

    def use(value):
        return value

    if produced is not None:
        make.__annotations__["return"] = produced
    if wanted is not None:
        use.__annotations__["value"] = wanted
    return [node("value")(make), node("result")(use)]


FIT = [
    (int, int),
    (bool, int),
    (Dog, Animal),
    (int, object),
    (int, Any),
    (Any, int),
    (int, None),
    (None, int),
    (int, int | None),
    (int, Optional[int]),  # noqa: UP045 - the old spelling is still written
    (int, int | str),
    (int | str, Union[str, int, None]),  # noqa: UP007 - the old spelling is still written
    (list[int], list[int]),
    (list[int], list),
    (list[int], Sequence[int]),
    (list[Dog], Sequence[Animal]),
    (list[str], Iterable[str]),
    (tuple[int, str], tuple),
    (dict[str, int], Mapping[str, int]),
    (Literal["a"], str),
    (Literal["a"], Literal["a", "b"]),
    (Annotated[int, "metres"], int),
    (UserId, int),
    (type(None), int | None),
    (Callable[[int], str], Callable),
]

CLASH = [
    (int, str),
    (Animal, Dog),
    (int | None, int),
    (Optional[int], int),  # noqa: UP045 - the old spelling is still written
    (int | str, int),
    (type(None), int),
    (list[int], list[str]),
    (list[int], int),
    (int, list[int]),
    (Sequence[int], list[int]),
    (list[int | None], list[int]),
    (dict[str, int], Mapping[str, str]),
    (str, Literal["a"]),
    (Iterator[int], str),
]


class TestAnnotations:
    @pytest.mark.parametrize(("produced", "wanted"), FIT, ids=str)
    def test_fits(self, produced, wanted):
        """A producer whose type is at least as narrow is accepted, and so is one that says nothing."""
        pipeline = Pipeline(chain(produced, wanted), strict_types=True)
        assert pipeline.run(x=1, output_name="result") == 1

    @pytest.mark.parametrize(("produced", "wanted"), CLASH, ids=str)
    def test_clashes(self, produced, wanted):
        """A producer whose type is not good enough is refused, with both nodes, the name, and both types."""
        with pytest.raises(TypeMismatchError) as caught:
            Pipeline(chain(produced, wanted), strict_types=True)
        message = str(caught.value)
        for word in ("make", "use", "value", _word_of(produced), _word_of(wanted)):
            assert word in message

    @pytest.mark.parametrize(("produced", "wanted"), CLASH, ids=str)
    def test_off_by_default(self, produced, wanted):
        """Without strict_types annotations are documentation: nothing is checked."""
        assert Pipeline(chain(produced, wanted)).run(x=1, output_name="result") == 1

    def test_kind_of_error(self):
        """The error is caught as a DefinitionError, a TypeError or a ValueError."""
        for kind in (DefinitionError, TypeError, ValueError):
            with pytest.raises(kind):
                Pipeline(chain(int, str), strict_types=True)

    def test_values_are_not_checked(self):
        """Only annotations are compared: values at run time are the nodes' own business."""
        assert Pipeline(chain(int, int), strict_types=True).run(x="text", output_name="result") == "text"

    def test_order_of_nodes_does_not_matter(self):
        """A mismatch is found however the nodes are listed."""
        with pytest.raises(TypeMismatchError):
            Pipeline(reversed(chain(int, str)), strict_types=True)

    def test_second_consumer(self):
        """Every consumer is checked, not only the first."""
        make, use = chain(int, int)

        @node("other")
        def misuse(value: str):
            return value

        with pytest.raises(TypeMismatchError, match="misuse"):
            Pipeline([make, use, misuse], strict_types=True)

    def test_string_annotations(self):
        """Annotations written as strings, or under `from __future__ import annotations`, are resolved."""

        def make(x: "int") -> "list[Dog]":
            return x

        def use(value: "Sequence[Animal]"):
            return value

        def misuse(value: "Dog"):
            return value

        assert Pipeline([node("value")(make), node("r")(use)], strict_types=True).outputs == ("value", "r")
        with pytest.raises(TypeMismatchError, match="misuse"):
            Pipeline([node("value")(make), node("r")(misuse)], strict_types=True)

    def test_annotation_that_cannot_be_resolved(self):
        """An annotation that names nothing at run time, as under TYPE_CHECKING, does not spoil the others."""

        def use(value: "int", client: "NotImportedHere"):  # noqa: F821 - that is the point
            return value

        [make, _] = chain(int, None)
        [bad, _] = chain(str, None)
        assert Pipeline([make, node("r")(use)], strict_types=True).run(x=1, client=None)["r"] == 1
        with pytest.raises(TypeMismatchError):
            Pipeline([bad, node("r")(use)], strict_types=True)

    def test_type_variables(self):
        """A generic consumer accepts any producer."""

        def use(value: T) -> T:
            return value

        [make, _] = chain(int, int)
        assert Pipeline([make, node("r")(use)], strict_types=True).run(x=1)["r"] == 1


def _word_of(annotation: Any) -> str:
    """A word that every spelling of the annotation has."""
    return "None" if "None" in str(annotation) else getattr(annotation, "__name__", str(annotation))


class TestForms:
    def test_async_function(self):
        """An async function's annotation is what it gives when awaited."""

        @node("value")
        async def make(x) -> int:
            return x

        [_, use] = chain(int, int)
        [_, misuse] = chain(int, str)
        assert Pipeline([make, use], strict_types=True).run(x=1)["result"] == 1
        with pytest.raises(TypeMismatchError):
            Pipeline([make, misuse], strict_types=True)

    @pytest.mark.parametrize("annotation", [Iterator[int], Iterable[int], Generator[int, None, None]])
    def test_generator(self, annotation):
        """A generator of T makes a list of T."""

        def make(x):
            yield x

        make.__annotations__["return"] = annotation
        for wanted in (list[int], Sequence[int], list, None):
            [_, use] = chain(None, wanted)
            assert Pipeline([node("value")(make), use], strict_types=True).run(x=1)["result"] == [1]
        for unwanted in (int, list[str], annotation if annotation is Generator[int, None, None] else str):
            [_, misuse] = chain(None, unwanted)
            with pytest.raises(TypeMismatchError):
                Pipeline([node("value")(make), misuse], strict_types=True)

    def test_async_generator(self):
        """An async generator of T makes a list of T."""

        @node("value")
        async def make(x) -> AsyncIterator[int]:
            yield x

        [_, use] = chain(None, list[int])
        [_, misuse] = chain(None, list[str])
        assert Pipeline([make, use], strict_types=True).run(x=1)["result"] == [1]
        with pytest.raises(TypeMismatchError):
            Pipeline([make, misuse], strict_types=True)

    def test_tuple_outputs(self):
        """Each of several outputs has its own part of the tuple's annotation."""

        @node(("number", "text"))
        def make(x) -> tuple[int, str]:
            return x, str(x)

        @node("result")
        def use(number: int, text: str):
            return text * number

        @node("result")
        def misuse(number: int, text: int):
            return text * number

        assert Pipeline([make, use], strict_types=True).run(x=2)["result"] == "22"
        with pytest.raises(TypeMismatchError, match="text") as caught:
            Pipeline([make, misuse], strict_types=True)
        assert "'number'" not in str(caught.value)

    def test_uniform_tuple_outputs(self):
        """tuple[T, ...] gives T to every output."""

        @node(("a", "b"))
        def make(x) -> tuple[int, ...]:
            return x, x

        @node("result")
        def misuse(b: str):
            return b

        with pytest.raises(TypeMismatchError, match="misuse"):
            Pipeline([make, misuse], strict_types=True)

    def test_partial_and_methods(self):
        """Partials, bound methods and callable objects are checked by their functions' annotations."""

        class Maker:
            def make(self, x) -> int:
                return x

            def __call__(self, x) -> int:
                return x

        def make(x, k) -> int:
            return x + k

        [_, use] = chain(int, int)
        [_, misuse] = chain(int, str)
        for form in (Maker().make, Maker(), partial(make, k=0)):
            assert Pipeline([node("value")(form), use], strict_types=True).run(x=1)["result"] == 1
            with pytest.raises(TypeMismatchError):
                Pipeline([node("value")(form), misuse], strict_types=True)


class TestNested:
    def inner(self) -> Pipeline:
        @node("doubled")
        def double(number: int) -> int:
            return 2 * number

        return Pipeline([double], name="inner")

    def test_into_a_nested_pipeline(self):
        """What goes into a nested pipeline is checked against what its node wants, under its outer name."""
        make, _ = chain(int, int)
        bad, _ = chain(str, str)
        step = self.inner().as_node(input_mapping={"value": "number"})
        assert Pipeline([make, step], strict_types=True).run(x=1)["doubled"] == 2
        with pytest.raises(TypeMismatchError, match="value"):
            Pipeline([bad, step], strict_types=True)

    def test_out_of_a_nested_pipeline(self):
        """What comes out of a nested pipeline is checked against its consumer."""
        _, use = chain(int, int)
        _, misuse = chain(str, str)
        step = self.inner().as_node(output_mapping={"doubled": "value"})
        assert Pipeline([step, use], strict_types=True).run(number=1)["result"] == 2
        with pytest.raises(TypeMismatchError, match="use"):
            Pipeline([step, misuse], strict_types=True)

    def test_mapped(self):
        """A mapped input wants a list of what the node wants, and a mapped output is a list."""
        step = self.inner().as_node(
            input_mapping={"value": "number"}, output_mapping={"doubled": "all"}, map_over="value"
        )
        good, _ = chain(list[int], None)
        for produced in (int, list[str]):
            bad, _ = chain(produced, None)
            with pytest.raises(TypeMismatchError):
                Pipeline([bad, step], strict_types=True)

        @node("total")
        def total(all: list[int]) -> int:
            return sum(all)

        @node("total")
        def wrong(all: int) -> int:
            return all

        assert Pipeline([good, step, total], strict_types=True).run(x=[1, 2])["total"] == 6
        with pytest.raises(TypeMismatchError, match="wrong"):
            Pipeline([good, step, wrong], strict_types=True)

    @pytest.mark.parametrize("produced", [tuple[int, ...], Sequence[int], list[bool]])
    def test_mapped_over_any_sequence(self, produced):
        """A mapped input takes any sequence of what the node wants, as a map does when it runs."""
        step = self.inner().as_node(input_mapping={"value": "number"}, map_over="value")
        make, _ = chain(produced, None)
        assert Pipeline([make, step], strict_types=True).run(x=(1, 2))["doubled"] == [2, 4]

    def test_replace_is_checked(self):
        """A replaced node is checked as well."""
        make, use = chain(int, int)
        pipeline = Pipeline([make, use], strict_types=True)
        bad, _ = chain(str, None)
        with pytest.raises(TypeMismatchError):
            pipeline.replace(value=bad)


def test_without_beartype(monkeypatch):
    """Where the type library is not installed, strict_types says what to install."""
    for name in list(sys.modules):
        if name.split(".")[0] == "beartype":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "beartype", None)
    with pytest.raises(Exception, match=r"hypernodes\[types\]"):
        Pipeline(chain(int, int), strict_types=True)


def test_import_is_lazy():
    """Importing hypernodes and building a pipeline without strict_types does not import the type library."""
    script = (
        "import sys; from hypernodes import Pipeline, node; Pipeline([node('y')(lambda x: x)]).run(x=1);"
        "sys.exit('beartype' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0

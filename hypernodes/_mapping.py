"""Which rows a map has: pure, lazy, and checked before anything runs."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from hypernodes.errors import DefinitionError, MapInputError, MapTypeError, did_you_mean, quoted

MapMode = Literal["zip", "product"]
OnError = Literal["raise", "collect"]
Path = tuple[str | int, ...]


class ItemResult(NamedTuple):
    """One finished item of a stream: its position, and its outputs by name or its error."""

    index: int  # type: ignore[assignment]  # the promised name, not tuple.index
    outputs: dict[str, Any] | None
    error: BaseException | None = None


class ItemFailure(NamedTuple):
    """One failed item of a map: its position, where in the run it failed, the error, and its mapped inputs."""

    index: int  # type: ignore[assignment]  # the promised name, not tuple.index
    path: Path
    error: BaseException
    inputs: dict[str, Any]


class MapResult(dict[str, list[Any]]):
    """A list for each output, in input order; a failed position holds None and stands in ``failures``."""

    def __init__(self, outputs: Mapping[str, list[Any]], failures: Iterable[ItemFailure] = ()) -> None:
        super().__init__(outputs)
        self.failures: list[ItemFailure] = sorted(failures, key=lambda failure: failure.index)

    def __repr__(self) -> str:
        failed = f", {len(self.failures)} failed" if self.failures else ""
        return f"MapResult({super().__repr__()}{failed})"

    def __reduce__(self) -> tuple[Any, ...]:
        return MapResult, (dict(self), self.failures)


@dataclass(frozen=True, slots=True)
class MapSpec:
    """How a pipeline is mapped: over which of its inputs, how they combine, how many at once, what errors do."""

    over: tuple[str, ...]
    mode: MapMode = "zip"
    max_concurrency: int | None = None
    on_error: OnError = "raise"
    max_failures: int | None = None

    @classmethod
    def checked(
        cls,
        over: str | Iterable[str],
        known: Iterable[str],
        *,
        mode: MapMode,
        max_concurrency: int | None,
        on_error: OnError,
        max_failures: int | None = None,
        owner: str,
    ) -> MapSpec:
        """Check a map's options against the names that can be mapped."""
        known = tuple(known)
        names = (over,) if isinstance(over, str) else tuple(over) if isinstance(over, Iterable) else (over,)
        if not all(isinstance(name, str) for name in names):
            raise DefinitionError(f"map_over of {owner} is the name of an input, or a list of names, not {over!r}")
        if not names:
            raise DefinitionError(f"map_over of {owner} is empty: name at least one input; known here: {quoted(known)}")
        for name in names:
            if name not in known:
                raise DefinitionError(
                    f"map_over of {owner} names {name!r}, which is not an input{did_you_mean(name, known)}"
                )
        if len(set(names)) < len(names):
            raise DefinitionError(f"map_over of {owner} names an input twice: {quoted(names)}")
        _one_of(mode, ("zip", "product"), "map_mode", owner)
        _one_of(on_error, ("raise", "collect"), "on_error", owner)
        for option, value in (("max_concurrency", max_concurrency), ("max_failures", max_failures)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise DefinitionError(
                    f"{option} of {owner} must be a whole number of at least 1 or None, not {value!r}"
                )
        if max_failures is not None and on_error == "raise":
            raise DefinitionError(
                f'max_failures of {owner} needs on_error="collect": "raise" stops at the first failure'
            )
        return cls(names, mode, max_concurrency, on_error, max_failures)


def _one_of(value: str, choices: tuple[str, ...], option: str, owner: str) -> None:
    if value not in choices:
        raise DefinitionError(f"{option} of {owner} must be {' or '.join(map(repr, choices))}, not {value!r}")


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one map: tuples of values in the order of ``names``."""

    names: tuple[str, ...]
    rows: Iterable[tuple[Any, ...]]
    count: int

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return iter(self.rows)


def listed_rows(spec: MapSpec, inputs: Mapping[str, Any], where: str) -> Rows:
    """Return the rows of a map whose values are finite; iterators are read into lists.

    Raises:
        MapTypeError: a str, bytes, a dict, or something that is not iterable.
        MapInputError: unequal lengths, an async iterable, or an iterator where ``product`` needs a list.
    """
    columns = [_column(name, inputs[name], spec, where) for name in spec.over]
    if spec.mode == "product":
        count = 1
        for column in columns:
            count *= len(column)
        return Rows(spec.over, itertools.product(*columns), count)
    lengths = {name: len(column) for name, column in zip(spec.over, columns, strict=True)}
    if len(set(lengths.values())) > 1:
        listing = ", ".join(f"{name!r} has length {length}" for name, length in lengths.items())
        raise MapInputError(
            f"{where} maps lists of unequal length: {listing}; "
            f'make them equal, or use map_mode="product" for all combinations'
        )
    return Rows(spec.over, zip(*columns, strict=True), len(columns[0]))


def _column(name: str, value: Any, spec: MapSpec, where: str) -> Any:
    refuse_unmappable(name, value, where)
    if isinstance(value, AsyncIterable):
        advice = "use astream()" if spec.mode == "zip" else 'map_mode="product" needs a list'
        raise MapInputError(f"{where} maps {name!r} over an async iterable, which may be endless: {advice}")
    if isinstance(value, Sized) and not isinstance(value, Iterator):
        return value if isinstance(value, list | tuple | range) else list(value)  # type: ignore[call-overload]
    if spec.mode == "product":
        raise MapInputError(
            f'{where} maps {name!r} with map_mode="product", which goes over its values more than once: '
            f"{type(value).__name__} can be read only once; pass list(...)"
        )
    return list(value)


def refuse_unmappable(name: str, value: Any, where: str) -> None:
    """Raise MapTypeError for values that people pass by mistake where a list of items is meant."""
    if isinstance(value, str | bytes | bytearray | Mapping):
        kind = type(value).__name__
        advice = f"[{name}] for a single item" if isinstance(value, str | bytes | bytearray) else "list(d.values())"
        raise MapTypeError(f"{where} maps over {name!r}, so it takes a list of items, not a {kind}; pass {advice}")
    if not isinstance(value, Iterable | AsyncIterable) and not hasattr(type(value), "__getitem__"):
        raise MapTypeError(
            f"{where} maps over {name!r}, so it takes a list of items; {type(value).__name__} is not iterable"
        )

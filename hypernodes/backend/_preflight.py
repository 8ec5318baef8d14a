"""What would go wrong with a remote run, said before anything is paid for."""

from __future__ import annotations

import dis
import html
import io
import pickle
import socket
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import PurePosixPath
from types import CodeType, FunctionType, GeneratorType
from typing import TYPE_CHECKING, Any, NamedTuple

from hypernodes._plan import INHERIT, ExecutionPlan, PlanStep
from hypernodes.backend._image import NEEDED
from hypernodes.backend._message import PYTHON, Pickler
from hypernodes.backend._site import Site, distributions, is_local, normal, reached, spec_of
from hypernodes.backend._wire import find_unpicklable
from hypernodes.cache._disk import DiskCache
from hypernodes.errors import ExecutionError, RemoteExecutionError, SerializationError

if TYPE_CHECKING:
    from hypernodes.backend._base import Backend

LARGE_BYTES = 100_000_000
"""From here on a value is better read where it is needed than sent along with each run."""
_MOST_PARTS = 5
"""Parts of one input that are named."""


class Finding(NamedTuple):
    """One thing that is wrong: where, what, and what to do about it."""

    where: str
    """Its path, such as ``inputs['encoder']._lock``."""
    what: str
    do: str
    error: type[ExecutionError] = RemoteExecutionError
    """What a run would raise."""

    def __str__(self) -> str:
        return f"{self.where} {self.what}: {self.do}"


@dataclass(frozen=True, slots=True, repr=False)
class Preflight:
    """What ``check`` finds; prints as a list, in a notebook as a table."""

    name: str
    problems: tuple[Finding, ...]
    """What a run would fail of."""
    warnings: tuple[Finding, ...]
    """What a run would suffer from, or perhaps fail of."""
    unknown: tuple[str, ...]
    """What cannot be known from here."""
    sizes: Mapping[str, int]
    """Bytes of each input as it is sent; without those that cannot be."""
    code: int
    """Bytes of the pipeline itself."""

    @property
    def ok(self) -> bool:
        """Whether there is no problem; there may be warnings."""
        return not self.problems

    def raise_for_problems(self) -> None:
        """Raise an error with all the problems, if there are any.

        Raises:
            SerializationError: something cannot be pickled.
            RemoteExecutionError: the place lacks something.
        """
        if not self.problems:
            return
        listed = "".join(f"\n- {each}" for each in self.problems)
        raise self.problems[0].error(f"{self.name} cannot run on the other machine:{listed}")

    def _rows(self) -> Iterator[tuple[str, str, str, str]]:
        for label, findings in (("problem", self.problems), ("warning", self.warnings)):
            yield from ((label, each.where, each.what, each.do) for each in findings)
        yield from (("not known", each, "", "") for each in self.unknown)
        for name, size in sorted(self.sizes.items(), key=lambda item: -item[1]):
            yield "sends", f"inputs[{name!r}]", _bytes(size), ""
        yield "sends", "the pipeline", _bytes(self.code), ""

    def _summary(self) -> str:
        total = _bytes(sum(self.sizes.values()) + self.code)
        said = f"{_count(len(self.problems), 'problem')}, {_count(len(self.warnings), 'warning')}, {total} to send"
        return f"{self.name}: {said}"

    def __str__(self) -> str:
        lines = [self._summary()]
        for label, where, what, do in self._rows():
            said = " ".join(part for part in (where, what) if part)
            lines.append(f"  {label:<9}  {said}{f': {do}' if do else ''}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        """Return the list: it is read more often than it is computed with."""
        return str(self)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        body = "".join(
            "<tr>" + "".join(f"<td style='text-align:left'>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self._rows()
        )
        table = f"<div>{html.escape(self._summary())}</div><table><tbody>{body}</tbody></table>"
        return {"text/plain": str(self), "text/html": table}


def preflight(plan: ExecutionPlan, inputs: Mapping[str, Any], place: Backend, site: Site | None) -> Preflight:
    """Look at all that a run would send. It pickles everything, and keeps nothing of it.

    Args:
        plan: what would be run.
        inputs: with what; of a map, its lists are looked at as they are.
        place: where.
        site: what is known of that; None for nothing.
    """
    known = site or Site()
    problems: list[Finding] = []
    sizes, modules = _inputs(inputs, place, problems)
    code, named = _pipeline(plan, place, problems)
    modules |= named | _imported(plan)
    advice = 'image.add_local_python_source("{}")' if site else "install {} there"
    found = [*_python(known), *_local(modules, known, advice), *_packages(modules, known)]
    warnings = [*_large(sizes, bool(site)), *(finding for certain, finding in found if not certain)]
    return Preflight(
        name=plan.label,
        problems=(*problems, *(finding for certain, finding in found if certain)),
        warnings=(*warnings, *(_caches(plan, known) if site else ())),
        unknown=tuple(_unknown(known)),
        sizes=sizes,
        code=code,
    )


# ---- what is sent


def _inputs(inputs: Mapping[str, Any], place: Backend, problems: list[Finding]) -> tuple[dict[str, int], set[str]]:
    """Return the bytes of each input, and the modules that all of them name."""
    weighed = {name: _weighed(value, f"inputs[{name!r}]", place, problems) for name, value in inputs.items()}
    there = {name: each for name, each in weighed.items() if each is not None}
    return {name: each.size for name, each in there.items()}, {name for each in there.values() for name in each.modules}


def _pipeline(plan: ExecutionPlan, place: Backend, problems: list[Finding]) -> tuple[int, set[str]]:
    """Return the bytes of a plan, and the modules that it names."""
    before = len(problems)
    parts = [_weighed(part, name, place, problems) for name, part in _code(plan).items()]
    if len(problems) == before:
        parts = [_weighed(plan, plan.label, place, problems)]  # with its settings
    there = [each for each in parts if each is not None]
    return sum(each.size for each in there), {name for each in there for name in each.modules}


def _large(sizes: Mapping[str, int], volumes: bool) -> Iterator[Finding]:
    do = "put it on a modal.Volume, and send the path" if volumes else "leave it there, and send its name"
    for name, size in sizes.items():
        if size > LARGE_BYTES:
            yield Finding(f"inputs[{name!r}]", f"is {_bytes(size)}, sent with each run", do)


class _Scale:
    """A file that keeps nothing of what is written to it but the size."""

    def __init__(self) -> None:
        self.size = 0

    def write(self, data: Any) -> int:
        """Count it."""
        size = memoryview(data).nbytes
        self.size += size
        return size


class _Weighed(NamedTuple):
    size: int
    modules: set[str]


def _weighed(value: Any, where: str, place: Backend, problems: list[Finding]) -> _Weighed | None:
    """Return how many bytes a value is when it is sent, and the modules that it is read with; or note what is wrong."""
    scale, buffers = _Scale(), list[pickle.PickleBuffer]()
    pickler = Pickler(scale, buffers, place)
    try:
        pickler.dump(value)
    except SerializationError as error:  # ours, and whole
        problems.append(Finding(where, "cannot be sent", str(error), SerializationError))
    except Exception as error:  # noqa: BLE001 - pickling runs the user's code
        problems += _unpicklable(value, where, error)
    else:
        return _Weighed(scale.size + sum(each.raw().nbytes for each in buffers), pickler.modules)
    return None


def _unpicklable(value: Any, where: str, error: Exception) -> list[Finding]:
    """Return what in a value cannot be pickled: of each item, if it is a list or a dict."""
    items = [(where, value)]
    if isinstance(value, dict):
        items = [(f"{where}[{key!r}]", each) for key, each in value.items()]
    elif isinstance(value, list | tuple):
        items = [(f"{where}[{position}]", each) for position, each in enumerate(value)]
    found = [found for name, each in items if (found := find_unpicklable(each, name)) is not None]
    findings = [
        Finding(
            path,
            f"is a {type(culprit).__name__}, which cannot be pickled ({reason})",
            _advice(culprit),
            SerializationError,
        )
        for path, culprit, reason in (found or [(where, value, error)])[:_MOST_PARTS]
    ]
    if len(found) > _MOST_PARTS:
        more = f"has {len(found) - _MOST_PARTS:,} more items that cannot be pickled"
        findings.append(Finding(where, more, "most likely for the same reason", SerializationError))
    return findings


_LOCKS = tuple(type(make()) for make in (threading.Lock, threading.RLock))
_OPEN = (socket.socket, io.IOBase)


def _advice(culprit: Any) -> str:
    if isinstance(culprit, _LOCKS):
        return "leave it out in __getstate__, and make it anew in __setstate__"
    if isinstance(culprit, _OPEN) or type(culprit).__module__.partition(".")[0] in ("ssl", "_ssl", "sqlite3"):
        return "send the path or the address, and open it inside the node"
    if isinstance(culprit, GeneratorType):
        return "send a list"
    return "make it inside the node, or give its class __getstate__/__reduce__"


def _code(plan: ExecutionPlan) -> dict[str, Any]:
    """Return what a plan is made of by name: functions and bound values, also of the plans inside."""
    named: dict[str, Any] = {f"bind({name}=...)": value for name, value in plan.constants.items()}
    for step in plan.steps:
        if isinstance(step, PlanStep):
            named |= {f"{step.name} / {name}": part for name, part in _code(step.plan).items()}
        else:
            named[step.name] = step.node
    return named


# ---- what it needs there


def _unknown(site: Site) -> Iterator[str]:
    if site.python is None:
        yield f"which Python runs there: it has to be {PYTHON}, as here"
    if not site.complete:
        yield "which modules and packages are installed there"


def _python(site: Site) -> Iterator[tuple[bool, Finding]]:
    """Yield what is wrong with Python there, of which a run fails."""
    if site.python not in (None, PYTHON):
        do = f'functions can be sent between equal versions only: debian_slim(python_version="{PYTHON}")'
        yield True, Finding("the image", f"has Python {site.python}, and this is Python {PYTHON}", do)


def _imported(plan: ExecutionPlan) -> set[str]:
    """Return the modules that the functions of a plan import when they are called."""
    found: set[str] = set()
    left = [getattr(part, "func", None) for part in _code(plan).values()]
    codes = [each.__code__ for each in left if isinstance(each, FunctionType)]
    while codes:
        code = codes.pop()
        found |= {each.argval for each in dis.get_instructions(code) if each.opname == "IMPORT_NAME"}
        codes += [each for each in code.co_consts if isinstance(each, CodeType)]
    return found


def _local(modules: Iterable[str], site: Site, advice: str) -> Iterator[tuple[bool, Finding]]:
    """Yield the project's own modules that are not there, and whether that is certain; also those that they use."""
    found = {module.partition(".")[0]: site.lacks(module) for module in reached(modules)}
    for top, lacking in sorted(found.items()):
        if lacking or (top not in site.modules and is_local(top)):
            what = "is a module of this project, and not in the image"
            perhaps = "is a module of this project, and perhaps not there"
            yield lacking, Finding(repr(top), what if lacking else perhaps, advice.format(top))


def _packages(modules: Iterable[str], site: Site) -> Iterator[tuple[bool, Finding]]:
    """Yield what is wrong with installed packages, and whether a run fails of it."""
    tops = {module.partition(".")[0] for module in modules if not is_local(module)} - {"hypernodes"}
    names = {name for top in tops for name in distributions(top)} | set(NEEDED)
    for name in sorted(names):
        try:
            here = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
        _, exact, there = site.packages.get(normal(name), "").partition("==")
        if exact and there.partition("+")[0] != here:
            do = "what is pickled by one may not be read by the other: take the same"
            yield False, Finding(name, f"is {there} in the image, and {here} here", do)
        elif site.complete and not site.installs(name):
            yield True, Finding(name, "is not among what the image installs", f'image.pip_install("{name}=={here}")')
    if site.exact:
        for top in sorted(tops - sys.stdlib_module_names - site.modules):
            if top and not distributions(top) and spec_of(top) is None:
                what = "is imported by a node, and neither installed here nor, as far as can be seen, in the image"
                yield False, Finding(repr(top), what, f'image.pip_install("{top}"), or what its package is called')


# ---- what it keeps


def _caches(plan: ExecutionPlan, site: Site) -> Iterator[Finding]:
    """Yield caches that do not work there."""
    cache = plan.settings.cache
    where = f"the cache of {plan.label}"
    if isinstance(cache, DiskCache):
        if not any(PurePosixPath(cache.path).is_relative_to(each) for each in site.volumes):
            do = "what it keeps is gone with the container; mount a modal.Volume there"
            yield Finding(where, f"is at {cache.path}, on none of the volumes", do)
        if cache.key is not None and not site.secrets:
            do = "give the container a modal.Secret with HYPERNODES_CACHE_KEY"
            yield Finding(where, "is signed, and its key is not sent along", do)
    elif cache is not INHERIT and cache is not None and not getattr(cache, "travels", False):
        do = "nothing is cached there; use a DiskCache on a modal.Volume"
        yield Finding(where, f"is a {type(cache).__name__}, which stays here", do)
    for step in plan.steps:
        if isinstance(step, PlanStep):
            yield from _caches(step.plan, site)


def _bytes(size: int) -> str:
    for unit, each in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= each:
            return f"{size / each:.3g} {unit}"
    return f"{size} B"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"

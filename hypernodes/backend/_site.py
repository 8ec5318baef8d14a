"""What is known of the containers that a run will get, before there are any: read from the image's own definition.

Modal builds images on its servers, so nobody here can look into one. Its client keeps how each layer is to be built,
which tells most of it: the base, what pip installs, the sources that are added. What cannot be read, such as an image
from a registry, is not known, and is never taken to be missing.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shlex
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

from hypernodes._signature.origin import foreign_parts
from hypernodes.backend._image import NEEDED
from hypernodes.errors import RemoteExecutionError

_BUILDER = "2025.06"
_ROOT = PurePosixPath("/root")
_PYTHON = re.compile(r"FROM python:(\d+\.\d+)")
_REQUIREMENT = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)\s*(\[[^\]]*\])?\s*(.*)")
_TOOLS = {"pip", "setuptools", "uv", "wheel"}
_INSTALLED = {"site-packages", "dist-packages"}
_INSTALL = re.compile(r"RUN (?:python -m pip|pip|/\.uv/uv pip) install (.*)")
_FILE_OPTIONS = {"-r", "--requirement", "--requirements"}
_VALUE_OPTIONS = {"-f", "-i", "--find-links", "--index-url", "--extra-index-url", "--prerelease", "--python"}
_HARMLESS = re.compile(
    r"FROM base$|RUN apt-get |RUN echo 'debconf|RUN rm /|CMD |WORKDIR |ENV (?!.*PYTHONPATH)|COPY /\.|"
    r"COPY --from=ghcr\.io/astral-sh/uv|COPY \. /|COPY /modal_requirements"
)
"""Lines of a Dockerfile that add no module."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What a run finds where it goes."""

    python: str | None = None
    """Such as ``"3.12"``; None if it is not known."""
    packages: Mapping[str, str] = field(default_factory=dict)
    """What pip installs, by normalised name, with extras and versions as asked for, such as ``"[torch]==2.0"``."""
    modules: frozenset[str] = frozenset()
    """Names at the top of the sources that are added from this machine."""
    complete: bool = False
    """Whether all that puts modules there is known."""
    volumes: tuple[str, ...] = ()
    """Where volumes are mounted."""
    secrets: bool = False
    """Whether it is given any."""

    def lacks(self, module: str) -> bool:
        """Say whether a module of this project is certainly not there."""
        return module.partition(".")[0] not in self.modules and is_local(module) and self.exact

    @property
    def exact(self) -> bool:
        """Whether it is known which modules there are; not where a package is installed that is not known here."""
        return self.complete and not any(_may_bring_anything(name) for name in self.packages)

    def require(self, modules: Iterable[str]) -> None:
        """Raise an error for the modules among these that are certainly not there.

        Raises:
            RemoteExecutionError: there are some; it says how to add them.
        """
        tops = sorted({module.partition(".")[0] for module in modules if self.lacks(module)})
        if tops:
            named = ", ".join(map(repr, tops))
            raise RemoteExecutionError(
                f"the image has no module {named}, which the pipeline needs and which is in this project: "
                f"image.add_local_python_source({named})"
            )

    def installs(self, distribution: str) -> bool:
        """Say whether a distribution is there: by itself, as another one needs it, or as Modal's client does."""
        name = normal(distribution)
        if name in _needed_by(frozenset(self.packages.items())):
            return True
        return name not in NEEDED and name in _needed_by(frozenset({("modal", "")}))


def is_local(module: str) -> bool:
    """Say whether a module is the project's own: not of Python, not of hypernodes, and not installed from elsewhere."""
    top = module.partition(".")[0]
    return top not in ("__main__", "__mp_main__", "hypernodes", "") and foreign_parts(module) is None and _is_there(top)


def _is_there(top: str) -> bool:
    """Say whether a module lies here, in no folder that packages are installed into."""
    spec = spec_of(top)
    if spec is None:
        return False
    place = spec.origin if spec.has_location else next(iter(spec.submodule_search_locations or []), None)
    return place is not None and _INSTALLED.isdisjoint(Path(place).parts)


def spec_of(top: str) -> ModuleSpec | None:
    """Return where a top-level module is found here; None for nowhere."""
    try:
        return importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None


@functools.lru_cache(maxsize=256)
def _may_bring_anything(distribution: str) -> bool:
    """Say whether nobody can tell from here which modules a distribution has: it is not installed here, or in place."""
    if distribution == "hypernodes":
        return False
    try:
        return '"editable"' in (metadata.distribution(distribution).read_text("direct_url.json") or "")
    except metadata.PackageNotFoundError:
        return True


def normal(name: str) -> str:
    """Return the name of a distribution as registries write it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def distributions(top: str) -> list[str]:
    """Return the distributions here that a top-level module is from."""
    return sorted(set(_providers().get(top, [])))


@functools.cache
def _providers() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()


@functools.lru_cache(maxsize=64)
def _needed_by(asked: frozenset[tuple[str, str]]) -> frozenset[str]:
    """Return these distributions and all that they need, as far as they are installed here.

    Of one that is asked for with an extra, such as ``"[torch]"``, all extras count.
    """
    found: set[str] = set()
    left = list(asked)
    while left:
        name, said = left.pop()
        if name not in found:
            found.add(name)
            needed = _requirements(name)
            matches = [_REQUIREMENT.match(each) for each in needed if said.startswith("[") or "extra ==" not in each]
            left += [(normal(match[1]), match[2] or "") for match in matches if match]
    return frozenset(found)


def _requirements(distribution: str) -> Collection[str]:
    if distribution == "hypernodes":  # a checkout need not be installed
        return NEEDED
    try:
        return metadata.requires(distribution) or ()
    except metadata.PackageNotFoundError:
        return ()


def site_of(image: Any, volumes: Collection[str], secrets: bool) -> Site:
    """Return what is known of containers with an image.

    Args:
        image: a ``modal.Image``; None where it is not known, as that of a deployed app.
        volumes: where volumes are mounted.
        secrets: whether there are any.
    """
    reading = _Reading()
    try:
        reading.read(image)
    except Exception:  # noqa: BLE001 - another version of the client keeps its layers in another way
        reading.complete = False
    # A volume may bring modules along.
    hidden = any(PurePosixPath(path).is_relative_to(_ROOT) for path in volumes)
    return Site(
        python=reading.python,
        packages=dict(reading.packages),
        modules=frozenset(reading.modules),
        complete=reading.complete and not hidden,
        volumes=tuple(volumes),
        secrets=secrets,
    )


class _Reading:
    """The layers of an image, read one by one; the names are those of Modal's client 1.6."""

    def __init__(self) -> None:
        self.python: str | None = None
        self.packages: dict[str, str] = {}
        self.modules: set[str] = set()
        self.complete = True

    def read(self, image: Any) -> None:
        """Read an image, or nothing where there is none."""
        inner = next((each for each in getattr(image, "__dict__", {}).values() if hasattr(each, "_deps")), None)
        if inner is None:
            self.complete = False
            return
        self._layer(inner)

    def _layer(self, layer: Any) -> None:
        """Read a layer after those that it stands on."""
        dependencies = list(layer._deps()) if layer._deps else []
        for each in dependencies:
            if hasattr(each, "_added_python_source_set"):
                self._layer(each)
            elif hasattr(each, "_entries"):
                self._mount(each)
        self.modules |= {name.partition(".")[0] for name in layer._added_python_source_set}
        names = _enclosed(layer._load)
        write = names.get("dockerfile_function")
        if write is not None:
            written = write(_BUILDER)
            for line in written.commands:
                self._line(line, written.context_files)
            if any(line.startswith("COPY . ") for line in written.commands):
                self._mount(names["context_mount_function"](_BUILDER))
            self.complete &= names.get("build_function") is None
        elif "mount" not in names:
            self.python = names.get("add_python") or self.python
            self.complete = False

    def _line(self, line: str, files: Mapping[str, str]) -> None:
        if match := _PYTHON.match(line):
            self.python = match[1]
        elif match := _INSTALL.match(line):
            self._install(re.sub(r"\$\([^)]*\)", "_", match[1]), files)
        elif not _HARMLESS.match(line):
            self.complete = False

    def _install(self, arguments: str, files: Mapping[str, str]) -> None:
        words = iter(shlex.split(arguments))
        for word in words:
            if word in _FILE_OPTIONS:
                self._requirements(next(words, ""), files)
            elif word in _VALUE_OPTIONS:
                next(words, None)
            elif not word.startswith("-"):
                self._requirement(word)

    def _requirements(self, path: str, files: Mapping[str, str]) -> None:
        """Read a file of requirements, which lies here under another name than in the image."""
        name = PurePosixPath(path).name
        here = next((here for there, here in files.items() if PurePosixPath(there).name.endswith(name)), None)
        if here is None:
            self.complete = False
            return
        for line in Path(here).read_text().splitlines():
            said = line.partition(" #")[0].partition(";")[0].strip()
            if said.startswith("-"):
                self.complete = False
            elif said and not said.startswith("#"):
                self._requirement(said)

    def _requirement(self, said: str) -> None:
        match = _REQUIREMENT.fullmatch(said)
        if match is None or "@" in match[3] or "/" in said:
            self.complete = False  # from a repository or a folder: it may hold any module
        elif normal(match[1]) not in _TOOLS:
            self.packages[normal(match[1])] = (match[2] or "") + match[3].replace(" ", "")

    def _mount(self, mount: Any) -> None:
        """Note the modules that files from this machine are, below the folder where Python looks for them."""
        for entry in mount._entries:
            if (name := getattr(entry, "module_name", None)) is not None:
                self.modules.add(name.partition(".")[0])
                continue
            target = PurePosixPath("/", entry.remote_path)
            if target == _ROOT:
                self.modules |= {each.stem for each in Path(entry.local_dir).iterdir()}
            elif target.is_relative_to(_ROOT):
                self.modules.add(PurePosixPath(target.relative_to(_ROOT).parts[0]).stem)


def _enclosed(function: Any) -> dict[str, Any]:
    """Return the variables around a function by name."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: cell.cell_contents for name, cell in cells}


def reached(modules: Iterable[str]) -> Iterator[str]:
    """Yield the project's modules among these, and those that they refer to in turn."""
    seen: set[str] = set()
    left = sorted(set(modules))
    while left:
        name = left.pop()
        if name in seen or not is_local(name):
            continue
        seen.add(name)
        yield name
        for value in list(vars(sys.modules[name]).values()) if name in sys.modules else ():
            found = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            if isinstance(found, str) and found not in seen:
                left.append(found)

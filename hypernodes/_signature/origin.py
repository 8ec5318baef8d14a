"""Whose code it is: the project's own, which is read, or somebody else's, which counts by its version."""

from __future__ import annotations

import builtins
import contextlib
import functools
import hashlib
import importlib.util
import os
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from importlib.metadata import Distribution

Parts: TypeAlias = Mapping[str, bytes]

_NOTHING: Parts = MappingProxyType({})
_STANDARD_LIBRARY = os.path.join(os.path.dirname(os.path.realpath(os.__file__)), "")
_INSTALLED = ("site-packages", "dist-packages")
_HEAP_TYPE = 1 << 9  # of CPython's type flags: it was made while Python ran
_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


def foreign_parts(module: str) -> Parts | None:
    """Return what stands for the code of a module; None when it is project code, which is followed.

    Third-party code counts by its distribution's version, the standard library by Python's minor version, a compiled
    extension module of the project by its file, and what is built into Python not at all. Code installed in editable
    mode is project code. What `pip install --target` put into any other folder is third-party code.
    """
    top = module.partition(".")[0]
    if top == "hypernodes" and module.partition(".")[2].partition(".")[0] != "demo":
        return _named(f"package 'hypernodes' {sys.modules['hypernodes'].__version__}")
    if module in ("builtins", ""):
        return _NOTHING
    if module in ("__main__", "__mp_main__"):  # whatever file started the process, such as that of a test runner
        return None
    loaded = sys.modules.get(module)
    if loaded is not None:
        return _parts_of(top, getattr(loaded, "__file__", None) or _folder(loaded))
    try:
        spec = importlib.util.find_spec(top) if top not in sys.modules else sys.modules[top].__spec__
    except (ImportError, ValueError):
        return None
    if spec is None:  # made by hand, or not there
        return None
    return _parts_of(top, spec.origin if spec.has_location else next(iter(spec.submodule_search_locations or []), None))


def foreign_class(cls: type) -> Parts | None:
    """Return what stands for the code of a class; None when it is project code.

    One that `exec` made in a namespace without a name says that it is in `builtins`.
    """
    if (
        (module := class_module(cls)) == "builtins"
        and cls.__flags__ & _HEAP_TYPE
        and vars(builtins).get(cls.__name__) is not cls
    ):
        return None
    return foreign_parts(module)


def _folder(module: object) -> str | None:
    """Return a folder of a package without an `__init__.py`."""
    return next(iter(getattr(module, "__path__", [])), None)


@functools.lru_cache(maxsize=4096)
def _parts_of(top: str, file: str | None) -> Parts | None:
    if file is None:
        return _named(f"Python {_VERSION}") if top in sys.stdlib_module_names else None
    path = os.path.realpath(file)
    installed = not set(_INSTALLED).isdisjoint(path.split(os.sep))
    if not installed and path.startswith(_STANDARD_LIBRARY):
        return _named(f"Python {_VERSION}")
    if found := _distributions(top) if installed else _beside(top, os.path.abspath(file)):
        return _named(*(f"package {name!r} {version}" for name, version in found))
    if path.endswith((".so", ".pyd", ".dylib")):
        with open(path, "rb") as opened:
            return {f"extension module {top!r}": hashlib.file_digest(opened, "sha256").digest()}
    return None


def _named(*names: str) -> Parts:
    return MappingProxyType({name: hashlib.sha256(name.encode()).digest() for name in names})


def _distributions(top: str) -> list[tuple[str, str]]:
    """Return the names and versions of the distributions that a top-level module comes from."""
    from importlib import metadata

    try:
        # Most are named as their module is; to read what all of them provide takes a hundred times longer.
        likely = metadata.distribution(top)
        if f"\n{top}/" in "\n" + (likely.read_text("RECORD") or ""):
            return [_name_and_version(likely)]
    except metadata.PackageNotFoundError:
        pass
    return [_name_and_version(metadata.distribution(name)) for name in sorted(set(_providers().get(top, [])))]


def _beside(top: str, file: str) -> list[tuple[str, str]]:
    """Return the distributions that a module outside of `site-packages` was installed from, if it was installed."""
    found: dict[str, str] = {}
    while (folder := os.path.dirname(file)) != file:
        if os.path.basename(file).partition(".")[0] == top:
            found.update(_installed_in(folder).get(top, {}))
        file = folder
    return sorted(found.items())


@functools.lru_cache(maxsize=256)
def _installed_in(folder: str) -> Mapping[str, Mapping[str, str]]:
    """Return the distributions that say they have installed top-level modules into a folder, with their versions.

    A `*.dist-info` lists its files, but for those of a project in editable mode; `*.egg-info` is made by building.
    """
    found: dict[str, dict[str, str]] = {}
    with contextlib.suppress(OSError):
        for entry in sorted(os.listdir(folder)):
            if entry.endswith(".dist-info"):
                from importlib import metadata  # it takes longer than most fingerprints, and few folders have any

                distribution = metadata.Distribution.at(os.path.join(folder, entry))
                listed = distribution.read_text("RECORD") or distribution.read_text("top_level.txt") or ""
                for top in {line.partition(",")[0].partition("/")[0].partition(".")[0] for line in listed.splitlines()}:
                    found.setdefault(top, {}).update([_name_and_version(distribution)])
    return found


def _name_and_version(distribution: Distribution) -> tuple[str, str]:
    """Return what the first lines of its metadata say; the parser of the standard library reads all of them."""
    text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
    fields = dict(line.split(": ", 1) for line in text.split("\n\n", 1)[0].splitlines() if ": " in line)
    return fields.get("Name", "?"), fields.get("Version", "?")


@functools.cache
def _providers() -> Mapping[str, list[str]]:
    from importlib import metadata

    return metadata.packages_distributions()


def module_name(names: Mapping[str, object]) -> str:
    """Return a module's name from its globals, by which it can be imported also where it is the script that runs."""
    name = names.get("__name__")
    if name not in ("__main__", "__mp_main__"):
        return name if isinstance(name, str) else "?"
    spec = names.get("__spec__")
    if spec is not None and isinstance(found := getattr(spec, "name", None), str):
        return found.removesuffix(".__main__")
    file = names.get("__file__")
    return os.path.splitext(os.path.basename(file))[0] if isinstance(file, str) else "__main__"


def class_module(cls: type) -> str:
    """Return the module of a class; empty where its metaclass, or a compiled class, has something else there."""
    found = type.__dict__["__module__"].__get__(cls)
    return found if isinstance(found, str) else ""

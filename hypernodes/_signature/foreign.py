"""Somebody else's code counts by its version; here is what it holds of the project's, which counts by itself."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

from hypernodes._node import Node
from hypernodes._signature.code import code_of
from hypernodes._signature.origin import foreign_class, foreign_parts
from hypernodes._signature.scope import cells_of, content_of
from hypernodes._signature.stream import SCALARS

_EXTENSIONS = (".so", ".pyd", ".dylib")
_ITEMS = (list, tuple, set, frozenset)


def is_foreign(func: FunctionType) -> bool:
    """Say whether a function is somebody else's. What `exec` made without a module's name is not."""
    module = func.__globals__.get("__name__") or func.__module__ or ""
    return module not in ("", "builtins", "__main__", "__mp_main__") and foreign_parts(module) is not None


def held_in_closure(func: FunctionType) -> Iterator[tuple[str, Any, Any]]:
    """Yield what somebody else's function was made with, by name, with its cell: code of the project and scalars.

    Such are a decorator's function and its options, without what the function itself rebinds.
    """
    contents = {name: (cell, content_of(cell)) for name, cell in sorted(cells_of(func).items())}
    if not any(holds_project_code(value) for _, value in contents.values()):
        return
    rebound = code_of(func).uses.outer.rebound
    for name, (cell, value) in contents.items():
        if name not in rebound and (type(value) in SCALARS or holds_project_code(value)):
            yield name, cell, value


def held_in_object(value: Any) -> list[tuple[str, Any]]:
    """Return code of the project that an object of somebody else's class holds in attributes, by their names."""
    attributes = getattr(value, "__dict__", None)
    items = sorted(attributes.items()) if isinstance(attributes, dict) else []
    return [(name, each) for name, each in items if holds_project_code(each)]


def held_by_compiled(value: Any) -> list[Any]:
    """Return code of the project that a compiled function was made around, as `numpy.frompyfunc` does."""
    return [each for each in gc.get_referents(value) if holds_project_code(each)]


def home_of(value: Any, name: str) -> str:
    """Return the module that has a compiled function under its own name; empty when none has.

    Where it does not say which (a ufunc of scipy says numpy), extension modules are looked into: others may have
    imported it from there.
    """
    said = getattr(value, "__module__", None) or type(value).__module__
    if _has(sys.modules.get(said), name, value):
        return str(said)
    loaded = [each for each in list(sys.modules.values()) if _has(each, name, value)]
    return min(
        (each.__name__ for each in loaded if str(getattr(each, "__file__", "")).endswith(_EXTENSIONS)), default=""
    )


def _has(module: Any, name: str, value: Any) -> bool:
    found = module if isinstance(module, ModuleType) else None
    for each in name.split("."):
        found = getattr(found, "__dict__", {}).get(each)
    return found is value


def holds_project_code(value: Any, within: tuple[int, ...] = ()) -> bool:
    """Say whether a value is code of the project, or somebody else's around it, or a container of these."""
    if type(value) in SCALARS or id(value) in within:
        return False
    within = (*within, id(value))
    match value:
        case Node():
            return True
        case staticmethod() | classmethod():
            return holds_project_code(value.__func__, within)
        case FunctionType():
            if not is_foreign(value):
                return True
            inner = [value.__dict__.get("__wrapped__"), *map(content_of, value.__closure__ or ())]
            return any(holds_project_code(each, within) for each in inner)
        case type():
            return foreign_class(value) is None
        case functools.partial():
            return any(holds_project_code(each, within) for each in (value.func, value.args, value.keywords))
        case MethodType():
            return any(holds_project_code(each, within) for each in (value.__func__, value.__self__))
    if type(value) is dict:
        return any(holds_project_code(each, within) for each in value.values())
    if type(value) in _ITEMS:
        return any(holds_project_code(each, within) for each in value)
    if not callable(value):
        return False
    if foreign_class(type(value)) is None:
        return True
    attributes = getattr(value, "__dict__", None)
    return isinstance(attributes, dict) and holds_project_code(attributes, within)

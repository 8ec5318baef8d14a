"""What the names in a function stand for, as far as that can be told without running it."""

from __future__ import annotations

import builtins
import importlib.util
import sys
from collections.abc import Mapping
from types import CellType, FunctionType, ModuleType
from typing import Any

from hypernodes._signature.captured import Chain, Import
from hypernodes._signature.code import code_of
from hypernodes._signature.members import ABSENT, member
from hypernodes._signature.origin import foreign_parts


def cells_of(func: FunctionType) -> dict[str, CellType]:
    return dict(zip(func.__code__.co_freevars, func.__closure__ or (), strict=True))


def content_of(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing has been assigned yet
        return ABSENT


def resolve(func: FunctionType, chain: Chain) -> Any:
    """Return what a chain of names stands for, without running anything; `ABSENT` if that cannot be told."""
    cells = cells_of(func)
    imports = [each for each in code_of(func).uses.imports if each.name == chain[0]]
    if imports:
        loaded = import_for(func, imports[0])
        value = member(loaded, imports[0].attribute) if imports[0].attribute else loaded
    elif chain[0] in cells:
        value = content_of(cells[chain[0]])
    else:
        value = func.__globals__.get(chain[0], ABSENT)
    for name in chain[1:]:
        value = member(value, name)
    return value


def import_for(func: FunctionType, what: Import) -> ModuleType | None:
    """Import a module of the project, as the function is about to do."""
    module = module_of(func, what)
    if not module or foreign_parts(module) is not None:
        return None
    try:
        loaded = importlib.import_module(module)
        if what.attribute and what.attribute not in vars(loaded):
            importlib.import_module(f"{module}.{what.attribute}")
    except Exception:  # noqa: BLE001 - importing runs the user's own code; the function may expect it to fail
        return None
    return loaded


def builtins_of(names: dict[str, Any]) -> Mapping[str, Any]:
    found = names.get("__builtins__", builtins)
    return vars(found) if isinstance(found, ModuleType) else found


def asked_for(names: dict[str, Any], name: str) -> Any:
    """Return what a module makes when it is asked for it: by its `__getattr__`, or by importing a submodule."""
    module = sys.modules.get(names.get("__name__", ""))
    try:
        return getattr(module, name, ABSENT) if module is not None and vars(module) is names else ABSENT
    except Exception:  # noqa: BLE001 - a module's `__getattr__` is the user's own code
        return ABSENT


def module_of(func: FunctionType, what: Import) -> str:
    if not what.level:
        return what.module
    package = func.__globals__.get("__package__") or func.__globals__.get("__name__", "").rpartition(".")[0]
    try:
        return importlib.util.resolve_name("." * what.level + what.module, package)
    except ImportError:
        return ""

"""The shape of the package, from its sources: imports go downward, deciding is pure, modules stay small."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import hypernodes

PACKAGE = Path(hypernodes.__file__).parent

# From the ground up. A module imports from rooms below its own; modules named in one line are one room, and
# may import each other. A package in the list stands for all its modules.
ROOMS = [
    ["_version", "errors"],
    ["_retry"],
    ["_node"],
    ["_mapping"],
    ["events", "_cost"],
    ["_signature"],
    ["_plan"],
    ["_program"],
    ["_explanation", "_frontier", "_strict", "_table"],
    ["_callbacks"],
    ["_context", "_crew", "_feed", "_stream", "_threads", "_traceback"],
    ["cache"],
    ["_digests"],
    ["_recipe"],
    ["_trace"],
    ["_run"],
    ["_kept"],
    ["_ahead", "_calls", "_map_run", "_whole_map"],
    ["_cached"],
    ["_engine"],
    ["_explain"],
    ["_bridge"],
    ["backend"],
    ["_options"],
    ["_definition"],
    ["_pipeline"],
    [""],  # hypernodes/__init__.py: the public names
    ["demo"],
    ["_cli"],
    ["__main__"],
]

# These decide; they do not act: no event loop, no clock, no threads, no processes, no files.
PURE = [
    "errors",
    "_node",
    "_mapping",
    "events",
    "_cost",
    "_plan",
    "_program",
    "_frontier",
    "_explanation",
    "_strict",
    "_table",
]
ACTING = {
    "anyio",
    "asyncio",
    "concurrent",
    "multiprocessing",
    "os",
    "pathlib",
    "socket",
    "subprocess",
    "threading",
}
ACTING |= {"time"}

LAZY = {
    "aiocache",
    "beartype",
    "cloudpickle",
    "dask",
    "distributed",
    "modal",
    "numpy",
    "opentelemetry",
    "rich",
    "tenacity",
}

MOST_CODE_LINES = 450
"""In one module, without docstrings, comments and blank lines."""


@cache
def modules() -> dict[str, Path]:
    """Files by dotted name inside the package, such as `backend._local`; the package's own name is empty."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything a file imports when it runs, also inside functions.

    Not what it imports for the type checker alone.
    """
    stack: list[ast.AST] = [ast.parse(file.read_text())]
    while stack:
        each = stack.pop()
        match each:
            case ast.If(test=ast.Name("TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
                stack.extend(each.orelse)
            case ast.Import():
                yield from ((each.lineno, alias.name) for alias in each.names)
            case ast.ImportFrom():
                assert each.level == 0, f"{file.name}:{each.lineno}: imports inside the package are absolute"
                yield from ((each.lineno, f"{each.module}.{alias.name}") for alias in each.names)
            case _:
                stack.extend(ast.iter_child_nodes(each))


def own_module(dotted: str) -> str | None:
    """The module of this package that an import of `dotted` runs; None for another package's."""
    if dotted.split(".")[0] != "hypernodes":
        return None
    name = dotted.partition(".")[2]
    while name not in modules():
        name = name.rpartition(".")[0]
    return name


def floor(module: str) -> int:
    for number, rooms in enumerate(ROOMS):
        if module in rooms or (module and module.split(".")[0] in rooms):
            return number
    pytest.fail(f"hypernodes/{module.replace('.', '/')}.py is in no room: add it to ROOMS")


def test_every_room_is_there() -> None:
    tops = {module.split(".")[0] for module in modules()}
    assert {room for rooms in ROOMS for room in rooms} == tops


@pytest.mark.parametrize("module", modules())
def test_imports_go_downward(module: str) -> None:
    own = module.split(".")[0]
    for line, dotted in imports(modules()[module]):
        target = own_module(dotted)
        if target is None or target.split(".")[0] == own:
            continue
        below = floor(target) < floor(module) or target in next(r for r in ROOMS if own in r)
        assert below, f"{modules()[module]}:{line} imports {dotted}, which is above it"


@pytest.mark.parametrize("module", PURE)
def test_what_decides_does_not_act(module: str) -> None:
    for line, dotted in imports(modules()[module]):
        assert dotted.split(".")[0] not in ACTING, f"{module}:{line} imports {dotted}"


def code_lines(file: Path) -> int:
    source = file.read_text()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    skipped: set[int] = set()
    for each in ast.walk(ast.parse(source)):
        if isinstance(each, documented) and ast.get_docstring(each) is not None:
            skipped.update(range(each.body[0].lineno, (each.body[0].end_lineno or 0) + 1))
    lines = enumerate(source.splitlines(), start=1)
    return sum(1 for number, line in lines if number not in skipped and line.strip() and line.lstrip()[0] != "#")


@pytest.mark.parametrize("module", modules())
def test_a_module_is_one_room(module: str) -> None:
    assert code_lines(modules()[module]) <= MOST_CODE_LINES


@pytest.mark.parametrize("module", modules())
def test_a_module_says_what_it_is_for(module: str) -> None:
    assert ast.get_docstring(ast.parse(modules()[module].read_text()))


def test_importing_hypernodes_imports_nothing_heavy() -> None:
    code = f"import sys, hypernodes, hypernodes.backend; print(*sorted({LAZY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_every_public_name_has_a_docstring() -> None:
    for name in hypernodes.__all__:
        value = getattr(hypernodes, name)
        if isinstance(value, type) or callable(value):
            assert value.__doc__, f"hypernodes.{name} has no docstring"

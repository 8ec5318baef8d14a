"""The syntax tree that a code object was compiled from, if it can still be had.

A file may have been edited since it was imported: then its text says what will run next time, not what runs now.
So the text is compiled again, and a function's tree is believed only if it compiles to the function's own code.
"""

from __future__ import annotations
import __future__

import ast
import functools
import linecache
import os
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any, TypeAlias

from hypernodes._signature.bytecode import bytecode_digest, nested
from hypernodes._signature.syntax import FunctionSyntax, undisturbed

_FUTURES = functools.reduce(
    int.__or__, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)
_KEPT_TEXTS = 16
"""Parsed files that are kept; what was found out about a function is kept with its code."""

_Stamp: TypeAlias = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A text with its tree, its functions by the line and name of their code, and its code by qualified name."""

    functions: dict[tuple[int, str], list[FunctionSyntax]]
    codes: dict[str, list[CodeType]]


_compiled: OrderedDict[tuple[str, int], tuple[_Stamp, _Compiled | None]] = OrderedDict()
_lock = threading.Lock()


def syntax_of(code: CodeType, module_globals: dict[str, Any] | None = None) -> FunctionSyntax | None:
    """Return the tree of a function's code; None without a source, and when the source is not what runs."""
    compiled = _compile(code.co_filename, code.co_flags & _FUTURES, module_globals)
    if compiled is None:
        return None
    candidates = compiled.codes.get(code.co_qualname, [])
    exact = [each for each in candidates if each == code]
    match = next((each for each in exact if each.co_linetable == code.co_linetable), exact[0] if exact else None)
    if match is None:  # moved by an edit further up, perhaps
        digest = bytecode_digest(code) if candidates else b""
        match = next((each for each in candidates if bytecode_digest(each) == digest), None)
    return None if match is None else _function(compiled, match)


def text_of(filename: str, module_globals: dict[str, Any] | None = None) -> tuple[_Stamp, bytes | str] | None:
    """Return the text of a file or notebook cell, with a stamp that differs when the text does."""
    try:
        status = os.stat(filename)
        with open(filename, "rb") as file:
            return (status.st_mtime_ns, status.st_size, status.st_ino), file.read()
    except (OSError, ValueError):
        text = "".join(linecache.getlines(filename, module_globals))
        return (("text", hash(text)), text) if text else None


def _compile(filename: str, flags: int, module_globals: dict[str, Any] | None) -> _Compiled | None:
    key = filename, flags
    stamp = _stamp(filename)
    with _lock:
        known = _compiled.get(key)
        if known is not None and known[0] == stamp:
            _compiled.move_to_end(key)
            return known[1]
    found = text_of(filename, module_globals)
    compiled = _compile_text(found[1], filename, flags) if found else None
    with _lock:
        _compiled[key] = (stamp, compiled)
        while len(_compiled) > _KEPT_TEXTS:
            _compiled.popitem(last=False)
    return compiled


def _stamp(filename: str) -> _Stamp:
    try:
        status = os.stat(filename)
    except (OSError, ValueError):
        cell = linecache.cache.get(filename)
        return ("cell", id(cell) if cell is None or len(cell) < 3 else hash(tuple(cell[2])))
    return status.st_mtime_ns, status.st_size, status.st_ino


def _compile_text(text: bytes | str, filename: str, flags: int) -> _Compiled | None:
    try:
        tree = undisturbed(lambda: ast.parse(text, filename))
        # Notebooks compile cells with a top-level `await`.
        flags |= ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        code = undisturbed(lambda: compile(tree, filename, "exec", flags=flags, dont_inherit=True))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None  # being edited, or not Python at all
    functions: defaultdict[tuple[int, str], list[FunctionSyntax]] = defaultdict(list)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.decorator_list[0] if node.decorator_list else node
            functions[first.lineno, node.name].append(node)
        elif isinstance(node, ast.Lambda):
            functions[node.lineno, "<lambda>"].append(node)
    codes: defaultdict[str, list[CodeType]] = defaultdict(list)
    for each in nested(code):
        codes[each.co_qualname].append(each)
    return _Compiled(dict(functions), dict(codes))


def _function(compiled: _Compiled, code: CodeType) -> FunctionSyntax | None:
    """Return the tree that a code object of the same text was compiled from."""
    found = compiled.functions.get((code.co_firstlineno, code.co_name), [])
    if len(found) > 1:  # lambdas in one line
        inside = sum(each.co_name == "<lambda>" for each in nested(code) if each is not code)
        found = [each for each in found if _is_within(code, each) and _lambdas_in(each) == inside]
    # Where it could be several (Python 3.12.1 leaves columns out), its bytecode has to do.
    return found[0] if len(found) == 1 else None


def _lambdas_in(function: FunctionSyntax) -> int:
    return sum(isinstance(each, ast.Lambda) for each in ast.walk(function)) - 1


def _is_within(code: CodeType, function: FunctionSyntax) -> bool:
    first = (function.lineno, function.col_offset)
    last = (function.end_lineno or 0, function.end_col_offset or 0)
    return all(first <= start and end <= last for start, end in _places(code))


def _places(code: CodeType) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    for line, end_line, column, end_column in code.co_positions():
        if line and end_line and column is not None and end_column:
            yield (line, column), (end_line, end_column)

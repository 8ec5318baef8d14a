"""The normal form of a function's syntax tree: what it does, without how it is written.

Comments, formatting, positions and docstrings are no part of it; nor are the annotations of parameters, results
and local variables, which change nothing that runs. The annotations in a class body are: they make fields.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import threading
from collections.abc import Callable
from typing import TypeAlias, TypeVar

FunctionSyntax: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda

T = TypeVar("T")
_NOT_MEANT = frozenset({"ctx", "kind", "type_comment", "type_ignores", "type_params"})


_parsing = threading.Lock()
_ATTEMPTS = 50


def undisturbed(make: Callable[[], T]) -> T:
    """Return what parsing or compiling a tree gives.

    Up to Python 3.12 two threads that do it at one moment may upset each other (``SystemError: AST constructor
    recursion depth mismatch``): ours take turns, and a collision with somebody else's is tried again.

    Raises:
        ValueError: there is no end to it.
    """
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(SystemError), _parsing:
            return make()
    raise ValueError("other threads parse all the time")


def function_digest(function: FunctionSyntax) -> bytes:
    """Return the digest of a function without its name, decorators and defaults, which count where they are kept."""
    form = _NormalForm()
    form.text(type(function).__name__)
    form.parameters(function.args, with_defaults=False)
    form.body(function)
    return hashlib.sha256(b"".join(form.pieces)).digest()


def expression_digest(expression: ast.expr) -> bytes:
    """Return the digest of an expression, such as a decorator."""
    form = _NormalForm()
    form.value(expression)
    return hashlib.sha256(b"".join(form.pieces)).digest()


def annotations_digest(function: FunctionSyntax) -> bytes:
    """Return the digest of the annotations of a function's parameters and result, which some decorators act on."""
    form = _NormalForm()
    for each in ast.walk(function.args):
        if isinstance(each, ast.arg) and each.annotation is not None:
            form.text(each.arg)
            form.value(each.annotation)
    form.value(None if isinstance(function, ast.Lambda) else function.returns)
    return hashlib.sha256(b"".join(form.pieces)).digest()


def tree_digest(tree: ast.Module) -> bytes:
    """Return the digest of a whole module."""
    form = _NormalForm()
    form.block(tree.body, documented=True)
    return hashlib.sha256(b"".join(form.pieces)).digest()


class _NormalForm:
    """Writes syntax as bytes that can be read in one way only: every list is counted, every text has its length.

    Fields are written by name and left out when empty, as newer versions of Python add fields to old nodes.
    """

    __slots__ = ("_in_class", "pieces")

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self._in_class = False

    def text(self, text: str) -> None:
        data = text.encode("utf-8", "surrogatepass")
        self.pieces.append(b"%d:" % len(data))
        self.pieces.append(data)

    def value(self, value: object) -> None:
        match value:
            case ast.Constant():
                self._constant(value.value)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                self._function(value)
            case ast.ClassDef():
                self._class(value)
            case ast.AnnAssign() if not self._in_class:
                self._without_annotation(value)
            case ast.AST():
                self._node(value)
            case list():
                self.pieces.append(b"[%d:" % len(value))
                for each in value:
                    self.value(each)
            case None:
                self.pieces.append(b"-")
            case _:  # a name or an operator's number
                self.text(f"{type(value).__name__} {value}")

    def _node(self, node: ast.AST) -> None:
        self.text(type(node).__name__)
        for name in node._fields:
            each = getattr(node, name, None)
            if each is not None and each != [] and name not in _NOT_MEANT:
                self.text(name)
                self.value(each)
        self.pieces.append(b".")

    def _constant(self, value: object) -> None:
        self.pieces.append(b"C")
        self.text(type(value).__name__)
        if isinstance(value, bytes):
            self.pieces.append(b"%d:" % len(value))
            self.pieces.append(value)
        else:
            self.text(value if isinstance(value, str) else repr(value))

    def _function(self, function: FunctionSyntax) -> None:
        self.text(type(function).__name__)
        if not isinstance(function, ast.Lambda):
            self.text(function.name)
            self.value(function.decorator_list)
        self.parameters(function.args, with_defaults=True)
        self.body(function)

    def parameters(self, parameters: ast.arguments, *, with_defaults: bool) -> None:
        kinds: tuple[list[ast.arg], ...] = (
            parameters.posonlyargs,
            parameters.args,
            [parameters.vararg] if parameters.vararg else [],
            parameters.kwonlyargs,
            [parameters.kwarg] if parameters.kwarg else [],
        )
        for kind in kinds:
            self.pieces.append(b"[%d:" % len(kind))
            for each in kind:
                self.text(each.arg)
        if with_defaults:
            self.value(parameters.defaults)
            self.value(parameters.kw_defaults)

    def body(self, function: FunctionSyntax) -> None:
        outside, self._in_class = self._in_class, False
        if isinstance(function, ast.Lambda):
            self.value(function.body)
        else:
            self.block(function.body, documented=True)
        self._in_class = outside

    def block(self, statements: list[ast.stmt], *, documented: bool) -> None:
        if documented and statements and _is_text(statements[0]):
            statements = statements[1:] or [ast.Pass()]
        self.value(statements)

    def _class(self, defined: ast.ClassDef) -> None:
        self.text(f"class {defined.name}")
        self.value(defined.decorator_list)
        self.value(defined.bases)
        self.value(defined.keywords)
        outside, self._in_class = self._in_class, True
        self.block(defined.body, documented=True)
        self._in_class = outside

    def _without_annotation(self, assignment: ast.AnnAssign) -> None:
        if assignment.value is None:
            self.text("declared")  # it makes the name a local one
            self.value(assignment.target)
        else:
            self._node(ast.Assign(targets=[assignment.target], value=assignment.value))


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )

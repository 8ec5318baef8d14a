"""What a function takes from outside of itself, and what it writes there, read from its syntax tree.

Names are followed as chains: in ``utils.K + log[0].n`` they are ``("utils", "K")`` and ``("log",)``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from hypernodes._signature.syntax import FunctionSyntax, expression_digest, undisturbed

Chain: TypeAlias = tuple[str, ...]

MUTATING_METHODS = frozenset(
    [
        "add",
        "append",
        "appendleft",
        "clear",
        "difference_update",
        "discard",
        "extend",
        "extendleft",
        "insert",
        "intersection_update",
        "move_to_end",
        "pop",
        "popitem",
        "popleft",
        "put",
        "put_nowait",
        "remove",
        "reverse",
        "rotate",
        "setdefault",
        "sort",
        "subtract",
        "symmetric_difference_update",
        "update",
        "write",
        "writelines",
        "__delitem__",
        "__setitem__",
    ]
)
"""Methods that change what they are called on, in the containers and files of the standard library."""

MUTATING_FUNCTIONS = frozenset(
    [
        "delattr",
        "heapify",
        "heappop",
        "heappush",
        "heappushpop",
        "heapreplace",
        "insort",
        "insort_left",
        "insort_right",
        "setattr",
        "shuffle",
    ]
)
"""Functions that change their first argument."""


class Import(NamedTuple):
    """An import inside a function: the name that it binds there (empty when none), and what that stands for."""

    name: str
    level: int
    module: str
    attribute: str | None = None


@dataclass(slots=True)
class Writes:
    """What is changed, by chains from a name."""

    rebound: set[str] = field(default_factory=set)
    """``global n; n = 1``."""
    stored: set[Chain] = field(default_factory=set)
    """``counter.n = 1``: the last of the chain is the attribute."""
    augmented: set[Chain] = field(default_factory=set)
    """Those of them that ``counter.n += 1`` stores."""
    read_first: set[Chain] = field(default_factory=set)
    """Attributes that are read, before they are stored if they are: ``if model.k is None: model.k = 10``."""
    mutated: set[Chain] = field(default_factory=set)
    """``seen[x] = 1``."""
    called: set[Chain] = field(default_factory=set)
    """``log.append(x)``: it changes a list, but adding two tensors changes neither."""
    called_inside: set[Chain] = field(default_factory=set)
    """``logs["a"].append(x)``: the same for what it contains."""


@dataclass(slots=True)
class Uses:
    """What one function reads and writes outside of itself, with all that is nested in it."""

    reads: set[Chain] = field(default_factory=set)
    imports: set[Import] = field(default_factory=set)
    attributes: set[str] = field(default_factory=set)
    """Every attribute that it names, of whatever."""
    outer: Writes = field(default_factory=Writes)
    parameters: Writes = field(default_factory=Writes)
    """The same for what was passed in; a method's first parameter is its instance."""


def uses_of(function: FunctionSyntax) -> Uses:
    """Return what a function reads and writes outside of itself."""
    reader = _Reader(_parameters(function))
    reader.enter(function)
    return reader.uses


def decorators_of(function: FunctionSyntax) -> Iterator[tuple[Chain, bytes]]:
    """Yield the decorators written above a function: how each is named, and the digest of all of it."""
    for each in () if isinstance(function, ast.Lambda) else function.decorator_list:
        yield _chain(each.func if isinstance(each, ast.Call) else each)[0], expression_digest(each)


def names_in(annotation: str) -> list[str]:
    """Return the names in an annotation that is kept as text."""
    try:
        tree = undisturbed(lambda: ast.parse(annotation, mode="eval"))
    except (SyntaxError, ValueError):
        return []
    return sorted({each.id for each in ast.walk(tree) if isinstance(each, ast.Name)})


def takes_over(writes: Writes, stored: Chain) -> bool:
    """Say whether what an attribute is given takes the place of one that is not read before: that one is no input."""
    return stored in writes.augmented or all(each[: len(stored)] != stored for each in writes.read_first)


class _Reader(ast.NodeVisitor):
    """Walks a function with the names that are local at each place."""

    def __init__(self, parameters: set[str]) -> None:
        self.uses = Uses()
        self._parameters = parameters
        self._local: set[str] = set()
        self._enclosing: set[str] = set()  # without those of a class body, which its methods do not see
        self._imported: set[str] = set()

    def enter(self, function: FunctionSyntax) -> None:
        """Visit the inside of a function."""
        body = [function.body] if isinstance(function, ast.Lambda) else function.body
        bound, declared = _bindings(body)
        outside = self._local, self._enclosing
        self._local = self._enclosing = (self._enclosing | bound | _parameters(function)) - declared
        for each in body:
            self.visit(each)
        self._local, self._enclosing = outside

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._visit_all(node.decorator_list)
        self._visit_defaults(node.args)
        self.enter(node)

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._visit_defaults(node.args)
        self.enter(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._visit_all([*node.decorator_list, *node.bases, *node.keywords])
        bound, declared = _bindings(node.body)
        outside = self._local
        self._local = (self._enclosing | bound) - declared
        self._visit_all(node.body)
        self._local = outside

    def _visit_comprehension(self, node: ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp) -> None:
        targets = {
            each.id
            for generator in node.generators
            for each in ast.walk(generator.target)
            if isinstance(each, ast.Name)
        }
        outside = self._local, self._enclosing
        self.visit(node.generators[0].iter)
        self._local, self._enclosing = self._local | targets, self._enclosing | targets
        self.generic_visit(node)
        self._local, self._enclosing = outside

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _visit_comprehension  # noqa: N815

    def visit_Assign(self, node: ast.Assign) -> None:
        # `x.k = x.k or 10` may leave what is there; `x.n = x.n + 1` counts, as `x.n += 1` does.
        kept = any(isinstance(each, ast.BoolOp | ast.IfExp) for each in ast.walk(node.value))
        self._visit_all([node.value, *node.targets] if kept else [*node.targets, node.value])

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        chain, whole = _chain(node.target)
        if whole and len(chain) > 1:
            self._wrote("augmented", chain)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._visit_all([node.target] if node.value is None else [node.value, node.target])

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.asname:
                self._import(Import(alias.asname, 0, alias.name))
            else:  # `import a.b` loads `a.b` and binds `a`
                top = alias.name.partition(".")[0]
                self._import(Import(top, 0, top))
                self.uses.imports.add(Import("", 0, alias.name))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            self._import(Import(alias.asname or alias.name, node.level, node.module or "", alias.name))

    def _import(self, what: Import) -> None:
        self.uses.imports.add(what)
        self._imported.add(what.name)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            if self._is_outer(node.id):
                self.uses.reads.add((node.id,))
        elif node.id not in self._local:
            self.uses.outer.rebound.add(node.id)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        chain, whole = _chain(node)
        if not isinstance(node.ctx, ast.Load) and chain:
            if whole:
                self._wrote("stored", chain)
            else:
                self._wrote("mutated", chain)
        if not (whole and chain):
            self.uses.attributes.add(node.attr)
            self.visit(node.value)
            return
        self.uses.attributes.update(chain[1:])
        if isinstance(node.ctx, ast.Load):
            self._read(chain)
        if self._is_outer(chain[0]):
            self.uses.reads.add(chain if isinstance(node.ctx, ast.Load) else chain[:-1])

    def visit_Subscript(self, node: ast.Subscript) -> None:
        chain, _ = _chain(node)
        if not isinstance(node.ctx, ast.Load) and chain:
            self._wrote("mutated", chain)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Attribute) and node.func.attr in MUTATING_METHODS:
            chain, whole = _chain(node.func.value)
            if chain:
                self._wrote("called" if whole else "called_inside", chain)
        elif node.args and _last_name(node.func) in MUTATING_FUNCTIONS:
            chain, _ = _chain(node.args[0])
            if chain:
                self._wrote("mutated", chain)
        self.generic_visit(node)

    def _wrote(self, how: str, chain: Chain) -> None:
        if self._is_outer(chain[0]):
            getattr(self.uses.outer, how).add(chain)
        elif chain[0] in self._parameters:
            getattr(self.uses.parameters, how).add(chain)

    def _read(self, chain: Chain) -> None:
        writes = self.uses.outer if self._is_outer(chain[0]) else self.uses.parameters
        if not any(chain[: len(each)] == each for each in writes.stored):
            self._wrote("read_first", chain)

    def _is_outer(self, name: str) -> bool:
        return name not in self._local or name in self._imported

    def _visit_all(self, nodes: Iterable[ast.AST]) -> None:
        for each in nodes:
            self.visit(each)

    def _visit_defaults(self, parameters: ast.arguments) -> None:
        self._visit_all(each for each in (*parameters.defaults, *parameters.kw_defaults) if each is not None)


def _chain(node: ast.expr) -> tuple[Chain, bool]:
    """Return the names from the root up to the first item or call, and whether that is all of it."""
    match node:
        case ast.Name():
            return (node.id,), True
        case ast.Attribute():
            chain, whole = _chain(node.value)
            return ((*chain, node.attr), True) if whole and chain else (chain, False)
        case ast.Subscript():
            return _chain(node.value)[0], False
    return (), False


def _last_name(node: ast.expr) -> str:
    match node:
        case ast.Name():
            return node.id
        case ast.Attribute():
            return node.attr
    return ""


def _parameters(function: FunctionSyntax) -> set[str]:
    args = function.args
    found = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
    return {each.arg for each in found if each is not None}


def _bindings(body: Iterable[ast.AST]) -> tuple[set[str], set[str]]:
    """Return the names that a scope binds, and those that it declares to be of another scope."""
    bound: set[str] = set()
    declared: set[str] = set()
    for node in _own(body):
        match node:
            case ast.Name(ctx=ast.Store() | ast.Del()):
                bound.add(node.id)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                bound.add(node.name)
            case ast.Import() | ast.ImportFrom():
                bound.update(alias.asname or alias.name.partition(".")[0] for alias in node.names)
            case ast.ExceptHandler() | ast.MatchAs() | ast.MatchStar() if node.name:
                bound.add(node.name)
            case ast.MatchMapping() if node.rest:
                bound.add(node.rest)
            case ast.Global() | ast.Nonlocal():
                declared.update(node.names)
    return bound, declared


def _own(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Yield the nodes of one scope, not of those nested in it; `:=` in a comprehension is the scope's own."""
    stack = list(body)
    while stack:
        node = stack.pop()
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            continue
        if isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            stack.extend(each.target for each in ast.walk(node) if isinstance(each, ast.NamedExpr))
        else:
            stack.extend(ast.iter_child_nodes(node))

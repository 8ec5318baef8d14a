"""What compiled code does and uses, for code whose source cannot be had or is no longer the one that runs."""

from __future__ import annotations

import dis
import hashlib
import sys
from collections.abc import Iterator
from itertools import pairwise
from types import CodeType
from typing import TypeAlias

from hypernodes._signature.captured import MUTATING_FUNCTIONS, MUTATING_METHODS, Chain, Import, Uses, Writes

_JUMPS = frozenset(dis.hasjrel) | frozenset(dis.hasjabs)
_CONSTANTS = frozenset(dis.hasconst)
_NAMED = frozenset(dis.hasname) | frozenset(dis.haslocal) | frozenset(dis.hasfree) | frozenset(dis.hascompare)
_IGNORED = frozenset({"NOP", "CACHE", "EXTENDED_ARG", "RESUME"})

_GLOBAL_LOADS = frozenset({"LOAD_GLOBAL", "LOAD_NAME"})
_CELL_LOADS = frozenset({"LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"})
_REBINDS = frozenset({"STORE_GLOBAL", "DELETE_GLOBAL"})
_CELL_REBINDS = frozenset({"STORE_DEREF", "DELETE_DEREF"})
_ITEM_STORES = frozenset({"STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE"})


def bytecode_digest(code: CodeType) -> bytes:
    """Return the digest of what the code does: no lines, no file, no docstring; of one minor version of Python."""
    version = f"bytecode {sys.implementation.name} {sys.version_info.major}.{sys.version_info.minor}"
    digest = hashlib.sha256(version.encode())
    for piece in _pieces(code):
        digest.update(b"%d:" % len(piece))
        digest.update(piece)
    return digest.digest()


def nested(code: CodeType) -> Iterator[CodeType]:
    """Yield a code object and all that is defined inside of it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from nested(constant)


def _pieces(code: CodeType) -> Iterator[bytes]:
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    flags = code.co_flags & 0xFF  # generator, coroutine, *args ..., not the marks of compilers and debuggers
    yield repr((names, code.co_posonlyargcount, code.co_kwonlyargcount, flags)).encode()
    yield code.co_exceptiontable
    instructions = [each for each in dis.get_instructions(code) if each.opname not in _IGNORED]
    position = {each.offset: number for number, each in enumerate(instructions)}
    for each in instructions:
        yield each.opname.encode()
        if each.opcode in _CONSTANTS:
            yield _constant(each.argval)
        elif each.opcode in _JUMPS:
            # To the first instruction that counts at or after the target.
            target = min((offset for offset in position if offset >= each.argval), default=-1)
            yield b"%d" % position.get(target, -1)
        elif each.opcode in _NAMED:
            yield repr(each.argval).encode()
        else:
            yield repr(each.arg).encode()


def _constant(value: object) -> bytes:
    if isinstance(value, CodeType):
        return value.co_name.encode() + bytecode_digest(value)
    if isinstance(value, tuple):
        return b"(" + b",".join(_constant(each) for each in value) + b")"
    if isinstance(value, frozenset):
        return b"{" + b",".join(sorted(_constant(each) for each in value)) + b"}"
    return f"{type(value).__name__} {value!r}".encode("utf-8", "surrogatepass")


def bytecode_uses(code: CodeType) -> Uses:
    """Return what the code reads and writes outside of itself.

    What is assigned to (``seen[x] = 1``) is found by its place in the source; compiled without places
    (``-X no_debug_ranges``), such a variable counts as one that is only read.
    """
    uses = Uses()
    parameters = frozenset(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
    for each in nested(code):
        _Use(uses, frozenset(code.co_freevars), parameters if each is code else frozenset()).read(each)
    return uses


_Place: TypeAlias = tuple[int | None, int | None]
_UNPLACED: _Place = (-1, -1)
"""The second variable of an instruction that loads two, which has the place of the first."""


class _Use:
    """Reads one code object, instruction by instruction."""

    def __init__(self, uses: Uses, free: frozenset[str], parameters: frozenset[str]) -> None:
        self.uses = uses
        self._free = free
        self._parameters = parameters
        self._imported: set[str] = set()
        self._next_is_changed = False
        self._at: dict[_Place, Chain] = {}

    def read(self, code: CodeType) -> None:
        chain: Chain = ()
        place: _Place = (None, None)
        instructions = [each for each in dis.get_instructions(code) if each.opname not in _IGNORED]
        self._imports(instructions)
        for each in instructions:
            start = (each.positions.lineno, each.positions.col_offset) if each.positions else (None, None)
            if chain and each.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                chain = (*chain, each.argval)
                self._at[place] = chain
                self.uses.attributes.add(each.argval)
                continue
            self._finish(chain)
            chain, place = self._root(each), _UNPLACED if isinstance(each.argval, tuple) else start
            if chain or place is _UNPLACED:
                self._at[place] = chain
            else:
                self._write(each, start)
        self._finish(chain)

    def _root(self, each: dis.Instruction) -> Chain:
        name = (
            each.argval[-1] if isinstance(each.argval, tuple) and each.opname.startswith("LOAD_FAST") else each.argval
        )
        if each.opname in _GLOBAL_LOADS or (each.opname in _CELL_LOADS and name in self._free | self._imported):
            return (name,)
        if each.opname.startswith("LOAD_FAST") and name in self._parameters | self._imported:
            return (name,)
        return ()

    def _finish(self, chain: Chain) -> None:
        if not chain:
            return
        if self._next_is_changed:
            self._writes(chain).mutated.add(chain)
        self._next_is_changed = chain[-1] in MUTATING_FUNCTIONS
        if chain[0] not in self._parameters:
            self.uses.reads.add(chain)
        writes = self._writes(chain)
        if len(chain) > 1 and not any(chain[: len(each)] == each for each in writes.stored):
            writes.read_first.add(chain)
        if chain[-1] in MUTATING_METHODS and len(chain) > 1:
            self._writes(chain).called.add(chain[:-1])

    def _write(self, each: dis.Instruction, start: _Place) -> None:
        if each.opname != "PUSH_NULL":
            self._next_is_changed = False
        if each.opname in _REBINDS or (each.opname in _CELL_REBINDS and each.argval in self._free):
            self.uses.outer.rebound.add(each.argval)
        elif each.opname in ("STORE_ATTR", "DELETE_ATTR"):
            self.uses.attributes.add(each.argval)
            if chain := self._written(start):
                augmented = chain[-1] == each.argval and len(chain) > 1
                stored = chain if augmented else (*chain, each.argval)
                self._writes(chain).stored.add(stored)
                if augmented:
                    self._writes(chain).augmented.add(stored)
        elif each.opname in _ITEM_STORES and (chain := self._written(start)):
            self._writes(chain).mutated.add(chain)
        elif each.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            self.uses.attributes.add(each.argval)
            if each.argval in MUTATING_METHODS and (chain := self._at.get(start, ())) and None not in start:
                self._writes(chain).called_inside.add(chain)

    def _written(self, start: _Place) -> Chain:
        unplaced = self._at.pop(_UNPLACED, ())
        return () if None in start else self._at.get(start, unplaced)

    def _writes(self, chain: Chain) -> Writes:
        return self.uses.parameters if chain[0] in self._parameters else self.uses.outer

    def _imports(self, instructions: list[dis.Instruction]) -> None:
        """Find `import a.b`, `import a.b as c` and `from a import b as c` by the shape that they compile to."""
        module, level = "", 0
        constants = [each.argval if each.opcode in _CONSTANTS else None for each in instructions]
        attribute: str | None = None
        for number, (each, following) in enumerate(pairwise(instructions)):
            if each.opname == "IMPORT_NAME":
                module, level, attribute = each.argval, constants[number - 2] or 0, None
                self.uses.imports.add(Import("", level, module))
                if following.opname.startswith("STORE_"):
                    top = module.partition(".")[0]
                    self._bind(following, Import("", level, top))
            elif each.opname == "IMPORT_FROM":
                attribute = each.argval
                if following.opname.startswith("STORE_"):
                    self._bind(following, Import("", level, module, attribute))
                elif following.opname == "SWAP":  # `import a.b as c` takes `b` from `a`
                    store = instructions[number + 3] if number + 3 < len(instructions) else following
                    self._bind(store, Import("", level, module))

    def _bind(self, store: dis.Instruction, what: Import) -> None:
        name = store.argval[0] if isinstance(store.argval, tuple) else store.argval
        if isinstance(name, str):
            self._imported.add(name)
            self.uses.imports.add(what._replace(name=name))

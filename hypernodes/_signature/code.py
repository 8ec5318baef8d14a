"""What the result of a function depends on besides its inputs: the code that runs, and what that code reads.

A fingerprint is made of named parts: the digest of each function, class and value by itself. A function that calls a
helper has a part of its own and another one for the helper, so that two fingerprints differ in the parts that were
edited, and in no others.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import CodeType, FunctionType, MappingProxyType
from typing import Any

from hypernodes._signature.bytecode import bytecode_digest, bytecode_uses
from hypernodes._signature.captured import Chain, Uses, decorators_of, uses_of
from hypernodes._signature.dependencies import hash_dependencies
from hypernodes._signature.source import syntax_of
from hypernodes._signature.syntax import annotations_digest, function_digest
from hypernodes.errors import UncacheableError

__all__ = ["Fingerprint", "fingerprint", "hash_code", "hash_dependencies"]

ALGORITHM = b"hypernodes code 1"


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What the result of a function depends on besides its inputs."""

    digest: bytes
    """32 bytes; the same in every process for the same code and captured values."""
    parts: Mapping[str, bytes]
    """A digest for each function, class, package and captured value, by a name that a person understands."""
    opaque: tuple[str, ...]
    """Captured objects that count by their class alone, such as a client or a lock."""


def fingerprint(func: Callable[..., Any]) -> Fingerprint:
    """Return what the result of a function depends on besides its inputs, as it is at this moment.

    What is found out about code is kept, and captured values are read anew by every call. Safe in any thread.
    A module that the function imports when it runs is imported, if it belongs to the project.
    """
    return _fingerprint(func)


def _fingerprint(func: Any, *, told: bool = False) -> Fingerprint:
    from hypernodes._signature.walk import Walk

    walk = Walk()
    entry = walk.enter(func)
    if told:
        walk.tell(func)
    parts, opaque = walk.finish()
    named = [(name.encode("utf-8", "surrogatepass"), parts.get(name, b"")) for name in (entry, *sorted(parts))]
    written = b"".join([b"%d:%b%d:%b" % (len(name), name, len(digest), digest) for name, digest in named])
    return Fingerprint(hashlib.sha256(ALGORITHM + written).digest(), MappingProxyType(parts), opaque)


_open = threading.local()


def hash_code(obj: Any) -> bytes:
    """Return the digest of a function, method, class, module, builtin or partial that was found in a value.

    Docstring and annotations of a function count: what holds it may tell them, as of a tool that a model may use.
    A function that reaches itself again through a value counts by its name there.
    """
    under_way: set[int] = _open.__dict__.setdefault("ids", set())
    if id(obj) in under_way:
        name = getattr(obj, "__qualname__", type(obj).__qualname__)
        return hashlib.sha256(f"{getattr(obj, '__module__', '')} {name}".encode()).digest()
    under_way.add(id(obj))
    try:
        return _fingerprint(obj, told=True).digest
    finally:
        under_way.discard(id(obj))


@dataclass(frozen=True, slots=True)
class Code:
    """What does not change about one code object."""

    digest: bytes
    uses: Uses
    reads: tuple[Chain, ...]
    decorators: tuple[tuple[Chain, bytes], ...] = ()
    """What is written above the function, for decorators whose code is not read."""
    annotations: bytes = b""


_known: dict[int, tuple[weakref.ref[CodeType], Code]] = {}


def code_of(func: FunctionType) -> Code:
    """Return what there is to know about a function's code; found out once.

    Raises:
        UncacheableError: it cannot be found out; a result found by less would be stale after an edit.
    """
    code = func.__code__
    known = _known.get(id(code))
    if known is not None and known[0]() is code:
        return known[1]
    try:
        found = _found_out(func, code)
    except Exception as error:
        raise UncacheableError(f"the code of {code.co_qualname} cannot be read ({error!r})") from error
    address = id(code)
    _known[address] = weakref.ref(code, lambda _: _known.pop(address, None)), found
    return found


def _found_out(func: FunctionType, code: CodeType) -> Code:
    syntax = syntax_of(code, func.__globals__)
    if syntax is None:
        uses = bytecode_uses(code)
        return Code(bytecode_digest(code), uses, tuple(sorted(uses.reads)))
    uses = uses_of(syntax)
    return Code(
        function_digest(syntax),
        uses,
        tuple(sorted(uses.reads)),
        tuple(decorators_of(syntax)),
        annotations_digest(syntax),
    )

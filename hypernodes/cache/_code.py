"""What a run knows of each function that it caches: the part of its signatures that no input changes."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

from hypernodes._cost import Cost
from hypernodes._node import Node
from hypernodes._signature.code import Fingerprint, fingerprint
from hypernodes._signature.dependencies import hash_dependencies
from hypernodes._signature.keys import call_prefix
from hypernodes._signature.values import hash_value
from hypernodes.cache._ledger import SHORT, history_name


class Clock:
    """What the calls of one function take: of those that overlap each has its share, so that the sum is right."""

    __slots__ = ("_ended",)

    def __init__(self) -> None:
        self._ended = 0.0

    def share(self, began: float) -> float:
        """Return the seconds of a call that began at a time of :func:`time.perf_counter` and ends now."""
        now = time.perf_counter()
        seconds = now - max(began, self._ended)
        self._ended = now
        return seconds


@dataclass(frozen=True, slots=True, eq=False)
class Code:
    """What is known of a node's function in one run: the part of its signatures that no input changes."""

    node: Node[..., Any]
    prefix: bytes
    names: tuple[str, ...]
    """Its parameters in the order in which their digests count."""
    fingerprint: Fingerprint
    parts: dict[str, str]
    """Short digests of the parts of its code, of ``version`` and of ``depends_on``, by what to call them."""
    history: str
    """The name of the node's history in a store."""
    saving: Cost
    """Whether its results are pickled on the loop or in a thread."""
    clock: Clock
    """What its calls take."""
    about: bytes
    """The part of its entries' meta blocks that is the same in all of them."""


def read_code(node: Node[..., Any]) -> Code:
    """Fingerprint a node's function, as it and what it refers to are now.

    Raises:
        Exception: whatever reading code and values runs into.
    """
    print_ = fingerprint(node.func)
    salts = {} if node.version is None else {"version": hash_value(node.version)}
    salts |= hash_dependencies(node.depends_on)
    names = tuple(sorted(node.parameters))
    parts = {name: digest[:SHORT].hex() for name, digest in {**print_.parts, **salts}.items()}
    several = len(node.outputs) if isinstance(node.output_name, tuple) else 0
    prefix = call_prefix(print_.digest, names, salts, outputs=several)
    history = history_name(_place(node.func), node.outputs)
    about = b'{"node": %s, "at": ' % json.dumps(node.name).encode()
    return Code(node, prefix, names, print_, parts, history, Cost(), Clock(), about)


def _place(func: Any) -> str:
    """Return where a function was written: its module and qualified name."""
    while isinstance(func, (partial, Node)):
        func = func.func
    kind = func if isinstance(getattr(func, "__qualname__", None), str) else type(func)
    return f"{kind.__module__}.{kind.__qualname__}"

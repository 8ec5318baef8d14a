"""What nodes with ``keep="process"`` have made: held for as long as this process lives, for all its runs."""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from hashlib import sha256
from typing import Any

from hypernodes._node import Node
from hypernodes._plan import EVERYTHING
from hypernodes._run import Run
from hypernodes._signature.code import fingerprint, hash_code, hash_dependencies
from hypernodes._signature.keys import call_prefix
from hypernodes._signature.values import hash_value
from hypernodes._threads import default_threads, in_thread
from hypernodes.cache._flight import Flights
from hypernodes.errors import UncacheableError

MOST_EACH = 4
"""Results of one node that are held, by its inputs; the one used longest ago goes first."""

PATIENCE_S = 600.0
"""Seconds that a call waits for the making on another event loop; a model may take minutes to load."""

_Name = tuple[str, str, tuple[str, ...]]
_log = logging.getLogger("hypernodes")


class _Held:
    """The results of one function as it is now; those of an earlier version of it are gone."""

    __slots__ = ("prefix", "results")

    def __init__(self, prefix: bytes) -> None:
        self.prefix = prefix
        self.results: OrderedDict[bytes, Any] = OrderedDict()


class _Everything:
    """All that this process holds. Used by any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[_Name, _Held] = {}
        self._said: set[_Name] = set()
        self.flights = Flights(PATIENCE_S)

    def get(self, name: _Name, prefix: bytes, key: bytes) -> list[Any]:
        """Return the result in a list, which is empty if there is none."""
        with self._lock:
            held = self._held.get(name)
            if held is None or held.prefix != prefix or key not in held.results:
                return []
            held.results.move_to_end(key)
            return [held.results[key]]

    def put(self, name: _Name, prefix: bytes, key: bytes, result: Any) -> None:
        dropped: list[Any] = []  # let go of outside the lock: freeing an object may run anything
        with self._lock:
            held = self._held.get(name)
            if held is None or held.prefix != prefix:
                dropped.append(held)
                held = self._held[name] = _Held(prefix)
            held.results[key] = result
            while len(held.results) > MOST_EACH:
                dropped.append(held.results.popitem(last=False))

    def drop(self, name: _Name | None) -> None:
        with self._lock:
            dropped = [self._held.pop(name, None)] if name is not None else list(self._held.values())
            if name is None:
                self._held, self._said = {}, set()
        del dropped

    def say_once(self, name: _Name, message: str) -> None:
        """Say why a node's results are not kept."""
        if name not in self._said:
            self._said.add(name)
            _log.warning("%s", message)


_everything = _Everything()


async def kept(
    run: Run,
    node: Node[..., Any],
    arguments: tuple[Any, ...],
    keywords: Mapping[str, Any],
    make: Callable[[], Awaitable[Any]],
) -> Any:
    """Return what a node makes of its inputs: made now, or by an earlier call in this process.

    Calls for the same inputs at the same time make it once.
    """
    name = _name(node)
    try:
        (prefix, key), _ = await in_thread(lambda: _key(run, node, arguments, keywords), default_threads())
    except UncacheableError as error:
        _everything.say_once(name, f"node {node.name!r} is not kept: {error}")
        return await make()
    asked_anew = EVERYTHING in run.refresh or not run.refresh.isdisjoint(node.outputs)

    async def compute() -> Any:
        found = [] if asked_anew else _everything.get(name, prefix, key)
        if found:
            return found[0]
        result = await make()
        _everything.put(name, prefix, key, result)
        return result

    if not asked_anew and (found := _everything.get(name, prefix, key)):
        return found[0]
    result, _ = await _everything.flights.once((name, key), compute)
    return result


def _key(
    run: Run, node: Node[..., Any], arguments: tuple[Any, ...], keywords: Mapping[str, Any]
) -> tuple[bytes, bytes]:
    """Return what stands for a node's code, and for a call of it; may block."""
    prefix = run.prefixes.get(node)
    if prefix is None:
        salts = {} if node.version is None else {"version": hash_value(node.version)}
        salts |= hash_dependencies(node.depends_on)
        names = tuple(node.parameters)
        prefix = run.prefixes[node] = call_prefix(fingerprint(node.func).digest, names, salts, outputs=0)
    digest = sha256(prefix)
    classes: set[type] = set()
    for value in arguments:
        digest.update(hash_value(value, classes=classes))
    for keyword, value in sorted(keywords.items()):
        digest.update(keyword.encode() + hash_value(value, classes=classes))
    for code in sorted(hash_code(each) for each in classes):
        digest.update(code)
    return prefix, digest.digest()


def forget_kept(*nodes: Node[..., Any]) -> None:
    """Let go of what nodes with ``keep="process"`` have made in this process; of all nodes where none is named."""
    if not nodes:
        _everything.drop(None)
    for node in nodes:
        _everything.drop(_name(node))


def _name(node: Node[..., Any]) -> _Name:
    func = node.func
    return getattr(func, "__module__", "") or "", getattr(func, "__qualname__", node.name), node.outputs


def _forget_everything() -> None:
    """In a forked child: another thread may have held a lock."""
    global _everything  # noqa: PLW0603 - nothing in it can be trusted
    _everything = _Everything()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_everything)

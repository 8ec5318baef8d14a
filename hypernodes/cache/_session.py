"""One run's use of one cache: what functions are, which entries there are, and what waits to be written."""

from __future__ import annotations

import json
import logging
import time
import weakref
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from typing import Any

import anyio

from hypernodes._cost import CHEAP_S, Cost
from hypernodes._node import Node
from hypernodes._signature.code import hash_code
from hypernodes._signature.values import hash_value
from hypernodes._threads import default_threads, in_thread
from hypernodes.cache._buffer import buffer_of, identity
from hypernodes.cache._code import Code, read_code
from hypernodes.cache._codec import encode
from hypernodes.cache._envelope import Refused, seal, unseal
from hypernodes.cache._flight import Flights
from hypernodes.cache._guard import guard_of
from hypernodes.cache._ledger import History, Ledger, read_histories, write_histories
from hypernodes.cache._loaded import Loaded
from hypernodes.cache._store import size as bytes_in
from hypernodes.errors import UncacheableError

PLAIN = 17
"""In an envelope's header: not a pickle."""
SMALL = 64 * 1024
"""Bytes under which entries are gathered and written together."""
MOST_FRESH = 100_000
"""Entries of its own that a run knows without asking, those asked for last."""
MOST_HELD = 4_096
MOST_HELD_BYTES = 64 << 20
"""Bounds of what has been read and not been loaded, after which the oldest is forgotten: it can be read again."""
_NUMBERS = frozenset({int, float, complex, bool, type(None)})
_log = logging.getLogger("hypernodes")
_CHECKED_AT_ONCE = 500
_said: weakref.WeakKeyDictionary[Node[..., Any], set[str]] = weakref.WeakKeyDictionary()
"""What has been said of nodes in this process: a service runs the same ones again and again."""
_FLIGHTS = Flights()


class CacheSession:
    """One run's use of one store. Nothing in it ever fails a run."""

    def __init__(self, store: Any, *, nested: bool = False) -> None:
        self.store = store
        self._nested = nested
        """Whether a node's function has started this run: then it may hold a token that others wait for."""
        self._guard = guard_of(store)
        self._guard.check()
        self._buffer = buffer_of(identity(store))
        self._secret: bytes | None = getattr(store, "key", None)
        self._codes: dict[Node[..., Any], Code | None] = {}
        self._classes: dict[type, bytes] = {}
        """Digests of the code of classes that inputs are of."""
        self._fresh: OrderedDict[str, None] = OrderedDict()
        self._broken: set[str] = set()
        self._fetched: dict[str, Any] = {}
        """Entries that are about to be loaded."""
        self._held: OrderedDict[str, Any] = OrderedDict()
        self._held_bytes = 0
        self._warned: set[str] = set()
        self._reasons: dict[Node[..., Any], str] = {}
        self.hashing = Cost()
        """Whether inputs are hashed on the loop or in a thread."""
        self._loading = Cost()
        self._ledger = Ledger()

    # ---- functions

    async def learn(self, nodes: Iterable[Node[..., Any]]) -> None:
        """Fingerprint functions, as they and what they refer to are now."""
        unknown = [node for node in dict.fromkeys(nodes) if node not in self._codes]
        if unknown:
            codes, _ = await in_thread(lambda: [self._code(node) for node in unknown], default_threads())
            self._codes.update(zip(unknown, codes, strict=True))

    def code(self, node: Node[..., Any]) -> Code | None:
        """Return what is known of a node's function; None for one that is not cached."""
        return self._codes.get(node)

    def _code(self, node: Node[..., Any]) -> Code | None:
        try:
            return read_code(node)
        except Exception as error:  # noqa: BLE001 - reading code and values runs the user's code
            self._reasons[node] = str(error)
            self.warn(node, f"node {node.name!r} is not cached: {error}")
            return None

    # ---- entries

    def digest(self, value: Any) -> bytes:
        """Return the digest of a value that is an input, with the code of the classes that its objects are of.

        Safe in any thread.

        Raises:
            UncacheableError: it has no identity that holds in another process.
        """
        classes: set[type] = set()
        digest = hash_value(value, classes=classes)
        if not classes:
            return digest
        for each in classes:
            if each not in self._classes:
                try:
                    self._classes[each] = hash_code(each)
                except Exception as error:  # reading a class runs the user's code
                    raise UncacheableError(f"the class {each.__qualname__} cannot be read: {error!r}") from error
        return sha256(b"".join([digest, *sorted(self._classes[each] for each in classes)])).digest()

    async def find(self, keys: Sequence[str], *, fetch: bool = False) -> set[str]:
        """Return which of these keys have an entry; with ``fetch`` they are read, for :meth:`load` to come."""
        fresh, broken, buffer = self._fresh, self._broken, self._buffer
        found = {key for key in keys if key in fresh or key in buffer} if fresh or buffer else set()
        unknown = [key for key in keys if key not in found and key not in broken] if found or broken else list(keys)
        if not unknown:
            return found
        if self._guard.can_find and not fetch:
            found.update(await self._guard.find_many(unknown))
        else:
            got = await self._guard.get_many(unknown)
            if fetch:
                self._fetched.update(got)
            else:
                self._hold(got)
            found.update(got)
        return found

    def _hold(self, got: Mapping[str, Any]) -> None:
        held = self._held
        for key, data in got.items():
            self._let_go(key)
            held[key] = data
            self._held_bytes += bytes_in(data)
        while len(held) > MOST_HELD or self._held_bytes > MOST_HELD_BYTES:
            self._let_go(next(iter(held)))

    def _let_go(self, key: str, default: Any = None) -> Any:
        data = self._held.pop(key, default)
        if data is not None:
            self._held_bytes -= bytes_in(data)
        return data

    def has(self, key: str) -> bool:
        """Say whether this run has saved an entry."""
        there = key in self._fresh
        if there:
            self._fresh.move_to_end(key)
        return there

    async def load(self, keys: Iterable[str]) -> tuple[Loaded, dict[str, str]]:
        """Return the values of entries, and for those that cannot be used why; these count as missing from now on."""
        sealed: dict[str, Any] = {}
        missing = list(dict.fromkeys(keys))
        if self._buffer:
            # What has been made anew counts, and not what was there before.
            sealed = {key: data for key in missing if (data := self._buffer.get(key)) is not None}
        for waiting, take in ((self._fetched, self._fetched.pop), (self._held, self._let_go)):
            if waiting:
                for key in missing:
                    data = take(key, None)
                    if data is not None:
                        sealed.setdefault(key, data)
        if sealed:
            missing = [key for key in missing if key not in sealed]
        if missing:
            sealed.update(await self._guard.get_many(missing))
        cost = self._loading
        if cost.inline and len(sealed) == 1:
            began = time.perf_counter()
            loaded = Loaded(sealed, self._secret)
            now = time.perf_counter()
            if now - began > CHEAP_S:
                cost.doubted(now - began, now)
        else:
            loaded, spent = await in_thread(partial(Loaded, sealed, self._secret), default_threads())
            cost.measured(spent.seconds / max(len(sealed), 1))
        refused = loaded.refused
        for reason in set(refused.values()):
            self.warn(None, f"entries of the cache are not used, and made anew: {reason}")
        for key in missing:
            if key not in sealed:
                refused[key] = "it is no longer there"
        self._broken.update(refused)
        self._forget(refused)
        return loaded, refused

    async def check(self, keys: Iterable[str]) -> dict[str, str]:
        """Return which entries cannot be used, and why: all are read, and none is unpickled."""
        refused: dict[str, str] = {}
        keys = list(keys)
        for start in range(0, len(keys), _CHECKED_AT_ONCE):
            some = keys[start : start + _CHECKED_AT_ONCE]
            sealed: dict[str, Any] = {key: data for key in some if (data := self._buffer.get(key)) is not None}
            sealed |= await self._guard.get_many([key for key in some if key not in sealed])
            refused |= (await in_thread(partial(self._unusable, sealed), default_threads()))[0]
        self._broken.update(refused)
        return refused

    def _unusable(self, sealed: Mapping[str, Any]) -> dict[str, str]:
        refused = {}
        for key, data in sealed.items():
            try:
                unseal(key, data, self._secret)
            except Refused as error:
                refused[key] = str(error)
        return refused

    async def save(self, code: Code, key: str, value: Any, seconds: float, digests: Iterable[bytes]) -> int | None:
        """Store what a call made; return its size in bytes, or None when it cannot be stored."""
        # What a function has made is kept, also when the run is cancelled by now.
        cost = code.saving
        if cost.inline or _is_small(value):
            began = time.perf_counter()
            sealed = self._sealed(code, key, value, seconds)
            now = time.perf_counter()
            if not cost.inline:
                cost.measured(now - began)
            elif now - began > CHEAP_S:
                cost.doubted(now - began, now)
        else:
            call = partial(self._sealed, code, key, value, seconds)
            with anyio.CancelScope(shield=True):
                sealed, spent = await in_thread(call, default_threads())
            # Not the seconds of the clock: threads that wait for each other would never prove to be cheap.
            cost.measured(spent.cpu_s)
        if sealed is None:
            return None
        size = sum(map(bytes_in, sealed))
        if size >= SMALL:
            with anyio.CancelScope(shield=True):
                stored = await self._guard.set_many({key: sealed})
            if not stored:
                return None
            self._note(code, key, seconds, digests)
            return size
        self._note(code, key, seconds, digests)
        if self._buffer.put(key, b"".join(sealed)):
            with anyio.CancelScope(shield=True):
                await self.flush()
        return size

    def _note(self, code: Code, key: str, seconds: float, digests: Iterable[bytes]) -> None:
        self._broken.discard(key)
        if self._fetched or self._held:
            # What was there before no longer counts.
            self._fetched.pop(key, None)
            self._let_go(key)
        self._fresh[key] = None
        if len(self._fresh) > MOST_FRESH:
            self._fresh.popitem(last=False)
        self._ledger.note(code.history, code.names, code.parts, key, seconds, digests)

    def _forget(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._fresh.pop(key, None)

    def _sealed(self, code: Code, key: str, value: Any, seconds: float) -> list[Any] | None:
        """Return the entry of a value; None if there can be none."""
        try:
            codec, payload = encode(value)
        except Exception as error:  # noqa: BLE001 - pickling runs the user's code
            self.warn(
                code.node,
                f"what node {code.node.name!r} returns is not cached: it cannot be pickled ({error}); "
                f"say cache=False to be quiet about it",
            )
            return None
        meta = b'%s%.3f, "seconds": %.6f}' % (code.about, time.time(), seconds)
        return seal(key, codec, meta, payload, self._secret)

    @property
    def damaged(self) -> bool:
        """Whether this run has found entries that it could not use."""
        return bool(self._broken)

    async def read_plain(self, key: str) -> bytes | None:
        """Return bytes of our own that are no pickle; None when they are not there or cannot be trusted."""
        data = self._buffer.get(key) or (await self._guard.get_many([key])).get(key)
        if data is None:
            return None
        try:
            codec, payload = unseal(key, data, self._secret)
        except Refused:
            return None
        return bytes(payload) if codec == PLAIN else None

    async def write_plain(self, key: str, data: bytes, about: str) -> None:
        """Store bytes of our own; ``about`` is what inspection calls them."""
        meta = json.dumps({"node": about, "at": round(time.time(), 3), "seconds": 0.0}).encode()
        with anyio.CancelScope(shield=True):
            await self.flush()  # so that whoever finds it finds what it speaks of
            await self._guard.set_many({key: seal(key, PLAIN, meta, [data], self._secret)})

    async def once(self, key: str, compute: Callable[[], Awaitable[Any]]) -> tuple[Any, bool]:
        """Compute what several ask for at the same time once; say whether this caller did it."""
        return await _FLIGHTS.once((self._buffer, key), compute, wait=not self._nested)

    # ---- writing

    def look_again(self) -> None:
        """Have the store look again before it says that something is not there: other processes have written to it."""
        look_again = getattr(self.store, "look_again", None)
        if look_again is not None:
            look_again()

    async def flush(self) -> None:
        """Write what waits to be written."""
        batch = self._buffer.take()
        if batch:
            try:
                stored = await self._guard.set_many(batch)
            except BaseException:
                self._buffer.put_back(batch)
                raise
            if not stored:
                self._forget(batch)
            self._buffer.written(batch)

    def remember(self, noted: Mapping[str, History]) -> None:
        """Take over what the session of a worker process has noted of its entries."""
        self._ledger.add(noted)

    def noted(self) -> dict[str, History]:
        """Return what this session has noted of its entries, for another one to write."""
        return self._ledger.take()

    async def histories(self, names: Iterable[str]) -> dict[str, History]:
        """Return what is remembered of nodes, by the names of their histories."""
        return await read_histories(self._guard, names, self._secret, self._buffer.histories)

    @property
    def unwritten(self) -> bool:
        """Whether there is something left to write."""
        return bool(self._buffer or self._ledger)

    async def aclose(self) -> None:
        """Write what is left."""
        await self.flush()
        if noted := self._ledger.take():
            await write_histories(self._guard, noted, self._secret, self._buffer.histories)

    # ---- what the user should know

    def uncacheable(self, node: Node[..., Any], reason: str) -> None:
        """Note why a node's results cannot be cached, and say so once."""
        self._reasons[node] = reason
        self.warn(node, f"node {node.name!r} is not cached: {reason}")

    def reason(self, node: Node[..., Any]) -> str:
        """Return why a node's results cannot be cached."""
        return self._reasons.get(node, "an input is not known by value")

    def warn(self, about: Any, message: str) -> None:
        """Say something once in a run; of a node, once in this process."""
        said = self._warned if not isinstance(about, Node) else _said.setdefault(about, set())
        if message not in said:
            said.add(message)
            _log.warning("%s", message)


def _is_small(value: Any) -> bool:
    """Say whether a value is surely pickled in no time; of others that has to be measured."""
    kind = type(value)
    return kind in _NUMBERS or (kind in (str, bytes) and len(value) < SMALL)

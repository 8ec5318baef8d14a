"""What stands between a run and a store that may be down, slow, full or wrong: a deadline and a circuit breaker.

A run is never failed by its cache. What a store raises, or does not answer in time, counts as a miss or as a result
that is not kept; after a few failures in a row the store is left alone for a while, and then tried by one call.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import threading
import time
import traceback
import weakref
from collections.abc import Collection, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import anyio

from hypernodes._context import await_in_copy
from hypernodes.cache._store import Store, joined, total
from hypernodes.errors import CacheError

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from hypernodes.cache._store import Entry

T = TypeVar("T")

Way: TypeAlias = Literal["read", "write"]

DEADLINE_S = 5.0
"""Seconds for one call of a store that names no ``deadline_s`` of its own."""
KEYS_PER_S = 100.0
"""How much longer a call may take that asks for much."""
BYTES_PER_S = 4e6
"""Likewise, one that writes much."""

FAILURES = 3
"""Failures in a row that open a breaker. Running into the deadline opens it at once: each time costs seconds."""
OPEN_S = 1.0
"""Seconds that an open breaker stays so; doubled by each attempt in vain."""
LONGEST_OPEN_S = 30.0

QUIET_S = 60.0
"""Seconds after a warning in which a store that fails on and off gets no other."""

_log = logging.getLogger("hypernodes")


def guard_of(store: Store) -> Guard:
    """Return a store's guard; what is known of the store's health is shared in the process and outlives runs."""
    return Guard(store, _health_of(store))


class Guard:
    """A store as runs see it: it answers in time and does not raise.

    A store may name its ``deadline_s``, the seconds for a call about little; None stands for no deadline at all, as
    for files, which a thread reads that nobody can stop.
    """

    __slots__ = ("_deadline_s", "can_find", "health", "store")

    def __init__(self, store: Store, health: Health) -> None:
        self.store = store
        self.health = health
        self.can_find = callable(getattr(store, "find_many", None))
        """Whether the store can say what it has without reading it."""
        deadline_s: float | None = getattr(store, "deadline_s", DEADLINE_S)
        self._deadline_s = math.inf if deadline_s is None else deadline_s

    def check(self) -> None:
        """Ask a store that has a ``check`` whether it can be used here; it raises ``CacheError`` if not.

        To be called on the event loop of a run, as it starts.
        """
        check = getattr(self.store, "check", None)
        if check is not None:
            check()

    async def get_many(self, keys: Sequence[str]) -> Mapping[str, Buffer]:
        """Return what the store has for some keys; nothing if it fails."""
        found = await self._call("read", self._got(keys), keys=len(keys))
        return {} if found is None else found

    async def find_many(self, keys: Sequence[str]) -> Collection[str]:
        """Return which of some keys the store has; none if it fails."""
        if not self.can_find:
            return (await self.get_many(keys)).keys()
        found = await self._call("read", self._found(keys), keys=len(keys))
        return () if found is None else found

    async def set_many(self, entries: Mapping[str, Entry]) -> bool:
        """Have the store keep entries; say whether it does."""
        written = sum(map(total, entries.values()))
        return bool(await self._call("write", self._put(entries), keys=len(entries), written=written))

    async def _got(self, keys: Sequence[str]) -> Mapping[str, Buffer]:
        found = await self.store.get_many(keys)
        if not isinstance(found, Mapping):
            raise CacheError(f"get_many() returned {type(found).__name__}, not a mapping of keys to bytes")
        for value in found.values():
            if type(value) is not bytes:
                try:
                    memoryview(value).release()
                except TypeError:
                    raise CacheError(f"get_many() returned {type(value).__name__} for a key, not bytes") from None
        return found

    async def _found(self, keys: Sequence[str]) -> Collection[str]:
        return frozenset(await self.store.find_many(keys))  # type: ignore[attr-defined]

    async def _put(self, entries: Mapping[str, Entry]) -> bool:
        if not getattr(self.store, "takes_parts", False):
            # Large values come in several pieces; a store of the user's gets bytes.
            entries = {key: joined(entry) for key, entry in entries.items()}
        await self.store.set_many(entries)
        return True

    async def _call(self, way: Way, call: Coroutine[Any, Any, T], *, keys: int, written: int = 0) -> T | None:
        """Await a call of the store, if it may be called now; return None if not, and if it fails."""
        health = self.health
        attempt = health.begin(way)
        if attempt is None:
            call.close()
            health.count_lost(way, keys)
            return None
        allowed_s = self._deadline_s + keys / KEYS_PER_S + written / BYTES_PER_S
        try:
            with contextlib.nullcontext() if allowed_s == math.inf else anyio.fail_after(allowed_s):
                result: T = await await_in_copy(call)
        except Exception as error:  # noqa: BLE001 - the store may be the user's own
            health.count_lost(way, keys)
            health.failed(way, attempt, error, self.store)
            return None
        except BaseException:
            health.given_up(way, attempt)
            raise
        health.succeeded(way, attempt, self.store)
        return result


Attempt: TypeAlias = Literal["usual", "trial"]


class Breaker:
    """Whether calls of one kind may be made: all while it is closed, none while it is open, then one on trial."""

    __slots__ = ("_failures", "_open_s", "_open_until", "_trying")

    def __init__(self) -> None:
        self._close()

    def _close(self) -> None:
        self._failures = 0
        self._open_s = OPEN_S
        self._open_until: float | None = None
        self._trying = False

    def begin(self, now: float) -> Attempt | None:
        """Say whether a call may be made at a time, in seconds, and in which capacity."""
        if self._open_until is None:
            return "usual"
        if self._trying or now < self._open_until:
            return None
        self._trying = True
        return "trial"

    def succeeded(self, attempt: Attempt) -> bool:
        """Note a call that went well; say whether that counts: not so for one that began before the breaker opened."""
        if self._open_until is not None and attempt != "trial":
            return False
        self._close()
        return True

    def failed(self, now: float, attempt: Attempt, *, late: bool) -> None:
        """Note a call that failed, or that came to no end in its time."""
        if attempt == "trial":
            self._trying = False
            self._open_s = min(2 * self._open_s, LONGEST_OPEN_S)
        elif self._open_until is not None:
            return
        self._failures += 1
        if late or attempt == "trial" or self._failures >= FAILURES:
            self._open_until = now + self._open_s

    def given_up(self, attempt: Attempt) -> None:
        """Note a call that was cancelled: it tells nothing."""
        if attempt == "trial":
            self._trying = False


class Health:
    """What is known of one store in this process, by runs in any thread."""

    __slots__ = ("__weakref__", "_breakers", "_failing", "_lock", "_quiet_until", "_warned", "dropped", "missed")

    def __init__(self) -> None:
        self.missed = 0
        """Keys that could not be looked up."""
        self.dropped = 0
        """Entries that could not be written."""
        # Reentrant: the garbage collector may close a coroutine that is in a call.
        self._lock = threading.RLock()
        self._breakers: dict[Way, Breaker] = {"read": Breaker(), "write": Breaker()}
        self._failing: set[Way] = set()
        self._warned = False
        self._quiet_until = -math.inf

    def begin(self, way: Way) -> Attempt | None:
        """Say whether a call may be made now."""
        with self._lock:
            return self._breakers[way].begin(time.monotonic())

    def count_lost(self, way: Way, keys: int) -> None:
        """Count keys that were not looked up, or entries that were not written."""
        with self._lock:
            if way == "read":
                self.missed += keys
            else:
                self.dropped += keys

    def given_up(self, way: Way, attempt: Attempt) -> None:
        """Note a call that was cancelled."""
        with self._lock:
            self._breakers[way].given_up(attempt)

    def failed(self, way: Way, attempt: Attempt, error: Exception, store: Store) -> None:
        """Note a failure; the first one of an outage is worth a warning."""
        now = time.monotonic()
        with self._lock:
            self._breakers[way].failed(now, attempt, late=isinstance(error, TimeoutError))
            warn = not self._failing and now >= self._quiet_until
            self._failing.add(way)
            if warn:
                self._warned = True
                self._quiet_until = now + QUIET_S
        if warn:
            effect = "nothing is read from it" if way == "read" else "results are not kept"
            _log.warning("the cache %s fails (%s): until it works again, %s", _name(store), _reason(error), effect)

    def succeeded(self, way: Way, attempt: Attempt, store: Store) -> None:
        """Note a call that went well; the one that ends an outage is worth a line."""
        if not self._failing and attempt == "usual":
            return
        with self._lock:
            if self._breakers[way].succeeded(attempt):
                self._failing.discard(way)
            over = self._warned and not self._failing
            if over:
                self._warned = False
        if over:
            _log.info(
                "the cache %s works again; in all %d lookups and %d results have gone without it",
                _name(store),
                self.missed,
                self.dropped,
            )


def _name(store: Store) -> str:
    # The repr of a user's store may show what it was made with, passwords too.
    return repr(store) if type(store).__module__.startswith("hypernodes.") else type(store).__name__


_TELLING_PACKAGES = {"aiocache", "aiomcache", "hypernodes", "redis"}


def _reason(error: Exception) -> str:
    """Return what went wrong, without what a message may quote: values, keys, passwords.

    Those of the operating system and of known clients are shown; for others the line of code has to do.
    """
    kind = type(error)
    if kind is TimeoutError and not error.args:
        return "no answer in time"
    said = str(error).split("\n")[0].split(", with args")[0]  # redis quotes the arguments of a command it refuses
    if said and (isinstance(error, OSError) or kind.__module__.split(".")[0] in _TELLING_PACKAGES):
        return f"{kind.__name__}: {re.sub(r'://[^@/ ]*@', '://', said)[:200]}"
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
    return kind.__name__ + place


_healths: dict[int, tuple[Any, Health]] = {}
"""By the identity of a store, since equal stores may be different ones: what keeps track of the store, its health."""
_healths_lock = threading.RLock()


def _health_of(store: Store) -> Health:
    key = id(store)
    with _healths_lock:
        if key not in _healths:
            try:
                alive: Any = weakref.ref(store, lambda _: _healths.pop(key, None))
            except TypeError:
                alive = store  # one that cannot be referred to weakly stays, lest another gets its id
            _healths[key] = alive, Health()
        return _healths[key][1]

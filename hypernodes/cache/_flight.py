"""Single-flight: what several callers in this process need at the same time is computed once.

The first caller computes, in its own task; the others wait for it, on the same event loop or on that of another
thread. Nothing outlives a flight: it is forgotten as soon as its leader has landed.

Waiting cannot deadlock. A context carries the chain of flights that it runs in, and each flight knows what the
code inside it waits for, so a caller can see beforehand that its waiting would close a circle. What is waited for
besides flights is not known; so those who may hold it do not wait, and nobody waits for another loop for ever.
"""

from __future__ import annotations

import copy
import os
import sys
import threading
import weakref
from collections.abc import Awaitable, Callable, Hashable, Iterator
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, Literal, TypeVar

import anyio

from hypernodes.errors import CacheError

T = TypeVar("T")

ACROSS_LOOPS_S = 5.0
"""Seconds that a caller waits for a leader on another event loop; then it computes for itself."""

_leading: ContextVar[_Flight | None] = ContextVar("hypernodes_leading", default=None)
"""The innermost flight that this code runs in; tasks and threads started there inherit it."""

# Reentrant: while it is held the garbage collector may close a coroutine that waits here, which takes it too.
_lock = threading.RLock()


class Flights:
    """What is being computed for one cache in this process, by key."""

    __slots__ = ("__weakref__", "_flying", "patience_s")

    def __init__(self, patience_s: float | None = None) -> None:
        self.patience_s = patience_s
        """Seconds that a caller waits for a leader on another event loop; None for ``ACROSS_LOOPS_S``."""
        self._flying: dict[Hashable, _Flight] = {}
        _everywhere.add(self)

    def __len__(self) -> int:
        return len(self._flying)

    async def once(self, key: Hashable, compute: Callable[[], Awaitable[T]], *, wait: bool = True) -> tuple[T, bool]:
        """Return the result for a key, and whether this very call computed it.

        While a key is being computed, other calls for it wait and get the same object, whatever their thread and
        event loop. An ``Exception`` of the leader is raised in all of them, in each a copy of its own where one can
        be made. If the leader is cancelled (or ends by ``KeyboardInterrupt`` and the like), one of them computes.
        With ``wait=False`` a call computes for itself when another one does already: for callers that hold what the
        other one may be waiting for, such as a token of a limit.

        Raises:
            CacheError: the code that computes the key asks for the key, and would wait for itself.
        """
        outer = _leading.get()
        if outer is not None:
            outer = self._enclosing(outer, key)
        flight = _Flight(self, key, outer, _this_loop())
        try:
            # One atomic step: alone, a caller needs no lock.
            while (there := self._flying.setdefault(key, flight)) is not flight:
                if not wait or not await _landing(there, outer):
                    break  # the other side waits for this one, so this one computes for itself
                if there.state == "landed":
                    return there.result, False
                if there.state == "failed":
                    raise there.error()
            del there
            token = _leading.set(flight)
            try:
                result = await compute()
            except Exception as error:
                flight.land("failed", error=error)
                raise
            finally:
                try:  # noqa: SIM105 - `suppress` would take longer than all the rest
                    _leading.reset(token)
                except ValueError:
                    pass  # a coroutine that is thrown away may be closed in another context
            flight.land("landed", result)
            return result, True
        finally:
            if flight.state == "flying":
                flight.land("abandoned")
            del flight  # a traceback holds this frame, which would hold the flight and with it the error

    def _enclosing(self, innermost: _Flight, key: Hashable) -> _Flight | None:
        """Return the innermost flight that this call is part of; refuse a key that one of them computes."""
        flying = [flight for flight in _chain(innermost) if flight.state == "flying"]
        if any(flight.key == key and flight.home is self for flight in flying):
            raise CacheError(
                "a cached node needs its own result: its function runs a pipeline that has the same node with the "
                "same inputs, so it would wait for itself without end"
            )
        return flying[0] if flying else None


class _Flight:
    """One computation of a key by one caller, its leader."""

    __slots__ = ("_failure", "awaits", "home", "key", "loop", "outer", "result", "state", "waiters")

    def __init__(self, home: Flights, key: Hashable, outer: _Flight | None, loop: object) -> None:
        self.home = home
        self.key = key
        self.outer = outer
        self.loop = loop
        """What identifies the leader's event loop."""
        self.state: Literal["flying", "landed", "failed", "abandoned"] = "flying"
        self.result: Any = None
        self.waiters: dict[_Waiter, None] = {}
        """Who waits for this flight, in the order in which they came."""
        self.awaits: dict[_Waiter, None] = {}
        """The waits of the code inside this flight."""
        self._failure: _Failure | None = None

    def land(
        self,
        state: Literal["landed", "failed", "abandoned"],
        result: Any = None,
        *,
        error: Exception | None = None,
    ) -> None:
        """End the flight and wake those who wait.

        First the state is set and then the waiters are looked at; a waiter first enters and then looks at the
        state. So each is either woken or has seen the end.
        """
        self.result = result
        if error is not None:
            self._failure = _Failure(error)
        self.state = state
        if self.home._flying.get(self.key) is self:
            del self.home._flying[self.key]
        if self.waiters:
            with _lock:
                waiters, self.waiters = self.waiters, {}
            here = _this_loop()
            for waiter in waiters:
                waiter.wake(here)

    def error(self) -> Exception:
        """Return the leader's error for one of those who waited."""
        assert self._failure is not None
        return self._failure.copy()


class _Waiter:
    """One wait for a flight."""

    __slots__ = ("_event", "flight", "loop")

    def __init__(self, flight: _Flight) -> None:
        self.flight = flight
        self._event = anyio.Event()
        self.loop = _this_loop()

    async def wait(self) -> None:
        await self._event.wait()

    def wake(self, here: object) -> None:
        """Wake the waiting task; ``here`` is the event loop of the caller."""
        if self.loop is here:
            self._event.set()
        else:
            with suppress(RuntimeError):  # on a loop that is closed by now nobody waits
                _post(self.loop, self._event.set)


class _Failure:
    """A leader's error as it was when it left, before anyone else noted or raised it elsewhere."""

    __slots__ = ("_error", "_notes", "_traceback")

    def __init__(self, error: Exception) -> None:
        self._error = error
        self._notes = tuple(getattr(error, "__notes__", ()))
        self._traceback = error.__traceback__

    def copy(self) -> Exception:
        """Return a copy of the error, since one object raised in several places would mix their tracebacks and notes.

        The same object, if its class makes no equal copy.
        """
        error = self._error
        try:
            twin = _twin(error)
            twin.__cause__, twin.__context__ = error.__cause__, error.__context__
            twin.__suppress_context__ = error.__suppress_context__
            if self._notes:
                twin.__notes__ = list(self._notes)
        except Exception:  # noqa: BLE001 - a class of the user's may do anything when it is copied
            twin = error
        return twin.with_traceback(self._traceback)


def _twin(error: Exception) -> Exception:
    """Return an equal error; its class's ``__init__`` often takes other arguments than ``args``."""
    try:
        twin = copy.copy(error)
        if type(twin) is not type(error) or twin.args != error.args:
            raise TypeError("not a copy")
    except Exception:
        twin = type(error).__new__(type(error), *error.args)
        twin.__dict__.update(error.__dict__)
        if str(twin) != str(error):
            raise
    # Some classes return themselves, which is no copy.
    if twin is error:
        raise TypeError("not a copy")
    if twin.__dict__ is error.__dict__:  # as tblib has it, which other packages install
        twin.__dict__ = dict(error.__dict__)
    twin.__dict__.pop("__notes__", None)
    return twin


async def _landing(flight: _Flight, outer: _Flight | None) -> bool:
    """Wait until a flight has ended; return False, at once, if it could not end before this caller goes on."""
    waiter = _Waiter(flight)
    enclosing = list(_chain(outer))
    with _lock:
        if enclosing and _depends(flight, set(enclosing)):
            return False
        flight.waiters[waiter] = None
        for each in enclosing:
            each.awaits[waiter] = None
    try:
        if flight.state == "flying":
            if flight.loop is waiter.loop:
                await waiter.wait()
            else:
                # What the leader waits for there cannot be known, such as a token that this caller holds.
                with anyio.move_on_after(flight.home.patience_s or ACROSS_LOOPS_S):
                    await waiter.wait()
    finally:
        with _lock:
            flight.waiters.pop(waiter, None)
            for each in enclosing:
                del each.awaits[waiter]
    return flight.state != "flying"


def _depends(flight: _Flight, others: set[_Flight]) -> bool:
    """Say whether the code inside a flight waits, directly or not, for one of the others."""
    seen: set[_Flight] = set()
    ahead = [flight]
    while ahead:
        each = ahead.pop()
        if each in others:
            return True
        if each not in seen:
            seen.add(each)
            ahead += [waiter.flight for waiter in list(each.awaits)]
    return False


def _chain(flight: _Flight | None) -> Iterator[_Flight]:
    while flight is not None:
        yield flight
        flight = flight.outer


def _this_loop() -> object:
    """Return what identifies the running event loop; None where a coroutine is being closed outside any."""
    # As current_async_library() does, in fewer steps: it is asked for each call that a cache does not have.
    trio = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_run():
        return trio.lowlevel.current_trio_token()
    asyncio = sys.modules.get("asyncio")
    try:
        return None if asyncio is None else asyncio.get_running_loop()
    except RuntimeError:
        return None


def _post(loop: Any, call: Callable[[], object]) -> None:
    """Have the event loop of another thread call something."""
    post = loop.call_soon_threadsafe if hasattr(loop, "call_soon_threadsafe") else loop.run_sync_soon
    post(call)


_everywhere: weakref.WeakSet[Flights] = weakref.WeakSet()


def _forget_flights() -> None:
    """In a forked child nobody is left who could land what was flying, nor to release the lock."""
    global _lock  # noqa: PLW0603 - a lock that another thread held at the fork stays taken in the child
    _lock = threading.RLock()
    for flights in list(_everywhere):
        flights._flying.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_flights)

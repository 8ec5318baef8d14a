"""A sync function's call in a worker thread, and what cancelling it can do."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import anyio
from anyio.lowlevel import RunVar

DEFAULT_THREADS = 64
_POLL_S = 0.005
_limiter: RunVar[anyio.CapacityLimiter] = RunVar("hypernodes_threads")


def current_async_library() -> Literal["asyncio", "trio"] | None:
    """Return whose event loop this thread runs, be it in a task or in a plain callback; None for no loop."""
    trio = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_run():
        return "trio"
    asyncio = sys.modules.get("asyncio")
    try:
        return "asyncio" if asyncio is not None and asyncio.get_running_loop() is not None else None
    except RuntimeError:
        return None


def default_threads() -> anyio.CapacityLimiter:
    """Return this event loop's limiter: ours alone, not the one that anyio shares with other libraries."""
    try:
        return _limiter.get()
    except LookupError:
        limiter = anyio.CapacityLimiter(DEFAULT_THREADS)
        _limiter.set(limiter)
        return limiter


async def in_thread(
    call: Callable[[], Any], limiter: anyio.CapacityLimiter, leave: Callable[[], bool] = lambda: False
) -> tuple[Any, Spent]:
    """Call in a worker thread; return the result and what it took there.

    When cancelled it waits for the thread, which Python cannot stop, unless ``leave`` says to let it run on.
    """
    from anyio.to_thread import run_sync

    in_thread = ThreadCall(call)
    token = thread_call.set(in_thread)
    try:
        # Always "abandon": what happens to a thread that runs on is decided here, not by a shielded scope,
        # into which asyncio's own task.cancel() would reach.
        return await run_sync(in_thread.run, abandon_on_cancel=True, limiter=limiter)
    except anyio.get_cancelled_exc_class():
        if not in_thread.give_up() and not leave():
            await in_thread.ended()
        raise
    finally:
        thread_call.reset(token)


class Spent(NamedTuple):
    """What a call took in its thread: seconds by the clock, and of the CPU."""

    seconds: float
    cpu_s: float


class ThreadCall:
    """A call in a worker thread that its awaiter can take back, or wait for, when it is cancelled."""

    __slots__ = ("_call", "_lock", "_state", "given_up")

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._lock = threading.Lock()
        self._state: Literal["waiting", "running", "ended"] = "waiting"
        self.given_up = False

    def run(self) -> tuple[Any, Spent]:
        """Call, in the thread; return the result and what it took."""
        with self._lock:
            if self.given_up:
                return None, Spent(0.0, 0.0)
            self._state = "running"
        began, computing = time.perf_counter(), time.thread_time()
        try:
            result = self._call()
            return result, Spent(time.perf_counter() - began, time.thread_time() - computing)
        finally:
            self._state = "ended"

    def give_up(self) -> bool:
        """Say whether the call is not running; one that waited for its thread will not start."""
        with self._lock:
            self.given_up = True
            return self._state != "running"

    async def ended(self) -> None:
        """Wait for the thread, whoever cancels: asyncio's own ``task.cancel()`` reaches into a shielded scope."""
        while self._state == "running":
            with anyio.CancelScope(shield=True), contextlib.suppress(anyio.get_cancelled_exc_class()):
                await anyio.sleep(_POLL_S)


thread_call: ContextVar[ThreadCall | None] = ContextVar("hypernodes_thread_call", default=None)
"""The call that this code runs in, if it runs in a worker thread of a run."""


def given_up() -> bool:
    """Say whether the run around this worker thread has been cancelled."""
    call = thread_call.get()
    return call is not None and call.given_up

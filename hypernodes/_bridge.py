"""Calling async code from sync code: in this thread when it has no event loop, else in one of its own."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

import anyio

from hypernodes._crew import Crew
from hypernodes._stream import Handover
from hypernodes._threads import current_async_library, given_up, thread_call
from hypernodes._traceback import user_frames

if TYPE_CHECKING:
    from anyio.from_thread import BlockingPortal

R = TypeVar("R")
T = TypeVar("T")

blocking: ContextVar[bool] = ContextVar("hypernodes_blocking", default=False)
"""Whether this code is called by sync code that holds an event loop meanwhile: what runs there stands still."""
POLL_S = 0.02
"""Seconds between looks at whether the run around a sync node has been cancelled."""


class RunStopped(BaseException):
    """Unwinds a sync call that was stopped from outside: its node's run was cancelled, or the user interrupted."""


def run_sync(call: Callable[[], Awaitable[R]]) -> R:
    """Run an async call to its end and return its result.

    Without a running event loop the call runs on a new one in this thread. Inside one (a notebook cell, an
    async function that calls sync code) it runs on a new loop in another thread, while this one waits. In a
    sync node's worker thread, cancelling the node's run cancels the call.
    """
    if current_async_library() is None:
        outcome: list[Callable[[], R]] = []

        async def box() -> None:
            # Not returned from the loop's main task, whose repr asyncio may make, with all that it returns.
            outcome.append(await _outcome(None if thread_call.get() is None else given_up, call))

        anyio.run(box)
        return outcome[0]()
    from anyio.from_thread import start_blocking_portal

    token = blocking.set(True)
    try:
        with start_blocking_portal() as portal:
            return _call(portal, call)
    finally:
        blocking.reset(token)


class Iteration(Generic[T]):
    """A stream in a ``with`` block: on a loop in another thread, read from this one."""

    def __init__(self, open_stream: Callable[[], AbstractAsyncContextManager[AsyncIterator[T]]], written: str) -> None:
        self._opened = open_stream()
        self._written = written
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> Iterator[T]:
        from anyio.from_thread import start_blocking_portal

        with contextlib.ExitStack() as opening:
            opening.enter_context(_interruptible())
            portal = opening.enter_context(start_blocking_portal())
            stream = opening.enter_context(portal.wrap_async_context_manager(self._opened))
            self._exit = opening.pop_all()
        assert isinstance(stream, Handover)

        def items() -> Iterator[T]:
            while not closed():
                with user_frames:
                    batch = _call(portal, stream.batch)
                if not batch:
                    return
                yield from batch

        def closed() -> bool:
            return self._exit is _CLOSED

        return items()

    def __exit__(self, *raised: Any) -> None:
        closing, self._exit = self._exit, _CLOSED
        closing.__exit__(*raised)

    def __iter__(self) -> NoReturn:
        raise TypeError(f"a stream has to be closed, so it is opened first: write `with {self._written}`")


_CLOSED = contextlib.ExitStack()


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt in a block inside a running loop, which asyncio would only note."""
    handler = signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or not callable(handler) or current_async_library() is None:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _call(portal: BlockingPortal, call: Callable[[], Awaitable[R]]) -> R:
    """Call through a portal; Ctrl-C meanwhile cancels the call, waits for its end, and is raised then.

    A KeyboardInterrupt in the middle of this thread's wait could leave the wait's own locks taken, and
    asyncio's handler would wait for a loop that is waiting here.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        return portal.call(_outcome, None if thread_call.get() is None else given_up, call)()
    interrupted = False

    def interrupt(signum: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            signal.default_int_handler(signum, frame)
        interrupted = True

    signal.signal(signal.SIGINT, interrupt)
    try:
        from concurrent.futures import wait

        future = portal.start_task_soon(_outcome, lambda: interrupted, call)
        # A signal may be delivered to another thread: then this one has to wake to handle it.
        while not future.done():
            wait([future], timeout=POLL_S)
        outcome = future.result()
    finally:
        signal.signal(signal.SIGINT, handler)
    if interrupted:
        # Also when the call was done just then: an interrupt is never lost.
        raise KeyboardInterrupt
    return outcome()


async def _outcome(stopped: Callable[[], bool] | None, call: Callable[[], Awaitable[R]]) -> Callable[[], R]:
    """Await a call and return what gives its result or raises its error.

    What is no ``Exception``, such as ``SystemExit`` from a node, would otherwise end the portal on its way.
    """
    try:
        result = await _unless(stopped, call)
    except anyio.get_cancelled_exc_class():
        raise
    except BaseException as error:  # noqa: BLE001 - raised in the calling thread
        return partial(_raise, error)
    return lambda: result


def _raise(error: BaseException) -> NoReturn:
    raise error


async def _unless(stopped: Callable[[], bool] | None, call: Callable[[], Awaitable[R]]) -> R:
    """Await a call, unless it should stop: then cancel it.

    Raises:
        RunStopped: it was stopped.
    """
    if stopped is None:
        return await call()
    made: list[R] = []

    async def watch(crew: Crew) -> None:
        while not stopped():  # noqa: ASYNC110 - set by a signal handler or another thread, which can set no Event of this loop
            await anyio.sleep(POLL_S)
        crew.fail(RunStopped())

    async def both(crew: Crew) -> None:
        crew.start(watch)
        made.append(await call())
        crew.stop()

    await Crew.run(both)
    return made[0]

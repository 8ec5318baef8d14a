"""Calling async code from sync code: in this thread when it has no event loop, else in one of its own."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

import anyio
import anyio.from_thread
import anyio.lowlevel

from hypernodes._stream import Handover

R = TypeVar("R")
T = TypeVar("T")

POLL_S = 0.05
"""Seconds between looks at whether the run around a sync node has been cancelled."""


def run_sync(call: Callable[[], Awaitable[R]]) -> R:
    """Run an async call to its end and return its result.

    Without a running event loop the call runs on a new one in this thread. Inside one (a notebook cell, an
    async function that calls sync code) it runs on a new loop in another thread, while this one waits. In a
    sync node's worker thread, cancelling the node's run cancels the call.
    """
    if _loop_is_running():
        with anyio.from_thread.start_blocking_portal() as portal:
            return portal.call(call)
    try:
        return anyio.run(_followed, call)
    except _StoppedFromOutside as stopped:
        raise stopped.cancellation from None


@contextlib.contextmanager
def iterate_sync(open_stream: Callable[[], AbstractAsyncContextManager[AsyncIterator[T]]]) -> Iterator[Iterator[T]]:
    """Open an async stream on a loop in another thread and iterate over it from this one."""
    opened = open_stream()
    with (
        anyio.from_thread.start_blocking_portal() as portal,
        portal.wrap_async_context_manager(opened) as stream,
    ):
        assert isinstance(stream, Handover)

        def items() -> Iterator[T]:
            while batch := portal.call(stream.batch):
                yield from batch

        yield items()


async def _followed(call: Callable[[], Awaitable[R]]) -> R:
    """Await a call; when this thread is a worker of another loop, follow that loop's cancellation."""
    if not _is_worker_thread():
        return await call()
    result: Any = None
    failure: BaseException | None = None
    outer: BaseException | None = None
    async with anyio.create_task_group() as group:

        async def watch() -> None:
            nonlocal outer
            while True:
                await anyio.sleep(POLL_S)
                try:
                    anyio.from_thread.check_cancelled()
                except BaseException as error:  # noqa: BLE001 - the outer loop's own cancellation, raised below
                    outer = error
                    group.cancel_scope.cancel()
                    return

        group.start_soon(watch)
        try:
            result = await call()
        except anyio.get_cancelled_exc_class():
            raise
        except BaseException as error:  # noqa: BLE001 - raised again below, outside the group
            failure = error
        group.cancel_scope.cancel()
    if outer is not None:
        raise _StoppedFromOutside(outer)
    if failure is not None:
        raise failure
    return result  # type: ignore[no-any-return]


class _StoppedFromOutside(BaseException):
    """Carries the outer loop's cancellation through the inner loop."""

    def __init__(self, cancellation: BaseException) -> None:
        self.cancellation = cancellation


def _is_worker_thread() -> bool:
    try:
        anyio.from_thread.check_cancelled()
    except RuntimeError:
        return False
    return True


def _loop_is_running() -> bool:
    try:
        anyio.lowlevel.current_token()
    except RuntimeError:
        return False
    return True

"""Apps and calls on Modal that end when who started them leaves, at whatever moment."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import anyio

from hypernodes._crew import unbroken
from hypernodes._threads import current_async_library
from hypernodes.backend._handle import RemoteCall
from hypernodes.backend._modal_errors import A_RUN, begun, translated
from hypernodes.errors import ExecutionError, RemoteExecutionError

_CREATED_S = 10.0
"""Seconds that who leaves waits for the id of the app that is to be ended."""
_POLL_S = 0.005


@contextlib.asynccontextmanager
async def running(app: Any, manager: contextlib.AbstractAsyncContextManager[Any]) -> AsyncIterator[None]:
    """Run an app for as long as the block; who leaves, at whatever moment, leaves nothing running.

    It begins and ends in a task of its own, which a cancellation reaches once: anyio cancels a task again at each of
    its waits, and each of these would reach the request by which Modal's client ends the app.
    """
    loop = asyncio.get_running_loop()
    begun, leave = loop.create_future(), asyncio.Event()

    async def hold() -> None:
        async with manager:
            begun.set_result(None)
            await leave.wait()

    task = loop.create_task(hold())
    try:
        await asyncio.wait([task, begun], return_when=asyncio.FIRST_COMPLETED)
        if begun.done():
            yield
    except asyncio.CancelledError:
        await unbroken(partial(_cancel, app, task))
        raise
    finally:
        leave.set()
        await unbroken(partial(_ended, task))
    await task  # raises what went wrong with the app


async def _cancel(app: Any, task: asyncio.Task[None]) -> None:
    """Cancel the task that runs an app, once Modal's client knows which one: it would not end another."""
    with anyio.move_on_after(_CREATED_S):
        while not (task.done() or app.app_id):  # noqa: ASYNC110 - nothing tells of it
            await anyio.sleep(_POLL_S)
    task.cancel()


async def _ended(task: asyncio.Task[None]) -> None:
    """Wait for a task; what it raised is for others to raise."""
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()


async def spawned(function: Any, arguments: tuple[Any, ...]) -> Any:
    """Start a call of a function; who leaves meanwhile leaves nothing running."""
    calls: list[Any] = []

    async def spawn() -> None:
        calls.append(await function.spawn.aio(*arguments))

    try:
        await unbroken(spawn)
    except anyio.get_cancelled_exc_class():
        if calls:
            await unbroken(partial(end_call, calls[0]))
        raise
    return calls[0]


async def reply_of(function: Any, arguments: tuple[Any, ...]) -> bytes:
    """Call a function of an app that stays; leaving early ends the call."""
    call = await spawned(function, arguments)
    try:
        return await call.get.aio()  # type: ignore[no-any-return]
    except anyio.get_cancelled_exc_class():
        await unbroken(partial(end_call, call))
        raise


async def end_call(call: Any) -> None:
    """End a call, and its container with it, whatever runs there."""
    await call.cancel.aio(terminate_containers=True)


class ModalCall(RemoteCall):
    """A spawned call, by the id that Modal knows it by."""

    def __init__(self, id: str) -> None:
        self._call = modal_client().FunctionCall.from_id(id)

    async def reply(self, seconds: float | None) -> bytes:
        """Wait for the reply, at most so long."""
        need_asyncio()
        with translated(A_RUN), begun(A_RUN):
            return await self._call.get.aio(timeout=seconds)  # type: ignore[no-any-return]

    def is_end(self, error: ExecutionError) -> bool:
        """Say whether it is an error of the call, and not of the account or the connection."""
        from modal.exception import AuthError, ConnectionError

        return not isinstance(error.__cause__, AuthError | ConnectionError)

    async def cancel(self) -> None:
        """End the call and its container."""
        need_asyncio()
        with translated(A_RUN):
            await self._call.cancel.aio(terminate_containers=True)


def attached(id: str) -> RemoteCall:
    """Return a call by its id."""
    return ModalCall(id)


def need_asyncio() -> None:
    """Raise an error under another event loop than asyncio's."""
    if current_async_library() != "asyncio":
        raise RemoteExecutionError("Modal's client needs asyncio; under trio, call run() in a thread")


def modal_client() -> Any:
    """Return the package ``modal``, or raise an error that says what to install."""
    try:
        import modal
    except ModuleNotFoundError as error:
        raise RemoteExecutionError('ModalBackend needs Modal\'s client: pip install "hypernodes[modal]"') from error
    return modal

"""Apps and calls on Modal that end when who started them leaves, at whatever moment."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import anyio

from hypernodes._crew import Crew, unbroken

_CREATED_S = 10.0
"""Seconds that who leaves waits for the id of the app that is to be ended."""
_POLL_S = 0.005


async def begun(app: Any, running: contextlib.AbstractAsyncContextManager[Any]) -> None:
    """Begin to run an app; who leaves meanwhile leaves nothing running.

    Modal's client does not end an app if it is cancelled before it has been told the app's id.
    """
    began, ended, left = [], anyio.Event(), anyio.Event()
    beginning = anyio.CancelScope(shield=True)

    async def begin(_: Crew) -> None:
        try:
            with beginning:
                began.append(await running.__aenter__())
        finally:
            ended.set()

    async def end() -> None:
        await running.__aexit__(None, None, None)

    async def cancel_late(_: Crew) -> None:
        with anyio.CancelScope(shield=True):
            await left.wait()
            with anyio.move_on_after(_CREATED_S):
                while not (ended.is_set() or app.app_id):  # noqa: ASYNC110 - nothing tells of it
                    await anyio.sleep(_POLL_S)
            beginning.cancel()

    async def both(crew: Crew) -> None:
        crew.start(begin)
        crew.start(cancel_late)
        try:
            await ended.wait()
        finally:
            left.set()

    try:
        await Crew.run(both)
    except anyio.get_cancelled_exc_class():
        if began:
            await unbroken(end)
        raise


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

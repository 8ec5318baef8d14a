"""The caller's end on Modal: the calls of one run, and the events that come back while they last."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import anyio

from hypernodes._crew import Crew
from hypernodes._threads import default_threads, in_thread
from hypernodes.backend._entry import Shared
from hypernodes.backend._modal_calls import modal_client, reply_of
from hypernodes.backend._modal_errors import begun, translated
from hypernodes.backend._modal_job import SharedRef
from hypernodes.backend._remote import Line
from hypernodes.backend._replay import Receive

_log = logging.getLogger("hypernodes")
_INLINE_BYTES = 1 << 20
_PIECE_BYTES = 16 << 20
_END = ("", 0, 0, b"")
"""Follows the last piece of an event in a queue."""
_BEAT_S = 0.25
"""Seconds between two turns of a loop that only waits: Jupyter's interrupt is noticed when it turns."""
_CLOSING_S = 5.0
"""Seconds that a queue gets to take the last word, when the result is there."""
T = TypeVar("T")


class ModalLine(Line):
    """The function of an app, for the calls of one run.

    Args:
        label: what is run, for messages.
        function: what is called.
        volumes: those that are mounted.
        stack: closed when the run ends.
        environment: the Modal environment.
        width: how many containers there may be.
        alone: whether the app is this run's own and ends with it.
    """

    def __init__(
        self,
        label: str,
        function: Any,
        volumes: list[Any],
        stack: contextlib.AsyncExitStack,
        environment: str | None,
        width: int,
        alone: bool,
    ) -> None:
        self.width = width
        self.queue: Any = None
        self._label = label
        self._function = function
        self._volumes = volumes
        self._stack = stack
        self._environment = environment
        self._alone = alone

    async def call(self, payload: bytes, shared: SharedRef | None = None) -> bytes:
        """Call once."""
        arguments = (payload, self._volumes, self.queue, shared)
        with translated(self._label, sent=len(payload)), begun(self._label):
            if self._alone:
                return await self._function.remote.aio(*arguments)  # type: ignore[no-any-return]
            return await reply_of(self._function, arguments)

    async def share(self, data: bytes) -> SharedRef:
        """Keep what calls share in a ``modal.Dict`` while the run lasts, unless it is small."""
        name, _ = await in_thread(lambda: Shared.name(data), default_threads())
        if len(data) <= _INLINE_BYTES:
            return name, data, 0
        store = await self._stack.enter_async_context(
            modal_client().Dict.ephemeral.aio(environment_name=self._environment)
        )
        pieces = range(0, len(data), _PIECE_BYTES)
        for number, start in enumerate(pieces):
            await store.put.aio(number, data[start : start + _PIECE_BYTES])
        return name, store, len(pieces)


async def listening(queue: Any, receive: Receive | None, work: Callable[[], Awaitable[T]]) -> T:
    """Do some work; hand over meanwhile what comes through a queue, if there is one."""
    made: list[T] = []
    deaf: list[Exception] = []

    async def beat(crew: Crew) -> None:
        while True:  # noqa: ASYNC110 - that the loop turns is the point
            await anyio.sleep(_BEAT_S)

    async def drain(crew: Crew) -> None:
        assert receive is not None
        joined = _Joined(receive)
        try:
            # Without a timeout: it would raise where nothing comes for so long, as while a container starts.
            while _END not in (pieces := await queue.get_many.aio(100)):
                for piece in pieces:
                    await joined.take(*piece)
            for piece in pieces[: pieces.index(_END)]:
                await joined.take(*piece)
        except Exception as error:  # noqa: BLE001 - nobody loses a run over what callbacks would have been told
            _log.warning("the events of a run on Modal do not come any more: %s: %s", type(error).__name__, error)
            deaf.append(error)
            if not made:
                return
        crew.stop()

    async def all_three(crew: Crew) -> None:
        crew.start(beat)
        if receive is not None:
            crew.start(drain)
        made.append(await work())
        if receive is None or deaf:
            crew.stop()
            return
        told = False
        with contextlib.suppress(Exception), anyio.move_on_after(_CLOSING_S):
            # Told, not cancelled: a request that is given up may have taken pieces out of the queue already.
            await queue.put.aio(_END)
            told = True
        if not told:  # the result is there, whatever became of the events
            _log.warning("the last events of a run on Modal may be missing: its queue does not answer")
            crew.stop()

    await Crew.run(all_three)
    return made[0]


class _Joined:
    """Joins the pieces of batches, which come from several containers at once."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._parts: dict[str, list[bytes]] = {}

    async def take(self, name: str, number: int, count: int, piece: bytes) -> None:
        """Take a piece; hand a batch over that is whole."""
        parts = self._parts.setdefault(name, [])
        parts.append(piece)
        if number + 1 == count:
            await self._receive(b"".join(self._parts.pop(name)))

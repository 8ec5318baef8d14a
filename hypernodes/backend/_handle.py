"""Runs that go on without the process that started them, found again by an id."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Generator
from typing import Any

from hypernodes._bridge import run_sync
from hypernodes._mapping import ItemFailure, MapResult
from hypernodes._threads import default_threads, in_thread
from hypernodes.backend._entry import ItemsReply
from hypernodes.backend._message import unpacked_reply
from hypernodes.backend._wire import load_error
from hypernodes.errors import DefinitionError, ExecutionError

_PLACES = {"modal:fc-": "hypernodes.backend._modal_calls"}
"""Modules whose ``attached`` finds a call again, by what their ids begin with."""


class RemoteCall(ABC):
    """A call that a place keeps until someone asks for its reply."""

    @abstractmethod
    async def reply(self, seconds: float | None) -> bytes:
        """Wait for the reply, at most so long.

        Raises:
            TimeoutError: it is not there yet.
        """

    @abstractmethod
    def is_end(self, error: ExecutionError) -> bool:
        """Say whether an error of :meth:`reply` is how the call ended, and not why it could not be asked for."""

    @abstractmethod
    async def cancel(self) -> None:
        """End the call, and what it runs on."""


class RunHandle:
    """A run that was started by :meth:`Pipeline.asubmit` and needs nobody to wait for it.

    ``await handle`` gives what :meth:`Pipeline.arun` or :meth:`Pipeline.amap` would have given, or raises its error,
    as often as it is asked. ``RunHandle.from_id(handle.id)`` is the same run in another process.
    """

    def __init__(self, id: str) -> None:
        place = next((place for place in _PLACES if isinstance(id, str) and id.startswith(place)), None)
        if place is None:
            raise DefinitionError(
                f"{id!r} is not the id of a run: it looks like 'modal:fc-...', and is what RunHandle.id was"
            )
        self.id = id
        """What to find it by, from any process with the same account."""
        self._call: RemoteCall = importlib.import_module(_PLACES[place]).attached(id.partition(":")[2])
        self._reply: bytes | None = None

    @classmethod
    def from_id(cls, id: str) -> RunHandle:
        """Return the handle of a run that was started earlier, perhaps by another process.

        Raises:
            DefinitionError: it is not the id of a run.
        """
        return cls(id)

    def __await__(self) -> Generator[Any, Any, Any]:
        return self.aresult().__await__()

    async def aresult(self, timeout: float | None = None) -> Any:  # noqa: ASYNC109 - the place knows best how to wait
        """Wait for the run to end, at most ``timeout`` seconds, and return its result.

        Stopping to wait does not stop the run.

        Raises:
            TimeoutError: it goes on still.
            RemoteExecutionError: it was cancelled, or nobody knows it any more.
        """
        if self._reply is None:
            self._reply = await self._call.reply(timeout)
        reply = self._reply
        (kind, answer, _), _ = await in_thread(lambda: unpacked_reply(reply), default_threads())
        if kind == "raised":
            raise load_error(answer)
        return _map_result(answer) if isinstance(answer, ItemsReply) else answer

    def result(self, timeout: float | None = None) -> Any:
        """:meth:`aresult` from sync code."""
        return run_sync(lambda: self.aresult(timeout))

    async def adone(self) -> bool:
        """Say whether the run has ended, however it ended.

        Raises:
            RemoteExecutionError: it cannot be asked: the account is refused, or nobody answers.
        """
        if self._reply is None:
            try:
                self._reply = await self._call.reply(0)
            except ExecutionError as error:
                if not self._call.is_end(error):
                    raise
            except TimeoutError:
                return False
        return True

    def done(self) -> bool:
        """:meth:`adone` from sync code."""
        return run_sync(self.adone)

    async def acancel(self) -> None:
        """End the run, and the container that it is in; of one that has ended, nothing."""
        await self._call.cancel()

    def cancel(self) -> None:
        """:meth:`acancel` from sync code."""
        run_sync(self.acancel)

    def __repr__(self) -> str:
        return f"RunHandle.from_id({self.id!r})"


def _map_result(answer: ItemsReply) -> MapResult:
    failures = [
        ItemFailure(index, raised[2] or (), error, answer.inputs.get(index, {}))
        for index, raised in answer.failures
        if isinstance(error := load_error(raised), Exception)
    ]
    return MapResult(dict(zip(answer.names, answer.lists, strict=True)), failures)

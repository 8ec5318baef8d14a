"""The worker's end of its line to the parent: frames, tokens that the parent keeps, and results on their way."""

from __future__ import annotations

import mmap
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import anyio

from hypernodes import events as ev
from hypernodes._digests import settled
from hypernodes._mapping import ItemFailure
from hypernodes.backend._chunks import DONE
from hypernodes.backend._wire import COUNT, LENGTH, Parts, dump_error, dumps, frame, packed, with_error
from hypernodes.cache._session import CacheSession
from hypernodes.errors import SerializationError

FLUSH_S = 0.05
"""Results and events are sent when the last ones were sent this many seconds ago."""


Finished = tuple[int, list[Any] | None, Any, Any]
"""An item's index, its outputs, their digests, or its error, each as it travels."""


class Channel:
    """The worker's end of the socket: reads in a thread, writes in place."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self.at_end: Callable[[], None] | None = None
        """Called before this process ends because its parent has closed the line."""

    def receive(self) -> Parts:
        """Read one frame; the parent's end of file is this process's end."""
        (count,) = COUNT.unpack(self._exactly(COUNT.size))
        lengths = [LENGTH.unpack(self._exactly(LENGTH.size))[0] for _ in range(count)]
        return [self._exactly(length) for length in lengths]

    def _exactly(self, length: int) -> bytearray:
        data = bytearray(length)
        view = memoryview(data)
        while view:
            try:
                got = self._connection.recv_into(view)
            except OSError:
                got = 0
            if not got:
                if self.at_end is not None:
                    self.at_end()
                os.killpg(0, signal.SIGKILL)
            view = view[got:]
        return data

    def send(self, *message: Any) -> None:
        """Write one frame."""
        self.send_parts(dumps(message))

    def send_parts(self, parts: Parts) -> None:
        """Write one frame that is pickled already."""
        with self._sending:
            try:
                for piece in frame(parts):
                    self._connection.sendall(piece)
            except OSError:
                # The parent is gone.
                os.killpg(0, signal.SIGKILL)


class RemoteBound:
    """A bound that the parent keeps for all its workers."""

    def __init__(self, channel: Channel, number: int) -> None:
        self._channel = channel
        self.number = number
        """Bounds that are taken together are taken in this order, in every process."""
        self._waiting: deque[anyio.Event | None] = deque()
        self._settled = anyio.Event()

    async def acquire(self) -> None:
        """Ask the parent for a token and wait for it."""
        granted = anyio.Event()
        self._waiting.append(granted)
        self._channel.send("acquire", self.number)
        try:
            await granted.wait()
        except BaseException:
            if granted.is_set():
                self.release()
            else:
                # The parent will grant it all the same; it goes back at once.
                self._waiting[self._waiting.index(granted)] = None
            raise

    def granted(self) -> None:
        """Wake the one that has waited longest."""
        first = self._waiting.popleft()
        if first is None:
            self.release()
        else:
            first.set()
        if not self._waiting:
            self._settled.set()

    def release(self) -> None:
        """Give a token back."""
        self._channel.send("release", self.number)

    async def settled(self) -> None:
        """Wait until every token that was asked for has come, also those that nobody waits for any more."""
        while self._waiting:
            self._settled = anyio.Event()
            await self._settled.wait()


class Outbox:
    """Results and events on their way to the parent, sent in batches by time; a sink and an emit."""

    bounded = False
    window = None
    lazy = False

    def __init__(
        self, channel: Channel, board: mmap.mmap, wanted: tuple[str, ...], kinds: frozenset[type], *, traced: bool
    ) -> None:
        self._traced = traced
        self.session: CacheSession | None = None
        """The worker's use of the cache, where there is one."""
        self._channel = channel
        self._board = board
        self._wanted = wanted
        self.kinds = kinds
        self.first = 0
        self._items: list[Finished] = []
        self._events: list[ev.Event] = []
        self._sent_at = 0.0
        self._closed = False
        self._flushing = threading.Lock()
        self._pending = threading.Event()
        threading.Thread(target=self._flush_late, name="hypernodes-outbox", daemon=True).start()

    def __call__(self, event: ev.Event, /) -> None:
        travelling = with_error(event, lambda error: dump_error(error, None))
        self._events.append(travelling)
        self._send_in_time()

    def full(self, taken: int) -> bool:
        """Say no: a chunk is bounded by what was put into it."""
        return False

    async def room(self) -> None:
        """Return at once."""

    def collected(self) -> Mapping[str, Any]:
        """Return nothing: results went to the parent."""
        return {}

    def deliver(self, index: int, outputs: tuple[Any, ...], digests: Sequence[Any] | None = None) -> None:
        """Take an item's outputs."""
        self._board[index - self.first] = DONE
        # Pickled one by one, and now: one that cannot be, here or there, spoils no other.
        item: Finished
        try:
            known = None
            if digests is not None and self._traced and self.session is not None:
                known = [settled(digest, value, self.session) for digest, value in zip(digests, outputs, strict=True)]
            item = index, packed(outputs), known, None
        except Exception:  # noqa: BLE001 - pickling runs the user's code
            item = index, None, None, dump_error(self._unsendable(index, outputs), None)
        self._items.append(item)
        self._send_in_time()

    def fail(self, failure: ItemFailure) -> None:
        """Take an item's failure."""
        self._board[failure.index - self.first] = DONE
        # Made before the list is looked up, which the thread that sends late may replace meanwhile.
        item = failure.index, None, None, dump_error(failure.error, failure.path)
        self._items.append(item)
        self._send_in_time()

    def flush(self) -> None:
        """Send what there is."""
        with self._flushing:
            items, self._items = self._items, []
            events, self._events = self._events, []
            self._sent_at = time.monotonic()
            if not items and not events:
                return
            try:
                parts = dumps(("results", items, events))
            except Exception:  # noqa: BLE001 - an event about a value that cannot be sent is not sent
                parts = dumps(("results", items, [event for event in events if _sendable(event)]))
            self._channel.send_parts(parts)

    def close(self) -> None:
        """End the thread that sends late."""
        self._closed = True
        self._pending.set()

    def _send_in_time(self) -> None:
        if time.monotonic() - self._sent_at > FLUSH_S:
            self.flush()
        else:
            self._pending.set()

    def _flush_late(self) -> None:
        """Send what would otherwise wait for a long call to end; runs in a thread of its own."""
        while True:
            self._pending.wait()
            self._pending.clear()
            if self._closed:
                return
            time.sleep(FLUSH_S)
            self.flush()

    def _unsendable(self, index: int, outputs: tuple[Any, ...]) -> SerializationError:
        try:
            for name, value in zip(self._wanted, outputs, strict=True):
                sendable(value, value, f"output {name!r} of item {index}")
        except SerializationError as error:
            return error
        return SerializationError(f"the outputs of item {index} cannot be sent back together from a worker process")


def sendable(message: Any, value: Any, what: str) -> Parts:
    """Pickle a message for the parent.

    Raises:
        SerializationError: the value in it cannot be pickled.
    """
    try:
        return dumps(message)
    except Exception as error:
        raise SerializationError(
            f"{what} is a {type(value).__name__} that cannot be sent back from a worker process ({error})"
        ) from error


def _sendable(event: ev.Event) -> bool:
    try:
        dumps(event)
    except Exception:  # noqa: BLE001 - an event about a value that cannot be sent is not sent
        return False
    return True

"""Results and events handed over as they come: bounded buffers between a run and its consumer."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import anyio

from hypernodes._mapping import ItemFailure, ItemResult
from hypernodes.events import EVERY_KIND, Event

T = TypeVar("T")


class Handover(Generic[T]):
    """An async iterator over what one background task makes; ends, or raises, as that task does."""

    def __init__(self) -> None:
        self._ready: deque[T] = deque()
        self._arrived: anyio.Event | None = None
        self._ended = False
        self._failure: BaseException | None = None

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        if not self._ready:
            await self._wait()
        item = self._ready.popleft()
        self._took(1)
        return item

    async def batch(self) -> list[T]:
        """Return everything that is ready, at least one; an empty list at the end."""
        if not self._ready:
            try:
                await self._wait()
            except StopAsyncIteration:
                return []
        items = list(self._ready)
        self._ready.clear()
        self._took(len(items))
        return items

    async def _wait(self) -> None:
        while not self._ready:
            if self._ended:
                failure, self._failure = self._failure, None
                if isinstance(failure, StopAsyncIteration):
                    raise RuntimeError("a node raised StopAsyncIteration") from failure
                if failure is not None:
                    raise failure
                raise StopAsyncIteration
            self._arrived = anyio.Event()
            self._idle()
            await self._arrived.wait()

    def _announce(self) -> None:
        if self._arrived is not None:
            self._arrived.set()

    def _took(self, count: int) -> None:
        """Note that the consumer has taken so many."""

    def _idle(self) -> None:
        """Note that the consumer is waiting."""

    def _end(self, failure: BaseException | None) -> None:
        self._failure = failure
        self._ended = True
        self._announce()

    @contextlib.asynccontextmanager
    async def fed_by(self, produce: Callable[[], Awaitable[None]]) -> AsyncIterator[Handover[T]]:
        """Run the producer in the background for as long as the block lasts; leaving it cancels the rest."""
        failure: BaseException | None = None
        left = False

        async def background() -> None:
            nonlocal failure
            try:
                await produce()
            except anyio.get_cancelled_exc_class() as error:
                self._end(None if left else error)
                raise
            except BaseException as error:  # noqa: BLE001 - raised to the consumer, or below
                if left:
                    # Such as the source's own cleanup: nobody reads on, so the block itself raises it.
                    failure = failure or error
                self._end(None if left else error)
            else:
                self._end(None)

        async with anyio.create_task_group() as group:
            group.start_soon(background)
            try:
                yield self
            except anyio.get_cancelled_exc_class():
                raise
            except BaseException as error:  # noqa: BLE001 - raised again below, outside the group
                failure = error
            finally:
                left = True
                self._ready.clear()
                group.cancel_scope.cancel()
        if failure is not None:
            raise failure


class ItemStream(Handover[ItemResult]):
    """Results of a map as items finish: a sink that is full when ``window`` rows are neither done nor taken."""

    bounded = True

    def __init__(self, names: Sequence[str], window: int, *, ordered: bool) -> None:
        super().__init__()
        self._names = tuple(names)
        self._window = window
        self._ordered = ordered
        self._early: dict[int, ItemResult] = {}
        self._next = 0
        self._taken = 0
        self._room: anyio.Event | None = None
        self._wanted_below = 0

    def full(self, taken: int) -> bool:
        """Say whether as many rows as the window allows are on their way to the consumer."""
        return taken - self._taken >= self._window

    async def room(self) -> None:
        """Wait until the consumer has emptied half the window, or waits for more."""
        self._room = anyio.Event()
        self._wanted_below = self._taken + max(1, self._window // 2)
        await self._room.wait()
        self._room = None

    def deliver(self, index: int, outputs: tuple[Any, ...]) -> None:
        """Hand over an item's outputs."""
        self._put(ItemResult(index, dict(zip(self._names, outputs, strict=True))))

    def fail(self, failure: ItemFailure) -> None:
        """Hand over an item's failure."""
        self._put(ItemResult(failure.index, None, failure.error))

    def collected(self) -> Mapping[str, Any]:
        """Return nothing: results went to the consumer."""
        return {}

    def _put(self, item: ItemResult) -> None:
        if not self._ordered:
            self._ready.append(item)
        else:
            self._early[item.index] = item
            while self._next in self._early:
                self._ready.append(self._early.pop(self._next))
                self._next += 1
        if self._ready:
            self._announce()

    def _took(self, count: int) -> None:
        self._taken += count
        if self._room is not None and self._taken >= self._wanted_below:
            self._room.set()

    def _idle(self) -> None:
        if self._room is not None:
            self._room.set()


class EventStream(Handover[Event]):
    """The events of one run; an :class:`~hypernodes.events.Emit`. Events that are not read wait in memory."""

    kinds = EVERY_KIND

    def __call__(self, event: Event, /) -> None:
        self._ready.append(event)
        self._announce()

"""Results and events handed over as they come: bounded buffers between a run and its consumer."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

import anyio

from hypernodes._mapping import ItemFailure, ItemResult
from hypernodes._threads import current_async_library
from hypernodes._traceback import trimmed
from hypernodes.events import EVERY_KIND, Event

if TYPE_CHECKING:
    import asyncio

    import anyio.abc

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

    def forget(self) -> None:
        """Drop what has not been taken."""
        self._ready.clear()

    def end(self, failure: BaseException | None) -> None:
        """Note that no more will come, and why."""
        self._failure = failure
        self._ended = True
        self._announce()

    def fed_by(
        self, produce: Callable[[], Awaitable[None]], written: str, close: Callable[[], Awaitable[None]] | None = None
    ) -> Feeding[T]:
        """Return the block during which the producer runs in the background.

        ``written`` is how a user opens it; ``close`` is called at its end, also when the producer never began.
        """
        return Feeding(self, produce, written, close)


class Feeding(Generic[T]):
    """A producer in the background of an ``async with`` block; leaving the block cancels what is left of it.

    On asyncio it is a task of its own that this object owns, and not a task group in the consumer's task: the
    block may stand in an async generator, which frameworks leave half-way and close from another task.
    """

    def __init__(
        self,
        stream: Handover[T],
        produce: Callable[[], Awaitable[None]],
        written: str,
        close: Callable[[], Awaitable[None]] | None,
    ) -> None:
        self._stream = stream
        self._produce = produce
        self._written = written
        self._close = close
        self._left = False
        self._late: BaseException | None = None
        self._task: asyncio.Task[None] | None = None
        self._group: anyio.abc.TaskGroup | None = None

    async def __aenter__(self) -> Handover[T]:
        if current_async_library() == "asyncio":
            import asyncio

            self._task = asyncio.get_running_loop().create_task(self._background())
        else:
            self._group = await anyio.create_task_group().__aenter__()
            self._group.start_soon(self._background)
        return self._stream

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._left = True
        self._stream.forget()
        try:
            if self._task is not None:
                await self._end(self._task)
            elif self._group is not None:
                self._group.cancel_scope.cancel()
                await self._group.__aexit__(None, None, None)
        finally:
            if self._close is not None:
                with anyio.CancelScope(shield=True):
                    await self._close()
        if error is None and self._late is not None:
            raise self._late

    def __aiter__(self) -> NoReturn:
        raise TypeError(f"a stream has to be closed, so it is opened first: write `async with {self._written}`")

    async def _background(self) -> None:
        try:
            await self._produce()
        except anyio.get_cancelled_exc_class() as error:
            self._stream.end(None if self._left else error)
            raise
        except BaseException as error:  # noqa: BLE001 - raised to the consumer, or when the block is left
            if self._left:
                # Such as the source's own cleanup: nobody reads on.
                self._late = error
            if error.__traceback__ is not None:
                error.with_traceback(trimmed(error.__traceback__))
            self._stream.end(None if self._left else error)
        else:
            self._stream.end(None)

    @staticmethod
    async def _end(task: asyncio.Task[None]) -> None:
        """Cancel a task and wait until it has ended, also when the waiting is cancelled meanwhile."""
        import asyncio

        interrupted: BaseException | None = None
        task.cancel()
        with anyio.CancelScope(shield=True):
            while not task.done():
                try:
                    await asyncio.wait([task])
                except asyncio.CancelledError as error:
                    interrupted = error
        if interrupted is not None:
            raise interrupted


class ItemStream(Handover[ItemResult]):
    """Results of a map as items finish: a sink that is full when ``window`` rows are neither done nor taken."""

    bounded = True
    lazy = False

    def __init__(self, names: Sequence[str], window: int, *, ordered: bool) -> None:
        super().__init__()
        self._names = tuple(names)
        self._only = names[0] if len(names) == 1 else None  # the usual case, for which zip() is slow
        self.window = window
        self._ordered = ordered
        self._early: dict[int, ItemResult] = {}
        self._next = 0
        self._taken = 0
        self._room: anyio.Event | None = None
        self._wanted_below = 0

    def full(self, taken: int) -> bool:
        """Say whether as many rows as the window allows are on their way to the consumer."""
        return taken - self._taken >= self.window

    async def room(self) -> None:
        """Wait until the consumer has emptied half the window, or waits for more."""
        self._room = anyio.Event()
        self._wanted_below = self._taken + max(1, self.window // 2)
        await self._room.wait()
        self._room = None

    def deliver(self, index: int, outputs: tuple[Any, ...], digests: Sequence[Any] | None = None) -> None:
        """Hand over an item's outputs."""
        only = self._only
        named = dict(zip(self._names, outputs, strict=True)) if only is None else {only: outputs[0]}
        self._put(ItemResult(index, named))

    def fail(self, failure: ItemFailure) -> None:
        """Hand over an item's failure."""
        self._put(ItemResult(failure.index, None, failure.error))

    def collected(self) -> Mapping[str, Any]:
        """Return nothing: results went to the consumer."""
        return {}

    def _put(self, item: ItemResult) -> None:
        if not self._ordered:
            self._ready.append(item)
        elif item.index == self._next and not self._early:
            self._ready.append(item)
            self._next += 1
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

"""Events of runs on other machines, told here."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence

from hypernodes import events as ev
from hypernodes._mapping import Path
from hypernodes._threads import default_threads, in_thread
from hypernodes.backend._message import Batch, unpacked
from hypernodes.backend._wire import load_error, with_error

Receive = Callable[[bytes], Awaitable[None]]
"""Takes a batch of events that was sent while a job runs."""

_ENDS = frozenset({ev.ItemFinished, ev.ItemFailed, ev.ItemCached})
_END_OF: dict[type[ev.Event], type[ev.Event]] = {
    ev.NodeFinished: ev.NodeStarted,
    ev.NodeFailed: ev.NodeStarted,
    ev.NodeCancelled: ev.NodeStarted,
    ev.PipelineFinished: ev.PipelineStarted,
    ev.PipelineFailed: ev.PipelineStarted,
}
_log = logging.getLogger("hypernodes")


class Replay:
    """Tells an emit of this process what happens elsewhere.

    Of a map in chunks, what has become of an item is told once, though a chunk whose machine died runs again.

    Args:
        emit: who listens; None for nobody.
        place: of a map in chunks: its path.
    """

    def __init__(self, emit: ev.Emit | None, place: Path | None = None) -> None:
        self._emit = emit or ev.UNHEARD
        kinds = self._emit.kinds
        self._place = place
        self._open: set[int] = set()
        self._known: set[tuple[int | None, int]] = set()
        """Batches that have been told."""
        self._dead: set[int | None] = set()
        self._begun: dict[tuple[type[ev.Event], Path], tuple[int | None, str]] = {}
        """Nodes and pipelines that have been told to begin, and not yet to end, in that order; their calls and runs."""
        self._watched = {kind for kind in _END_OF.values() if {end for end in _END_OF if _END_OF[end] is kind} <= kinds}
        """Beginnings whose ends are all told."""
        self._ended: dict[int, int] = {}
        """Items that have been told to their end, with the call that told it, until their chunk is done."""
        self.kinds = kinds
        """The events that are to be sent."""
        if place is not None and self.kinds:
            self.kinds |= _ENDS

    @property
    def receive(self) -> Receive | None:
        """What takes batches of events while the job runs; None where nobody listens."""
        return self._received if self.kinds else None

    async def _received(self, batch: bytes) -> None:
        try:
            (_, batches, call), _ = await in_thread(lambda: unpacked(batch), default_threads())
        except Exception as error:  # noqa: BLE001 - unpickling runs the user's code; it never fails the run
            _log.warning("some events of a run on another machine cannot be told here: %s", error)
            return
        self.tell(batches, call)

    def tell(self, batches: Sequence[Batch], call: int | None = None) -> None:
        """Tell some events, of a call where there are several; a batch that has been told is not told again."""
        for number, events in batches:
            if (call, number) not in self._known and call not in self._dead:
                self._known.add((call, number))
                for event in events:
                    self._tell(event, call)

    def _tell(self, event: ev.Event, call: int | None) -> None:
        if call is not None and self._is_told(event, call):
            return
        kind = type(event)
        if kind in self._emit.kinds:
            self._emit(with_error(event, load_error))
        if kind in self._watched:
            self._begun[kind, event.path] = call, event.run_id
        elif (began := _END_OF.get(kind)) is not None:
            self._begun.pop((began, event.path), None)

    @contextlib.contextmanager
    def to_its_end(self) -> Iterator[None]:
        """Tell the end of what has begun there, where a block ends before it: its machine died, or nobody waits."""
        try:
            yield
        except BaseException as error:
            self._end(list(self._begun), error)
            raise

    def _end(self, begun: list[tuple[type[ev.Event], Path]], error: BaseException) -> None:
        """Tell the ends of what has begun, the innermost first."""
        for kind, path in reversed(begun):
            _, run_id = self._begun.pop((kind, path))
            if kind is ev.NodeStarted:
                self.tell_own(ev.NodeCancelled(run_id, path, time.time()))
            else:
                self.tell_own(ev.PipelineFailed(run_id, path, time.time(), error))

    def tell_own(self, event: ev.Event) -> None:
        """Tell an event of this process."""
        if type(event) in self._emit.kinds:
            self._emit(event)

    def begin(self, call: int) -> None:
        """Note that a call is under way."""
        self._open.add(call)

    def died(self, call: int, error: BaseException) -> None:
        """Note that a call came to nothing: its items run again, and what it has told since is not told."""
        self._open.discard(call)
        self._dead.add(call)
        self._end([key for key, (by, _) in self._begun.items() if by == call], error)

    def done(self, call: int, first: int, count: int) -> None:
        """Note that the items of a call are done."""
        self._open.discard(call)
        for index in range(first, first + count):
            self._ended.pop(index, None)

    def _is_told(self, event: ev.Event, call: int) -> bool:
        """Say whether another call has told what became of the item that an event is about."""
        assert self._place is not None
        if len(event.path) <= len(self._place):
            return False  # of the map as a whole
        index = event.path[len(self._place)]
        assert isinstance(index, int)
        by = self._ended.get(index)
        if by is not None:
            return by != call
        if type(event) in _ENDS and len(event.path) == len(self._place) + 1 and call in self._open:
            self._ended[index] = call
        return False

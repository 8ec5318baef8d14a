"""What happens in a run, as it happens: frozen, picklable events, each with the path where it happened.

A path leads from the outermost pipeline to the place: ``("retrieval", "encode_all", 17, "encode")`` is the
node ``encode`` of item 17 of the mapped pipeline ``encode_all``. Times are unix seconds, durations seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

from hypernodes._mapping import Path

__all__ = [
    "CacheRefused",
    "Emit",
    "Event",
    "ItemCached",
    "ItemFailed",
    "ItemFinished",
    "ItemStarted",
    "MapFinished",
    "MapStarted",
    "NodeCached",
    "NodeCancelled",
    "NodeChunk",
    "NodeFailed",
    "NodeFinished",
    "NodeRetried",
    "NodeStarted",
    "NodeStored",
    "NodeUncacheable",
    "NotLoaded",
    "Path",
    "PipelineFailed",
    "PipelineFinished",
    "PipelineStarted",
    "RunFinished",
    "format_path",
]


class NotLoaded:
    """What events show of a value that is in the cache and has not been loaded, as nothing has needed it yet."""

    __slots__ = ("key", "position")

    def __init__(self, key: str, position: int | None = None) -> None:
        self.key = key
        self.position = position
        """Which one it is of several outputs that are stored together; None for a single one."""

    def __reduce__(self) -> tuple[type[NotLoaded], tuple[str, int | None]]:
        return NotLoaded, (self.key, self.position)

    def __repr__(self) -> str:
        return f"<not loaded: {self.key[:12]}>"


class PipelineStarted(NamedTuple):
    """A pipeline, or a map of one, began; nested when its path is longer than one."""

    run_id: str
    path: Path
    at: float
    inputs: Mapping[str, Any]


class PipelineFinished(NamedTuple):
    """A pipeline, or a map of one, made its outputs."""

    run_id: str
    path: Path
    at: float
    outputs: Mapping[str, Any]
    duration: float


class PipelineFailed(NamedTuple):
    """A pipeline ended without outputs: by an error, or cancelled."""

    run_id: str
    path: Path
    at: float
    error: BaseException


class NodeStarted(NamedTuple):
    """A node was handed its inputs; it may still wait for a limit."""

    run_id: str
    path: Path
    at: float
    inputs: Mapping[str, Any]


class NodeFinished(NamedTuple):
    """A node made its outputs."""

    run_id: str
    path: Path
    at: float
    outputs: Mapping[str, Any]
    duration: float


class NodeFailed(NamedTuple):
    """A node failed; ``origin`` is False for the nested pipelines around the node where it began."""

    run_id: str
    path: Path
    at: float
    error: BaseException
    origin: bool


class NodeCancelled(NamedTuple):
    """A node was stopped before it finished."""

    run_id: str
    path: Path
    at: float


class NodeChunk(NamedTuple):
    """A generator node yielded a piece."""

    run_id: str
    path: Path
    at: float
    chunk: Any


class NodeRetried(NamedTuple):
    """An attempt failed and another one follows after ``wait`` seconds; ``attempt`` counts from 1."""

    run_id: str
    path: Path
    at: float
    attempt: int
    error: BaseException
    wait: float


class NodeCached(NamedTuple):
    """A node was not run: what it makes is in the cache, under this signature, and is loaded when it is needed."""

    run_id: str
    path: Path
    at: float
    signature: str


class NodeStored(NamedTuple):
    """What a node made went to the cache: so many bytes."""

    run_id: str
    path: Path
    at: float
    signature: str
    size: int


class CacheRefused(NamedTuple):
    """An entry was found and not used: damaged, or not signed with this cache's key. The node runs."""

    run_id: str
    path: Path
    at: float
    signature: str
    reason: str


class NodeUncacheable(NamedTuple):
    """A node that should be cached cannot be: an input has no identity, or what it made cannot be stored."""

    run_id: str
    path: Path
    at: float
    reason: str


class MapStarted(NamedTuple):
    """A map began; ``total_items`` is None for a stream of unknown length."""

    run_id: str
    path: Path
    at: float
    total_items: int | None


class MapFinished(NamedTuple):
    """Every item of a map is done."""

    run_id: str
    path: Path
    at: float
    duration: float


class ItemStarted(NamedTuple):
    """An item of a map began; its path ends with its index."""

    run_id: str
    path: Path
    at: float
    index: int  # type: ignore[assignment]  # the promised name, not tuple.index


class ItemFinished(NamedTuple):
    """An item of a map made its outputs."""

    run_id: str
    path: Path
    at: float
    index: int  # type: ignore[assignment]  # the promised name, not tuple.index
    duration: float


class ItemCached(NamedTuple):
    """An item of a map was not run: every node of it came from the cache."""

    run_id: str
    path: Path
    at: float
    index: int  # type: ignore[assignment]  # the promised name, not tuple.index
    signature: str


class ItemFailed(NamedTuple):
    """An item of a map failed."""

    run_id: str
    path: Path
    at: float
    index: int  # type: ignore[assignment]  # the promised name, not tuple.index
    error: BaseException


class RunFinished(NamedTuple):
    """The last event of ``aevents``: the answer, as ``arun`` would have returned it."""

    run_id: str
    path: Path
    at: float
    result: Any


Event = (
    PipelineStarted
    | PipelineFinished
    | PipelineFailed
    | NodeStarted
    | NodeFinished
    | NodeFailed
    | NodeCancelled
    | NodeChunk
    | NodeRetried
    | NodeCached
    | NodeStored
    | CacheRefused
    | NodeUncacheable
    | MapStarted
    | MapFinished
    | ItemStarted
    | ItemFinished
    | ItemCached
    | ItemFailed
    | RunFinished
)

EVERY_KIND: frozenset[type] = frozenset(Event.__args__)


class Emit(Protocol):
    """Where the engine sends events: called on the loop's thread, never concurrently."""

    @property
    def kinds(self) -> frozenset[type]:
        """The event types that someone wants; others need not be made."""
        ...

    def __call__(self, event: Event, /) -> None:
        """Take one event."""
        ...


class Emitter:
    """An :class:`Emit` from a plain function and the kinds it wants."""

    __slots__ = ("_receive", "kinds")

    def __init__(self, receive: Callable[[Event], None], kinds: frozenset[type] = EVERY_KIND) -> None:
        self._receive = receive
        self.kinds = kinds

    def __call__(self, event: Event, /) -> None:
        self._receive(event)


def _unheard(event: Event) -> None:
    """Drop an event."""


UNHEARD = Emitter(_unheard, frozenset())
"""An emit that wants nothing."""


def fan_out(emits: Iterable[Emit | None]) -> Emit | None:
    """Return one emit for several; None when nobody listens."""
    wanted = [emit for emit in emits if emit is not None and emit.kinds]
    if len(wanted) < 2:
        return wanted[0] if wanted else None

    def receive(event: Event) -> None:
        for emit in wanted:
            if type(event) in emit.kinds:
                emit(event)

    return Emitter(receive, frozenset().union(*(emit.kinds for emit in wanted)))


def format_path(path: Path) -> str:
    """Return a path for people: ``retrieval / encode_all[17] / encode``."""
    parts: list[str] = []
    for each in path:
        if isinstance(each, int) and parts:
            parts[-1] += f"[{each}]"
        else:
            parts.append(str(each))
    return " / ".join(parts)

"""The seam between what is run and where: one abstract base class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from hypernodes._bridge import run_sync
from hypernodes._engine import DEFAULT_ITEMS
from hypernodes._run import Job, Sink
from hypernodes.errors import RemoteExecutionError
from hypernodes.events import Emit

if TYPE_CHECKING:
    from hypernodes.backend._handle import RunHandle


class Backend(ABC):
    """A place where pipelines run.

    A subclass says how a :class:`Job` gets there and its results back, in async form; the sync twins come
    with it. How the job is executed once there is the engine's matter.
    """

    remote: ClassVar[bool] = False
    """Whether it is another machine, so that a job travels there as bytes."""

    @abstractmethod
    async def arun(self, job: Job, emit: Emit | None = None) -> dict[str, Any]:
        """Run a job once and return the wanted outputs by name; send events to ``emit``."""

    @abstractmethod
    async def amap(self, job: Job, sink: Sink, emit: Emit | None = None) -> None:
        """Run a job for each row of its feed, hand results to ``sink`` as items finish."""

    async def asubmit(self, job: Job, bare: str | None = None) -> RunHandle:
        """Start a job that outlives this process; ``bare`` names the one output that is its result.

        Raises:
            RemoteExecutionError: what runs at this place ends with this process.
        """
        raise RemoteExecutionError(f"what runs on {self!r} ends with this process: submit runs to a ModalBackend")

    def items_at_once(self) -> int:
        """Return how many items of a stream are on their way at once, where its caller does not say."""
        return DEFAULT_ITEMS

    def run(self, job: Job, emit: Emit | None = None) -> dict[str, Any]:
        """Run a job from sync code."""
        return run_sync(lambda: self.arun(job, emit))

    def map(self, job: Job, sink: Sink, emit: Emit | None = None) -> None:
        """Run a mapped job from sync code."""
        run_sync(lambda: self.amap(job, sink, emit))

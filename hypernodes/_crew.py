"""Tasks that share one fate: the first failure stops the others and comes out as itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
import anyio.abc


class Crew:
    """Workers in one task group.

    No failure crosses the task group, so there is never an exception group to take apart: the first one is
    kept, the others are cancelled, and then it is raised, whatever its type.
    """

    __slots__ = ("_failure", "_group", "_stopped")

    _group: anyio.abc.TaskGroup

    def __init__(self) -> None:
        self._failure: BaseException | None = None
        self._stopped = False

    @classmethod
    async def run(cls, work: Callable[[Crew], Awaitable[None]]) -> None:
        """Run the first worker in the calling task; wait for it and for all that it starts."""
        crew = cls()
        async with anyio.create_task_group() as crew._group:
            try:
                await work(crew)
            except anyio.get_cancelled_exc_class():
                raise
            except BaseException as error:  # noqa: BLE001 - raised again below, outside the group
                crew.fail(error)
        failure, crew._failure = crew._failure, None
        if failure is not None:
            try:
                raise failure
            finally:
                del failure

    def start(self, work: Callable[[Crew], Awaitable[None]]) -> None:
        """Start another worker in a task of its own."""
        self._group.start_soon(self._member, work)

    def fail(self, error: BaseException) -> None:
        """Stop everyone; the first error given is the one that is raised."""
        if self._failure is None:
            self._failure = error
        self._group.cancel_scope.cancel()

    def stop(self) -> None:
        """Stop everyone else; there is nothing to raise."""
        self._stopped = True
        self._group.cancel_scope.cancel()

    async def _member(self, work: Callable[[Crew], Awaitable[None]]) -> None:
        try:
            await work(self)
        except anyio.get_cancelled_exc_class() as error:
            # Cancelled from inside (a user's function awaited something that was cancelled) counts as a
            # failure; when the cancellation comes from outside, the group raises that and not this.
            if not self._stopped:
                self.fail(error)
            raise
        except BaseException as error:  # noqa: BLE001 - raised again by run()
            self.fail(error)


async def unbroken(work: Callable[[], Awaitable[None]]) -> None:
    """Do some work to its end; a cancellation from outside is raised when it is done."""

    async def shielded(_: Crew) -> None:
        with anyio.CancelScope(shield=True):
            await work()

    async def start(crew: Crew) -> None:
        # In a task of its own: asyncio's own task.cancel() reaches into a shielded scope.
        crew.start(shielded)

    await Crew.run(start)

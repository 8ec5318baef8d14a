"""The container's end on Modal: the one function that every app has."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Collection
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import anyio

from hypernodes.backend._entry import Shared, run_payload

if TYPE_CHECKING:
    import modal

ENTRY = "run_job"
"""The name of the function that every app has."""
_POSTED_BYTES = 512 << 10
"""Of one item of a queue, which takes a mebibyte."""

SharedRef = tuple[str, Any, int]
"""What chunks share: its digest, itself or the ``modal.Dict`` that holds it, and in how many pieces."""


async def run_job(
    payload: bytes,
    volumes: Collection[modal.Volume] = (),
    queue: modal.Queue | None = None,
    shared: SharedRef | None = None,
) -> bytes:
    """What the container is called with; whatever happens, it is a reply.

    Args:
        payload: the job, or a chunk of one.
        volumes: those that are mounted.
        queue: where events go while the job runs.
        shared: the job that a chunk is part of.
    """
    common = None if shared is None else Shared(shared[0], partial(_fetched, shared))
    async with _fresh(volumes):
        return await run_payload(payload, None if queue is None else partial(_post, queue), common)


async def _post(queue: Any, batch: bytes) -> None:
    """Send a batch of events, in pieces that a queue takes."""
    name, pieces = uuid4().hex, range(0, len(batch), _POSTED_BYTES)
    for number, start in enumerate(pieces):
        await queue.put.aio((name, number, len(pieces), batch[start : start + _POSTED_BYTES]))


async def _fetched(shared: SharedRef) -> bytes:
    _, data, pieces = shared
    if isinstance(data, bytes):
        return data
    return b"".join([await data.get.aio(number) for number in range(pieces)])


@contextlib.asynccontextmanager
async def _fresh(volumes: Collection[modal.Volume]) -> AsyncIterator[None]:
    """See what others have written to volumes, and let them see what is written here."""
    for volume in volumes:
        await volume.reload.aio()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        with anyio.CancelScope(shield=True):
            for volume in volumes:
                await volume.commit.aio()  # type: ignore[no-untyped-call]

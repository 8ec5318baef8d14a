"""P11, P12: a map and a large array through ModalBackend, against the same bytes through a bare `.remote.aio()`.

Modal's client and container are real; its servers are the tests' control plane on 127.0.0.1, so networks, queues and
schedulers of a cloud are not in these figures. Both containers are warm.
"""

import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio

from benchmarks._harness import Options, Report, Row, Target, ameasure, atimed, compared, main
from hypernodes import Pipeline, node

ITEMS = 1_000
MEGABYTES = 50
LEFT_OUT = "ModalBackend is left out: it needs modal, and pytest for the control plane of the tests"

Work = Callable[[], Awaitable[object]]
Bare = Callable[[bytes, int], Awaitable[bytes]]


@node("next")
def increase(x: int) -> int:
    return x + 1


@node("same")
def give_back(array: Any) -> Any:
    return array


class Sent:
    """The one message of some work: its bytes, those of its reply, and the function that it is sent to."""

    payload = b""
    back = 0
    function: Any = None

    async def by(self, work: Work) -> "Sent":
        """Do some work, and keep what it sends."""
        from hypernodes.backend._modal_line import ModalLine

        call = ModalLine.call

        async def seen(line: Any, payload: bytes, shared: Any = None) -> bytes:
            reply = await call(line, payload, shared)
            self.payload, self.back, self.function = payload, len(reply), line._function
            return reply

        ModalLine.call = seen  # type: ignore[method-assign]
        try:
            await work()
        finally:
            ModalLine.call = call  # type: ignore[method-assign]
        return self

    async def again(self) -> object:
        """Send the same message by a bare call: what is done in the container, and nothing of what its caller does."""
        return await self.function.remote.aio(self.payload)


@asynccontextmanager
async def _bare() -> AsyncIterator[Bare]:
    """A function of an app that is kept open, which takes bytes and gives as many as it is told."""
    import modal

    from tests.loopback import job

    app = modal.App("bare")
    function = app.function(image=modal.Image.debian_slim())(job("answers"))
    async with app.run.aio():
        yield function.remote.aio


async def _row(
    what: str, work: Work, sent: Sent, bare: Bare, times: int, options: Options, most: float | None = None
) -> Row:
    payload = os.urandom(len(sent.payload))

    async def by_hand() -> object:
        return await bare(payload, sent.back)

    subjects = {"ModalBackend": atimed(work, times), "a bare .remote.aio()": atimed(by_hand, times)}
    costs = await ameasure(subjects, options.pick(15, 2), warm_up=2)
    target = Target(f"≤ {most} ×", "ratio", at_most=most) if most else None
    return compared(what, "ms", costs, figure=lambda seconds: seconds * 1e3, target=target)


async def _rows(options: Options) -> list[Row]:
    import modal
    import numpy as np

    from hypernodes.backend import ModalBackend

    items = {"x": list(range(options.pick(ITEMS, 10)))}
    array = np.arange(options.pick(MEGABYTES, 1) * 125_000, dtype=np.float64)
    async with _bare() as bare, ModalBackend(modal.Image.debian_slim()) as backend:
        increasing = Pipeline([increase], backend=backend)
        on_the_loop = Pipeline([node("next", run_in="loop")(increase.func)], backend=backend)
        giving = Pipeline([give_back], backend=backend)
        mapped, times = f"map of {len(items['x']):,} items in one call", options.pick(20, 1)

        def map_there() -> Awaitable[object]:
            return increasing.amap(items, "x")

        def map_on_the_loop() -> Awaitable[object]:
            return on_the_loop.amap(items, "x")

        def there_and_back() -> Awaitable[object]:
            return giving.arun(array=array)

        small = await Sent().by(map_there)
        looped = await Sent().by(map_on_the_loop)
        large = await Sent().by(there_and_back)
        size = f"{array.nbytes / 1e6:.3g} MB of numpy there and back"
        return [
            await _row(mapped, map_there, small, bare, times, options, 1.2),
            await _row(f"{mapped}: its container's end alone", small.again, small, bare, times, options),
            await _row(f"{mapped}, run_in='loop'", map_on_the_loop, looped, bare, times, options),
            await _row(size, there_and_back, large, bare, 1, options, 1.3),
        ]


def run(options: Options) -> Report:
    """On a control plane of its own."""
    try:
        from tests.loopback import Plane
    except ModuleNotFoundError:
        return Report([], [LEFT_OUT])
    with tempfile.TemporaryDirectory() as directory, Plane(Path(directory)) as plane:
        os.environ.update(plane.env)
        return Report(anyio.run(_rows, options))


if __name__ == "__main__":
    main("P11, P12", "Through Modal", run)

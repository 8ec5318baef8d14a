"""Maps in chunks over containers: the real Modal client and container entry point, on a loopback control plane.

How the rows become chunks, and what becomes of dead ones, is tested in test_distributed.py.
"""

import asyncio
import os
import pathlib
import signal

import modal
import modal.runner
import numpy as np
import psutil
import pytest

from hypernodes import DiskCache, Pipeline, PipelineCallback, RemoteTimeoutError, WorkerCrashedError, node
from hypernodes.backend import ModalBackend
from tests import loopback

plane, client = loopback.plane, loopback.client
pytestmark = pytest.mark.asyncio

IMAGE = modal.Image.debian_slim()


@node("doubled")
def double(x):
    return 2 * x


def distributed(**options):
    return ModalBackend(IMAGE, mode="distributed", **{"max_containers": 2, **options})


async def nothing_is_left(plane):
    """The control plane ends the containers of an app that is gone, a moment after it is."""
    await plane.until(lambda: not plane.containers)
    assert plane.open_inputs == 0


async def test_a_map_over_containers(plane, client, tmp_path):
    """Chunks run in as many containers as may be, one call each; results are in order; nothing is left."""

    @node("pid")
    async def where(x):
        (tmp_path / f"{os.getpid()}.pid").touch()
        while len(list(tmp_path.glob("*.pid"))) < 2:
            await asyncio.sleep(0.01)
        return os.getpid()

    pipeline = Pipeline([double, where], backend=distributed(chunk_size=25))
    made = await pipeline.amap({"x": range(100)}, "x")
    assert made["doubled"] == [2 * x for x in range(100)]
    assert len(set(made["pid"])) == 2
    assert plane.calls["FunctionMap"] == 4
    assert plane.most_containers == 2
    await nothing_is_left(plane)


async def test_what_chunks_share_is_sent_once(plane, client):
    """A large value that all items use goes out once and is read once by each container."""

    @node("y")
    def add(x, table):
        return x + len(table)

    table = np.random.default_rng(0).bytes(3_000_000)
    made = await Pipeline([add], backend=distributed(chunk_size=5)).amap({"x": range(40), "table": table}, "x")
    assert made["y"] == [x + 3_000_000 for x in range(40)]
    assert plane.calls["FunctionMap"] == 8
    assert sum(plane.blob_sizes) < 4_000_000
    assert plane.container_calls["DictGet"] <= 2


async def test_a_container_that_is_killed(plane, client, tmp_path):
    """Its chunk is run again by another one."""

    @node("y", run_in="loop")
    def dies_once(x):
        if x == 5 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return x

    pipeline = Pipeline([dies_once], backend=distributed(chunk_size=4))
    assert (await pipeline.amap({"x": range(12)}, "x"))["y"] == list(range(12))
    await nothing_is_left(plane)


async def test_an_item_that_kills_its_container(plane, client):
    """It fails alone, by name; the others succeed."""

    @node("y", run_in="loop")
    def dies(x):
        if x == 5:
            os._exit(3)
        return x

    pipeline = Pipeline([dies], name="p", backend=distributed(chunk_size=4))
    result = await pipeline.amap({"x": range(12)}, "x", on_error="collect")
    assert result["y"] == [None if x == 5 else x for x in range(12)]
    (failure,) = result.failures
    assert isinstance(failure.error, WorkerCrashedError)
    assert "item 5 (p[5])" in str(failure.error)


async def test_an_item_that_hangs(plane, client):
    """A chunk past the backend's timeout is halved until the item that hangs is alone."""

    @node("y")
    async def hang(x):
        await asyncio.sleep(60 if x == 1 else 0)
        return x

    pipeline = Pipeline([hang], name="p", backend=distributed(chunk_size=2, timeout=2))
    result = await pipeline.amap({"x": range(4)}, "x", on_error="collect")
    assert result["y"] == [0, None, 2, 3]
    assert isinstance(result.failures[0].error, RemoteTimeoutError)


@pytest.mark.parametrize("kind", ["NotFoundError", "InternalError", "AuthError"])
async def test_a_node_that_uses_modal(plane, client, kind):
    """Its errors are the user's own, and no sign of a dead container or a refused account."""

    @node("y")
    def asks_modal(x):
        import modal.exception

        raise getattr(modal.exception, kind)("of the user's own call")

    pipeline = Pipeline([asks_modal], backend=distributed(chunk_size=2))
    with pytest.raises(getattr(modal.exception, kind), match="own call"):
        await pipeline.amap({"x": range(4)}, "x")
    assert plane.calls["FunctionMap"] <= 2


async def test_progress_comes_while_chunks_run(plane, client):
    """One queue brings the events of all containers, under the indices of the whole map."""
    seen = []

    class Watch(PipelineCallback):
        def on_map_start(self, total_items, ctx):
            seen.append(("start", total_items))

        def on_map_item_end(self, item_index, duration, ctx):
            seen.append(("item", item_index))

        def on_map_end(self, total_duration, ctx):
            seen.append(("end", None))

    pipeline = Pipeline([double], backend=distributed(chunk_size=10), callbacks=[Watch()])
    await pipeline.amap({"x": range(40)}, "x")
    assert seen[0] == ("start", 40)
    assert seen[-1] == ("end", None)
    assert sorted(seen[1:-1]) == [("item", index) for index in range(40)]
    assert plane.calls["QueueGetOrCreate"] == 1


async def test_a_stream_of_an_endless_source(plane, client):
    """A slow consumer slows the source; leaving ends the containers."""
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield taken

    pipeline = Pipeline([double], backend=distributed(chunk_size=4))
    async with pipeline.astream({"x": endless()}, "x", max_concurrency=16) as items:
        for count in range(1, 40):
            assert (await anext(items)).outputs == {"doubled": 2 * count}
            assert taken <= count + 16
    await nothing_is_left(plane)


async def test_cancelling_ends_every_container(plane, client):
    """Nothing is left on the control plane when the awaiting task is cancelled."""

    @node("y")
    async def hang(x):
        await asyncio.sleep(600)

    pipeline = Pipeline([hang], backend=distributed(chunk_size=1))
    task = asyncio.create_task(pipeline.amap({"x": range(10)}, "x"))
    await plane.until(lambda: len(plane.containers) == 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await nothing_is_left(plane)


async def test_a_cache_on_a_volume(plane, client):
    """Containers share what is on the volume: a second map computes nothing."""
    path = f"/tmp/hypernodes-volume-{os.getpid()}"
    volume = modal.Volume.from_name("results", create_if_missing=True)

    @node("y")
    def mark(x):
        marks = pathlib.Path(path, "marks")
        marks.mkdir(exist_ok=True)
        (marks / str(x)).touch(exist_ok=False)
        return x

    pipeline = Pipeline(
        [mark], cache=DiskCache(f"{path}/cache"), backend=distributed(chunk_size=5, volumes={path: volume})
    )
    for _ in range(2):
        assert (await pipeline.amap({"x": range(20)}, "x"))["y"] == list(range(20))


async def test_the_callers_connections_do_not_grow(plane, client):
    """However many items there are, the caller holds one connection."""
    most = {}
    for count in (20, 5_000):
        pipeline = Pipeline([double], backend=distributed(chunk_size=count // 10))
        most[count] = 0

        async def watch(count=count):
            while True:
                here = psutil.Process().net_connections()
                mine = [each for each in here if each.raddr and each.raddr.port == plane.port]
                most[count] = max(most[count], len(mine))
                await asyncio.sleep(0.01)

        watching = asyncio.create_task(watch())
        assert (await pipeline.amap({"x": range(count)}, "x"))["doubled"][-1] == 2 * count - 2
        watching.cancel()
    assert 0 < most[5_000] <= most[20]

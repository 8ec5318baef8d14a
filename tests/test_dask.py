"""Runs on a Dask cluster: real schedulers and workers, as processes over TCP and as a LocalCluster."""

import asyncio
import contextlib
import functools
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import anyio
import numpy as np
import pytest
from distributed import Client, Future, LocalCluster

from hypernodes import (
    DefinitionError,
    DiskCache,
    NodeTimeoutError,
    Pipeline,
    PipelineCallback,
    RemoteExecutionError,
    SerializationError,
    WorkerCrashedError,
    node,
)
from hypernodes.backend import DaskBackend, LocalBackend
from tests._dask_cluster import PATIENCE_S, ROOT, Cluster, await_file


@pytest.fixture(scope="module")
def cluster():
    """Two workers of one thread each."""
    with Cluster() as cluster:
        yield cluster


@contextlib.asynccontextmanager
async def connected(cluster, kind="async"):
    """A client of this loop, or one with a loop of its own in another thread, which has nothing left afterwards."""
    address = getattr(cluster, "address", cluster)
    if kind == "async":
        async with Client(address, asynchronous=True, set_as_default=False) as client:
            yield client
            await assert_nothing_left(client)
        return
    client = await asyncio.to_thread(Client, address, set_as_default=False)
    try:
        yield client
        await assert_nothing_left(client)
    finally:
        await asyncio.to_thread(client.close)


async def assert_nothing_left(client):
    """No task, queue or event stays with the scheduler, and the client holds no future."""

    def held(dask_scheduler):
        extensions = dask_scheduler.extensions
        return {
            "tasks": [str(key) for key in dask_scheduler.tasks],
            "queues": list(extensions["queues"].queues),
            "events": list(extensions["events"]._events),
        }

    async def look():
        if client._asynchronous:
            return await client.run_on_scheduler(held)
        return await asyncio.to_thread(client.run_on_scheduler, held)

    nothing = {"tasks": [], "queues": [], "events": []}
    deadline = time.monotonic() + 10
    while (left := await look()) != nothing and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    assert left == nothing
    assert not client.futures


def each_client(test):
    return pytest.mark.parametrize("kind", ["async", "sync"])(test)


@node("cleaned")
def clean(text):
    return text.strip()


@node("size")
async def measure(cleaned):
    await anyio.sleep(0)
    return len(cleaned)


@node("pid")
def where(x):
    return os.getpid()


def text_pipeline(client, **options):
    return Pipeline([clean, measure], name="text", backend=DaskBackend(client, **options))


async def appears(path):
    while not os.path.exists(path):  # noqa: ASYNC240 - another process makes it
        await asyncio.sleep(0.01)


@pytest.mark.asyncio
class TestCalls:
    @each_client
    async def test_a_run(self, cluster, kind):
        """A run is a task on a worker."""
        async with connected(cluster, kind) as client:
            assert await text_pipeline(client).arun(text=" abc ") == {"cleaned": "abc", "size": 3}
            pid = await Pipeline([where], backend=DaskBackend(client)).arun(x=1, output_name="pid")
            assert pid != os.getpid()

    @each_client
    @pytest.mark.parametrize("mode", ["distributed", "single"])
    async def test_a_map(self, cluster, kind, mode):
        """Results are in order, whatever the chunks."""
        texts = [" a" * count for count in range(500)]
        async with connected(cluster, kind) as client:
            made = await text_pipeline(client, mode=mode).amap({"text": texts}, "text", output_name="size")
            assert made["size"] == [len(text.strip()) for text in texts]
            empty = await text_pipeline(client, mode=mode).amap({"text": []}, "text")
            assert empty == {"cleaned": [], "size": []}

    async def test_a_map_uses_every_worker(self, cluster, tmp_path):
        """Two chunks run at once: each item waits for one on the other worker."""

        @node("pid")
        async def meet(x):
            (tmp_path / str(os.getpid())).touch()
            while len(list(tmp_path.iterdir())) < 2:
                await asyncio.sleep(0.01)
            return os.getpid()

        async with connected(cluster) as client:
            pipeline = Pipeline([meet], backend=DaskBackend(client, chunk_size=1))
            assert len(set((await pipeline.amap({"x": range(4)}, "x"))["pid"])) == 2

    @each_client
    async def test_an_endless_stream(self, cluster, kind):
        """A slow consumer slows the source: memory is bounded, and leaving ends it."""
        taken = []

        def source():
            for number in itertools.count():
                taken.append(number)
                yield f" {number} "

        async with connected(cluster, kind) as client:
            pipeline = text_pipeline(client, max_concurrency=8)
            async with pipeline.astream({"text": source()}, "text", output_name="size") as items:
                seen = [item.outputs["size"] async for item in first(items, 100)]
            assert seen == [len(str(number)) for number in range(100)]
            assert len(taken) < 200

    @each_client
    async def test_the_callers_loop_stays_free(self, cluster, kind, tmp_path):
        """While a run waits on a worker, other tasks of the loop go on: this one waits for one of them."""

        @node("y")
        async def wait_for_the_caller(x):
            (tmp_path / "there").touch()
            await appears(tmp_path / "here")
            return x

        async def answer():
            await appears(tmp_path / "there")
            (tmp_path / "here").touch()

        async with connected(cluster, kind) as client:
            answering = asyncio.create_task(answer())
            assert await Pipeline([wait_for_the_caller], backend=DaskBackend(client)).arun(x=1) == {"y": 1}
            await answering

    async def test_few_futures_at_once(self, cluster):
        """However many items there are, the client holds a future for each worker's thread, and what they share."""
        most = 0

        class Watch(PipelineCallback):
            def on_map_item_end(self, item_index, duration, ctx):
                nonlocal most
                most = max(most, len(client.futures))

        async with connected(cluster) as client:
            pipeline = text_pipeline(client, chunk_size=5).with_callbacks([Watch()])
            await pipeline.amap({"text": ["a"] * 100}, "text")
            assert 2 <= most <= 3

    async def test_large_values(self, cluster):
        """Arrays of many megabytes go out, are shared, and come back whole, without a warning of Dask's."""

        @node("sums")
        def add(array, x):
            return float(array[x])

        @node("doubled")
        def double(array):
            return array * 2

        array = np.arange(3_000_000, dtype=np.float64)
        async with connected(cluster) as client:
            backend = DaskBackend(client)
            made = await Pipeline([double], backend=backend).arun(array=array, output_name="doubled")
            assert np.array_equal(made, array * 2)
            mapped = await Pipeline([add], backend=backend).amap({"array": array, "x": range(10)}, "x")
            assert mapped["sums"] == list(range(10))

    async def test_a_part_of_a_pipeline(self, cluster):
        """A nested pipeline with a backend of its own runs there, while the one around it stays here."""
        async with connected(cluster) as client:
            inside = Pipeline([where], name="inside", backend=DaskBackend(client)).as_node(
                map_over="x", output_mapping={"pid": "pids"}
            )
            here = node("here")(lambda pids: os.getpid())
            made = await Pipeline([inside, here]).arun(x=[1, 2, 3])
            assert made["here"] == os.getpid()
            assert os.getpid() not in made["pids"]

    async def test_the_same_place_inside(self, cluster):
        """A nested pipeline that asks for the backend of the one around it is part of its task."""
        async with connected(cluster) as client:
            backend = DaskBackend(client)
            inside = Pipeline([clean], name="inside", backend=backend)
            assert (await Pipeline([inside, measure], backend=backend).arun(text=" a "))["size"] == 1

    async def test_worker_processes_of_the_engine(self, cluster):
        """The engine on a worker takes its options: nodes and items in processes of its own."""
        async with connected(cluster) as client:
            backend = DaskBackend(client, map_execution="parallel", max_workers=2)
            pids = (await Pipeline([where], backend=backend).amap({"x": range(4)}, "x"))["pid"]
            assert set(pids).isdisjoint((await client.run(os.getpid)).values())

    async def test_limits_are_shared_out(self, cluster, tmp_path):
        """A limit of one holds on the whole cluster."""

        @node("alone", limit="one")
        async def work(x):
            try:
                (tmp_path / "held").touch(exist_ok=False)
            except FileExistsError:
                return False
            await asyncio.sleep(0.02)
            (tmp_path / "held").unlink()
            return True

        async with connected(cluster) as client:
            pipeline = Pipeline([work], limits={"one": 1}, backend=DaskBackend(client))
            assert all((await pipeline.amap({"x": range(10)}, "x"))["alone"])

    async def test_a_cache_on_a_shared_path(self, cluster, tmp_path):
        """What a worker has stored is a hit on another, and here."""

        class Watch(PipelineCallback):
            def __init__(self):
                self.cached = []

            def on_node_cached(self, node_id, signature, ctx):
                self.cached.append(node_id)

        async with connected(cluster) as client:
            pipeline = text_pipeline(client).with_cache(DiskCache(tmp_path / "cache"))
            await pipeline.amap({"text": [" a", "bb "]}, "text")
            there, here = Watch(), Watch()
            await pipeline.with_callbacks([there]).amap({"text": [" a", "bb "]}, "text")
            await pipeline.with_callbacks([here]).with_backend(LocalBackend()).amap({"text": [" a", "bb "]}, "text")
            assert sorted(there.cached) == sorted(here.cached) == ["clean", "clean", "measure", "measure"]


async def first(items, count):
    """The first of a stream."""
    if count:
        async for item in items:
            yield item
            count -= 1
            if not count:
                return


class TestSyncCode:
    def test_from_a_script(self, cluster):
        """run(), map() and stream() with a client of sync code."""
        with Client(cluster.address, set_as_default=False) as client:
            pipeline = text_pipeline(client)
            assert pipeline.run(text=" abc ", output_name="size") == 3
            assert pipeline.map({"text": ["a", "bb"]}, "text")["size"] == [1, 2]
            with pipeline.stream({"text": ["a", "bb"]}, "text", output_name="size") as items:
                assert [item.outputs["size"] for item in items] == [1, 2]

    @pytest.mark.asyncio
    async def test_in_a_running_loop(self, cluster):
        """As in a notebook's cell: a client with a loop of its own serves run()."""
        async with connected(cluster, "sync") as client:
            assert text_pipeline(client).run(text=" abc ", output_name="size") == 3

    @pytest.mark.asyncio
    async def test_a_client_of_the_loop_that_run_holds(self, cluster):
        """It would wait for itself: that is an error which says what to do."""
        async with connected(cluster) as client:
            with pytest.raises(RemoteExecutionError, match=r"await arun\(\)"):
                text_pipeline(client).run(text="a")

    @pytest.mark.parametrize("processes", [True, False])
    def test_a_local_cluster(self, processes):
        """Workers that are processes of a LocalCluster, and threads of the caller's process: in a process of its own.

        Python's resource tracker, which the cluster starts, lives as long as the process.
        """
        program = f"from tests.test_dask import map_on_a_local_cluster; print(map_on_a_local_cluster({processes}))"
        command = [sys.executable, "-c", program]
        ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=PATIENCE_S, cwd=ROOT)
        assert ended.stdout == f"{[1, 2] * 20}\n", ended.stderr


@pytest.mark.asyncio
async def test_a_client_stays_in_its_process():
    """Worker processes that would need it are refused with what to do instead."""
    async with Client(processes=False, n_workers=1, dashboard_address=":0", asynchronous=True) as client:
        there = text_pipeline(client).as_node()
        pipeline = Pipeline([there], backend=LocalBackend(map_execution="parallel", max_workers=1))
        with pytest.raises(
            SerializationError, match="since its client cannot: let the pipeline around it run its items"
        ):
            await pipeline.amap({"text": ["a"]}, "text")


@pytest.mark.asyncio
async def test_a_cluster_without_workers(monkeypatch, caplog):
    """A run waits for workers, as Dask does, and says so once."""
    monkeypatch.setattr("hypernodes.backend._dask._ALONE_S", 0.05)
    async with (
        LocalCluster(n_workers=0, processes=False, asynchronous=True, dashboard_address=":0") as local,
        Client(local, asynchronous=True, set_as_default=False) as client,
    ):
        waiting = asyncio.create_task(text_pipeline(client).amap({"text": [" a"] * 9}, "text"))
        while not caplog.messages:
            await anyio.sleep(0.01)
        await anyio.sleep(0.2)
        local.scale(1)
        assert (await waiting)["size"] == [1] * 9
    assert [each for each in caplog.messages if "no workers" in each] == [
        "the Dask cluster has no workers: pipeline 'text' waits until one comes"
    ]


@pytest.mark.asyncio
async def test_a_timeout_where_there_are_no_workers():
    """A pipeline's timeout holds for who waits, also while nothing can begin."""
    async with (
        LocalCluster(n_workers=0, processes=False, asynchronous=True, dashboard_address=":0") as local,
        Client(local, asynchronous=True, set_as_default=False) as client,
    ):
        with pytest.raises(NodeTimeoutError, match=r"did not finish within 0.2 s, the time until it could begin"):
            await text_pipeline(client).with_timeout(0.2).arun(text="a")
        await assert_nothing_left(client)


@pytest.mark.asyncio
async def test_a_cluster_that_adapts(tmp_path):
    """It grows for the tasks that wait: more than the threads that it has, as `max_tasks` says."""

    @node("worker")
    async def meet(x):
        (tmp_path / str(threading.get_ident())).touch()
        while len(list(tmp_path.iterdir())) < 2:
            await asyncio.sleep(0.01)
        return threading.get_ident()

    async with (
        LocalCluster(
            n_workers=0, threads_per_worker=1, processes=False, asynchronous=True, dashboard_address=":0"
        ) as local,
        Client(local, asynchronous=True, set_as_default=False) as client,
    ):
        local.adapt(minimum=0, maximum=2, interval="50ms", target_duration="100ms")
        pipeline = Pipeline([meet], backend=DaskBackend(client, chunk_size=1, max_tasks=4))
        assert len(set((await pipeline.amap({"x": range(6)}, "x"))["worker"])) == 2


def map_on_a_local_cluster(processes):
    """Map the pipeline of texts there."""
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=processes, dashboard_address=":0") as local,
        Client(local, set_as_default=False) as client,
    ):
        return text_pipeline(client).map({"text": ["a", " bb "] * 20}, "text")["size"]


class Watch(PipelineCallback):
    def __init__(self):
        self.seen = []

    def on_node_start(self, node_id, inputs, ctx):
        self.seen.append(("start", node_id, dict(inputs), ctx.hierarchy_path))

    def on_node_end(self, node_id, outputs, duration, ctx):
        self.seen.append(("end", node_id, dict(outputs), ctx.hierarchy_path))


@pytest.mark.asyncio
class TestEvents:
    @each_client
    async def test_callbacks_hear_what_happens_on_the_worker(self, cluster, kind):
        """In the order in which it happened, with the paths that a local run has."""
        far, near = Watch(), Watch()
        async with connected(cluster, kind) as client:
            await text_pipeline(client).with_callbacks([far]).arun(text=" abc ")
            await text_pipeline(client).with_callbacks([near]).with_backend(LocalBackend()).arun(text=" abc ")
        assert far.seen == near.seen

    @each_client
    @pytest.mark.parametrize("mode", ["distributed", "single"])
    async def test_they_come_while_it_runs(self, cluster, kind, mode, tmp_path):
        """The second item runs until the caller has heard of the end of the first."""

        @node("y")
        async def slow(x):
            if x:
                await appears(tmp_path / "heard")
            return x

        class Tell(PipelineCallback):
            def on_map_item_end(self, item_index, duration, ctx):
                (tmp_path / "heard").touch()

        async with connected(cluster, kind) as client:
            pipeline = Pipeline([slow], backend=DaskBackend(client, mode=mode), callbacks=[Tell()])
            if mode == "distributed":
                pipeline = pipeline.with_backend(DaskBackend(client, chunk_size=2))
            assert (await pipeline.amap({"x": [0, 1]}, "x"))["y"] == [0, 1]

    async def test_of_an_item_in_order(self, cluster):
        """What is sent while a chunk runs comes before what is sent with its reply."""

        @node("y")
        async def slow(x):
            await asyncio.sleep(0.03)
            return x

        starts, ends = [], []

        class Order(PipelineCallback):
            def on_map_item_start(self, item_index, ctx):
                starts.append(item_index)

            def on_map_item_end(self, item_index, duration, ctx):
                assert item_index in starts
                ends.append(item_index)

        async with connected(cluster) as client:
            backend = DaskBackend(client, max_concurrency=1)
            await Pipeline([slow], backend=backend, callbacks=[Order()]).amap({"x": range(40)}, "x")
        assert sorted(starts) == sorted(ends) == list(range(40))


@node("half")
def halve(x):
    if x % 2:
        raise ValueError(f"{x} is odd")
    return x // 2


@pytest.mark.asyncio
class TestErrors:
    @each_client
    async def test_a_users_exception_comes_back_as_itself(self, cluster, kind):
        """With its path, and its remote traceback as its cause."""
        async with connected(cluster, kind) as client:
            inside = Pipeline([halve], name="inside", backend=DaskBackend(client)).as_node(map_over="x")
            with pytest.raises(ValueError, match="3 is odd") as caught:
                await Pipeline([inside], name="outside").arun(x=[0, 2, 3])
            assert caught.value.__notes__ == ["in node 'halve' at outside / inside[2] / halve"]
            assert "is odd" in str(caught.value.__cause__)

    @each_client
    async def test_failures_are_collected(self, cluster, kind):
        """on_error="collect" works as it does here."""
        async with connected(cluster, kind) as client:
            pipeline = Pipeline([halve], backend=DaskBackend(client))
            result = await pipeline.amap({"x": range(40)}, "x", on_error="collect")
        assert result["half"] == [None if x % 2 else x // 2 for x in range(40)]
        assert [(failure.index, failure.inputs) for failure in result.failures] == [
            (x, {"x": x}) for x in range(40) if x % 2
        ]

    async def test_what_cannot_be_sent_is_named(self, cluster):
        """The path of the object, here and on the way back."""
        async with connected(cluster) as client:
            with pytest.raises(SerializationError, match=r"inputs\['text'\]"):
                await text_pipeline(client).arun(text=(each for each in ()))
            made = Pipeline([node("lock")(lambda x: __import__("threading").Lock())], backend=DaskBackend(client))
            with pytest.raises(SerializationError, match="output 'lock'"):
                await made.arun(x=1)

    async def test_sys_exit_in_a_node(self, cluster):
        """Is raised where the caller waits, and the worker lives on."""

        @node("y")
        async def leave(x):
            sys.exit(3)

        async with connected(cluster) as client:
            before = await client.run(os.getpid)
            with pytest.raises(SystemExit):
                await Pipeline([leave], backend=DaskBackend(client)).arun(x=1)
            assert await client.run(os.getpid) == before

    async def test_a_client_that_is_not_connected(self, cluster):
        """It says whether to await it or to make a new one."""
        client = Client(cluster.address, asynchronous=True, set_as_default=False)
        with pytest.raises(RemoteExecutionError, match="await it first"):
            await text_pipeline(client).arun(text="a")
        await client
        await client.close()
        with pytest.raises(RemoteExecutionError, match="not connected"):
            await text_pipeline(client).arun(text="a")

    @each_client
    async def test_a_scheduler_that_dies(self, kind, tmp_path):
        """Is one clear error, at once, with Dask's as its cause."""

        @node("y")
        async def hang(x):
            (tmp_path / "there").touch()
            await anyio.sleep_forever()

        with Cluster(workers=1) as own:
            options = {"set_as_default": False, "timeout": 4}
            if kind == "sync":
                client = await asyncio.to_thread(Client, own.address, **options)
            else:
                client = await Client(own.address, asynchronous=True, **options)
            pipeline = Pipeline([hang], backend=DaskBackend(client), callbacks=[Watch()])
            running = asyncio.create_task(pipeline.arun(x=1))
            await appears(tmp_path / "there")
            own.scheduler.kill()
            with pytest.raises(RemoteExecutionError) as caught:
                await running
            assert caught.value.__cause__ is not None
            # Dask tries to connect again meanwhile, and does not take well to being closed then.
            while client.status != "closed":
                await asyncio.sleep(0.05)
            if kind == "sync":
                await asyncio.to_thread(client.close)

    async def test_someone_cancels_it(self, cluster, tmp_path):
        """Whoever cancels everything on the scheduler is named as a cause."""

        @node("y")
        async def hang(x):
            (tmp_path / "there").touch()
            await anyio.sleep_forever()

        async with connected(cluster) as client:
            running = asyncio.create_task(Pipeline([hang], backend=DaskBackend(client)).arun(x=1))
            await appears(tmp_path / "there")
            await client.cancel([Future(key, client) for key in client.futures], force=True)
            with pytest.raises(RemoteExecutionError, match="given up by Dask"):
                await running


@pytest.mark.asyncio
class TestCancelling:
    @each_client
    @pytest.mark.parametrize("heard", [False, True])
    async def test_ends_what_runs_on_the_workers(self, cluster, kind, heard, tmp_path):
        """Promptly, with its own clean-up; nothing is left on the scheduler."""

        @node("y")
        async def hang(x):
            (tmp_path / f"began {os.getpid()}").touch()
            try:
                await anyio.sleep_forever()
            finally:
                (tmp_path / f"ended {os.getpid()}").touch()

        async with connected(cluster, kind) as client:
            pipeline = Pipeline([hang], backend=DaskBackend(client), callbacks=[Watch()] if heard else [])
            running = asyncio.create_task(pipeline.amap({"x": range(100)}, "x"))
            while len(list(tmp_path.glob("began *"))) < 2:
                await asyncio.sleep(0.01)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            for began in tmp_path.glob("began *"):
                await appears(str(began).replace("began", "ended"))
            assert not client.futures

    async def test_a_function_that_computes_runs_to_its_end(self, cluster, tmp_path):
        """The caller does not wait for it; afterwards the worker's thread is free again."""

        @node("y")
        def compute(x):
            (tmp_path / "began").touch()
            await_file(tmp_path / "go")
            return x

        async with connected(cluster) as client:
            running = asyncio.create_task(Pipeline([compute], backend=DaskBackend(client)).arun(x=1))
            await appears(tmp_path / "began")
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            (tmp_path / "go").touch()
            sizes = await text_pipeline(client, chunk_size=1).amap({"text": ["a"] * 4}, "text")
            assert sizes["size"] == [1] * 4

    async def test_one_failure_ends_the_others(self, cluster, tmp_path):
        """on_error="raise" stops what runs on other workers."""

        @node("y")
        async def fail_or_hang(x):
            if x == 0:
                await appears(tmp_path / "began")
                raise ValueError("the first")
            (tmp_path / "began").touch()
            try:
                await anyio.sleep_forever()
            finally:
                (tmp_path / "ended").touch()

        async with connected(cluster) as client:
            with pytest.raises(ValueError, match="the first"):
                await Pipeline([fail_or_hang], backend=DaskBackend(client, chunk_size=1)).amap({"x": [0, 1]}, "x")
            await appears(tmp_path / "ended")

    async def test_a_caller_that_dies(self, cluster, tmp_path):
        """Its work ends too: nobody waits for it any more."""
        script = tmp_path / "script.py"
        script.write_text(
            textwrap.dedent(
                f"""
                import anyio, pathlib
                from distributed import Client
                from hypernodes import Pipeline, node
                from hypernodes.backend import DaskBackend
                folder = pathlib.Path({str(tmp_path)!r})

                @node("y")
                async def hang(x):
                    (folder / "began").touch()
                    try:
                        await anyio.sleep_forever()
                    finally:
                        (folder / "ended").touch()

                if __name__ == "__main__":
                    Pipeline([hang], backend=DaskBackend(Client({cluster.address!r}))).run(x=1)
                """
            )
        )
        process = subprocess.Popen([sys.executable, script])  # noqa: ASYNC220 - it lives on
        try:
            await appears(tmp_path / "began")
        finally:
            process.kill()
            process.wait()
        await appears(tmp_path / "ended")
        async with connected(cluster):
            pass


@pytest.mark.asyncio
@pytest.mark.timeout(120)
class TestDeaths:
    async def test_a_chunk_is_tried_again(self, cluster, tmp_path):
        """On a worker that lives; no item is lost or made twice in the result."""

        @node("y")
        async def work(x):
            if x == 5 and not (tmp_path / "pid").exists():
                (tmp_path / "pid").write_text(str(os.getpid()))
                await anyio.sleep_forever()
            return x

        async with connected(cluster) as client:
            pipeline = Pipeline([work], backend=DaskBackend(client, chunk_size=4))
            running = asyncio.create_task(pipeline.amap({"x": range(20)}, "x"))
            while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
                await asyncio.sleep(0.01)
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
            assert (await running)["y"] == list(range(20))

    async def test_a_run_is_tried_again(self, cluster, tmp_path):
        """A run whose worker dies once is made by another."""

        @node("y")
        def die_once(x):
            if not (tmp_path / "died").exists():
                (tmp_path / "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return x

        async with connected(cluster) as client:
            assert await Pipeline([die_once], backend=DaskBackend(client)).arun(x=1) == {"y": 1}

    async def test_a_run_that_kills_its_worker(self, cluster, tmp_path):
        """Is tried twice, not as often as Dask would, and is an error that says so."""

        @node("y")
        def die(x):
            with (tmp_path / "deaths").open("a") as deaths:
                deaths.write("x")
            os.kill(os.getpid(), signal.SIGKILL)

        async with connected(cluster) as client:
            with pytest.raises(WorkerCrashedError, match="tried once more"):
                await Pipeline([die], backend=DaskBackend(client)).arun(x=1)
        assert (tmp_path / "deaths").read_text() == "xx"

    @pytest.mark.parametrize("threads", [1, 2])
    async def test_an_item_that_kills_its_worker_fails_alone(self, cluster, threads, tmp_path):
        """Those in its chunk, and in the other threads of its worker, do not fail."""

        @node("y")
        async def die(x):
            await asyncio.sleep(0.005)
            if x == 6:
                os.kill(os.getpid(), signal.SIGKILL)
            return x

        with contextlib.ExitStack() as stack:
            if threads > 1:
                cluster = stack.enter_context(Cluster(workers=1, threads=threads))
            async with connected(cluster) as client:
                pipeline = Pipeline([die], name="deadly", backend=DaskBackend(client, chunk_size=2))
                result = await pipeline.amap({"x": range(16)}, "x", on_error="collect")
        assert result["y"] == [None if x == 6 else x for x in range(16)]
        (failure,) = result.failures
        assert isinstance(failure.error, WorkerCrashedError)
        assert "item 6 (deadly[6])" in str(failure.error)


def test_another_event_loop_is_refused(cluster):
    """Dask's client needs asyncio: trio gets an error that says what to do."""
    with Client(cluster.address, set_as_default=False) as client:
        pipeline = text_pipeline(client)
        with pytest.raises(RemoteExecutionError, match="needs asyncio"):
            anyio.run(functools.partial(pipeline.arun, text="a"), backend="trio")


@pytest.mark.parametrize("client", [None, "tcp://127.0.0.1:8786"])
def test_what_is_no_client(client):
    """Is refused when the backend is made."""
    with pytest.raises(DefinitionError, match=r"takes a distributed\.Client"):
        DaskBackend(client)


def test_a_number_of_tasks_that_is_none(cluster):
    """Is refused when the backend is made, by its name."""
    with (
        Client(cluster.address, set_as_default=False) as client,
        pytest.raises(DefinitionError, match="max_tasks of 'DaskBackend' must be a whole number"),
    ):
        DaskBackend(client, max_tasks=0)


def test_without_dask(tmp_path):
    """Without Dask installed everything else works, and DaskBackend says what to install."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            sys.modules["distributed"] = None
            from hypernodes import Pipeline, node
            print(Pipeline([node("y")(lambda x: x + 1)]).run(x=1))
            from hypernodes.backend import DaskBackend
            try:
                DaskBackend(None)
            except Exception as error:
                print(type(error).__name__, error)
            """
        )
    )
    said = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[0] == "{'y': 2}"
    assert 'pip install "hypernodes[dask]"' in said

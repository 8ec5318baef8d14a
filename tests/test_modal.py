"""Whole runs in a container: the real Modal client and container entry point, on a loopback control plane.

What Modal's servers do (building images, scaling, timeouts, what becomes of a container that dies) is a model there.
"""

import asyncio
import os
import subprocess
import sys
import textwrap
import threading
import time

import anyio
import grpclib
import modal
import modal.runner
import numpy as np
import psutil
import pytest

from hypernodes import (
    CacheError,
    DefinitionError,
    DiskCache,
    NodeTimeoutError,
    Pipeline,
    PipelineCallback,
    RemoteExecutionError,
    RemoteTimeoutError,
    SerializationError,
    WorkerCrashedError,
    node,
)
from hypernodes.backend import LocalBackend, ModalBackend, RemoteBackend
from hypernodes.backend._entry import Shared, run_payload
from hypernodes.backend._message import packed, unpacked
from hypernodes.backend._remote import Line
from tests import loopback

plane, client = loopback.plane, loopback.client

IMAGE = modal.Image.debian_slim()
PATIENCE_S = 30


@node("cleaned")
def clean(text):
    return text.strip()


@node("size")
async def measure(cleaned):
    await anyio.sleep(0)
    return len(cleaned)


until_sending = {}


@node("y")
async def wait_for_sending(x):
    # Of the module itself, and not of the copy that travels with this function.
    await sys.modules["tests.test_modal"].until_sending["event"].wait()
    return x


@node("y")
async def sleep_long(x):
    await asyncio.sleep(600)


def text_pipeline(**options):
    return Pipeline([clean, measure], name="text", backend=ModalBackend(IMAGE, **options))


def assert_nothing_left(plane):
    assert plane.open_inputs == 0
    assert plane.containers == []


@pytest.mark.asyncio
class TestOneCall:
    async def test_a_run_is_one_call(self, plane, client):
        """However many nodes there are, a run is one call of one container, which is gone afterwards."""
        assert await text_pipeline().arun(text=" abc ") == {"cleaned": "abc", "size": 3}
        assert plane.calls["FunctionMap"] == 1
        assert plane.calls["FunctionPutInputs"] == 0

    async def test_a_map_is_one_call(self, plane, client):
        """However many items there are, a map is one call, and results are in order."""
        texts = [" a" * count for count in range(2_000)]
        sizes = (await text_pipeline().amap({"text": texts}, "text", output_name="size"))["size"]
        assert sizes == [len(text.strip()) for text in texts]
        assert plane.calls["FunctionMap"] == 1
        assert plane.calls["FunctionPutInputs"] == 0

    async def test_an_item_costs_the_caller_no_task(self, plane, client):
        """While a map of many items runs in the container, the caller's loop has as many tasks as for a few."""

        @node("slept")
        async def sleep(x):
            await asyncio.sleep(0.5)
            return x

        pipeline = Pipeline([sleep], backend=ModalBackend(IMAGE, max_concurrency=5_000))
        most = {}
        for count in (2, 2_000):
            counts = []

            async def watch(counts=counts):
                while True:
                    counts.append(len(asyncio.all_tasks()))
                    await asyncio.sleep(0.05)

            watching = asyncio.create_task(watch())
            result = await pipeline.amap({"x": range(count)}, "x")
            watching.cancel()
            assert result["slept"] == list(range(count))
            most[count] = max(counts)
        assert most[2_000] <= most[2] + 1

    async def test_from_sync_code_in_a_running_loop(self, plane, client):
        """run() works where a loop runs already, as in a notebook cell."""
        assert text_pipeline().run(text=" abc ", output_name="size") == 3

    @pytest.mark.parametrize("mode", ["single", "distributed"])
    async def test_a_map_of_nothing(self, plane, client, mode):
        """No container is started for it; it is told of all the same."""
        told = []

        class Watch(PipelineCallback):
            def on_pipeline_start(self, pipeline_id, inputs, ctx):
                told.append(("pipeline", pipeline_id, dict(inputs)))

            def on_map_start(self, total_items, ctx):
                told.append(("map", total_items))

            def on_map_end(self, duration, ctx):
                told.append("map ends")

            def on_pipeline_end(self, pipeline_id, outputs, duration, ctx):
                told.append(("pipeline ends", pipeline_id, outputs))

        pipeline = text_pipeline(mode=mode).with_callbacks([Watch()])
        assert await pipeline.amap({"text": []}, "text") == {"cleaned": [], "size": []}
        assert not plane.calls["AppCreate"]
        far, told = told, []
        await pipeline.with_backend(LocalBackend()).amap({"text": []}, "text")
        assert len(far) == 4
        assert far == told

    async def test_a_source_without_end(self, plane, client):
        """A single call reads it first, and can be cancelled while it does: the loop goes on."""

        async def consume():
            async with text_pipeline().astream({"text": iter(str, "never")}, "text") as items:
                async for _ in items:
                    pass

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(consume(), 0.2)
        assert not plane.calls["AppCreate"]

    async def test_a_stream(self, plane, client):
        """astream hands over what the container has made."""
        async with text_pipeline().astream({"text": ["a", "bb"]}, "text", output_name="size") as items:
            assert [item.outputs async for item in items] == [{"size": 1}, {"size": 2}]

    async def test_the_engine_inside_takes_its_options(self, plane, client):
        """Threads, worker processes and limits are those of the container."""

        @node("pid", run_in="process")
        def where(x):
            return os.getpid()

        @node("thread")
        def in_thread(x):
            return threading.current_thread() is threading.main_thread()

        backend = ModalBackend(IMAGE, node_execution="threaded", max_workers=2)
        made = await Pipeline([where, in_thread], backend=backend).amap({"x": range(3)}, "x")
        assert os.getpid() not in made["pid"]
        assert made["thread"] == [False] * 3
        limited = Pipeline([where], backend=ModalBackend(IMAGE, map_execution="parallel", max_workers=2))
        assert len(set((await limited.amap({"x": range(8)}, "x"))["pid"])) <= 8

    async def test_resources_of_a_part(self, plane, client):
        """A nested pipeline with a backend of its own runs there, while the one around it stays here."""

        @node("here")
        def here(size):
            return os.getpid()

        @node("there", run_in="loop")
        def there(cleaned):
            return os.getpid()

        inside = Pipeline([clean, there, measure], name="inside", backend=ModalBackend(IMAGE, gpu="A100"))
        nested = inside.as_node(map_over="text", output_mapping={"size": "sizes"})
        total = node("size")(lambda sizes: sum(sizes))
        made = await Pipeline([nested, total, here]).arun(text=["a", "bb", "ccc"])
        assert made["size"] == 6
        assert made["here"] == os.getpid()
        assert len(set(made["there"])) == 1
        assert made["there"][0] != os.getpid()
        assert plane.calls["FunctionMap"] == 1

    async def test_limits_set_around_it_hold_inside(self, plane, client):
        """A limit that an enclosing pipeline sets holds in the container of a nested one too."""
        running = []

        @node("most", limit="two")
        async def work(x):
            running.append(x)
            most = len(running)
            await asyncio.sleep(0.02)
            running.remove(x)
            return most

        inside = Pipeline([work], name="inside", backend=ModalBackend(IMAGE)).as_node(map_over="x")
        made = await Pipeline([inside], limits={"two": 2}).arun(x=list(range(6)))
        assert max(made["most"]) == 2

    async def test_one_place_inside_another_is_refused(self, plane, client):
        """A container does not start others: the message says so, before anything runs."""
        inside = Pipeline([clean], name="inside", backend=ModalBackend(IMAGE, gpu="A100"))
        with pytest.raises(SerializationError, match="a container does not start others"):
            await Pipeline([inside, measure], backend=ModalBackend(IMAGE)).arun(text="a")

    async def test_the_same_place_inside_is_the_same_container(self, plane, client):
        """A nested pipeline that asks for the backend of the one around it is part of its call."""
        backend = ModalBackend(IMAGE)
        inside = Pipeline([clean], name="inside", backend=backend)
        assert (await Pipeline([inside, measure], backend=backend).arun(text=" a "))["size"] == 1
        assert plane.calls["FunctionMap"] == 1


@pytest.mark.asyncio
class TestValues:
    async def test_large_arrays(self, plane, client):
        """Arrays of many megabytes go out and back whole, and can be written to."""

        @node("doubled")
        def double(array):
            array *= 2
            return array

        array = np.arange(2_000_000, dtype=np.float64)
        made = await Pipeline([double], backend=ModalBackend(IMAGE)).arun(array=array.copy(), output_name="doubled")
        assert np.array_equal(made, array * 2)
        made += 1
        assert plane.calls["BlobCreate"] >= 1

    async def test_classes_of_the_caller(self, plane, client):
        """Closures, lambdas and classes that only the caller has travel with the call."""

        class Point:
            def __init__(self, x):
                self.x = x

        factor = 3
        pipeline = Pipeline([node("moved")(lambda point: Point(point.x * factor))], backend=ModalBackend(IMAGE))
        assert (await pipeline.arun(point=Point(2), output_name="moved")).x == 6


@pytest.mark.asyncio
class TestTimeouts:
    async def test_of_a_pipeline(self, plane, client):
        """It holds for who waits, from the first moment on, and ends the run there."""
        pipeline = Pipeline([sleep_long], name="p", backend=ModalBackend(IMAGE), timeout=1)
        for each in (pipeline, Pipeline([pipeline.as_node()])):
            with pytest.raises(NodeTimeoutError, match=r"pipeline 'p' did not finish within 1 s, the time until"):
                await each.arun(x=1)
            await plane.until(lambda: not plane.containers)
            assert plane.open_inputs == 0


@pytest.mark.asyncio
class TestEvents:
    async def test_callbacks_hear_what_happens_in_the_container(self, plane, client):
        """In the order in which it happened, with the paths that a local run has."""

        class Watch(PipelineCallback):
            def __init__(self):
                self.seen = []

            def on_node_start(self, node_id, inputs, ctx):
                self.seen.append(("start", node_id, dict(inputs), ctx.current_pipeline_id))

            def on_node_end(self, node_id, outputs, duration, ctx):
                self.seen.append(("end", node_id, dict(outputs), ctx.current_pipeline_id))

        far, near = Watch(), Watch()
        await text_pipeline().with_callbacks([far]).arun(text=" abc ")
        await text_pipeline().with_callbacks([near]).with_backend(LocalBackend()).arun(text=" abc ")
        assert far.seen == near.seen

    async def test_they_come_while_the_container_runs(self, plane, client):
        """The first item is heard of long before the last one is done."""

        @node("slept")
        async def sleep(x):
            await asyncio.sleep(x)
            return x

        times = []

        class Watch(PipelineCallback):
            def on_map_item_end(self, item_index, duration, ctx):
                times.append(time.monotonic())

        pipeline = Pipeline([sleep], backend=ModalBackend(IMAGE), callbacks=[Watch()])
        await pipeline.amap({"x": [0.01, 2.5]}, "x")
        first, second = times
        assert second - first > 1

    @pytest.mark.parametrize("method", ["QueueGet", "QueuePut"])
    async def test_a_line_for_events_that_breaks(self, plane, client, caplog, method):
        """It costs the events that were on it, which is logged, and not the run."""

        class Watch(PipelineCallback):
            def on_node_end(self, node_id, outputs, duration, ctx):
                pass

        plane.fail(method, grpclib.Status.NOT_FOUND, times=1)
        pipeline = Pipeline([clean], backend=ModalBackend(IMAGE), callbacks=[Watch()])
        with anyio.fail_after(PATIENCE_S):
            assert await pipeline.arun(text=" a ") == {"cleaned": "a"}
        assert ("do not come any more" in caplog.text) is (method == "QueueGet")

    @pytest.mark.parametrize("ends", ["it dies", "it takes too long", "nobody waits any more"])
    async def test_what_began_is_told_to_its_end(self, plane, client, ends, tmp_path):
        """Of a part of a pipeline that is in a container, the innermost first, however it ends."""

        @node("y")
        async def hang(x):
            (tmp_path / "begun").touch()
            await asyncio.sleep(1)
            if ends == "it dies":
                os._exit(3)
            await asyncio.sleep(600)

        @node("z")
        async def fail(x):
            while ends != "nobody waits any more" or not (tmp_path / "begun").exists():
                await asyncio.sleep(0.05)
            await asyncio.sleep(1)
            raise LookupError("enough")

        timeout = 2 if ends == "it takes too long" else None
        far = Pipeline([hang], name="far", backend=ModalBackend(IMAGE), timeout=timeout)
        error = {"it dies": WorkerCrashedError, "it takes too long": NodeTimeoutError}.get(ends, LookupError)
        told = []
        with pytest.raises(error):
            async with Pipeline([far.as_node(), fail], name="here").aevents(x=1) as events:
                async for event in events:
                    told.append(event)  # noqa: PERF401 - those before the error are wanted
        told = [(type(event).__name__, *event.path[1:]) for event in told]
        assert [each for each in told if "hang" in each] == [
            ("NodeStarted", "far", "hang"),
            ("NodeCancelled", "far", "hang"),
        ]
        assert [kind for kind, *path in told if path == ["far"]] == [
            "NodeStarted",
            "PipelineStarted",
            "PipelineFailed",
            "NodeCancelled" if ends == "nobody waits any more" else "NodeFailed",
        ]
        assert told[0] == ("PipelineStarted",)
        assert told[-1] == ("PipelineFailed",)

    async def test_a_line_for_events_that_is_gone(self, plane, client, caplog, monkeypatch):
        """The result does not wait for it for ever."""
        monkeypatch.setattr("hypernodes.backend._modal_line._CLOSING_S", 0.3)
        heard = []

        class Watch(PipelineCallback):
            def on_node_end(self, node_id, outputs, duration, ctx):
                heard.append(node_id)

        plane.fail("QueuePut", grpclib.Status.UNAVAILABLE, times=1_000)
        pipeline = Pipeline([clean], backend=ModalBackend(IMAGE), callbacks=[Watch()])
        with anyio.fail_after(PATIENCE_S):
            assert await pipeline.arun(text=" a ") == {"cleaned": "a"}
        assert heard == ["clean"]  # they came with the reply
        assert "its queue does not answer" in caplog.text

    async def test_large_ones(self, plane, client):
        """Outputs of many megabytes are told while the container runs, though a queue takes small items only."""

        @node("array")
        def make(x):
            return np.full(400_000, x)

        @node("slept")
        async def sleep(array):
            await asyncio.sleep(1)
            return array.sum()

        times = {}

        class Watch(PipelineCallback):
            def on_node_end(self, node_id, outputs, duration, ctx):
                times[node_id] = time.monotonic()
                if node_id == "make":
                    assert np.array_equal(outputs["array"], np.full(400_000, 3))

        await Pipeline([make, sleep], backend=ModalBackend(IMAGE), callbacks=[Watch()]).arun(x=3)
        assert times["sleep"] - times["make"] > 0.5

    async def test_a_container_may_be_silent_for_long(self, plane, client):
        """A run that is watched goes on while nothing is heard of it, as while its container starts."""

        @node("slept")
        async def sleep(x):
            await asyncio.sleep(x)
            return x

        ended = []

        class Watch(PipelineCallback):
            def on_node_end(self, node_id, outputs, duration, ctx):
                ended.append(node_id)

        pipeline = Pipeline([sleep], backend=ModalBackend(IMAGE), callbacks=[Watch()])
        assert await pipeline.arun(x=6, output_name="slept") == 6  # seconds
        assert ended == ["sleep"]


@pytest.mark.asyncio
class TestErrors:
    async def test_a_users_exception_comes_back_as_itself(self, plane, client):
        """With its path, its remote traceback as its cause, and nothing of Modal's."""

        @node("x")
        def fails(text):
            raise ValueError("no such text")

        inside = Pipeline([fails], name="inside").as_node(map_over="text")
        with pytest.raises(ValueError, match="no such text") as caught:
            await Pipeline([inside], name="outside", backend=ModalBackend(IMAGE)).arun(text=["a", "b"])
        (note,) = caught.value.__notes__
        assert note in {f"in node 'fails' at outside / inside[{index}] / fails" for index in (0, 1)}
        assert "raise ValueError" in str(caught.value.__cause__)

    async def test_of_a_nested_pipeline_too(self, plane, client):
        """The note says the innermost place, once."""

        @node("x")
        def fails(text):
            raise ValueError("no such text")

        inside = Pipeline([fails], name="inside", backend=ModalBackend(IMAGE))
        with pytest.raises(ValueError, match="no such text") as caught:
            await Pipeline([inside], name="outside").arun(text="a")
        assert caught.value.__notes__ == ["in node 'fails' at outside / inside / fails"]

    async def test_failures_are_collected(self, plane, client):
        """on_error="collect" works as it does here."""

        @node("half")
        def halve(x):
            if x % 2:
                raise ValueError(f"{x} is odd")
            return x // 2

        result = await Pipeline([halve], backend=ModalBackend(IMAGE)).amap({"x": range(4)}, "x", on_error="collect")
        assert result["half"] == [0, None, 1, None]
        assert [(failure.index, str(failure.error), failure.inputs) for failure in result.failures] == [
            (1, "1 is odd", {"x": 1}),
            (3, "3 is odd", {"x": 3}),
        ]

    async def test_what_cannot_be_sent_is_named(self, plane, client):
        """The path of the object, before anything is started."""

        class Encoder:
            def __init__(self):
                self._lock = threading.Lock()

        with pytest.raises(SerializationError, match=r"inputs\['text'\]\._lock is a lock"):
            await text_pipeline().arun(text=Encoder())
        assert plane.calls["AppCreate"] == 0

    async def test_what_cannot_be_sent_back_is_named(self, plane, client):
        """An output that cannot be pickled is an error of ours, which names it."""

        @node("lock")
        def make(text):
            return threading.Lock()

        with pytest.raises(SerializationError, match="output 'lock'"):
            await Pipeline([make], backend=ModalBackend(IMAGE)).arun(text="a")

    async def test_a_module_that_the_image_lacks(self, plane, client, tmp_path, monkeypatch):
        """The message names the module and how to add it to the image."""
        (tmp_path / "only_on_this_machine.py").write_text("def shout(text):\n    return text.upper()\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        import only_on_this_machine

        with pytest.raises(RemoteExecutionError, match=r"no module 'only_on_this_machine'.*add_local_python_source"):
            await Pipeline([node("x")(only_on_this_machine.shout)], backend=ModalBackend(IMAGE)).arun(text="a")

    async def test_a_container_that_dies(self, plane, client):
        """Is one error of ours, with Modal's as its cause."""

        @node("x", run_in="loop")
        def dies(text):
            os._exit(3)

        with pytest.raises(WorkerCrashedError, match="container") as caught:
            await Pipeline([dies], backend=ModalBackend(IMAGE)).arun(text="a")
        assert isinstance(caught.value.__cause__, modal.exception.Error)

    async def test_a_timeout(self, plane, client):
        """The backend's timeout is an error of ours, which is a TimeoutError."""

        @node("x")
        async def waits(text):
            await asyncio.sleep(60)

        with pytest.raises(RemoteTimeoutError, match="timeout"):
            await Pipeline([waits], backend=ModalBackend(IMAGE, timeout=1)).arun(text="a")

    async def test_under_trio(self):
        """Modal's client needs asyncio, and the message says so."""

        def under_trio():
            anyio.run(lambda: text_pipeline().arun(text="a"), backend="trio")

        with pytest.raises(RemoteExecutionError, match="asyncio"):
            await anyio.to_thread.run_sync(under_trio)


@pytest.mark.asyncio
class TestCancellation:
    async def test_cancelling_ends_the_remote_run(self, plane, client, tmp_path):
        """The awaiting task is cancelled: the container is stopped, and nothing is left on the control plane."""
        started = tmp_path / "started"

        @node("x")
        async def waits(text):
            started.touch()
            await asyncio.sleep(3600)

        task = asyncio.create_task(Pipeline([waits], backend=ModalBackend(IMAGE)).arun(text="a"))
        with anyio.fail_after(PATIENCE_S):
            while not started.exists():
                await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while psutil.Process().children(recursive=True):
                await asyncio.sleep(0.02)
        assert plane.calls["AppClientDisconnect"] == 1

    @pytest.mark.parametrize("native", [True, False])
    async def test_cancelling_while_the_app_begins(self, plane, client, native):
        """No app is left, whatever its beginning had come to."""
        pipeline = Pipeline([clean], backend=ModalBackend(IMAGE))
        for wait in (0.001, 0.002, 0.003, 0.004, 0.006, 0.01, 0.02, 0.03):
            if native:
                task = asyncio.create_task(pipeline.arun(text="a"))
                await asyncio.sleep(wait)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            else:
                with anyio.move_on_after(wait) as scope:
                    await pipeline.arun(text="a")
                assert scope.cancelled_caught
        await plane.until(lambda: all(app.ended for app in plane.apps))
        assert len(plane.apps) > 3

    async def test_by_a_cancel_scope(self, plane, client, tmp_path):
        """anyio cancels a task at each of its waits: the request that ends the app arrives all the same."""
        started = tmp_path / "started"

        @node("x")
        async def waits(text):
            started.touch()
            await asyncio.sleep(3600)

        pipeline = Pipeline([waits], backend=ModalBackend(IMAGE))
        for _ in range(5):
            started.unlink(missing_ok=True)
            async with anyio.create_task_group() as group:
                group.start_soon(lambda: pipeline.arun(text="a"))
                await plane.until(started.exists)
                group.cancel_scope.cancel()
            assert plane.open_inputs == 0
            assert all(app.ended for app in plane.apps)
        await plane.until(lambda: not plane.containers)


@pytest.mark.asyncio
class TestOptions:
    async def test_what_is_asked_for_arrives(self, plane, client):
        """Resources, timeout, volumes and secrets are those of the function on the control plane."""
        path = f"/tmp/hypernodes-options-{os.getpid()}"
        volume = modal.Volume.from_name("results", create_if_missing=True)
        secret = modal.Secret.from_dict({"TOKEN": "s3cret"})
        backend = ModalBackend(
            IMAGE,
            gpu="H100:2",
            cpu=4,
            memory="32GB",
            timeout=77,
            volumes={path: volume},
            secrets=[secret],
        )
        assert "s3cret" not in repr(backend)
        await Pipeline([clean], backend=backend).arun(text="a")
        (function,) = plane.functions
        asked = function.options
        assert asked["timeout"] == 77
        assert asked["memory"] == 30518
        assert asked["cpu"] == 4
        assert asked["gpu"] == "H100:2"
        assert [mount.mount_path for mount in function.definition.volume_mounts] == [path]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"memory": "lots"}, "memory is a number of MiB or a size"),
            ({"memory": -1}, "memory is a number"),
            ({"gpu": 3}, "gpu of ModalBackend is a type"),
            ({"gpu": []}, "gpu of ModalBackend is a type"),
            ({"cpu": 0}, "cpu of ModalBackend"),
            ({"timeout": 0}, "timeout"),
            ({"timeout": 100_000}, "a day"),
            ({"volumes": {"relative": None}}, "absolute path"),
            ({"volumes": {"/x": "name"}}, "modal.Volume"),
            ({"volumes": ["/x"]}, "dict"),
            ({"secrets": ["TOKEN"]}, "modal.Secret"),
            ({"image": "debian"}, "modal.Image"),
            ({"map_execution": "fast"}, "map_execution of ModalBackend"),
            ({"memory": "100000TB"}, "memory is more than any machine has"),
            ({"memory": 10**400}, "memory is more than any machine has"),
            ({"memory": "9" * 400 + "GB"}, "memory is more than any machine has"),
            ({"cpu": float("inf")}, "cpu of ModalBackend"),
            ({"timeout": None}, "timeout of ModalBackend is 1 to 86,400 seconds"),
            ({"volumes": {"/": None}}, "at the root"),
            ({"app_name": 5}, "app_name of ModalBackend is a name"),
            ({"environment": ""}, "environment of ModalBackend is a name"),
            ({"keep_warm": 5, "max_containers": 2}, "keep_warm=5 of ModalBackend is more than its max_containers=2"),
        ],
    )
    async def test_bad_options(self, options, message):
        """Each is refused when the backend is made, with what it must be."""
        with pytest.raises(DefinitionError, match=message):
            ModalBackend(**options)

    async def test_it_shows_what_it_was_given(self):
        """What is not the default, in the words of its user; nothing of secrets."""
        secrets = [modal.Secret.from_dict({"TOKEN": "s3cret"})]
        assert repr(ModalBackend(IMAGE, secrets=secrets)) == "ModalBackend()"
        backend = ModalBackend(gpu="T4", memory="2GB", keep_warm=1, mode="distributed", max_concurrency=3)
        assert repr(backend) == (
            "ModalBackend(gpu='T4', memory='2GB', max_concurrency=3, mode='distributed', keep_warm=1)"
        )
        assert repr(ModalBackend(deployed="there")) == "ModalBackend(deployed='there')"


@pytest.mark.asyncio
async def test_a_cache_on_a_volume(plane, client, tmp_path):
    """A DiskCache on a volume is read before the run and committed after it: the next container has it."""
    path = f"/tmp/hypernodes-volume-{os.getpid()}"
    volume = modal.Volume.from_name("results", create_if_missing=True)
    marks = tmp_path / "marks"
    marks.mkdir()

    @node("marked", depends_on=[])
    def mark(x):
        (marks / f"{x}-{time.monotonic_ns()}").touch()
        return x

    backend = ModalBackend(IMAGE, volumes={path: volume})
    pipeline = Pipeline([mark], backend=backend, cache=DiskCache(f"{path}/cache"))
    for _ in range(2):
        assert (await pipeline.amap({"x": range(5)}, "x"))["marked"] == list(range(5))
    assert len(list(marks.iterdir())) == 5
    assert plane.calls["VolumeCommit"] + plane.container_calls["VolumeCommit"] >= 1


class EchoLine(Line):
    """The other end is here."""

    def __init__(self, seen=None):
        self._seen = seen

    async def call(self, payload, shared=None):
        if self._seen is not None:
            self._seen(payload)
        return await run_payload(payload, None, shared)

    async def share(self, data):
        async def fetch():
            return data

        return Shared(Shared.name(data), fetch)


class TestSeam:
    """The payload and the reply, without Modal."""

    async def test_another_python_is_refused_before_anything_is_unpickled(self, anyio_backend):
        """A header is checked first: unpickling another Python's functions may crash."""
        payload = packed("job", object).replace(
            f'"python": "{sys.version_info.major}.{sys.version_info.minor}"'.encode(), b'"python": "3.99"'
        )
        kind, error = unpacked(await run_payload(payload))
        assert kind == "raised"
        assert "3.99" in error[1]

    async def test_something_else_is_refused(self, anyio_backend):
        """What is no message of ours is not unpickled."""
        kind, error = unpacked(await run_payload(b"cos\nsystem\n(S'true'\ntR."))
        assert kind == "raised"
        assert "not a message" in error[1]

    async def test_a_new_place_is_a_page_of_code(self, anyio_backend):
        """A subclass that hands bytes to run_payload is a backend."""

        class Echo(RemoteBackend):
            async def connected(self, label, receive, work):
                return await work(EchoLine())

        pipeline = Pipeline([clean], backend=Echo())
        assert await pipeline.arun(text=" a ") == {"cleaned": "a"}
        assert (await pipeline.amap({"text": [" a ", "b"]}, "text"))["cleaned"] == ["a", "b"]

    async def test_no_event_is_lost_when_a_job_ends_while_they_are_sent(self, anyio_backend):
        """A batch that is on its way then arrives, before the reply."""

        class Posting(RemoteBackend):
            async def connected(self, label, receive, work):
                return await work(PostingLine(receive))

        class PostingLine(EchoLine):
            def __init__(self, receive):
                self.receive = receive

            async def call(self, payload, shared=None):
                async def post(batch):
                    sending.set()
                    await anyio.sleep(0.1)
                    await self.receive(batch)

                return await run_payload(payload, post)

        class Watch(PipelineCallback):
            def on_node_start(self, node_id, inputs, ctx):
                seen.append(node_id)

        seen = []
        sending = until_sending["event"] = anyio.Event()
        assert await Pipeline([wait_for_sending], backend=Posting(), callbacks=[Watch()]).arun(x=1) == {"y": 1}
        assert seen == ["wait_for_sending"]

    async def test_a_plan_that_has_run_there_is_known_again(self, anyio_backend):
        """What a process has measured of functions holds for later runs of the same pipeline, with other inputs."""

        class Echo(RemoteBackend):
            async def connected(self, label, receive, work):
                return await work(EchoLine())

        this_test = repr(anyio_backend)  # what this process knows of the same test on another loop is of another plan

        @node("thread")
        def which(x):
            return bool(this_test) and threading.current_thread() is threading.main_thread()

        pipeline = Pipeline([which], backend=Echo())
        first = (await pipeline.amap({"x": range(200)}, "x"))["thread"]
        assert not first[0]
        again = (await pipeline.amap({"x": range(200, 400)}, "x"))["thread"]
        assert again.count(False) < first.count(False)

        @node("thread")
        def which(x):
            return ("edited" if this_test else "", threading.current_thread() is threading.main_thread())

        edited = await Pipeline([which], backend=Echo()).amap({"x": range(2)}, "x")
        assert edited["thread"][0] == ("edited", False)

    async def test_a_caches_key_stays_where_it_is(self, anyio_backend, tmp_path, monkeypatch):
        """No payload holds the key that results are signed with; the container signs with the one it was given."""
        key = b"what nobody else may know"
        payloads = []

        class Listening(RemoteBackend):
            async def connected(self, label, receive, work):
                return await work(EchoLine(payloads.append))

        cache = DiskCache(tmp_path / "cache", key=key)
        inside = Pipeline([measure], name="inside", cache=DiskCache(tmp_path / "inside", key=key))
        pipeline = Pipeline([clean, inside], cache=cache, backend=Listening())
        monkeypatch.setenv("HYPERNODES_CACHE_KEY", key.decode())
        assert (await pipeline.arun(text=" a "))["size"] == 1
        assert (await pipeline.amap({"text": [" a "]}, "text"))["size"] == [1]
        assert len(payloads) == 2
        assert all(key not in payload for payload in payloads)
        assert cache.stats().entries > 0
        assert not cache.verify().findings

    async def test_a_container_without_the_key(self, anyio_backend, tmp_path, monkeypatch):
        """It says how to give it one; results that nobody signs need none."""

        class Bare(RemoteBackend):
            async def connected(self, label, receive, work):
                monkeypatch.delenv("HYPERNODES_CACHE_KEY", raising=False)
                return await work(EchoLine())

        pipeline = Pipeline([clean], backend=Bare())
        with pytest.raises(CacheError, match=r"secrets=\[modal\.Secret\.from_dict\(\{\"HYPERNODES_CACHE_KEY\""):
            await pipeline.with_cache(DiskCache(tmp_path / "signed", key="secret")).arun(text=" a ")
        monkeypatch.delenv("HYPERNODES_CACHE_KEY", raising=False)
        assert await pipeline.with_cache(DiskCache(tmp_path / "unsigned")).arun(text=" a ") == {"cleaned": "a"}


def test_without_the_client(tmp_path):
    """Without modal installed everything else works, and ModalBackend says what to install."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            sys.modules["modal"] = None
            from hypernodes import Pipeline, node
            print(Pipeline([node("y")(lambda x: x + 1)]).run(x=1))
            from hypernodes.backend import ModalBackend
            try:
                ModalBackend()
            except Exception as error:
                print(type(error).__name__, error)
            """
        )
    )
    said = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[0] == "{'y': 2}"
    assert 'pip install "hypernodes[modal]"' in said

"""Apps that stay for several runs, and runs that outlive their caller, on a loopback control plane.

What Modal's servers do with idle containers and with detached apps is a model there.
"""

import asyncio
import os
import textwrap
import threading
import time

import grpclib
import modal
import modal.runner
import pytest

from hypernodes import (
    DefinitionError,
    MapResult,
    Pipeline,
    PipelineCallback,
    RemoteExecutionError,
    RunHandle,
    SerializationError,
    WorkerCrashedError,
    node,
)
from hypernodes.backend import LocalBackend, ModalBackend
from tests import loopback

plane, client = loopback.plane, loopback.client

IMAGE = modal.Image.debian_slim()


@node("pid", run_in="loop")
def where(x):
    return os.getpid()


@node("doubled")
def double(x):
    if x == 13:
        raise LookupError("not thirteen")
    return 2 * x


@node("slept")
async def sleep(x):
    await asyncio.sleep(x)
    return x


async def gone(plane):
    """The control plane ends the containers of an app a moment after it has gone."""
    await plane.until(lambda: not plane.containers)


@pytest.mark.asyncio
class TestKept:
    async def test_runs_in_the_block_share_a_container(self, plane, client):
        """One app and one container serve all runs in the block, and both are gone after it."""
        backend = ModalBackend(IMAGE)
        pipeline = Pipeline([where], backend=backend)
        async with backend:
            pids = [await pipeline.arun(x=x, output_name="pid") for x in range(3)]
            pids += (await pipeline.amap({"x": range(3)}, "x"))["pid"]
            pids.append(await asyncio.to_thread(pipeline.run, x=1, output_name="pid"))
        assert len(set(pids)) == 1
        assert plane.calls["AppCreate"] == 1
        assert plane.calls["FunctionMap"] == 5
        await gone(plane)
        assert await pipeline.arun(x=1, output_name="pid") not in pids
        assert plane.calls["AppCreate"] == 2

    async def test_what_is_dear_is_made_once_in_a_container(self, plane, client):
        """A node with keep="process" makes its object in the first run; later runs in the container use it."""

        @node("model", keep="process")
        def load(name):
            return threading.Lock(), time.monotonic_ns()

        made_at = node("made_at")(lambda model, x: model[1])
        backend = ModalBackend(IMAGE)
        pipeline = Pipeline([load, made_at], backend=backend)
        async with backend:
            times = [await pipeline.arun(name="a", x=x, output_name="made_at") for x in range(3)]
            times += (await pipeline.amap({"name": "a", "x": range(3)}, "x", output_name="made_at"))["made_at"]
            other = await pipeline.arun(name="b", x=0, output_name="made_at")
        assert len(set(times)) == 1
        assert other not in times

    async def test_blocks_may_overlap(self, plane, client):
        """The app goes when the last block ends."""
        backend = ModalBackend(IMAGE)
        pipeline = Pipeline([where], backend=backend)
        async with backend:
            async with backend:
                first = await pipeline.arun(x=1)
            assert await pipeline.arun(x=1) == first
        assert plane.calls["AppCreate"] == 1
        await gone(plane)

    async def test_many_runs_at_once(self, plane, client):
        """They share the app, each in a container of its own where they overlap."""
        backend = ModalBackend(IMAGE)
        pipeline = Pipeline([where, sleep], backend=backend)
        async with backend:
            made = await asyncio.gather(*(pipeline.arun(x=0.2) for _ in range(4)))
        assert len(made) == 4
        assert plane.calls["AppCreate"] == 1
        await gone(plane)

    async def test_cancelling_one_run_leaves_the_others(self, plane, client):
        """Its call and its container end; the app and what else runs there stay."""
        backend = ModalBackend(IMAGE)
        pipeline = Pipeline([sleep], backend=backend)
        async with backend:
            other = asyncio.create_task(pipeline.arun(x=1.5))
            task = asyncio.create_task(pipeline.arun(x=600))
            await plane.until(lambda: plane.open_inputs == 2 and len(plane.containers) == 2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await plane.until(lambda: plane.open_inputs <= 1)
            assert await other == {"slept": 1.5}
        await gone(plane)
        assert plane.open_inputs == 0

    async def test_cancelling_what_holds_its_thread(self, plane, client, tmp_path):
        """The container ends, whatever runs there; no other takes over the call, and the app stays for other runs."""

        @node("y")
        def hold(x):
            with (tmp_path / "begun").open("a") as begun:
                begun.write("once ")
            time.sleep(600)

        backend = ModalBackend(IMAGE)
        async with backend:
            task = asyncio.create_task(Pipeline([hold], backend=backend).arun(x=1))
            await plane.until((tmp_path / "begun").exists)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await gone(plane)
            assert plane.open_inputs == 0
            assert await Pipeline([sleep], backend=backend).arun(x=0) == {"slept": 0}
        assert (tmp_path / "begun").read_text() == "once "
        await gone(plane)

    async def test_a_run_that_outlasts_the_block(self, plane, client):
        """It ends with the app, and says so."""
        backend = ModalBackend(IMAGE)
        async with backend:
            task = asyncio.create_task(Pipeline([sleep], name="p", backend=backend).arun(x=600))
            await plane.until(lambda: plane.open_inputs == 1)
        with pytest.raises(RemoteExecutionError, match=r"^pipeline 'p' was ended with its app .* was left"):
            await task
        await gone(plane)

    async def test_cancelling_while_the_call_is_being_made(self, plane, client):
        """A call that nobody has seen begin is ended too."""
        backend = ModalBackend(IMAGE)
        pipeline = Pipeline([sleep], backend=backend)
        async with backend:
            for wait in (0, 0.001, 0.003, 0.01, 0.02, 0.05):
                task = asyncio.create_task(pipeline.arun(x=600))
                await asyncio.sleep(wait)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                await plane.until(lambda: plane.open_inputs == 0)
        await gone(plane)

    async def test_a_container_that_dies(self, plane, client):
        """The next run gets a new one."""

        @node("y", run_in="loop")
        def die(x):
            os._exit(3)

        backend = ModalBackend(IMAGE)
        async with backend:
            with pytest.raises(WorkerCrashedError):
                await Pipeline([die], backend=backend).arun(x=1)
            assert await Pipeline([double], backend=backend).arun(x=1) == {"doubled": 2}

    async def test_errors_and_events(self, plane, client):
        """A user's exception is itself, and callbacks hear what happens, as with an app of a run's own."""
        seen = []

        class Watch(PipelineCallback):
            def on_map_item_end(self, item_index, duration, ctx):
                seen.append(item_index)

        backend = ModalBackend(IMAGE)
        pipeline = Pipeline([double], backend=backend, callbacks=[Watch()])
        async with backend:
            await pipeline.amap({"x": range(3)}, "x")
            with pytest.raises(LookupError, match="not thirteen"):
                await pipeline.arun(x=13)
        assert sorted(seen) == [0, 1, 2]

    async def test_containers_that_wait(self, plane, client):
        """keep_warm, scaledown_window and max_containers are those of the function on the control plane."""
        await Pipeline([double], backend=ModalBackend(IMAGE, keep_warm=1, scaledown_window=90, max_containers=3)).arun(
            x=1
        )
        settings = plane.functions[0].definition.autoscaler_settings
        assert (settings.min_containers, settings.scaledown_window, settings.max_containers) == (1, 90, 3)

    async def test_wrong_options(self):
        """They are refused where they are given."""
        with pytest.raises(DefinitionError, match="scaledown_window of ModalBackend is 2 to 3,600 seconds"):
            ModalBackend(IMAGE, scaledown_window=1)
        with pytest.raises(DefinitionError, match="keep_warm"):
            ModalBackend(IMAGE, keep_warm=-1)
        with pytest.raises(DefinitionError, match=r"has its own 'image' and 'gpu'"):
            ModalBackend(IMAGE, gpu="A100", deployed="there")
        for wrong in ("", 3):
            with pytest.raises(DefinitionError, match="deployed of ModalBackend is the name of an app"):
                ModalBackend(deployed=wrong)


@pytest.mark.asyncio
class TestDeployed:
    async def test_a_deployed_app(self, plane, client):
        """Anyone with the account runs on it by its name; it stays."""
        await ModalBackend(IMAGE, cpu=2).adeploy("there")
        pipeline = Pipeline([where], backend=ModalBackend(deployed="there"))
        pids = [await pipeline.arun(x=x, output_name="pid") for x in range(2)]
        pids += (await pipeline.amap({"x": range(2)}, "x"))["pid"]
        assert len(set(pids)) == 1
        assert plane.calls["AppCreate"] <= 1
        assert plane.calls["FunctionMap"] == 3
        assert plane.functions[0].definition.resources.milli_cpu == 2000

    async def test_in_worker_processes(self, plane, client):
        """The name of an app can be sent to them; an image cannot, which is said by name."""
        await ModalBackend(IMAGE).adeploy("there")
        around = LocalBackend(map_execution="parallel", max_workers=1)
        inner = Pipeline([double], name="inner", backend=ModalBackend(deployed="there"))
        assert (await Pipeline([inner.as_node()], backend=around).amap({"x": [1, 2]}, "x"))["doubled"] == [2, 4]
        inner = inner.with_backend(ModalBackend(IMAGE))
        with pytest.raises(SerializationError, match=r"images, volumes and secrets cannot.*deployed="):
            await Pipeline([inner.as_node()], backend=around).amap({"x": [1, 2]}, "x")

    async def test_a_name_that_nobody_deployed(self, plane, client):
        """The error says how to deploy it."""
        with pytest.raises(
            RemoteExecutionError, match=r"no app 'nowhere' is deployed.*[^.]\): deploy.*\.deploy\('nowhere'\)"
        ) as caught:
            await Pipeline([where], backend=ModalBackend(deployed="nowhere")).arun(x=1)
        assert "not found" in str(caught.value.__cause__)
        assert caught.value.__cause__.__traceback__ is None, "frames of Modal's client say nothing to a user"

    async def test_cancelling(self, plane, client):
        """The call ends, and the app stays."""
        await ModalBackend(IMAGE).adeploy("there")
        pipeline = Pipeline([sleep], backend=ModalBackend(deployed="there"))
        task = asyncio.create_task(pipeline.arun(x=600))
        await plane.until(lambda: len(plane.containers) == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await plane.until(lambda: plane.open_inputs == 0)
        assert await pipeline.arun(x=0) == {"slept": 0}


@pytest.mark.asyncio
class TestDetached:
    async def test_a_run(self, plane, client):
        """The handle gives what arun would have given, as often as it is asked."""
        handle = await Pipeline([double], backend=ModalBackend(IMAGE)).asubmit(x=2)
        assert await handle == {"doubled": 4}
        assert await handle == {"doubled": 4}
        assert await handle.adone()
        assert repr(handle) == f"RunHandle.from_id({handle.id!r})"

    async def test_one_output(self, plane, client):
        """output_name as a str gives the bare value."""
        handle = await Pipeline([double], backend=ModalBackend(IMAGE)).asubmit(x=2, output_name="doubled")
        assert await handle == 4

    async def test_a_map(self, plane, client):
        """With map_over the result is that of amap, failures included."""
        pipeline = Pipeline([double], name="p", backend=ModalBackend(IMAGE))
        handle = await pipeline.asubmit({"x": [12, 13, 14]}, "x", on_error="collect")
        result = await handle
        assert isinstance(result, MapResult)
        assert result == {"doubled": [24, None, 28]}
        (failure,) = result.failures
        assert (failure.index, failure.path, failure.inputs) == (1, ("p", 1, "double"), {"x": 13})
        assert isinstance(failure.error, LookupError)

    async def test_it_needs_nobody(self, plane, client, tmp_path):
        """A process that submits and ends leaves a run that another one awaits by its id."""
        script = """
            import time
            import modal
            from hypernodes import Pipeline, node
            from hypernodes.backend import ModalBackend

            @node("y")
            def slow(x):
                time.sleep(1.5)
                return x + 1

            print(Pipeline([slow], backend=ModalBackend(modal.Image.debian_slim())).submit(x=1).id)
        """
        done = await asyncio.to_thread(plane.run_script, textwrap.dedent(script))
        handle = RunHandle.from_id(done.stdout.strip())
        assert not await handle.adone()
        with pytest.raises(TimeoutError):
            await handle.aresult(timeout=0.1)
        assert await handle == {"y": 2}
        assert await handle.adone()

    async def test_its_error(self, plane, client):
        """A user's exception is raised as itself to whoever waits."""
        handle = await Pipeline([double], name="p", backend=ModalBackend(IMAGE)).asubmit(x=13)
        with pytest.raises(LookupError, match="not thirteen") as caught:
            await handle
        assert caught.value.__notes__ == ["in node 'double' at p / double"]
        assert await handle.adone()

    @pytest.mark.parametrize("holds", [False, True])
    async def test_cancelling_by_handle(self, plane, client, tmp_path, holds):
        """The run ends with its container, from any process that has the id; also one that holds its thread."""

        @node("y")
        async def hang(x):
            (tmp_path / "begun").touch()
            await asyncio.sleep(600)

        @node("y")
        def hold(x):
            (tmp_path / "begun").touch(exist_ok=False)
            time.sleep(600)

        handle = await Pipeline([hold if holds else hang], backend=ModalBackend(IMAGE)).asubmit(x=1)
        await plane.until((tmp_path / "begun").exists)
        await RunHandle.from_id(handle.id).acancel()
        await gone(plane)
        assert plane.open_inputs == 0
        assert await handle.adone()
        with pytest.raises(RemoteExecutionError, match=r"^the run was cancelled"):
            await handle
        await handle.acancel()

    async def test_to_stop_waiting_is_not_to_stop(self, plane, client):
        """Cancelling who awaits the handle leaves the run alone."""
        handle = await Pipeline([sleep], backend=ModalBackend(IMAGE)).asubmit(x=1.5)
        waiting = asyncio.create_task(handle.aresult())
        await plane.until(lambda: len(plane.containers) == 1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await handle == {"slept": 1.5}

    async def test_on_a_deployed_app(self, plane, client):
        """Submitted runs of a deployed app find its warm containers."""
        await ModalBackend(IMAGE).adeploy("there")
        pipeline = Pipeline([where], backend=ModalBackend(deployed="there"))
        first = await pipeline.arun(x=1, output_name="pid")
        assert await (await pipeline.asubmit(x=1, output_name="pid")) == first

    async def test_cancelling_while_it_is_submitted(self, plane, client):
        """A run whose handle nobody gets is ended."""
        await ModalBackend(IMAGE).adeploy("there")
        for backend in (ModalBackend(IMAGE), ModalBackend(deployed="there")):
            pipeline = Pipeline([sleep], backend=backend)
            before = len(plane.function_calls)
            task = asyncio.create_task(pipeline.asubmit(x=600))
            await plane.until(lambda before=before: len(plane.function_calls) > before)
            if task.cancel():
                with pytest.raises(asyncio.CancelledError):
                    await task
            else:  # it was quicker
                await task.result().acancel()
            await plane.until(lambda: plane.open_inputs == 0)

    async def test_one_that_cannot_be_asked(self, plane, client):
        """That nobody answers does not mean that a run has ended."""
        handle = await Pipeline([sleep], backend=ModalBackend(IMAGE)).asubmit(x=600)
        assert not await handle.adone()
        plane.fail("FunctionGetOutputs", grpclib.Status.UNAUTHENTICATED, times=1)
        with pytest.raises(RemoteExecutionError, match="refuses the account"):
            await handle.adone()
        assert not await handle.adone()
        await handle.acancel()
        assert await handle.adone()

    async def test_from_sync_code(self, plane, client):
        """submit, result, done and cancel block; in a running loop too."""
        handle = Pipeline([double], backend=ModalBackend(IMAGE)).submit(x=2)
        assert handle.result() == {"doubled": 4}
        assert handle.done()
        handle.cancel()

    async def test_an_unknown_id(self, plane, client):
        """What is no id is refused; an id that nobody knows is an error when it is asked for."""
        for wrong in ("", "fc-1", "elsewhere:1", None, "modal:"):
            with pytest.raises(DefinitionError, match=r"RunHandle\.id"):
                RunHandle.from_id(wrong)
        with pytest.raises(RemoteExecutionError, match=r"knows no such run.*fc-none.*RunHandle\.id") as caught:
            await RunHandle.from_id("modal:fc-none")
        assert caught.value.__cause__.__traceback__ is None, "frames of Modal's client say nothing to a user"


@pytest.mark.anyio
async def test_a_place_that_ends_with_this_process(anyio_backend):
    """A local backend says where runs can be submitted."""
    with pytest.raises(RemoteExecutionError, match="submit runs to a ModalBackend"):
        await Pipeline([double], backend=LocalBackend()).asubmit(x=1)

"""Modal's own client and container on the loopback: what the tests of ModalBackend stand on.

Real: the client, its wire protocol, uploads, pickling, blobs, the container's entry point and process, cancelling an
input inside it, the exceptions that a caller gets. A model, which these tests only show to be there: when containers
start and end, timeouts, what becomes of an input whose container dies, working copies of volumes, and every text that
Modal's servers would write.
"""

import asyncio
import os
import signal
import socket

import modal
import psutil
import pytest
from grpclib import Status

from tests import loopback

plane, client, job, one_app = loopback.plane, loopback.client, loopback.job, loopback.one_app
nothing_left = loopback.nothing_left

pytestmark = pytest.mark.asyncio


class TestCalls:
    async def test_one_call(self, plane, client):
        """Bytes go to a module's function in a container and back, in one FunctionMap and one FunctionGetOutputs."""
        app, echo = one_app("echo")
        async with app.run.aio():
            assert await echo.remote.aio(b"abc") == b"abc"
            assert (plane.calls["FunctionMap"], plane.calls["FunctionGetOutputs"]) == (1, 1)
            assert (plane.open_inputs, len(plane.containers), plane.connections) == (0, 1, 1)
        assert plane.apps[0].disconnect_reason == "ENTRYPOINT_COMPLETED"

    async def test_warm_container(self, plane, client):
        """The next call goes to the same process; an async function runs there too."""
        app, where = one_app("where")
        async with app.run.aio():
            first, second = await where.remote.aio(0), await where.remote.aio(0)
        assert first[:2] == second[:2]
        assert first[0] != os.getpid()
        assert plane.containers_started == 1
        app, async_echo = one_app("async_echo")
        async with app.run.aio():
            assert await async_echo.remote.aio(b"abc") == b"abc"

    async def test_many_containers(self, plane, client):
        """Inputs that wait get containers of their own, up to `max_containers`."""
        app, meets = one_app("meets", max_containers=2)
        async with app.run.aio(), modal.Queue.ephemeral() as meeting:
            pids = await asyncio.gather(meets.remote.aio(meeting, "a", "b"), meets.remote.aio(meeting, "b", "a"))
        assert len(set(pids)) == 2
        assert plane.most_containers == 2

    async def test_map(self, plane, client):
        """`.map` is one call of many inputs, in batches, and yields in order."""
        app, echo = one_app("echo", max_containers=1)
        data = [b"%d" % number for number in range(120)]
        async with app.run.aio():
            assert [one async for one in echo.map.aio(data)] == data
        assert plane.calls["FunctionMap"] == 1
        assert plane.calls["FunctionPutInputs"] >= 3
        assert len(plane.function_calls[0].inputs) == 120

    async def test_large(self, plane, client):
        """50 MiB go there and back as blobs: one upload and one download on each side."""
        app, echo = one_app("echo")
        data = os.urandom(50 * 2**20)
        async with app.run.aio():
            assert await echo.remote.aio(data) == data
        assert (plane.calls["BlobCreate"], plane.calls["BlobGet"]) == (1, 1)
        assert (plane.container_calls["BlobCreate"], plane.container_calls["BlobGet"]) == (1, 1)
        assert len(plane.blob_sizes) == 2
        assert min(plane.blob_sizes) > 50 * 2**20

    async def test_generator(self, plane, client):
        """`remote_gen` streams what a generator in the container yields."""
        app, counts = one_app("counts")
        async with app.run.aio():
            assert [number async for number in counts.remote_gen.aio(5)] == [0, 1, 2, 3, 4]

    async def test_two_apps_at_once(self, plane, client):
        """Two apps run at the same time, each with containers of its own; ending one leaves the other."""

        async def one(seen, done):
            app, where = one_app("where")
            async with app.run.aio():
                seen.append(await where.remote.aio(0))
                await done.wait()
                seen.append(await where.remote.aio(0))

        first, second, now = [], [], asyncio.Event()
        now.set()
        later = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(one(first, later))
            ended = tasks.create_task(one(second, now))
            await ended
            await plane.until(lambda: first and len(plane.containers) == 1)
            later.set()
        assert first[0][0] == first[1][0] != second[0][0]

    async def test_two_clients(self, plane, client):
        """Clients of one process are told apart: `client=` says which one an app uses."""
        app, echo = one_app("echo")
        async with plane.client() as other, app.run.aio(client=other):
            assert await echo.remote.aio(b"abc") == b"abc"
            assert plane.connections == 2


class TestFailures:
    async def test_error_of_the_function(self, plane, client):
        """An exception comes back with its own type; its traceback goes on into the container's frames."""
        app, fails = one_app("fails")
        async with app.run.aio():
            with pytest.raises(job("OddError"), match="no: b'abc'") as caught:
                await fails.remote.aio(b"abc")
        assert caught.traceback[-1].name == "fails"

    async def test_timeout(self, plane, client):
        """A call beyond its timeout is a FunctionTimeoutError, no builtin TimeoutError, and ends its container."""
        app, sleeps = one_app("sleeps", timeout=1)
        async with app.run.aio():
            with pytest.raises(modal.exception.FunctionTimeoutError, match="hit its timeout of 1s") as caught:
                await sleeps.remote.aio(600)
            assert not isinstance(caught.value, TimeoutError)
            await plane.until(lambda: not plane.containers)

    async def test_crash(self, plane, client):
        """A container that dies makes its input an InternalFailure; the next call gets a new container."""
        app, dies_on = one_app("dies_on")
        async with app.run.aio():
            with pytest.raises(modal.exception.InternalFailure, match="exit code 7"):
                await dies_on.remote.aio(7)
            assert await dies_on.remote.aio(None) == "alive"
        assert plane.containers_started == 2

    async def test_client_retries(self, plane, client):
        """With `retries`, the client itself sends a failed input again."""
        app, fails = one_app("fails", retries=modal.Retries(max_retries=2, initial_delay=0.0))
        async with app.run.aio():
            with pytest.raises(job("OddError")):
                await fails.remote.aio(b"abc")
        assert plane.calls["FunctionRetryInputs"] == 2
        assert plane.log.count("OddError: no") == 3

    async def test_module_that_the_image_lacks(self, plane, client):
        """A container imports what was mounted and what is installed; not the checkout, nor what the image lacks."""
        plane.without_packages("watchfiles")
        app, imports = one_app("imports")
        async with app.run.aio():
            assert "site-packages" not in await imports.remote.aio("loopback_jobs")
            assert await imports.remote.aio("psutil")
            for name in ("hypernodes", "tests", "watchfiles"):
                with pytest.raises(ModuleNotFoundError, match=name):
                    await imports.remote.aio(name)

    async def test_local_source(self, plane, client):
        """`add_local_python_source` is what makes a local package importable in the container."""
        image = modal.Image.debian_slim().add_local_python_source("hypernodes")
        app, imports = one_app("imports", image=image)
        async with app.run.aio():
            assert "site-packages" not in await imports.remote.aio("hypernodes")
        assert "/root/hypernodes/__init__.py" in plane.mounted(plane.functions[0])

    async def test_function_that_cannot_be_imported(self, plane, client, tmp_path):
        """A module that fails to import in the container fails the calls, with the exception that it raised."""
        module = tmp_path / "only_here.py"
        module.write_text("import os\nif os.environ.get('MODAL_IS_REMOTE'): import not_there\ndef f(x): pass\n")
        app = modal.App("one")
        function = app.function(image=modal.Image.debian_slim())(loopback.load(module).f)
        async with app.run.aio():
            with pytest.raises(ModuleNotFoundError, match="not_there"):
                await function.remote.aio(1)

    async def test_bad_token(self, plane, client):
        """A token that the server does not know is an AuthError, at the first call."""
        app, _ = one_app("echo")
        async with plane.client("ak-other", "as-other") as stranger:
            with pytest.raises(modal.exception.AuthError, match="Token validation failed"):
                async with app.run.aio(client=stranger):
                    pass
        assert plane.apps == []

    async def test_no_token(self, plane):
        """Without any token the client says so itself, before it connects."""
        script = "import modal\nmodal.Client.from_env()"
        done = plane.run_script(script, MODAL_TOKEN_ID="", MODAL_TOKEN_SECRET="")
        assert "modal.exception.AuthError: Token missing. Could not authenticate client." in done.stderr
        assert not plane.calls

    async def test_server_that_fails_for_a_moment(self, plane, client):
        """The client tries again on UNAVAILABLE, 3 times; then it is a ServiceError."""
        app, echo = one_app("echo")
        async with app.run.aio():
            plane.fail("FunctionMap", times=2)
            assert await echo.remote.aio(b"abc") == b"abc"
            assert plane.calls["FunctionMap"] == 3
            plane.fail("FunctionMap", Status.UNAVAILABLE, "gone", times=4)
            with pytest.raises(modal.exception.ServiceError, match="gone"):
                await echo.remote.aio(b"abc")

    async def test_lost_connection(self, plane, client):
        """A connection that breaks during a call is made again, and the call comes to its end."""
        app, meets = one_app("meets")
        async with app.run.aio(), modal.Queue.ephemeral() as meeting:
            call = asyncio.create_task(meets.remote.aio(meeting, "here", "there"))
            assert await meeting.get.aio(partition="here", timeout=20)
            await plane.until(lambda: plane.in_flight["FunctionGetOutputs"] == 1)
            plane.cut()
            await meeting.put.aio(1, partition="there")
            assert await call
            assert plane.calls["FunctionGetOutputs"] == 2

    async def test_connection_that_is_left_open(self, tmp_path, no_leaks):
        """The plane breaks it when it closes, and leaves no socket to the garbage collector."""
        with loopback.Plane(tmp_path) as plane:
            left = socket.create_connection(("127.0.0.1", plane.port))
            left.settimeout(20)
            await plane.until(lambda: plane.connections == 1)
        with left:
            while left.recv(1024):
                pass

    async def test_what_the_loopback_lacks(self, plane, client):
        """A method that the loopback does not have is refused by its name."""
        with pytest.raises(modal.exception.UnimplementedError, match="EnvironmentList is not implemented"):
            await modal.environments.list_environments.aio(client=client)


class TestCancelling:
    async def test_leaving_the_app(self, plane, client, no_leaks, tmp_path):
        """Cancelling the task that is inside `app.run` disconnects the app: the container is interrupted and ends."""
        app, waits = one_app("waits")

        async def run():
            async with app.run.aio():
                await waits.remote.aio(str(tmp_path))

        task = asyncio.create_task(run())
        await plane.until((tmp_path / "started").exists)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert plane.apps[0].disconnect_reason == "KEYBOARD_INTERRUPT"
        await plane.until(lambda: not plane.containers)
        assert (tmp_path / "ended").exists()
        assert plane.open_inputs == 0

    async def test_cancelling_only_the_call(self, plane, client, tmp_path):
        """Cancelling `.remote.aio()` alone tells nobody: the container works on."""
        app, waits = one_app("waits")
        async with app.run.aio():
            call = asyncio.create_task(waits.remote.aio(str(tmp_path)))
            await plane.until((tmp_path / "started").exists)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await plane.until(lambda: not plane.in_flight["FunctionGetOutputs"])
            assert (plane.open_inputs, len(plane.containers)) == (1, 1)
            assert not plane.calls["FunctionCallCancel"]
        await plane.until((tmp_path / "ended").exists)

    async def test_refusing_to_end(self, plane, client, tmp_path):
        """A container that ignores the interrupt is killed after the grace, with what it started."""
        plane.set_limits(grace_s=0.2)
        app, holds_on = one_app("holds_on")
        async with app.run.aio():
            await holds_on.spawn.aio(str(tmp_path))
            await plane.until((tmp_path / "started").exists)
            processes = psutil.Process(plane.containers[0].pid).children(recursive=True)
            assert processes
        await plane.until(lambda: not plane.containers)
        assert (tmp_path / "refused").exists()
        await plane.until(lambda: not any(one.is_running() for one in processes))

    async def test_function_call_cancel(self, plane, client, tmp_path):
        """`FunctionCall.cancel` cancels the coroutine in the container, which stays; the result is a RemoteError."""
        app, waits = one_app("waits")
        async with app.run.aio():
            call = await waits.spawn.aio(str(tmp_path))
            await plane.until((tmp_path / "started").exists)
            await call.cancel.aio()
            with pytest.raises(modal.exception.RemoteError):
                await call.get.aio()
            assert (tmp_path / "cancelled").exists()
            assert len(plane.containers) == 1

    async def test_kill_of_the_client(self, plane, tmp_path):
        """A client that dies says nothing; without its heartbeats the app ends, and its containers."""
        plane.set_limits(heartbeat_timeout_s=2.5)
        script = plane.start_script(
            """
            import time, sys, modal
            from pathlib import Path
            app = modal.App("script")

            @app.function()
            def sleeps(path):
                Path(path).touch()
                time.sleep(3600)

            if __name__ == "__main__":
                with app.run():
                    sleeps.remote(sys.argv[1])
            """,
            str(tmp_path / "started"),
        )
        await plane.until((tmp_path / "started").exists)
        script.send_signal(signal.SIGKILL)
        script.communicate()
        await plane.until(lambda: plane.apps[0].ended and not plane.containers)
        assert plane.apps[0].disconnect_reason == "HEARTBEAT_LOST"
        assert plane.apps[0].heartbeats >= 1

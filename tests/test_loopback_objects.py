"""Queues, dicts, volumes, options and logs on the loopback, and functions that several processes share.

Volumes are a model (see `loopback/_volumes.py`), and so is the life of deployed and detached apps; the calls that the
client and the container make for them are real.
"""

import asyncio
import os
import queue
import tempfile
import textwrap
import time

import modal
import pytest

from tests import loopback

plane, client, job, one_app = loopback.plane, loopback.client, loopback.job, loopback.one_app
nothing_left = loopback.nothing_left

pytestmark = pytest.mark.asyncio


@pytest.fixture
def mount_path():
    """Where containers see a volume: a path that does not exist."""
    return f"{tempfile.gettempdir()}/loopback-{os.getpid()}-{time.monotonic_ns()}"


class TestObjects:
    async def test_queue_while_it_runs(self, plane, client):
        """What a container puts in a queue reaches the caller while the call runs, and the other way round."""
        app, tells = one_app("tells")
        async with app.run.aio(), modal.Queue.ephemeral() as told:
            call = asyncio.create_task(tells.remote.aio(told, 3))
            assert [await told.get.aio(timeout=20) for _ in range(3)] == [0, 1, 2]
            assert not call.done()
            await told.put.aio("enough", partition="answers")
            assert await call == "enough"
            with pytest.raises(queue.Empty):
                await told.get.aio(timeout=0.01)

    async def test_dict(self, plane, client):
        """A Dict is the same on both sides."""
        app, remembers = one_app("remembers")
        async with app.run.aio(), modal.Dict.ephemeral() as mapping:
            await mapping.put.aio("given", 1)
            assert await remembers.remote.aio(mapping, "pid") == 1
            assert await mapping.get.aio("pid") != os.getpid()

    async def test_volume(self, plane, client, mount_path):
        """Another container sees what was committed; `commit` and `reload` are calls of the container's."""
        volume = modal.Volume.from_name("kept", create_if_missing=True)
        options = {"image": modal.Image.debian_slim(), "volumes": {mount_path: volume}}
        app = modal.App("one")
        commits, reads = (app.function(**options)(job(name)) for name in ("commits", "reads"))
        file = f"{mount_path}/sub/a.txt"
        async with app.run.aio():
            await commits.remote.aio(volume, file, "kept")
            assert await reads.remote.aio(file) == "kept"
        assert (plane.volume("kept").path / "sub/a.txt").read_text() == "kept"
        assert plane.volume("kept").commits >= 1
        assert plane.volumes_of(plane.functions[0]) == {mount_path: "kept"}

    async def test_volume_that_nobody_committed(self, plane, client, mount_path):
        """Without `commit`, what was written counts once the container ends in peace, and is lost if it is killed."""
        volume = modal.Volume.from_name("kept", create_if_missing=True)
        for name, killed in (("a.txt", False), ("b.txt", True)):
            app, writes = one_app("writes", volumes={mount_path: volume})
            async with app.run.aio():
                await writes.remote.aio(f"{mount_path}/{name}", name)
                assert not (plane.volume("kept").path / name).exists()
                if killed:
                    plane.crash(plane.containers[0])
                    await plane.until(lambda: not plane.containers)
            await plane.until(lambda: not plane.containers)
        app, reads = one_app("reads", volumes={mount_path: volume})
        async with app.run.aio():
            assert await reads.remote.aio(f"{mount_path}/a.txt") == "a.txt"
            assert await reads.remote.aio(f"{mount_path}/b.txt") is None

    async def test_volume_that_is_missing(self, plane, client, mount_path):
        """A volume by a name that does not exist is a NotFoundError when the app starts."""
        app, _ = one_app("reads", volumes={mount_path: modal.Volume.from_name("absent")})
        with pytest.raises(modal.exception.NotFoundError, match="Volume 'absent' not found"):
            async with app.run.aio():
                pass

    async def test_options(self, plane, client):
        """What was asked for is there to see, and nothing else: resources, limits, image, secrets."""
        plane.known_secrets["token"] = {"SECRET_TOKEN": "hush"}
        image = modal.Image.debian_slim(python_version="3.12").pip_install("numpy==2.0").env({"MODE": "test"})
        app, where = one_app(
            "where",
            image=image,
            gpu=["H100:2", "A100"],
            cpu=2.5,
            memory=(1024, 2048),
            timeout=100,
            max_containers=3,
            scaledown_window=30,
            secrets=[modal.Secret.from_name("token"), modal.Secret.from_dict({"A": "1"})],
        )
        async with app.run.aio():
            environment = (await where.remote.aio(0))[4]
        function = plane.functions[0]
        assert function.options == {
            "gpu": ["H100:2", "A100"],
            "cpu": 2.5,
            "memory": (1024, 2048),
            "timeout": 100,
            "startup_timeout": 100,
            "max_containers": 3,
            "scaledown_window": 30,
        }
        assert plane.secrets_of(function) == ["token", ""]
        commands = plane.image_of(function).commands
        assert commands[0].startswith("FROM python:3.12")
        assert any("numpy==2.0" in line for line in commands)
        assert {"SECRET_TOKEN": "hush", "A": "1", "MODE": "test"}.items() <= environment.items()
        assert "MODAL_TOKEN_SECRET" not in environment

    async def test_logs(self, plane, client, capsys):
        """What containers print is in the app's log, and printed by the client while output is enabled."""
        app, echo = one_app("echo")
        with modal.enable_output():
            async with app.run.aio():
                await echo.remote.aio(b"abc")
                await plane.until(lambda: "echo of 3 bytes" in plane.log)
        assert "echo of 3 bytes" in capsys.readouterr().out
        assert plane.calls["AppGetLogs"] >= 1


class TestOtherProcesses:
    SERVICE = """
        import sys, time, modal
        app = modal.App("service", image=modal.Image.debian_slim())

        @app.function()
        def double(number):
            return 2 * number

        @app.function()
        def slow_double(number):
            time.sleep(0.5)
            return 2 * number
    """

    def run(self, plane, main):
        """Run the service's file with this as its main part."""
        source = f'{textwrap.dedent(self.SERVICE)}\nif __name__ == "__main__":\n{textwrap.indent(main, "    ")}\n'
        done = plane.run_script(source)
        assert done.returncode == 0, done.stderr
        return done.stdout

    async def test_script(self, plane):
        """A script is its own mount; its app ends with it."""
        assert self.run(plane, "with app.run():\n    print(double.remote(21))") == "42\n"
        assert plane.mounted(plane.functions[0]) == ["/root/script.py"]
        assert plane.apps[0].ended

    async def test_deployed(self, plane, client):
        """A deployed function is found by name from another process, keeps its containers, and ends when stopped."""
        self.run(plane, "app.deploy()")
        double = modal.Function.from_name("service", "double")
        assert await double.remote.aio(21) == 42
        assert await double.remote.aio(1) == 2
        assert plane.containers_started == 1
        with pytest.raises(modal.exception.NotFoundError, match="'other'"):
            await modal.Function.from_name("service", "other").hydrate.aio()
        assert len(plane.containers) == 1
        modal_command = "import runpy; runpy.run_module('modal', run_name='__main__')"
        done = plane.run_script(modal_command, "app", "stop", "service", "--yes")
        assert done.returncode == 0, done.stderr
        await plane.until(lambda: not plane.containers)

    async def test_spawned(self, plane, client):
        """What one process spawned in a detached app, another one waits for by its id."""
        call_id = self.run(plane, "with app.run(detach=True):\n    print(slow_double.spawn(21).object_id)").strip()
        call = modal.FunctionCall.from_id(call_id)
        with pytest.raises(TimeoutError):
            await call.get.aio(timeout=0)
        assert await call.get.aio(timeout=20) == 42
        assert await call.get.aio() == 42

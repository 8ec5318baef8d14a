"""One container: a process that runs Modal's own entry point, sees only what it was given, and leaves nothing."""

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from modal_proto import api_pb2

from tests.loopback._service import TASK_HEADER
from tests.loopback._state import Function, Input

HEARTBEAT_S = 10.0
"""Seconds between the heartbeats of a container, each of which waits that long for a cancellation."""

# The kernel ends containers with the thread that started them, should a test run be killed.
TIED = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []


@dataclass
class Interpreter:
    """The Python of containers, and the directory of its installed packages."""

    path: str = sys.executable
    packages: Path = field(default_factory=lambda: Path(sysconfig.get_path("purelib")))
    version: str = ".".join(map(str, sys.version_info[:3]))

    def without(self, lacking: set[str], directory: Path) -> Path:
        """A directory of links to the installed packages, but for these and for what `.pth` files add."""
        if not directory.exists():
            directory.mkdir()
            for entry in self.packages.iterdir():
                distribution = entry.name.partition("-")[0].partition(".")[0]
                if distribution not in lacking and not entry.name.endswith(".pth"):
                    (directory / entry.name).symlink_to(entry)
        return directory


@dataclass(eq=False)
class Container:
    """A container of one function, and the inputs it works on."""

    id: str
    function: Function
    directory: Path
    process: asyncio.subprocess.Process | None = None
    running: dict[str, Input] = field(default_factory=dict)
    timers: dict[str, asyncio.TimerHandle] = field(default_factory=dict)
    cancelled: list[str] = field(default_factory=list)
    taken: int = 0
    stopping: bool = False
    draining: bool = False
    failure: api_pb2.GenericResult | None = None
    reason: str = ""
    idle: asyncio.TimerHandle | None = None
    kill: asyncio.TimerHandle | None = None

    @property
    def pid(self) -> int:
        return self.process.pid if self.process else 0

    @property
    def free(self) -> int:
        """Inputs that it could take now."""
        if self.stopping or self.draining or (self.function.definition.single_use_containers and self.taken):
            return 0
        return self.function.slots - len(self.running)

    async def run(
        self,
        interpreter: Interpreter,
        path: list[Path],
        environment: dict[str, str],
        written: Callable[[int, str], None],
    ) -> int:
        """Run it to its end, passing on what it writes; returns its exit code."""
        arguments = self.directory / "arguments"
        arguments.write_bytes(self._arguments().SerializeToString())
        work = self.directory / "work"
        work.mkdir()
        self.process = await asyncio.create_subprocess_exec(
            # -S: neither `.pth` files nor a checkout that was installed in place may add to what it can import.
            *[*TIED, interpreter.path, "-S", "-m", "modal._container_entrypoint"],
            cwd=work,
            env={
                "PATH": os.environ.get("PATH", ""),
                "LANG": "C.UTF-8",
                "HOME": str(work),
                "TMPDIR": str(work),
                "PYTHONUNBUFFERED": "1",
                "PYTHONPATH": os.pathsep.join(map(str, path)),
                "MODAL_CONTAINER_ARGUMENTS_PATH": str(arguments),
                "MODAL_IS_REMOTE": "1",
                "MODAL_TASK_ID": self.id,
                "MODAL_IMAGE_ID": self.function.definition.image_id,
                "MODAL_ENVIRONMENT": "main",
                "MODAL_HEARTBEAT_INTERVAL": str(HEARTBEAT_S),
                "MODAL_OVERRIDE_HEADERS": f"{TASK_HEADER}:{self.id}",
                **environment,
            },
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        try:
            if self.stopping:  # meanwhile
                self._signal(signal.SIGKILL)
            async with asyncio.TaskGroup() as readers:
                readers.create_task(self._read(self.process.stdout, 1, written))
                readers.create_task(self._read(self.process.stderr, 2, written))
                code = await self.process.wait()
                self._signal(signal.SIGKILL)  # whatever it started: the readers end with the last of them
        finally:
            self._signal(signal.SIGKILL)
            shutil.rmtree(self.directory, ignore_errors=True)
        return code

    def _arguments(self) -> api_pb2.ContainerArguments:
        function = self.function
        layout = function.app.layout
        known = {one.object_id for one in layout.objects}
        # The client looks up each object that the function depends on.
        volumes = {mount.volume_id for mount in function.definition.volume_mounts}
        for dependency in function.definition.object_dependencies:
            if dependency.object_id in volumes:
                layout.objects.add(object_id=dependency.object_id, volume_metadata=api_pb2.VolumeMetadata())
            elif dependency.object_id not in known:
                layout.objects.add(object_id=dependency.object_id)
        return api_pb2.ContainerArguments(
            task_id=self.id,
            function_id=function.id,
            app_id=function.app.id,
            function_def=function.definition,
            app_layout=layout,
            environment_name="main",
        )

    async def _read(
        self, stream: asyncio.StreamReader | None, descriptor: int, written: Callable[[int, str], None]
    ) -> None:
        while stream and (data := await stream.read(65536)):
            written(descriptor, data.decode(errors="replace"))

    def interrupt(self, grace_s: float) -> None:
        """End it as Modal's worker does: an interrupt, so that exit handlers run, and a kill after the grace."""
        self.stopping = True
        if self.kill is None:
            self.kill = asyncio.get_running_loop().call_later(grace_s, self.end)
            if self.process and self.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    self.process.send_signal(signal.SIGINT)

    def end(self) -> None:
        """Kill it, with whatever it started."""
        self.stopping = True
        if self.process and self.process.returncode is None:
            self._signal(signal.SIGKILL)

    def forget_timers(self) -> None:
        for timer in (self.idle, self.kill, *self.timers.values()):
            if timer:
                timer.cancel()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

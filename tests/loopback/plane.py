"""The plane: Modal's control plane in miniature, on 127.0.0.1, in a thread of its own.

Real: the `modal` client, its protocol, the container entry point, which runs in processes of their own, the upload of
files, pickling, blobs, cancelling an input, and every exception that the client raises.
A model: scheduling, scaling, timeouts, retries of spawned calls, image builds (recorded, not built), volumes, the
texts of errors that only the server knows, and how long anything takes.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import modal
from grpclib import GRPCError, Status

from tests.loopback._apps import Apps
from tests.loopback._blobs import Blobs
from tests.loopback._containers import Containers
from tests.loopback._functions import Functions
from tests.loopback._mounts import Image, Mounts, Store
from tests.loopback._process import Container, Interpreter
from tests.loopback._queues import Dicts, Queues
from tests.loopback._service import NAMES, CountingServer, Service
from tests.loopback._state import App, Call, Function, LogLine, State
from tests.loopback._volumes import Volume, Volumes

T = TypeVar("T")

CREDENTIALS = ("ak-loopback", "as-loopback")
PATIENCE_S = 20.0


class Plane:
    """A control plane between `with`: `plane.env` is what a process needs to find it.

    Args:
        directory: For what it keeps while it is open; empty.
        store: Where the files of mounts are kept; planes may share one.
    """

    def __init__(self, directory: Path, store: Store | None = None) -> None:
        self.directory = directory
        self._store = store or Store(directory / "store")
        self._state = State()
        self._blobs = Blobs(self._state)
        self._mounts = Mounts(self._state, self._blobs, self._store)
        self._volumes = Volumes(self._state, directory / "volumes")
        self._containers = Containers(self._state, self._mounts, self._volumes, directory / "containers")
        self._apps = Apps(self._state, self._containers)
        self._queues, self._dicts = Queues(self._state), Dicts(self._state)
        rooms = [self._apps, self._blobs, self._mounts, self._volumes, self._containers, self._queues, self._dicts]
        self._service = Service([*rooms, Functions(self._state, self._containers)], CREDENTIALS)
        self._thread = threading.Thread(target=self._main, name="loopback plane", daemon=True)
        self._open = threading.Event()
        self._closing: asyncio.Event
        self._loop: asyncio.AbstractEventLoop
        self._server: CountingServer | None = None
        self._scripts: list[subprocess.Popen[str]] = []
        self.port = 0

    # Its life

    def __enter__(self) -> "Plane":
        (self.directory / "containers").mkdir()
        self._mounts.python_version = self._containers.interpreter.version
        self._thread.start()
        self._open.wait(PATIENCE_S)
        if not self.port:
            raise RuntimeError("the loopback did not start")
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._scripts:
            process.kill()
            process.communicate()
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(PATIENCE_S)
        if self._thread.is_alive():
            raise RuntimeError("the loopback did not close")

    def _main(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._closing = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as tasks:
                self._server = server = CountingServer(self._service)
                await server.start("127.0.0.1", 0)
                await self._blobs.open()
                self.port = server._server.sockets[0].getsockname()[1]
                self._containers.environment = {"MODAL_SERVER_URL": self.url}
                self._containers.tasks = tasks
                self._open.set()
                await self._closing.wait()
                self._containers.tasks = None
                for container in self._containers.alive:
                    container.end()
                server.close()
            await self._blobs.close()
            self._apps.close()
            self._volumes.close()
            await server.wait_closed()
        finally:
            self._open.set()

    def on_loop(self, act: Callable[[], T]) -> T:
        """Let the plane's own thread do something to its state."""

        async def acting() -> T:
            return act()

        return asyncio.run_coroutine_threadsafe(acting(), self._loop).result(PATIENCE_S)

    # How to reach it

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def env(self) -> dict[str, str]:
        """The environment of a client: no file of a real account is read, and heartbeats come every second."""
        return {
            "MODAL_SERVER_URL": self.url,
            "MODAL_TOKEN_ID": CREDENTIALS[0],
            "MODAL_TOKEN_SECRET": CREDENTIALS[1],
            "MODAL_CONFIG_PATH": str(self.directory / "no-modal.toml"),
            "MODAL_HEARTBEAT_INTERVAL": "1",
            "MODAL_DISABLE_API_PROXY": "1",
            "MODAL_BUILD_VALIDATION": "ignore",  # sources that are edited while tests run
        }

    @contextlib.asynccontextmanager
    async def client(
        self, token_id: str = CREDENTIALS[0], token_secret: str = CREDENTIALS[1]
    ) -> AsyncIterator[modal.Client]:
        """A client in this process besides the one of the fixture: for `client=` of apps, queues and the like."""
        client = modal.Client(self.url, 1, (token_id, token_secret))  # 1: a user's client
        async with client:
            yield client

    def start_script(self, script: str | Path, *args: str, **env: str) -> subprocess.Popen[str]:
        """Start a Python script, or its source, in a process of its own, as a user of Modal would.

        The repository can be imported there. The source of a script is written to `script.py`, since Modal mounts the
        file that a function comes from; containers import that file, so what only the script does comes after
        `if __name__ == "__main__":`. What is still running when the plane closes is killed.
        """
        path = Path(script) if isinstance(script, Path) else self._written(script)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("MODAL_")}
        checkout = str(Path(__file__).parents[2])
        process = subprocess.Popen(
            [sys.executable, str(path), *args],
            env={**inherited, "PYTHONPATH": checkout, **self.env, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._scripts.append(process)
        return process

    def _written(self, source: str) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="script-", dir=self.directory))
        path = folder / "script.py"
        path.write_text(textwrap.dedent(source))
        return path

    def run_script(self, script: str | Path, *args: str, **env: str) -> "subprocess.CompletedProcess[str]":
        """Run a script to its end and return what it wrote; the caller looks at `returncode`."""
        process = self.start_script(script, *args, **env)
        out, err = process.communicate(timeout=PATIENCE_S * 2)
        self._scripts.remove(process)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    # What it saw

    @property
    def calls(self) -> Counter[str]:
        """How often clients called each method, `calls["FunctionMap"]`; attempts that failed count too."""
        return self._service.calls

    @property
    def container_calls(self) -> Counter[str]:
        """The same, for calls from containers."""
        return self._service.container_calls

    @property
    def in_flight(self) -> Counter[str]:
        """Calls that wait for their answer now."""
        return self._service.in_flight

    @property
    def connections(self) -> int:
        """Open connections of clients, without those of containers."""
        ports = self._server.transports.keys() if self._server else set()
        return len(ports - self._service.container_ports)

    @property
    def faults(self) -> list[str]:
        """What went wrong in the plane itself: the fixture fails a test that leaves any."""
        return self._service.faults + self._containers.faults

    @property
    def apps(self) -> list[App]:
        return list(self._state.apps.values())

    @property
    def functions(self) -> list[Function]:
        """All functions that were defined; what was asked for is in `functions[0].options`."""
        return list(self._state.functions.values())

    @property
    def function_calls(self) -> list[Call]:
        return list(self._state.calls.values())

    @property
    def open_inputs(self) -> int:
        """Inputs without an output."""
        return sum(len(call.unfinished) for call in self.function_calls)

    @property
    def containers(self) -> list[Container]:
        """Containers whose process is alive."""
        return list(self._containers.alive)

    @property
    def containers_started(self) -> int:
        return self._containers.started

    @property
    def most_containers(self) -> int:
        """The most that were alive at once."""
        return self._containers.most_alive

    @property
    def images(self) -> list[Image]:
        return list(self._mounts.images.values())

    def image_of(self, function: Function) -> Image:
        return self._mounts.image(function.definition.image_id)

    def mounted(self, function: Function) -> list[str]:
        """The paths of all files that a function's mounts bring, as in its container."""
        return sorted(path for mount in function.definition.mount_ids for path in self._mounts.mounts[mount])

    def volumes_of(self, function: Function) -> dict[str, str]:
        """The names of a function's volumes by where they are mounted."""
        return {one.mount_path: self._volumes.volumes[one.volume_id].name for one in function.definition.volume_mounts}

    def secrets_of(self, function: Function) -> list[str]:
        """The names of a function's secrets; "" for one that was made in code."""
        return [self._volumes.secrets[one][0] for one in function.definition.secret_ids]

    def volume(self, name: str) -> Volume:
        """A volume with its `path` (what was committed), `commits` and `reloads`."""
        return self._volumes.by_name(name)

    @property
    def blob_sizes(self) -> list[int]:
        return self._blobs.sizes

    @property
    def queues_open(self) -> int:
        return len(self._queues.queues)

    @property
    def logs(self) -> list[LogLine]:
        """What containers wrote, of all apps."""
        return [line for app in self.apps for line in app.logs]

    @property
    def log(self) -> str:
        """The same, as one text."""
        return "".join(line.text for line in self.logs)

    # What it should be like

    @property
    def known_secrets(self) -> dict[str, dict[str, str]]:
        """Secrets that exist by name, with their values: for tests to add to."""
        return self._volumes.known_secrets

    def set_limits(
        self,
        *,
        max_containers: int | None = None,
        grace_s: float | None = None,
        heartbeat_timeout_s: float | None = None,
    ) -> None:
        """Containers of one function at most (4), seconds from interrupt to kill (2), and to a lost client (60)."""
        self._containers.max_containers = max_containers or self._containers.max_containers
        self._containers.grace_s = grace_s if grace_s is not None else self._containers.grace_s
        self._apps.heartbeat_timeout_s = heartbeat_timeout_s or self._apps.heartbeat_timeout_s

    def without_packages(self, *names: str) -> None:
        """Let containers lack these installed packages (the names that one imports), as their image would."""
        self._containers.lacking |= set(names)

    def use_interpreter(self, path: str, packages: Path, version: str) -> None:
        """Run containers with another Python, whose `packages` directory has `modal`."""
        self._containers.interpreter = Interpreter(path, packages, version)
        self._mounts.python_version = version

    def fail(
        self, name: str, status: Status = Status.UNAVAILABLE, message: str = "made to fail", times: int = 1
    ) -> None:
        """Let the next calls of this method fail. The client tries again 3 times on UNAVAILABLE and a few others."""
        assert name in NAMES, f"the client has no method {name}"
        self._service.failures[name] += [GRPCError(status, message) for _ in range(times)]

    def cut(self) -> None:
        """Break all connections of clients, as a network does; they may connect again."""

        def act() -> None:
            for port, transport in list(self._server.transports.items()):
                if port not in self._service.container_ports:
                    transport.abort()

        self.on_loop(act)

    def vanish(self) -> None:
        """Take no more connections, and break those of clients."""
        self.on_loop(lambda: self._server._server.close())
        self.cut()

    def crash(self, container: Container) -> None:
        """Kill a container, as a lack of memory would."""
        os.kill(container.pid, signal.SIGKILL)

    # Waiting for it

    def wait_for(self, condition: Callable[[], T], timeout_s: float = PATIENCE_S) -> T:
        """Wait until this is true, and return it."""
        deadline = time.monotonic() + timeout_s
        while not (result := condition()):
            if time.monotonic() > deadline:
                raise TimeoutError(self.report())
            time.sleep(0.005)
        return result

    async def until(self, condition: Callable[[], T], timeout_s: float = PATIENCE_S) -> T:
        """The same, for async tests."""
        waiting: Awaitable[T] = asyncio.to_thread(self.wait_for, condition, timeout_s)
        return await waiting

    def report(self) -> str:
        """What it is busy with, for a test that failed."""
        lines = [f"calls: {dict(self.calls)}", f"from containers: {dict(self.container_calls)}"]
        lines += [f"open inputs: {self.open_inputs}, containers: {[(c.id, c.pid) for c in self.containers]}"]
        return "\n".join([*lines, *self.faults, "containers wrote:", self.log])

    def __repr__(self) -> str:
        return f"<Plane {self.url} containers={len(self.containers)} open_inputs={self.open_inputs}>"

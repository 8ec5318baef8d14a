"""Fixtures that every test may use: the async backends, and a check that nothing was left behind."""

import contextlib
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import FrameType

import anyio
import psutil
import pytest

from tests._servers import SHARED, Server, Servers

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As for what a shell starts in the background. Child processes inherit it, and tests press Ctrl-C on them.
    signal.signal(signal.SIGINT, signal.default_int_handler)

collect_ignore = [
    "typing",  # for the type checker: it is not run
    "fingerprint_project",  # imported by other processes, from copies that are edited
]

GRACE_S = 5.0
"""Seconds that threads, processes and files get to be gone after a test; tasks get none."""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("asyncio", {}), id="asyncio"),
        pytest.param(("asyncio", {"use_uvloop": True}), id="asyncio+uvloop"),
        pytest.param(("trio", {}), id="trio"),
    ],
)
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, object]]:
    """Every test marked `anyio` runs on asyncio, asyncio with uvloop, and trio."""
    return request.param


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    """The Redis and memcached servers that the tests of a module share; no test may harm one."""
    yield SHARED
    SHARED.stop()


@pytest.fixture
def own_server(servers: Servers) -> Iterator[Callable[[str], Server]]:
    """Starts a server that is the test's own, to kill, freeze or restart."""
    with contextlib.ExitStack() as started:

        def start(kind: str) -> Server:
            server = Server(kind)
            started.callback(server.stop)
            return server.start()

        yield start


@pytest.fixture(scope="session")
def _warm_uvloop() -> None:
    """Its first child process opens a pipe that it keeps for the life of this process."""
    anyio.run(anyio.run_process, [sys.executable, "-V"], backend_options={"use_uvloop": True})


@pytest.fixture
def no_leaks(request: pytest.FixtureRequest, _nothing_held: None) -> None:
    """Fails the test if it leaves a task, thread, process, open file or temporary file behind.

    For async tests (marked `anyio`) and sync ones. Temporary files of this process and its children go to a
    folder of their own for the test, which must be empty in the end.
    """
    if "anyio_backend" in request.fixturenames:
        request.getfixturevalue("_no_tasks_left")


@pytest.fixture
def _nothing_held(_warm_uvloop: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setenv("TMPDIR", str(scratch))
    before = _held()
    yield
    left = _settled(lambda: (_held() - before) | {f"temporary file {p.name}" for p in scratch.iterdir()})
    assert not left, f"left behind: {', '.join(sorted(left))}"


@pytest.fixture
async def _no_tasks_left(anyio_backend: object) -> AsyncIterator[None]:
    before = _tasks()
    yield
    left = [coro for coro in _tasks() if coro not in before]
    assert not left, f"tasks left running: {left}"


def _tasks() -> list[object]:
    """The coroutines of the loop's tasks, without those of anyio's own test runner."""
    coros = [task.coro for task in anyio.get_running_tasks()]
    return [coro for coro in coros if not getattr(coro, "__qualname__", "").startswith("TestRunner.")]


def _held() -> set[str]:
    return _threads() | _processes() | _open_files()


def _threads() -> set[str]:
    frames = sys._current_frames()
    return {f"thread {t.name} ({t.ident})" for t in threading.enumerate() if not _idle(frames.get(t.ident or 0))}


def _idle(frame: FrameType | None) -> bool:
    """A pooled thread of anyio or trio that waits for work: both keep such threads for a while."""
    waits = False
    while frame is not None and frame.f_code.co_filename.endswith(("threading.py", "queue.py")):
        waits, frame = True, frame.f_back
    if frame is None:
        return False
    package = Path(frame.f_code.co_filename).parts[-3:]
    return ("anyio" in package and waits) or ("trio" in package and frame.f_code.co_name == "_work")


def _processes() -> set[str]:
    held = set()
    for child in psutil.Process().children(recursive=True):
        try:
            ended = ", ended" if child.status() == psutil.STATUS_ZOMBIE else ""
            held.add(f"process {child.pid} ({child.name()}{ended})")
        except psutil.NoSuchProcess:
            continue  # it ended while we looked
    return held


def _open_files() -> set[str]:
    held = set()
    for fd in os.listdir("/dev/fd"):
        try:
            held.add(f"file descriptor {fd} ({os.readlink(f'/dev/fd/{fd}')})")
        except OSError:
            continue  # the descriptor of this very listing
    return held


def _settled(left: Callable[[], set[str]]) -> set[str]:
    """What is still left once it is empty, or after `GRACE_S`."""
    deadline = time.monotonic() + GRACE_S
    while (found := left()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return found

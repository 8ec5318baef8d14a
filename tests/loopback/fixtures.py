"""Fixtures: a plane for each test, and Modal's client of this process pointed at it."""

import functools
import importlib.util
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

# Modal's client reads the file of the account when it is imported, so this comes before it.
if "modal" not in sys.modules:
    os.environ["MODAL_CONFIG_PATH"] = os.devnull

import modal
import modal.runner

from tests.loopback._mounts import Store
from tests.loopback.plane import Plane

THREADS = 4

HERE = Path(__file__).parent


@pytest.fixture
def plane(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    """A plane of the test's own, which finds the files of mounts that others in the session were sent.

    It fails the test if anything in it went wrong; its report is with a failed test.
    """
    directory = tmp_path / "plane"
    directory.mkdir()
    with Plane(directory, Store(tmp_path_factory.getbasetemp() / "mounts")) as plane:
        yield plane
        print(plane.report())  # noqa: T201 - pytest shows it with a test that failed
    assert not plane.faults, plane.faults


@pytest.fixture
def client(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> Iterator[modal.Client]:
    """The client of this process, for as long as the test: what Modal uses where no `client=` is given."""
    for name in [name for name in os.environ if name.startswith("MODAL_")]:
        monkeypatch.delenv(name)
    for name, value in plane.env.items():
        monkeypatch.setenv(name, value)
    _start_threads()
    monkeypatch.setattr(modal.config, "_user_config", {})
    monkeypatch.setattr(modal.runner, "HEARTBEAT_INTERVAL", 1.0)
    modal._environments.ENVIRONMENT_CACHE.clear()
    client = modal.Client.from_env()
    client.hello()
    assert plane.calls.pop("ClientHello", 0), "Modal's client of another test is still open"
    yield client
    client.__exit__(None, None, None)  # 1.6.0 has no `close`
    modal._environments.ENVIRONMENT_CACHE.clear()


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No process, listening socket or link to a volume outlives a plane: for all tests of a module that has this."""
    yield
    assert psutil.Process().children(recursive=True) == []
    listening = [one for one in psutil.Process().net_connections(kind="inet") if one.status == psutil.CONN_LISTEN]
    assert listening == []
    assert [path for path in Path(tempfile.gettempdir()).glob(f"loopback-{os.getpid()}-*") if path.is_symlink()] == []


@functools.cache
def _start_threads() -> None:
    """Start the threads that Modal's event loop keeps for good, so that `no_leaks` has seen them (ask for it last)."""
    loop = modal._utils.async_utils.synchronizer._get_loop(start=True)
    together = threading.Barrier(THREADS)
    executor = ThreadPoolExecutor(THREADS)
    for _ in executor.map(lambda _: together.wait(), range(THREADS)):
        pass
    loop.call_soon_threadsafe(loop.set_default_executor, executor)


def job(name: str) -> Callable[..., Any]:
    """A function of `loopback_jobs.py`, from a module of its own at the top, so that this one file is its mount."""
    return getattr(load(HERE / "loopback_jobs.py"), name)


def one_app(name: str, **options: Any) -> tuple[modal.App, modal.Function]:
    """A fresh app with one function of `loopback_jobs.py`."""
    app = modal.App("one")
    return app, app.function(**{"image": modal.Image.debian_slim(), **options})(job(name))


def load(path: Path) -> ModuleType:
    """Import a file as a module at the top, once."""
    if path.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    return sys.modules[path.stem]

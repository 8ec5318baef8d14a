"""The leak check of conftest.py finds each kind of leak, and passes what cleans up after itself."""

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

CONFTEST = Path(__file__).with_name("conftest.py")

HEAD = """
import asyncio, socket, subprocess, tempfile, threading, time
import anyio, anyio.to_thread, pytest, trio

kept = []
"""

LEAKS = """
def test_thread(no_leaks):
    threading.Thread(target=time.sleep, args=[2]).start()

def test_process(no_leaks):
    kept.append(subprocess.Popen(["sleep", "2"]))

def test_zombie(no_leaks):
    kept.append(subprocess.Popen(["true"]))

def test_socket(no_leaks):
    kept.append(socket.socketpair())

def test_temporary_file(no_leaks):
    tempfile.mkdtemp()

@pytest.mark.anyio
async def test_task(no_leaks, anyio_backend_name):
    if anyio_backend_name == "trio":
        trio.lowlevel.spawn_system_task(trio.sleep, 1)
    else:
        kept.append(asyncio.create_task(asyncio.sleep(1)))
    await anyio.sleep(0.01)

@pytest.mark.anyio
async def test_pooled_thread(no_leaks):
    with anyio.move_on_after(0.05):
        await anyio.to_thread.run_sync(time.sleep, 2, abandon_on_cancel=True)
"""

CLEAN = """
def test_threads(no_leaks):
    anyio.run(anyio.to_thread.run_sync, time.sleep, 0.01)

def test_process(no_leaks):
    subprocess.run(["true"])

def test_files(no_leaks):
    with tempfile.TemporaryFile():
        pass

@pytest.mark.anyio
async def test_pooled_threads(no_leaks):
    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(anyio.to_thread.run_sync, time.sleep, 0.01)

@pytest.mark.anyio
async def test_async_process(no_leaks):
    await anyio.run_process(["true"])
"""


@pytest.fixture
def outcomes(pytester: pytest.Pytester):
    """Runs tests that use `no_leaks` in a pytest of its own, and counts how they went."""
    pytester.makeconftest(CONFTEST.read_text().replace("GRACE_S = 5.0", "GRACE_S = 0.2"))

    def run(tests: str) -> dict[str, int]:
        pytester.makepyfile(HEAD + tests)
        return pytester.runpytest_subprocess("-p", "no:asyncio").parseoutcomes()

    return run


def test_every_kind_of_leak_is_an_error_after_the_test(outcomes) -> None:
    sync, on_each_backend = 5, 2 * 3
    assert outcomes(LEAKS) == {"passed": sync + on_each_backend, "errors": sync + on_each_backend}


def test_what_cleans_up_after_itself_passes(outcomes) -> None:
    sync, on_each_backend = 3, 2 * 3
    assert outcomes(CLEAN) == {"passed": sync + on_each_backend}

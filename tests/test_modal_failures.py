"""What goes wrong between a caller and Modal, as one error of ours that says what to do.

The texts that only Modal's servers know are a model; the client's own exceptions are real.
"""

import asyncio
import time

import modal
import modal.runner
import pytest
from grpclib import Status

from hypernodes import Pipeline, RemoteExecutionError, node
from hypernodes.backend import ModalBackend
from tests import _kernel, loopback
from tests._kernel import CellError, Kernel

plane, client = loopback.plane, loopback.client
kernels_here = _kernel.kernels_here

IMAGE = modal.Image.debian_slim()


@node("size")
def measure(data):
    return len(data)


@pytest.fixture
def kernel(plane, kernels_here, monkeypatch):
    """A Jupyter kernel whose account is on the loopback."""
    for name, value in plane.env.items():
        monkeypatch.setenv(name, value)
    kernel = Kernel()
    yield kernel
    kernel.close()


def pipeline(**options):
    return Pipeline([measure], name="p", backend=ModalBackend(IMAGE, **options))


@pytest.mark.asyncio
async def test_an_account_that_is_refused(plane, client):
    """The error names the command that sets one up."""
    plane.fail("AppCreate", Status.UNAUTHENTICATED, "Token is invalid")
    with pytest.raises(RemoteExecutionError, match=r"modal token new") as caught:
        await pipeline().arun(data=b"")
    assert isinstance(caught.value.__cause__, modal.exception.AuthError)


@pytest.mark.asyncio
@pytest.mark.parametrize("mode", ["single", "distributed"])
@pytest.mark.parametrize("package", ["anyio", "cloudpickle"])
async def test_an_image_without_what_hypernodes_needs(plane, client, package, mode):
    """The error says that it is hypernodes that needs the package, and how to get an image that has it."""
    plane.without_packages(package)
    with pytest.raises(RemoteExecutionError, match=rf"no module '{package}', which hypernodes needs.*modal_image"):
        await pipeline(mode=mode).amap({"data": [b"a", b"b"]}, "data")
    handle = await pipeline().asubmit(data=b"a")
    with pytest.raises(RemoteExecutionError, match=rf"no module '{package}', which hypernodes needs"):
        await handle
    assert await handle.adone()


@pytest.mark.asyncio
@pytest.mark.parametrize("status", [Status.INVALID_ARGUMENT, Status.RESOURCE_EXHAUSTED])
async def test_what_is_too_large(plane, client, status):
    """Where Modal refuses what is sent, the error says how large it was, and what to do."""
    plane.fail("BlobCreate", status, "Blob is too large", times=20)
    with pytest.raises(RemoteExecutionError, match=r"3\.0 MiB.*modal\.Volume") as caught:
        await pipeline().arun(data=bytes(3 << 20))
    assert "Blob is too large" in str(caught.value)


@pytest.mark.asyncio
async def test_servers_that_do_not_answer(plane, client):
    """A run that cannot be started ends with an error, and does not wait for ever."""
    plane.vanish()
    began = time.monotonic()
    with pytest.raises(RemoteExecutionError, match=r"do not answer.*online") as caught:
        await pipeline().arun(data=b"")
    assert caught.value.__cause__ is not None
    assert time.monotonic() - began < 60


@pytest.mark.asyncio
async def test_a_connection_that_is_cut(plane, client, tmp_path):
    """One cut is bridged: the run goes on, and its result arrives."""

    @node("y")
    async def slow(x):
        (tmp_path / "begun").touch()
        await asyncio.sleep(1.5)
        return x

    task = asyncio.create_task(Pipeline([slow], backend=ModalBackend(IMAGE)).arun(x=1))
    await plane.until((tmp_path / "begun").exists)
    plane.cut()
    assert await task == {"y": 1}


TIMERS = """
    import asyncio, pathlib, sys
    import modal
    from hypernodes import Pipeline, node
    from hypernodes.backend import ModalBackend

    @node("never")
    async def forever(x):
        pathlib.Path({begun!r}).touch()
        await asyncio.sleep(3600)

    endless = Pipeline([forever], name="endless", backend=ModalBackend(modal.Image.debian_slim()))
    spread = endless.with_backend(ModalBackend(modal.Image.debian_slim(), mode="distributed", max_containers=2))
"""

ENDLESS = {
    "arun": "await endless.arun(x=1)",
    "run": "endless.run(x=1)",
    "amap": "await endless.amap({'x': [1, 2]}, 'x')",
    "distributed": "await spread.amap({'x': [1, 2, 3]}, 'x')",
    "distributed map": "spread.map({'x': [1, 2, 3]}, 'x')",
    "stream": """
        with endless.stream({'x': [1, 2]}, 'x') as items:
            list(items)
    """,
}


@pytest.mark.parametrize("call", ENDLESS)
def test_interrupting_a_notebook_ends_the_run_there(plane, kernel, tmp_path, call):
    """The stop button of a real Jupyter kernel ends the containers; the kernel is as good as new."""
    begun = tmp_path / "begun"
    kernel(TIMERS.format(begun=str(begun)))
    with pytest.raises(CellError) as caught:
        kernel(ENDLESS[call], interrupt_when=begun.exists)
    assert caught.value.name in {"KeyboardInterrupt", "CancelledError"}, caught.value
    plane.wait_for(lambda: not plane.containers)
    assert plane.open_inputs == 0
    assert all(app.ended for app in plane.apps)
    assert kernel("print(Pipeline([node('y')(lambda x: x + 1)]).run(x=1))").strip() == "{'y': 2}"

"""A real Jupyter kernel for tests; importing this skips a module where Jupyter is not installed."""

import os
import queue
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

try:
    import ipykernel  # noqa: F401
    from jupyter_client import KernelManager
except ModuleNotFoundError as missing:
    if os.environ.get("CI"):
        raise
    pytest.skip(f"notebooks need {missing.name}", allow_module_level=True)


ROOT = Path(__file__).parent.parent


@pytest.fixture
def kernels_here(monkeypatch, tmp_path):
    """Kernels import this package, and leave nothing in the user's home."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))


class CellError(Exception):
    """A cell ended with an exception."""

    def __init__(self, name: str, traceback: list[str]) -> None:
        super().__init__("\n".join(traceback))
        self.name = name


class Kernel:
    """A real Jupyter kernel; ``kernel(code)`` runs a cell and returns what it printed."""

    def __init__(self) -> None:
        self._manager = KernelManager(kernel_name="python3")
        self._manager.start_kernel()
        self._client = self._manager.client()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=30)

    def __call__(self, code: str, *, interrupt_when: Callable[[], bool] | None = None) -> str:
        """Run a cell; interrupt it once ``interrupt_when`` is true.

        Raises:
            CellError: the cell ended with an exception.
        """
        request = self._client.execute(textwrap.dedent(code))
        pieces: list[str] = []
        error: CellError | None = None
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if interrupt_when is not None and interrupt_when():
                self._manager.interrupt_kernel()
                interrupt_when = None
            try:
                message = self._client.get_iopub_msg(timeout=0.02)
            except queue.Empty:
                continue
            content = message["content"]
            match message["msg_type"]:
                case _ if message["parent_header"].get("msg_id") != request:
                    pass
                case "stream":
                    pieces.append(content["text"])
                case "error":
                    error = CellError(content["ename"], content["traceback"])
                case "status" if content["execution_state"] == "idle":
                    if error is not None:
                        raise error
                    return "".join(pieces)
        raise TimeoutError(f"the cell did not end: {code}")

    def close(self) -> None:
        self._client.stop_channels()
        self._manager.shutdown_kernel(now=True)
        self._manager.cleanup_resources()

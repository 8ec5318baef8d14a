"""A Dask cluster of processes over TCP: a scheduler, and workers that a nanny starts again when they die."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
PATIENCE_S = 40


class Cluster:
    """Started on 127.0.0.1; its scheduler's address is `address`."""

    def __init__(self, workers=2, threads=1):
        self._folder = tempfile.TemporaryDirectory()
        self._workers = workers
        self._threads = threads
        self._processes = []

    def __enter__(self):
        file = f"{self._folder.name}/scheduler.json"
        self.scheduler = self._started(
            "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", file
        )
        for _ in range(self._workers):
            self.add_worker(file)
        from distributed import Client

        with Client(scheduler_file=file, set_as_default=False) as client:
            client.wait_for_workers(self._workers, timeout=PATIENCE_S)
            self.address = client.scheduler.address
        return self

    def add_worker(self, file):
        """Start another worker."""
        threads = ["--nthreads", str(self._threads)]
        self._started(
            "worker", "--scheduler-file", file, *threads, "--no-dashboard", "--local-directory", self._folder.name
        )

    def _started(self, kind, *arguments):
        log = open(f"{self._folder.name}/{kind}-{len(self._processes)}.log", "wb")  # noqa: SIM115 - it is the process's
        with log:
            process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", f"distributed.cli.dask_{kind}", *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                cwd=self._folder.name,
            )
        self._processes.append(process)
        return process

    def logs(self):
        """What the processes have said."""
        return "".join(file.read_text(errors="replace") for file in Path(self._folder.name).glob("*.log"))

    def __exit__(self, *raised):
        families = []
        for process in self._processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                families += psutil.Process(process.pid).children(recursive=True)
            process.kill()
        for each in families:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        for process in self._processes:
            process.wait()
        self._folder.cleanup()


def await_file(path):
    """Wait until a file is there."""
    deadline = time.monotonic() + PATIENCE_S
    while not Path(path).exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)

"""Worker processes on this machine: started when needed, killed when in doubt, none left behind."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import anyio.abc

from hypernodes._mapping import Path
from hypernodes._program import BoundCall
from hypernodes._run import MapWork, cpu_count
from hypernodes.backend._chunks import ChunkedMap, WorkerDied, describe_end
from hypernodes.backend._wire import COUNT, LENGTH, Parts, dumps, frame, load_error, loads, packed_checked
from hypernodes.errors import ExecutionError, SerializationError, WorkerCrashedError
from hypernodes.events import format_path

BOARD_SIZE = 1 << 16
LAST_S = 1.0
"""Seconds that a worker gets to write to a cache what it has, before it is killed."""
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_START = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from hypernodes.backend._worker import main; main(int(sys.argv[2]), int(sys.argv[3]))"
)


class _Connection:
    """The parent's end of a worker's socket.

    Not anyio's socket stream: cancelling its ``receive`` just as data comes makes asyncio report an
    ``InvalidStateError``, and workers are cancelled while they send.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._sending = anyio.Lock()

    async def send(self, parts: Parts) -> None:
        """Write the parts of one frame.

        Raises:
            WorkerDied: the other end is gone.
        """
        async with self._sending:
            for part in parts:
                view = memoryview(part).cast("B")
                while view:
                    try:
                        view = view[self._socket.send(view) :]
                    except BlockingIOError:
                        await anyio.wait_writable(self._socket)
                    except OSError as error:
                        raise WorkerDied from error

    async def receive(self, length: int) -> bytearray:
        """Read so many bytes.

        Raises:
            WorkerDied: the other end is gone.
        """
        data = bytearray(length)
        view = memoryview(data)
        while view:
            try:
                count = self._socket.recv_into(view)
            except BlockingIOError:
                await anyio.wait_readable(self._socket)
                continue
            except OSError as error:
                raise WorkerDied from error
            if not count:
                raise WorkerDied
            view = view[count:]
        return data

    def end(self) -> None:
        """Tell the other end that no more will come."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close it, also for those who wait for it."""
        anyio.notify_closing(self._socket)
        self._socket.close()


class WorkerProcess:
    """One worker, from the parent's side."""

    def __init__(self, process: anyio.abc.Process, connection: _Connection, board: mmap.mmap) -> None:
        self.board = board
        """One byte for each item of the chunk it runs: 0 waiting, 1 started, 2 done."""
        self._process = process
        self._connection = connection
        self._status: int | None = None
        self.saves = False
        """Whether it writes to a cache: then it may do so until LAST_S before it is killed."""
        self.funcs: set[int] = set()
        """The numbers of the functions that it has been sent."""

    @classmethod
    async def start(cls, cpus: int) -> WorkerProcess:
        """Start a worker in a session of its own, so that it can be killed with all that it starts.

        ``cpus`` is how many CPUs libraries such as BLAS should use in it, unless the environment says otherwise.

        Raises:
            WorkerCrashedError: it ended before it was ready; its standard error says why.
        """
        if os.name != "posix":
            raise ExecutionError(
                "worker processes need a POSIX system (Linux or macOS): "
                'use node_execution and map_execution "async" or "threaded"'
            )
        with contextlib.ExitStack() as opened:
            ours, theirs = socket.socketpair()
            opened.callback(ours.close)
            with theirs, tempfile.TemporaryFile() as file:
                file.truncate(BOARD_SIZE)
                board = mmap.mmap(file.fileno(), BOARD_SIZE)
                opened.callback(board.close)
                fds = (theirs.fileno(), file.fileno())
                flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
                process = await anyio.open_process(
                    [sys.executable, *flags, "-c", _START, json.dumps(sys.path), *map(str, fds)],
                    stdin=subprocess.DEVNULL,
                    stdout=None,
                    stderr=None,
                    env={**dict.fromkeys(_THREAD_VARIABLES, str(cpus)), **os.environ},
                    pass_fds=fds,
                    start_new_session=True,
                )
            opened.pop_all()
        worker = cls(process, _Connection(ours), board)
        try:
            await worker.receive()
        except WorkerDied:
            status = await worker.aclose()
            raise WorkerCrashedError(
                f"a worker process (pid {worker.pid}) could not start and {describe_end(status)}; "
                f"its standard error says why"
            ) from None
        except BaseException:
            await worker.aclose()
            raise
        return worker

    @property
    def alive(self) -> bool:
        """Whether it has not been closed."""
        return self._status is None

    @property
    def pid(self) -> int:
        return self._process.pid

    async def send(self, *message: Any) -> None:
        """Write one frame.

        Raises:
            WorkerDied: the process is gone.
        """
        await self._connection.send(frame(dumps(message)))

    async def receive(self) -> Any:
        """Read one message.

        Raises:
            WorkerDied: the process is gone.
            SerializationError: a value in it cannot be rebuilt in this process.
        """
        receive = self._connection.receive
        (count,) = COUNT.unpack(await receive(COUNT.size))
        lengths = [LENGTH.unpack(await receive(LENGTH.size))[0] for _ in range(count)]
        parts: Parts = [await receive(length) for length in lengths]
        try:
            return loads(parts)
        except Exception as error:  # unpickling runs the user's code
            raise SerializationError(
                f"an output of a worker process cannot be rebuilt here: {type(error).__name__}: {error}"
            ) from error

    async def aclose(self) -> int:
        """Kill it with all that it has started; return its exit status, negative for a signal."""
        if self._status is None:
            with anyio.CancelScope(shield=True):
                if self.saves:
                    self._connection.end()
                    with anyio.move_on_after(LAST_S):
                        await self._process.wait()
                _kill(self._process.pid)
                self._status = await self._process.wait()
                await self._process.aclose()
                self._connection.close()
                self.board.close()
        assert self._status is not None
        return self._status


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


class WorkerPool:
    """Up to ``max_workers`` worker processes of one event loop; None for one per CPU."""

    def __init__(self, max_workers: int | None) -> None:
        self.size = max_workers or cpu_count()
        self.tokens = anyio.Semaphore(self.size, fast_acquire=True)
        self._closed = False
        self._idle: list[WorkerProcess] = []
        self._numbers: weakref.WeakKeyDictionary[Any, tuple[int, list[Any]]] = weakref.WeakKeyDictionary()
        self._numbered = 0

    @contextlib.asynccontextmanager
    async def worker(self) -> AsyncIterator[WorkerProcess]:
        """Lend a worker to one who holds a token; one whose block ends with an error or a cancellation is killed."""
        worker = self._idle.pop() if self._idle else await WorkerProcess.start(max(1, cpu_count() // self.size))
        try:
            yield worker
        except BaseException:
            await worker.aclose()
            raise
        if self._closed or not worker.alive:
            await worker.aclose()
        else:
            self._idle.append(worker)

    async def call(
        self,
        step: BoundCall,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
        path: Path,
        *,
        tell: Callable[[Any], None],
        ready: Callable[[], None],
    ) -> Any:
        """Call one function in a worker.

        Raises:
            SerializationError: the function or an argument cannot be pickled.
            WorkerCrashedError: the worker died; the next call gets a new one.
        """
        number, func = self._func(step)
        named = dict(zip((name for name, _ in step.parameters), (*arguments, *keywords.values()), strict=True))
        sent = packed_checked((arguments, keywords), named, f"the inputs of node {step.name!r}")
        is_generator = step.node.kind == "generator"
        pieces: list[Any] = []
        async with self.worker() as worker:
            ready()
            known = number in worker.funcs
            try:
                await worker.send("call", number, step.name, None if known else func, sent)
                worker.funcs.add(number)
                while True:
                    kind, value = await worker.receive()
                    if kind != "piece":
                        break
                    pieces.append(value)
                    tell(value)
            except WorkerDied:
                status = await worker.aclose()
                raise WorkerCrashedError(
                    f"the worker process (pid {worker.pid}) that ran node {step.name!r} at {format_path(path)} "
                    f"{describe_end(status)}"
                ) from None
        if kind == "raised":
            raise load_error(value)
        return pieces if is_generator else value

    async def map(self, work: MapWork, template: list[Any]) -> None:
        """Run a map's items in chunks, as many workers at once as there are."""
        await ChunkedMap(self, work, template).run()

    def _func(self, step: BoundCall) -> tuple[int, list[Any]]:
        known = self._numbers.get(step.node)
        if known is None:
            self._numbered += 1
            what = f"the function of node {step.name!r}"
            known = self._numbered, packed_checked(step.func, {step.name: step.func}, what)
            self._numbers[step.node] = known
        return known

    async def aclose(self) -> None:
        """Stop every idle worker; those in use are stopped when they come back."""
        self._closed = True
        while self._idle:
            await self._idle.pop().aclose()

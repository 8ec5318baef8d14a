"""The worker process: takes calls and chunks of items from its parent, sends back what they make.

It ends when its parent does: the socket's end of file kills the process and all that it started.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import mmap
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from io import TextIOWrapper
from typing import Any

import anyio
import anyio.abc

from hypernodes import events as ev
from hypernodes._cached import CachedMapRun
from hypernodes._engine import PipelineExecutionEngine, item_runner
from hypernodes._feed import ListFeed
from hypernodes._map_run import MapRun
from hypernodes._mapping import ItemFailure, MapSpec, Path, Rows
from hypernodes._plan import ExecutionPlan
from hypernodes._program import Places, bind
from hypernodes._run import Bound, BoundKey, MapWork, Origin, Run, Scope
from hypernodes._trace import Trace, cached_nodes, settled
from hypernodes.backend._chunks import DONE, STARTED
from hypernodes.backend._process import BOARD_SIZE
from hypernodes.backend._wire import COUNT, LENGTH, Parts, dump_error, dumps, frame, loads, packed, with_error
from hypernodes.errors import SerializationError

FLUSH_S = 0.05
"""Results and events are sent when the last ones were sent this many seconds ago."""


Finished = tuple[int, list[Any] | None, Any, Any]
"""An item's index, its outputs, their digests, or its error, each as it travels."""


class Channel:
    """The worker's end of the socket: reads in a thread, writes in place."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()

    def receive(self) -> Parts:
        """Read one frame; the parent's end of file is this process's end."""
        (count,) = COUNT.unpack(self._exactly(COUNT.size))
        lengths = [LENGTH.unpack(self._exactly(LENGTH.size))[0] for _ in range(count)]
        return [self._exactly(length) for length in lengths]

    def _exactly(self, length: int) -> bytearray:
        data = bytearray(length)
        view = memoryview(data)
        while view:
            try:
                got = self._connection.recv_into(view)
            except OSError:
                got = 0
            if not got:
                os.killpg(0, signal.SIGKILL)
            view = view[got:]
        return data

    def send(self, *message: Any) -> None:
        """Write one frame."""
        self.send_parts(dumps(message))

    def send_parts(self, parts: Parts) -> None:
        """Write one frame that is pickled already."""
        with self._sending:
            try:
                for piece in frame(parts):
                    self._connection.sendall(piece)
            except OSError:
                # The parent is gone.
                os.killpg(0, signal.SIGKILL)


class RemoteBound:
    """A bound that the parent keeps for all its workers."""

    def __init__(self, channel: Channel, number: int) -> None:
        self._channel = channel
        self._number = number
        self._waiting: deque[anyio.Event | None] = deque()
        self._settled = anyio.Event()

    async def acquire(self) -> None:
        """Ask the parent for a token and wait for it."""
        granted = anyio.Event()
        self._waiting.append(granted)
        self._channel.send("acquire", self._number)
        try:
            await granted.wait()
        except BaseException:
            if granted.is_set():
                self.release()
            else:
                # The parent will grant it all the same; it goes back at once.
                self._waiting[self._waiting.index(granted)] = None
            raise

    def granted(self) -> None:
        """Wake the one that has waited longest."""
        first = self._waiting.popleft()
        if first is None:
            self.release()
        else:
            first.set()
        if not self._waiting:
            self._settled.set()

    def release(self) -> None:
        """Give a token back."""
        self._channel.send("release", self._number)

    async def settled(self) -> None:
        """Wait until every token that was asked for has come, also those that nobody waits for any more."""
        while self._waiting:
            self._settled = anyio.Event()
            await self._settled.wait()


class WorkerRun(Run):
    """The state of a run in a worker: its bounds are the parent's."""

    __slots__ = ("_remote", "spent")

    def __init__(self, run_id: str, emit: ev.Emit | None, remote: Mapping[BoundKey, RemoteBound]) -> None:
        super().__init__(run_id, emit)
        self._remote = remote
        self.spent = False
        """Whether a thread runs on in this process that nobody waits for."""

    def leave_thread(self) -> bool:
        """Leave it: the parent kills a spent worker."""
        self.spent = True
        return True

    def bound(self, key: BoundKey, value: Any) -> Bound:
        """Return the parent's bound for a key."""
        return self._remote[key]  # type: ignore[return-value]


class Outbox:
    """Results and events on their way to the parent, sent in batches by time; a sink and an emit."""

    bounded = False
    lazy = False

    def __init__(
        self, channel: Channel, board: mmap.mmap, wanted: tuple[str, ...], kinds: frozenset[type], *, traced: bool
    ) -> None:
        self._traced = traced
        self._channel = channel
        self._board = board
        self._wanted = wanted
        self.kinds = kinds
        self.first = 0
        self._items: list[Finished] = []
        self._events: list[ev.Event] = []
        self._sent_at = 0.0
        self._closed = False
        self._flushing = threading.Lock()
        self._pending = threading.Event()
        threading.Thread(target=self._flush_late, name="hypernodes-outbox", daemon=True).start()

    def __call__(self, event: ev.Event, /) -> None:
        travelling = with_error(event, lambda error: dump_error(error, None))
        self._events.append(travelling)
        self._send_in_time()

    def full(self, taken: int) -> bool:
        """Say no: a chunk is bounded by what was put into it."""
        return False

    async def room(self) -> None:
        """Return at once."""

    def collected(self) -> Mapping[str, Any]:
        """Return nothing: results went to the parent."""
        return {}

    def deliver(self, index: int, outputs: tuple[Any, ...], digests: Sequence[Any] | None = None) -> None:
        """Take an item's outputs."""
        self._board[index - self.first] = DONE
        # Pickled one by one, and now: one that cannot be, here or there, spoils no other.
        item: Finished
        try:
            known = None
            if digests is not None and self._traced:
                known = [settled(digest, value) for digest, value in zip(digests, outputs, strict=True)]
            item = index, packed(outputs), known, None
        except Exception:  # noqa: BLE001 - pickling runs the user's code
            item = index, None, None, dump_error(self._unsendable(index, outputs), None)
        self._items.append(item)
        self._send_in_time()

    def fail(self, failure: ItemFailure) -> None:
        """Take an item's failure."""
        self._board[failure.index - self.first] = DONE
        # Made before the list is looked up, which the thread that sends late may replace meanwhile.
        item = failure.index, None, None, dump_error(failure.error, failure.path)
        self._items.append(item)
        self._send_in_time()

    def flush(self) -> None:
        """Send what there is."""
        with self._flushing:
            items, self._items = self._items, []
            events, self._events = self._events, []
            self._sent_at = time.monotonic()
            if not items and not events:
                return
            try:
                parts = dumps(("results", items, events))
            except Exception:  # noqa: BLE001 - an event about a value that cannot be sent is not sent
                parts = dumps(("results", items, [event for event in events if _sendable(event)]))
            self._channel.send_parts(parts)

    def close(self) -> None:
        """End the thread that sends late."""
        self._closed = True
        self._pending.set()

    def _send_in_time(self) -> None:
        if time.monotonic() - self._sent_at > FLUSH_S:
            self.flush()
        else:
            self._pending.set()

    def _flush_late(self) -> None:
        """Send what would otherwise wait for a long call to end; runs in a thread of its own."""
        while True:
            self._pending.wait()
            self._pending.clear()
            if self._closed:
                return
            time.sleep(FLUSH_S)
            self.flush()

    def _unsendable(self, index: int, outputs: tuple[Any, ...]) -> SerializationError:
        try:
            for name, value in zip(self._wanted, outputs, strict=True):
                sendable(value, value, f"output {name!r} of item {index}")
        except SerializationError as error:
            return error
        return SerializationError(f"the outputs of item {index} cannot be sent back together from a worker process")


def sendable(message: Any, value: Any, what: str) -> Parts:
    """Pickle a message for the parent.

    Raises:
        SerializationError: the value in it cannot be pickled.
    """
    try:
        return dumps(message)
    except Exception as error:
        raise SerializationError(
            f"{what} is a {type(value).__name__} that cannot be sent back from a worker process ({error})"
        ) from error


def _sendable(event: ev.Event) -> bool:
    try:
        dumps(event)
    except Exception:  # noqa: BLE001 - an event about a value that cannot be sent is not sent
        return False
    return True


class MapHere:
    """One map of the parent's, as this worker runs chunks of it."""

    def __init__(self, channel: Channel, board: mmap.mmap, parts: Parts) -> None:
        described: dict[str, Any] = loads(parts)
        plan: ExecutionPlan = described["plan"]
        self._spec: MapSpec = described["spec"]
        inputs: Mapping[str, Any] = described["inputs"]
        path: Path = described["path"]
        kinds: frozenset[type] = described["kinds"]
        engine: PipelineExecutionEngine = described["engine"]
        keys: list[BoundKey] = described["keys"]
        self.bounds = [RemoteBound(channel, number) for number in range(len(keys))]
        remote = dict(zip(keys, self.bounds, strict=True))
        limits = {name: self.bounds[number] for name, number in described["limits"].items()}
        given = frozenset(inputs) | set(self._spec.over)
        self._program = bind(plan, given, described["wanted"], Places())
        self._inputs = inputs
        self._described = described
        self._template: list[Any]
        self._board = board
        self._outbox = Outbox(channel, board, described["wanted"], kinds, traced=described.get("traced", False))
        run = self._run = WorkerRun(described["run_id"], self._outbox if kinds else None, remote)
        # A store that cannot be shared was left out, whichever pipeline has set it.
        self._scope = Scope(run, plan, path, engine, described["backend"], limits)
        self._scope.cache = run.tracer(described["cache"])
        self._limit: int = described["limit"]

    async def open(self) -> None:
        """Make ready what every item begins with."""
        program, tracer = self._program, self._scope.cache
        if tracer is None:
            self._template = program.template.copy()
        else:
            await tracer.session.learn(cached_nodes(program, tracer.session.store))
            recipe = tracer.recipe(program, self._described["given"], self._described["asked"])
            self._template = trace = Trace(recipe, program.template, recipe.template.copy())
            for name, digest in self._described["digests"].items():
                trace.digests[program.slots[name]] = digest
        for name, value in self._inputs.items():
            self._template[program.slots[name]] = value

    async def run(
        self, first: int, rows: list[tuple[Any, ...]], digests: list[tuple[Any, ...]] | None
    ) -> tuple[float, Any]:
        """Run a chunk; return the seconds it took, and the error that ended it."""
        self._outbox.first = first
        runner = item_runner(self._scope)

        async def run_item(scope: Scope, program: Any, values: Any, index: int, window: Any) -> None:
            self._board[index - first] = STARTED
            await runner(scope, program, values, index, window)

        feed = ListFeed(Rows(self._spec.over, rows, len(rows)))
        began = time.perf_counter()
        error = None
        try:
            source = None if digests is None else Origin(iter(digests), _nothing_to_load)
            work = MapWork(self._scope, self._program, {}, self._spec, feed, len(rows), self._outbox, source)
            kind = MapRun if self._scope.cache is None else CachedMapRun
            await kind(work, self._template, run_item, limit=self._limit, first=first).run()
        except BaseException as raised:  # noqa: BLE001 - it is raised in the parent
            origin = self._scope.run.forgive(raised, self._scope.path)
            error = dump_error(raised, None if origin == self._scope.path else origin)
        await self._run.save()
        seconds = time.perf_counter() - began
        self._outbox.flush()
        if error is None:
            # Between two chunks the parent does not listen, and must not hold a token for this worker then.
            for bound in self.bounds:
                await bound.settled()
        return seconds, error

    def noted(self) -> Any:
        """Return what is to be remembered of the entries that were written."""
        return None if self._scope.cache is None else self._scope.cache.session.noted()

    @property
    def spent(self) -> bool:
        """Whether this worker should run no more chunks."""
        return self._run.spent

    async def aclose(self) -> None:
        """Stop what its run has started."""
        self._outbox.close()
        await self._scope.run.aclose()


async def _nothing_to_load() -> tuple[Mapping[str, Any], list[tuple[Any, ...]]]:
    raise AssertionError("what is sent to a worker has been loaded")


class Worker:
    """Serves the parent's messages, one call or chunk at a time."""

    def __init__(self, channel: Channel, board: mmap.mmap) -> None:
        self._channel = channel
        self._board = board
        self._funcs: dict[int, Any] = {}
        self._map: MapHere | None = None
        self.calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        """Sync calls for the main thread, where signals and other people's loops work."""

    async def serve(self) -> None:
        """Handle messages until the parent goes away."""
        send, receive = anyio.create_memory_object_stream[Parts](math.inf)
        loop = asyncio.get_running_loop()

        def read() -> None:
            # Reads on whatever the loop does, so that the parent's end is always noticed.
            while True:
                loop.call_soon_threadsafe(send.send_nowait, self._channel.receive())

        threading.Thread(target=read, name="hypernodes-reader", daemon=True).start()
        self._channel.send("up")
        async with anyio.create_task_group() as group, receive:
            async for parts in receive:
                kind, *message = loads(parts)
                match kind:
                    case "granted":
                        assert self._map is not None
                        self._map.bounds[message[0]].granted()
                    case "call":
                        group.start_soon(self._call, *message)
                    case "map":
                        group.start_soon(self._open_map, *message)
                    case "chunk":
                        group.start_soon(self._chunk, *message)

    async def _call(self, number: int, name: str, func: Parts | None, arguments: Parts) -> None:
        try:
            if func is not None:
                self._funcs[number] = loads(func)
            positional, keywords = loads(arguments)
            call = partial(self._funcs[number], *positional, **keywords)
            made = await self._in_main_thread(partial(self._drained, name, call))
            if inspect.isawaitable(made):
                made = await made
            reply = sendable(("returned", made), made, f"the output of node {name!r}")
        except BaseException as error:  # noqa: BLE001 - it is raised in the parent
            reply = dumps(("raised", dump_error(error, None)))
        flush_prints()
        self._channel.send_parts(reply)

    async def _in_main_thread(self, call: Callable[[], Any]) -> Any:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Any] = loop.create_future()
        context = copy_context()

        def run() -> None:
            try:
                result = context.run(call)
            except BaseException as error:  # noqa: BLE001 - raised where the call is awaited
                loop.call_soon_threadsafe(done.set_result, (None, error))
            else:
                loop.call_soon_threadsafe(done.set_result, (result, None))

        self.calls.put(run)
        result, error = await done
        if error is not None:
            raise error
        return result

    def _drained(self, name: str, call: Callable[[], Any]) -> Any:
        """Call; send the pieces of a generator one by one."""
        made = call()
        if not inspect.isgenerator(made):
            return made
        for piece in made:
            self._channel.send_parts(sendable(("piece", piece), piece, f"a piece that node {name!r} yields"))
        return None

    async def _open_map(self, parts: Parts) -> None:
        try:
            if self._map is not None:
                await self._map.aclose()
            self._map = MapHere(self._channel, self._board, parts)
            await self._map.open()
        except BaseException as error:  # noqa: BLE001 - it is raised in the parent
            self._channel.send("raised", dump_error(error, None))
        else:
            self._channel.send("ready")

    async def _chunk(self, first: int, parts: Parts, digests: list[tuple[Any, ...]] | None) -> None:
        assert self._map is not None
        noted = None
        try:
            rows = loads(parts)
            seconds, error = await self._map.run(first, rows, digests)
            spent, noted = self._map.spent, self._map.noted()
        except BaseException as raised:  # noqa: BLE001 - it is raised in the parent
            seconds, error, spent = 0.0, dump_error(raised, None), False
        flush_prints()
        self._channel.send("done", seconds, error, spent, noted)


def printed() -> list[TextIOWrapper]:
    """Return the streams that functions print to, where there are any."""
    return [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, TextIOWrapper)]


def flush_prints() -> None:
    """Write what was printed without an end of line; the process may be killed any time after."""
    for stream in printed():
        with suppress(OSError, ValueError):  # a closed terminal fails nobody's call
            stream.flush()


def main(socket_fd: int, board_fd: int) -> None:
    """Run a worker on the file descriptors that the parent left open for it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = socket.socket(fileno=socket_fd)
    connection.setblocking(True)
    board = mmap.mmap(board_fd, BOARD_SIZE)
    os.close(board_fd)
    # What a module prints at import or a function while it runs goes to the user's own streams line by line: written
    # piece by piece, as PYTHONUNBUFFERED has it, the lines of several workers would run into each other.
    for stream in printed():
        stream.reconfigure(line_buffering=True, write_through=False)
    worker = Worker(Channel(connection), board)

    def serve() -> None:
        try:
            anyio.run(worker.serve)
        except BaseException:  # noqa: BLE001 - a worker that no longer answers would hang its parent
            traceback.print_exc()
        os._exit(1)

    threading.Thread(target=serve, name="hypernodes-worker", daemon=True).start()
    while True:
        worker.calls.get()()

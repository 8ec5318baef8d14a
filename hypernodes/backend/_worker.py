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
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from io import TextIOWrapper
from typing import Any

import anyio
import anyio.abc

from hypernodes import events as ev
from hypernodes._cached import CachedMapRun
from hypernodes._crew import Crew
from hypernodes._engine import PipelineExecutionEngine, item_runner
from hypernodes._feed import ListFeed
from hypernodes._map_run import MapRun
from hypernodes._mapping import MapSpec, Path, Rows
from hypernodes._plan import ExecutionPlan
from hypernodes._program import Places, bind
from hypernodes._recipe import cached_nodes
from hypernodes._run import Bound, BoundKey, MapWork, Origin, Run, Scope
from hypernodes._trace import Trace
from hypernodes.backend._chunks import STARTED
from hypernodes.backend._outbox import Channel, Outbox, RemoteBound, sendable
from hypernodes.backend._process import BOARD_SIZE, LAST_S
from hypernodes.backend._wire import Parts, dump_error, dumps, loads


class WorkerRun(Run):
    """The state of a run in a worker: its bounds are the parent's."""

    __slots__ = ("_remote", "spent")

    def __init__(
        self, run_id: str, emit: ev.Emit | None, refresh: frozenset[str], remote: Mapping[BoundKey, RemoteBound]
    ) -> None:
        super().__init__(run_id, emit, refresh)
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
        numbers: dict[BoundKey, int] = described["bounds"]
        self.bounds = [RemoteBound(channel, number) for number in range(len(set(numbers.values())))]
        remote = {key: self.bounds[number] for key, number in numbers.items()}
        limits = {name: self.bounds[number] for name, number in described["limits"].items()}
        given = frozenset(inputs) | set(self._spec.over)
        self._program = bind(plan, given, described["wanted"], Places())
        self._inputs = inputs
        self._described = described
        self._template: list[Any]
        self._board = board
        self._outbox = Outbox(channel, board, described["wanted"], kinds, traced=described.get("traced", False))
        run = self._run = WorkerRun(described["run_id"], self._outbox if kinds else None, described["refresh"], remote)
        # A store that cannot be shared was left out, whichever pipeline has set it.
        self._scope = Scope(run, plan, path, engine, described["backend"], limits)
        self._scope.cache = run.tracer(described["cache"])
        self._outbox.session = None if self._scope.cache is None else self._scope.cache.session
        self._limit: int = described["limit"]
        self.saves = self._scope.cache is not None or plan.has_cache
        """Whether it writes to a cache."""

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
            items = kind(work, self._template, run_item, limit=self._limit, first=first)
            await (Crew.run(partial(self._run_saving, items)) if self.saves else items.run())
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

    async def _run_saving(self, items: MapRun, crew: Crew) -> None:
        crew.start(lambda _: self._run.save_late())
        await items.run()
        crew.stop()

    async def save(self) -> None:
        """Write to caches what waits to be written."""
        await self._run.aclose()

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

        def save() -> None:
            if self._map is not None and self._map.saves:
                with suppress(Exception):
                    asyncio.run_coroutine_threadsafe(self._map.save(), loop).result(LAST_S)

        self._channel.at_end = save
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

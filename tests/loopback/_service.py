"""The gRPC service: it routes calls to the rooms, counts them by name, checks tokens, and can be made to fail.

All methods come from the client's own interface definition; one that no room answers is UNIMPLEMENTED, by name.
"""

import asyncio
import inspect
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from grpclib import GRPCError, Status
from grpclib.config import Configuration
from grpclib.const import Handler
from grpclib.protocol import H2Protocol
from grpclib.server import Server, Stream
from modal_proto.api_grpc import ModalClientBase

from tests.loopback._state import Caller

TASK_HEADER = "x-loopback-task"
"""Names the container that sends a request, since not every message of a container does."""

WINDOW_BYTES = 64 * 1024 * 1024


class _Names:
    def __getattr__(self, name: str) -> str:
        return name


METHODS: dict[str, Handler] = ModalClientBase.__mapping__(_Names())  # type: ignore[arg-type]
NAMES = {path.rpartition("/")[2] for path in METHODS}


class Service:
    """Answers each method with the coroutine or async generator of that name in one of the rooms."""

    def __init__(self, rooms: Iterable[object], credentials: tuple[str, str]) -> None:
        self.calls: Counter[str] = Counter()
        self.container_calls: Counter[str] = Counter()
        self.in_flight: Counter[str] = Counter()
        self.faults: list[str] = []
        self.failures: dict[str, list[GRPCError]] = defaultdict(list)
        self.container_ports: set[int] = set()
        self._credentials = credentials
        self._answers: dict[str, Callable[[Any, Caller], Any]] = {}
        for room in rooms:
            for name in NAMES & set(dir(room)):
                assert name not in self._answers, f"two rooms answer {name}"
                self._answers[name] = getattr(room, name)

    def __mapping__(self) -> dict[str, Handler]:
        return {
            path: Handler(partial(self._serve, path.rpartition("/")[2]), *handler[1:])
            for path, handler in METHODS.items()
        }

    async def _serve(self, name: str, stream: Stream[Any, Any]) -> None:
        caller = self._admit(name, stream)
        request = await stream.recv_message()
        self.in_flight[name] += 1
        try:
            if self.failures[name]:
                raise self.failures[name].pop(0)
            await self._answer(name, request, caller, stream)
        except GRPCError:
            raise
        except Exception as error:
            self.faults.append(f"{name}: {''.join(traceback.format_exception(error))}")
            # A status that the client does not try again on.
            raise GRPCError(Status.FAILED_PRECONDITION, f"the loopback failed in {name}: {error!r}") from error
        finally:
            self.in_flight[name] -= 1

    def _admit(self, name: str, stream: Stream[Any, Any]) -> Caller:
        headers = stream.metadata or {}
        if task_id := headers.get(TASK_HEADER):
            self.container_calls[name] += 1
            self.container_ports.add(stream.peer.addr()[1])
            return Caller(str(task_id))
        self.calls[name] += 1
        if (headers.get("x-modal-token-id"), headers.get("x-modal-token-secret")) != self._credentials:
            raise GRPCError(Status.UNAUTHENTICATED, "Token validation failed")
        return Caller()

    async def _answer(self, name: str, request: Any, caller: Caller, stream: Stream[Any, Any]) -> None:
        answer = self._answers.get(name)
        if answer is None:
            raise GRPCError(Status.UNIMPLEMENTED, f"{name} is not implemented by the loopback (tests/loopback)")
        if inspect.isasyncgenfunction(answer):
            async for message in answer(request, caller):
                await stream.send_message(message)
        else:
            await stream.send_message(await answer(request, caller))


class CountingServer(Server):
    """A gRPC server that knows its open connections, by the port of the other side."""

    def __init__(self, service: Service) -> None:
        windows = Configuration(http2_connection_window_size=WINDOW_BYTES, http2_stream_window_size=WINDOW_BYTES)
        super().__init__([service], config=windows)
        self.transports: dict[int, Any] = {}

    async def wait_closed(self) -> None:
        """Break the connections that clients have left open, or whose end is not yet read; wait for handlers to end."""
        for transport in list(self.transports.values()):
            transport.abort()
        while self.transports:
            await asyncio.sleep(0)
        await super().wait_closed()

    def _protocol_factory(self) -> H2Protocol:
        protocol = super()._protocol_factory()
        made, lost = protocol.connection_made, protocol.connection_lost
        ports = []

        def connection_made(transport: Any) -> None:
            ports.append(transport.get_extra_info("peername")[1])
            self.transports[ports[0]] = transport
            made(transport)

        def connection_lost(error: BaseException | None) -> None:
            self.transports.pop(ports[0], None)
            lost(error)

        protocol.connection_made = connection_made  # type: ignore[method-assign]
        protocol.connection_lost = connection_lost  # type: ignore[method-assign]
        return protocol

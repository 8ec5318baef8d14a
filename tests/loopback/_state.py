"""What the plane knows: apps, functions, calls, inputs, logs; and how long polls wait for a change of it."""

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from grpclib import GRPCError, Status
from modal_proto import api_pb2

T = TypeVar("T")


@dataclass(frozen=True)
class Caller:
    """Who sent a request: a container, or a client of a user (`task_id` is empty)."""

    task_id: str = ""


@dataclass(frozen=True)
class LogLine:
    """A piece of a container's standard output (1) or error (2), as it was written."""

    app_id: str
    function_id: str
    task_id: str
    descriptor: int
    text: str


@dataclass(eq=False)
class App:
    id: str
    description: str
    environment: str
    state: int
    name: str = ""
    functions: dict[str, "Function"] = field(default_factory=dict)
    logs: list[LogLine] = field(default_factory=list)
    ended: bool = False
    heartbeats: int = 0
    disconnect_reason: str = ""

    @property
    def layout(self) -> api_pb2.AppLayout:
        """What the client and its containers look objects up in."""
        return api_pb2.AppLayout(
            function_ids={name: function.id for name, function in self.functions.items()},
            objects=[
                api_pb2.Object(object_id=function.id, function_handle_metadata=function.metadata)
                for function in self.functions.values()
            ],
        )


@dataclass(eq=False)
class Function:
    """A function as the client defined it, and its inputs that no container has taken yet."""

    id: str
    name: str
    app: App
    ranked: list[api_pb2.Function]
    """Its definition: several, in the order of preference, where several kinds of GPU will do."""
    pending: "deque[Input]" = field(default_factory=deque)

    @property
    def definition(self) -> api_pb2.Function:
        return self.ranked[0]

    @property
    def data(self) -> api_pb2.FunctionData:
        ranked = [api_pb2.FunctionData.RankedFunction(rank=rank, function=one) for rank, one in enumerate(self.ranked)]
        return api_pb2.FunctionData(function_name=self.name, ranked_functions=ranked)

    @property
    def metadata(self) -> api_pb2.FunctionHandleMetadata:
        definition = self.definition
        return api_pb2.FunctionHandleMetadata(
            app_id=self.app.id,
            function_name=self.name,
            function_type=definition.function_type,
            definition_id=f"de-{self.id}",
            function_schema=definition.function_schema if definition.HasField("function_schema") else None,
            supported_input_formats=definition.supported_input_formats,
            supported_output_formats=definition.supported_output_formats,
        )

    @property
    def slots(self) -> int:
        """Inputs that one of its containers works on at once."""
        return max(1, self.definition.target_concurrent_inputs or self.definition.max_concurrent_inputs)

    @property
    def options(self) -> dict[str, Any]:
        """What the user asked for, in the user's terms; what was not asked for is left out. Memory in MiB."""
        wanted, resources, scaler = self.definition, self.definition.resources, self.definition.autoscaler_settings
        gpus = [_gpu(one.resources.gpu_config) for one in self.ranked]
        options = {
            "gpu": gpus if len(gpus) > 1 else gpus[0],
            "cpu": _pair(resources.milli_cpu / 1000, resources.milli_cpu_max / 1000),
            "memory": _pair(resources.memory_mb, resources.memory_mb_max),
            "ephemeral_disk": resources.ephemeral_disk_mb,
            "timeout": wanted.timeout_secs,
            "startup_timeout": wanted.startup_timeout_secs,
            "retries": wanted.retry_policy.retries,
            "min_containers": scaler.min_containers,
            "max_containers": scaler.max_containers,
            "buffer_containers": scaler.buffer_containers,
            "scaledown_window": scaler.scaledown_window,
            "max_concurrent_inputs": wanted.max_concurrent_inputs,
            "single_use_containers": wanted.single_use_containers,
            "cloud": wanted.cloud_provider_str,
            "region": list(wanted.scheduler_placement.regions),
            "nonpreemptible": wanted.scheduler_placement.nonpreemptible,
            "block_network": wanted.block_network,
            "serialized": wanted.definition_type == api_pb2.Function.DEFINITION_TYPE_SERIALIZED,
        }
        return {name: value for name, value in options.items() if value}


def _gpu(config: api_pb2.GPUConfig) -> str:
    return f"{config.gpu_type}:{config.count}" if config.count > 1 else config.gpu_type


def _pair(request: float, limit: float) -> Any:
    return (request, limit) if limit else request


@dataclass(eq=False)
class Call:
    """One `.remote`, `.spawn` or `.map` of a function; its outputs are numbered in the order they came."""

    id: str
    function: Function
    invocation: int
    inputs: "dict[int, Input]" = field(default_factory=dict)
    outputs: list[tuple[int, api_pb2.FunctionGetOutputsItem]] = field(default_factory=list)
    chunks: list[api_pb2.DataChunk] = field(default_factory=list)
    numbered: int = 0

    @property
    def unfinished(self) -> list["Input"]:
        return [one for one in self.inputs.values() if one.result is None]

    @property
    def waits_for_client(self) -> bool:
        """Whether the client sends failed inputs again by itself (it does for `.remote` and `.map`)."""
        return self.invocation in (
            api_pb2.FUNCTION_CALL_INVOCATION_TYPE_SYNC,
            api_pb2.FUNCTION_CALL_INVOCATION_TYPE_UNSPECIFIED,
        )


@dataclass(eq=False)
class Input:
    id: str
    call: Call
    index: int
    payload: api_pb2.FunctionInput
    retry_count: int = 0
    task_id: str = ""
    result: api_pb2.GenericResult | None = None

    def finish(self, result: api_pb2.GenericResult, data_format: int = 0) -> None:
        """Record its output, once; later ones are dropped, as for an input that was cancelled meanwhile."""
        if self.result is not None:
            return
        self.result = result
        call = self.call
        call.numbered += 1
        item = api_pb2.FunctionGetOutputsItem(
            result=result,
            idx=self.index,
            input_id=self.id,
            data_format=data_format,
            task_id=self.task_id,
            retry_count=self.retry_count,
        )
        call.outputs.append((call.numbered, item))

    def again(self) -> None:
        """Forget its output, to be worked on once more."""
        self.result = None
        self.retry_count += 1
        self.task_id = ""
        self.call.outputs = [(n, item) for n, item in self.call.outputs if item.input_id != self.id]
        self.call.function.pending.append(self)


class Changes:
    """Any change of the state wakes every long poll, to look again."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[None]] = set()

    def tell(self) -> None:
        for future in self._waiting:
            if not future.done():
                future.set_result(None)

    async def until(self, found: Callable[[], T], timeout_s: float | None) -> T:
        """What `found` returns once that is true; or in the end, true or not."""
        loop = asyncio.get_running_loop()
        deadline = None if timeout_s is None else loop.time() + timeout_s
        while not (result := found()):
            future = loop.create_future()
            self._waiting.add(future)
            try:
                async with asyncio.timeout_at(deadline):
                    await future
            except TimeoutError:
                return found()
            finally:
                self._waiting.discard(future)
        return result


@dataclass
class State:
    """Everything that the rooms of the plane share. It is changed on the plane's own thread only."""

    apps: dict[str, App] = field(default_factory=dict)
    functions: dict[str, Function] = field(default_factory=dict)
    calls: dict[str, Call] = field(default_factory=dict)
    inputs: dict[str, Input] = field(default_factory=dict)
    deployed: dict[str, App] = field(default_factory=dict)
    changes: Changes = field(default_factory=Changes)
    _numbers: Counter[str] = field(default_factory=Counter)

    def new_id(self, prefix: str) -> str:
        """Ids look like Modal's, and count: `ap-0000000000000000000001`."""
        self._numbers[prefix] += 1
        return f"{prefix}-{self._numbers[prefix]:022d}"

    def app(self, app_id: str) -> App:
        return found("App", app_id, self.apps.get(app_id))

    def function(self, function_id: str) -> Function:
        return found("Function", function_id, self.functions.get(function_id))

    def call(self, call_id: str) -> Call:
        return found("Function call", call_id, self.calls.get(call_id))


def found(kind: str, name: str, thing: T | None) -> T:
    """What was looked up, or the error that Modal's client turns into its `NotFoundError`."""
    if thing is None:
        raise GRPCError(Status.NOT_FOUND, f"{kind} {name!r} not found in environment 'main'.")
    return thing

"""Containers: how many there are, what they work on, and what becomes of an input whose container ends.

All of it is a model of Modal's scheduler, which is not public:
- A function gets a container for each waiting input that no slot is free for, up to its own `max_containers` and the
  plane's. A container that has had nothing to do for `scaledown_window` seconds ends.
- An input that runs longer than the function's `timeout` has its container ended and is a `FunctionTimeoutError`.
- An input whose container dies is an `InternalFailure`; inputs that wait get a new container. A container that dies
  before it took an input fails all that wait for it, and so does one that cannot import its function.
"""

import asyncio
import shutil
from pathlib import Path

from google.protobuf.empty_pb2 import Empty
from modal_proto import api_pb2

from tests.loopback._mounts import Mounts
from tests.loopback._process import HEARTBEAT_S, Container, Interpreter
from tests.loopback._state import App, Caller, Function, Input, LogLine, State, found
from tests.loopback._volumes import Volumes

Result = api_pb2.GenericResult
TERMINATED = Result(status=Result.GENERIC_STATUS_TERMINATED, exception="Input was cancelled by user.")
APP_ENDED = Result(status=Result.GENERIC_STATUS_TERMINATED, exception="The app was stopped.")
RETRIED = (Result.GENERIC_STATUS_FAILURE, Result.GENERIC_STATUS_TIMEOUT, Result.GENERIC_STATUS_INTERNAL_FAILURE)

SCALEDOWN_S = 60


class Containers:
    def __init__(self, state: State, mounts: Mounts, volumes: Volumes, directory: Path) -> None:
        self.alive: list[Container] = []
        self.started = 0
        self.most_alive = 0
        self.max_containers = 4
        self.grace_s = 2.0
        self.lacking = {"hypernodes"}
        self.interpreter = Interpreter()
        self.faults: list[str] = []
        self.tasks: asyncio.TaskGroup | None = None
        self.environment: dict[str, str] = {}
        self._state = state
        self._mounts = mounts
        self._volumes = volumes
        self._directory = directory

    def of_app(self, app: App) -> list[Container]:
        return [one for one in self.alive if one.function.app is app]

    def of(self, function: Function) -> list[Container]:
        return [one for one in self.alive if one.function is function]

    def scale(self, function: Function) -> None:
        """Start the containers that a function's waiting inputs need."""
        if function.app.ended or self.tasks is None or not function.definition.function_name:
            return
        scaler, own = function.definition.autoscaler_settings, self.of(function)
        missing = len(function.pending) - sum(one.free for one in own)
        missing = max(missing, scaler.min_containers - len(own))
        room = min(scaler.max_containers or self.max_containers, self.max_containers) - len(own)
        for _ in range(min(missing, room)):
            task_id = self._state.new_id("ta")
            container = Container(task_id, function, self._directory / task_id)
            container.directory.mkdir(parents=True)
            self.alive.append(container)
            self.started += 1
            self.most_alive = max(self.most_alive, len(self.alive))
            self.tasks.create_task(self._run(container))

    async def _run(self, container: Container) -> None:
        definition, app = container.function.definition, container.function.app

        def written(descriptor: int, text: str) -> None:
            app.logs.append(LogLine(app.id, container.function.id, container.id, descriptor, text))
            self._state.changes.tell()

        code = 1
        try:
            self._volumes.mount(definition, container.id)
            environment = self._environment(definition)
            path = [self._mounts.tree(definition), self._packages()]
            code = await container.run(self.interpreter, path, environment, written)
        except Exception as error:  # noqa: BLE001 - whatever it is, the test must see it, and no call may wait for it
            self.faults.append(f"container {container.id}: {error!r}")
            container.reason = str(error)
        finally:
            self._ended(container, code)

    def _environment(self, definition: api_pb2.Function) -> dict[str, str]:
        image = self._mounts.images.get(definition.image_id)
        secrets = self._volumes.environment(list(definition.secret_ids))
        return {**(image.environment if image else {}), **secrets, **self.environment}

    def _packages(self) -> Path:
        name = "-".join(["packages", self.interpreter.version, *sorted(self.lacking)])
        return self.interpreter.without(self.lacking, self._directory / name)

    def _ended(self, container: Container, code: int) -> None:
        container.forget_timers()
        self.alive.remove(container)
        self._volumes.unmount(container.id)
        shutil.rmtree(container.directory, ignore_errors=True)
        reason = container.reason or f"Container terminated unexpectedly with exit code {code}."
        lost = container.failure or Result(
            status=Result.GENERIC_STATUS_INTERNAL_FAILURE, exception=reason, exitcode=max(code, 0)
        )
        for one in [one for one in container.running.values() if one.result is None]:
            if container.stopping and not container.function.app.ended:
                one.task_id = ""  # it was ended for another input's sake
                container.function.pending.appendleft(one)
            else:
                self._finish(one, lost)
        if not container.taken and not container.stopping and not container.draining:
            while container.function.pending:
                self._finish(container.function.pending.popleft(), lost)
        self.scale(container.function)
        self._state.changes.tell()

    def _finish(self, one: Input, result: api_pb2.GenericResult, data_format: int = 0) -> None:
        one.finish(result, data_format)
        retries = one.call.function.definition.retry_policy.retries
        if not one.call.waits_for_client and result.status in RETRIED and one.retry_count < retries:
            one.again()
            self.scale(one.call.function)

    def end_app(self, app: App) -> None:
        for function in app.functions.values():
            function.pending.clear()
        for call in self._state.calls.values():
            if call.function.app is app:
                for one in call.unfinished:
                    one.finish(APP_ENDED)
        for container in self.of_app(app):
            container.interrupt(self.grace_s)

    def retire(self, function: Function) -> None:
        """Let the containers of an older definition finish what they have, and take no more."""
        for container in self.of(function):
            container.draining = True
        self._state.changes.tell()

    def cancel(self, inputs: list[Input], *, terminate: bool) -> None:
        by_id = {one.id: one for one in self.alive}
        for one in inputs:
            container = by_id.get(one.task_id)
            if container is None:
                one.call.function.pending.remove(one)
                one.finish(TERMINATED)
            elif terminate:
                one.finish(TERMINATED)
                container.interrupt(self.grace_s)
            else:
                container.cancelled.append(one.id)
        self._state.changes.tell()

    def _of_task(self, caller: Caller) -> Container:
        return found("Task", caller.task_id, next((one for one in self.alive if one.id == caller.task_id), None))

    async def ContainerHello(self, request: Empty, caller: Caller) -> Empty:
        self._of_task(caller)
        return Empty()

    async def ContainerHeartbeat(
        self, request: api_pb2.ContainerHeartbeatRequest, caller: Caller
    ) -> api_pb2.ContainerHeartbeatResponse:
        """Answers when there is something to cancel, or when the next heartbeat is due."""
        container = self._of_task(caller)
        if not await self._state.changes.until(lambda: container.cancelled, HEARTBEAT_S - 0.1):
            return api_pb2.ContainerHeartbeatResponse()
        event = api_pb2.CancelInputEvent(input_ids=container.cancelled)
        container.cancelled = []
        return api_pb2.ContainerHeartbeatResponse(cancel_input_event=event)

    async def FunctionGetInputs(
        self, request: api_pb2.FunctionGetInputsRequest, caller: Caller
    ) -> api_pb2.FunctionGetInputsResponse:
        container, function = self._of_task(caller), self._state.function(request.function_id)
        loop = asyncio.get_running_loop()
        if not container.running and container.idle is None:
            window = function.definition.autoscaler_settings.scaledown_window or SCALEDOWN_S
            container.idle = loop.call_later(window, self._scale_down, container)

        def ready() -> bool:
            return container.draining or container.stopping or bool(function.pending)

        await self._state.changes.until(ready, timeout_s=None)
        if container.draining or container.stopping:
            return api_pb2.FunctionGetInputsResponse(inputs=[api_pb2.FunctionGetInputsItem(kill_switch=True)])
        if container.idle:
            container.idle.cancel()
            container.idle = None
        taken = [function.pending.popleft() for _ in range(min(len(function.pending), max(1, request.batch_max_size)))]
        for one in taken:
            one.task_id = container.id
            container.taken += 1
            container.running[one.id] = one
            if function.definition.timeout_secs:
                container.timers[one.id] = loop.call_later(
                    function.definition.timeout_secs, self._timed_out, container, one
                )
        return api_pb2.FunctionGetInputsResponse(inputs=[self._item(one) for one in taken])

    @staticmethod
    def _item(one: Input) -> api_pb2.FunctionGetInputsItem:
        return api_pb2.FunctionGetInputsItem(
            input_id=one.id,
            input=one.payload,
            function_call_id=one.call.id,
            function_call_invocation_type=one.call.invocation,
            retry_count=one.retry_count,
            function_map_idx=one.index,
        )

    def _scale_down(self, container: Container) -> None:
        scaler = container.function.definition.autoscaler_settings
        if len(self.of(container.function)) > scaler.min_containers:
            container.draining = True
            self._state.changes.tell()

    def _timed_out(self, container: Container, one: Input) -> None:
        limit = container.function.definition.timeout_secs
        message = f"Task's current input {one.id} hit its timeout of {limit}s"
        container.running.pop(one.id, None)
        container.interrupt(self.grace_s)
        self._finish(one, Result(status=Result.GENERIC_STATUS_TIMEOUT, exception=message))
        self._state.changes.tell()

    async def FunctionPutOutputs(self, request: api_pb2.FunctionPutOutputsRequest, caller: Caller) -> Empty:
        container = self._of_task(caller)
        for item in request.outputs:
            if timer := container.timers.pop(item.input_id, None):
                timer.cancel()
            if one := container.running.pop(item.input_id, None):
                self._finish(one, item.result, item.data_format)
        self.scale(container.function)
        self._state.changes.tell()
        return Empty()

    async def TaskResult(self, request: api_pb2.TaskResultRequest, caller: Caller) -> Empty:
        """A container that could not import its function, or whose exit handler failed."""
        self._of_task(caller).failure = request.result
        return Empty()

    async def ContainerStop(
        self, request: api_pb2.ContainerStopRequest, caller: Caller
    ) -> api_pb2.ContainerStopResponse:
        for container in [one for one in self.alive if one.id == request.task_id]:
            if request.graceful:
                container.draining = True
            else:
                container.interrupt(self.grace_s)
        self._state.changes.tell()
        return api_pb2.ContainerStopResponse()

"""Apps: ephemeral, detached and deployed ones, their heartbeats, their end, and the logs of their containers.

What is modelled: an ephemeral app ends when its client disconnects, or when no heartbeat came for
`heartbeat_timeout_s`; a detached or deployed one goes on until it is stopped.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from google.protobuf.empty_pb2 import Empty
from modal_proto import api_pb2

from tests.loopback._containers import Containers
from tests.loopback._state import App, Caller, State, found

BUILDER_VERSION = "2025.06"


class Apps:
    def __init__(self, state: State, containers: Containers) -> None:
        self.heartbeat_timeout_s = 60.0
        self._state = state
        self._containers = containers
        self._deadlines: dict[App, asyncio.TimerHandle] = {}

    async def ClientHello(self, request: Empty, caller: Caller) -> api_pb2.ClientHelloResponse:
        return api_pb2.ClientHelloResponse()

    async def EnvironmentGetOrCreate(
        self, request: api_pb2.EnvironmentGetOrCreateRequest, caller: Caller
    ) -> api_pb2.EnvironmentGetOrCreateResponse:
        settings = api_pb2.EnvironmentSettings(image_builder_version=BUILDER_VERSION)
        name = request.deployment_name or "main"
        return api_pb2.EnvironmentGetOrCreateResponse(
            environment_id=f"en-{name}", metadata=api_pb2.EnvironmentMetadata(name=name, settings=settings)
        )

    async def AppCreate(self, request: api_pb2.AppCreateRequest, caller: Caller) -> api_pb2.AppCreateResponse:
        app = self._new(request.description, request.environment_name, request.app_state)
        return api_pb2.AppCreateResponse(app_id=app.id, app_page_url=f"http://loopback/{app.id}")

    def _new(self, description: str, environment: str, state: int) -> App:
        app = App(self._state.new_id("ap"), description, environment, state)
        self._state.apps[app.id] = app
        self._expect_heartbeat(app)
        return app

    async def AppGetOrCreate(
        self, request: api_pb2.AppGetOrCreateRequest, caller: Caller
    ) -> api_pb2.AppGetOrCreateResponse:
        """What `App.lookup` calls."""
        app = self._state.deployed.get(request.app_name)
        if app is None and request.object_creation_type == api_pb2.OBJECT_CREATION_TYPE_CREATE_IF_MISSING:
            app = self._new(request.app_name, request.environment_name, api_pb2.APP_STATE_DEPLOYED)
            self._state.deployed[request.app_name] = app
        return api_pb2.AppGetOrCreateResponse(app_id=found("App", request.app_name, app).id)

    async def AppGetByDeploymentName(
        self, request: api_pb2.AppGetByDeploymentNameRequest, caller: Caller
    ) -> api_pb2.AppGetByDeploymentNameResponse:
        app = self._state.deployed.get(request.name)
        return api_pb2.AppGetByDeploymentNameResponse(app_id=app.id if app else "")

    async def AppGetLayout(self, request: api_pb2.AppGetLayoutRequest, caller: Caller) -> api_pb2.AppGetLayoutResponse:
        return api_pb2.AppGetLayoutResponse(app_layout=self._state.app(request.app_id).layout)

    async def AppPublish(self, request: api_pb2.AppPublishRequest, caller: Caller) -> api_pb2.AppPublishResponse:
        app = self._state.app(request.app_id)
        app.state = request.app_state or app.state
        if app.state == api_pb2.APP_STATE_DEPLOYED:
            app.name = request.name
            self._state.deployed[request.name] = app
        for function in app.functions.values():
            self._containers.scale(function)
        return api_pb2.AppPublishResponse(url=f"http://loopback/{app.id}", deployed_at=time.time())

    async def AppHeartbeat(self, request: api_pb2.AppHeartbeatRequest, caller: Caller) -> Empty:
        app = self._state.app(request.app_id)
        app.heartbeats += 1
        self._expect_heartbeat(app)
        return Empty()

    def _expect_heartbeat(self, app: App) -> None:
        if timer := self._deadlines.pop(app, None):
            timer.cancel()
        loop = asyncio.get_running_loop()
        self._deadlines[app] = loop.call_later(self.heartbeat_timeout_s, self._lost, app)

    def _lost(self, app: App) -> None:
        if app.state in (api_pb2.APP_STATE_EPHEMERAL, api_pb2.APP_STATE_INITIALIZING):
            app.disconnect_reason = app.disconnect_reason or "HEARTBEAT_LOST"
            self._end(app)

    async def AppClientDisconnect(self, request: api_pb2.AppClientDisconnectRequest, caller: Caller) -> Empty:
        app = self._state.app(request.app_id)
        app.disconnect_reason = api_pb2.AppDisconnectReason.Name(request.reason).removeprefix("APP_DISCONNECT_REASON_")
        if app.state in (api_pb2.APP_STATE_EPHEMERAL, api_pb2.APP_STATE_INITIALIZING):
            self._end(app)
        return Empty()

    async def AppStop(self, request: api_pb2.AppStopRequest, caller: Caller) -> Empty:
        self._end(self._state.app(request.app_id))
        return Empty()

    def _end(self, app: App) -> None:
        if app.ended:
            return
        app.ended = True
        app.state = api_pb2.APP_STATE_STOPPED
        self._state.deployed.pop(app.name, None)
        self._deadlines.pop(app).cancel()
        self._containers.end_app(app)
        self._state.changes.tell()

    def close(self) -> None:
        for timer in self._deadlines.values():
            timer.cancel()
        self._deadlines.clear()

    async def AppGetLogs(
        self, request: api_pb2.AppGetLogsRequest, caller: Caller
    ) -> AsyncIterator[api_pb2.TaskLogsBatch]:
        """What the client prints while an app runs, and until the last container of it is gone."""
        app = self._state.app(request.app_id)
        sent = int(request.last_entry_id or 0)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + request.timeout

        def something() -> Any:
            return len(app.logs) > sent or (app.ended and not self._containers.of_app(app))

        while loop.time() < deadline and await self._state.changes.until(something, deadline - loop.time()):
            if len(app.logs) == sent:
                yield api_pb2.TaskLogsBatch(app_done=True)
                return
            line = app.logs[sent]
            sent += 1
            log = api_pb2.TaskLogs(data=line.text, file_descriptor=line.descriptor, timestamp=time.time())
            yield api_pb2.TaskLogsBatch(
                task_id=line.task_id, function_id=line.function_id, entry_id=str(sent), items=[log]
            )

"""Functions and calls, as a client sees them: define, call, wait for outputs, cancel, look up.

What is modelled: a failed input of `.spawn` is tried again at once, as often as the function's `retries` say; for
`.remote` and `.map` the client does that by itself.
"""

from collections.abc import AsyncIterator

from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError, Status
from modal_proto import api_pb2

from tests.loopback._containers import Containers
from tests.loopback._state import Call, Caller, Function, Input, State, found

MOST_OUTSTANDING = 1000
"""Inputs that one `.map` has on their way at once."""


class Functions:
    def __init__(self, state: State, containers: Containers) -> None:
        self._state = state
        self._containers = containers

    async def FunctionPrecreate(
        self, request: api_pb2.FunctionPrecreateRequest, caller: Caller
    ) -> api_pb2.FunctionPrecreateResponse:
        definition = api_pb2.Function(
            function_type=request.function_type,
            supported_input_formats=request.supported_input_formats,
            supported_output_formats=request.supported_output_formats,
        )
        function = self._state.functions.get(request.existing_function_id)
        if function is None:
            app = self._state.app(request.app_id)
            function = Function(self._state.new_id("fu"), request.function_name, app, [definition])
            self._state.functions[function.id] = function
        return api_pb2.FunctionPrecreateResponse(function_id=function.id, handle_metadata=function.metadata)

    async def FunctionCreate(
        self, request: api_pb2.FunctionCreateRequest, caller: Caller
    ) -> api_pb2.FunctionCreateResponse:
        function = self._state.function(request.existing_function_id)
        ranked = [one.function for one in request.function_data.ranked_functions] or [request.function]
        if request.function.is_class or request.function_data.is_class:
            raise GRPCError(Status.UNIMPLEMENTED, "modal.Cls is not implemented by the loopback (tests/loopback)")
        self._containers.retire(function)
        function.ranked = ranked
        function.app.functions[function.name] = function
        return api_pb2.FunctionCreateResponse(
            function_id=function.id,
            function=ranked[0],
            function_data=function.data,
            handle_metadata=function.metadata,
        )

    async def FunctionGet(self, request: api_pb2.FunctionGetRequest, caller: Caller) -> api_pb2.FunctionGetResponse:
        app = found("App", request.app_name, self._state.deployed.get(request.app_name))
        function = found("Function", request.object_tag, app.functions.get(request.object_tag))
        return api_pb2.FunctionGetResponse(
            function_id=function.id, handle_metadata=function.metadata, function=function.data
        )

    async def FunctionMap(self, request: api_pb2.FunctionMapRequest, caller: Caller) -> api_pb2.FunctionMapResponse:
        function = self._state.function(request.function_id)
        if function.app.ended:
            raise GRPCError(Status.NOT_FOUND, f"App {function.app.id} is stopped.")
        call = Call(self._state.new_id("fc"), function, request.function_call_invocation_type)
        self._state.calls[call.id] = call
        policy = function.definition.retry_policy
        return api_pb2.FunctionMapResponse(
            function_call_id=call.id,
            function_call_jwt=call.id,
            pipelined_inputs=self._put(call, request.pipelined_inputs),
            retry_policy=policy if function.definition.HasField("retry_policy") else None,
            sync_client_retries_enabled=True,
            max_inputs_outstanding=MOST_OUTSTANDING,
        )

    async def FunctionPutInputs(
        self, request: api_pb2.FunctionPutInputsRequest, caller: Caller
    ) -> api_pb2.FunctionPutInputsResponse:
        call = self._state.call(request.function_call_id)
        return api_pb2.FunctionPutInputsResponse(inputs=self._put(call, request.inputs))

    def _put(
        self, call: Call, items: "list[api_pb2.FunctionPutInputsItem]"
    ) -> list[api_pb2.FunctionPutInputsResponseItem]:
        made = []
        for item in items:
            one = Input(self._state.new_id("in"), call, item.idx, item.input)
            self._state.inputs[one.id] = call.inputs[item.idx] = one
            call.function.pending.append(one)
            made.append(api_pb2.FunctionPutInputsResponseItem(idx=item.idx, input_id=one.id, input_jwt=one.id))
        self._containers.scale(call.function)
        self._state.changes.tell()
        return made

    async def FunctionRetryInputs(
        self, request: api_pb2.FunctionRetryInputsRequest, caller: Caller
    ) -> api_pb2.FunctionRetryInputsResponse:
        for item in request.inputs:
            one = self._state.inputs[item.input_jwt]
            one.again()
            self._containers.scale(one.call.function)
        self._state.changes.tell()
        return api_pb2.FunctionRetryInputsResponse(input_jwts=[item.input_jwt for item in request.inputs])

    async def FunctionFinishInputs(self, request: api_pb2.FunctionFinishInputsRequest, caller: Caller) -> Empty:
        return Empty()

    async def FunctionGetOutputs(
        self, request: api_pb2.FunctionGetOutputsRequest, caller: Caller
    ) -> api_pb2.FunctionGetOutputsResponse:
        call = self._state.call(request.function_call_id)
        seen = int(request.last_entry_id.partition("-")[0] or 0)

        def new() -> list[tuple[int, api_pb2.FunctionGetOutputsItem]]:
            return [(n, item) for n, item in call.outputs if n > seen and self._asked_for(request, item)]

        outputs = await self._state.changes.until(new, request.timeout)
        return api_pb2.FunctionGetOutputsResponse(
            idxs=[item.idx for _, item in outputs],
            outputs=[item for _, item in outputs],
            last_entry_id=f"{max([seen, *(n for n, _ in outputs)])}-0",
            num_unfinished_inputs=len(call.unfinished),
        )

    @staticmethod
    def _asked_for(request: api_pb2.FunctionGetOutputsRequest, item: api_pb2.FunctionGetOutputsItem) -> bool:
        return not request.HasField("start_idx") or request.start_idx <= item.idx <= request.end_idx

    async def FunctionCallFromId(
        self, request: api_pb2.FunctionCallFromIdRequest, caller: Caller
    ) -> api_pb2.FunctionCallFromIdResponse:
        call = self._state.call(request.function_call_id)
        metadata = api_pb2.FunctionCallHandleMetadata(app_id=call.function.app.id, function_id=call.function.id)
        return api_pb2.FunctionCallFromIdResponse(
            function_call_id=call.id, num_inputs=len(call.inputs), metadata=metadata
        )

    async def FunctionCallCancel(self, request: api_pb2.FunctionCallCancelRequest, caller: Caller) -> Empty:
        call = self._state.call(request.function_call_id)
        self._containers.cancel(call.unfinished, terminate=request.terminate_containers)
        return Empty()

    async def FunctionCallGetDataOut(
        self, request: api_pb2.FunctionCallGetDataRequest, caller: Caller
    ) -> AsyncIterator[api_pb2.DataChunk]:
        """What a generator yielded, as it comes, until the client has enough."""
        call = self._state.call(request.function_call_id)
        sent = request.last_index
        while True:
            new = await self._state.changes.until(
                lambda after=sent: [chunk for chunk in call.chunks if chunk.index > after], timeout_s=None
            )
            for chunk in new:
                yield chunk
            sent = new[-1].index

    async def FunctionCallPutDataOut(self, request: api_pb2.FunctionCallPutDataRequest, caller: Caller) -> Empty:
        self._state.call(request.function_call_id).chunks.extend(request.data_chunks)
        self._state.changes.tell()
        return Empty()

    async def FunctionGetCurrentStats(
        self, request: api_pb2.FunctionGetCurrentStatsRequest, caller: Caller
    ) -> api_pb2.FunctionStats:
        function = self._state.function(request.function_id)
        containers = self._containers.of(function)
        return api_pb2.FunctionStats(backlog=len(function.pending), num_total_tasks=len(containers))

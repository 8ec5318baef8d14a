"""`modal.Queue` and `modal.Dict`, with Modal's limits on how much a queue holds."""

from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError, Status
from modal_proto import api_pb2

from tests.loopback._state import Caller, State, found
from tests.loopback._volumes import CREATE

MOST_ITEMS = 5000
"""In one partition of a queue."""

LARGEST_ITEM_BYTES = 1024 * 1024


@dataclass(eq=False)
class Queue:
    """Items by partition, each with its number in the queue's life."""

    id: str
    name: str
    items: dict[bytes, list[tuple[int, bytes]]] = field(default_factory=lambda: defaultdict(list))
    puts: int = 0


@dataclass(eq=False)
class Mapping:
    id: str
    name: str
    entries: dict[bytes, bytes] = field(default_factory=dict)


class Queues:
    def __init__(self, state: State) -> None:
        self.queues: dict[str, Queue] = {}
        self._state = state

    def _queue(self, queue_id: str) -> Queue:
        return found("Queue", queue_id, self.queues.get(queue_id))

    async def QueueGetOrCreate(
        self, request: api_pb2.QueueGetOrCreateRequest, caller: Caller
    ) -> api_pb2.QueueGetOrCreateResponse:
        name = request.deployment_name
        queue = next((one for one in self.queues.values() if name and one.name == name), None)
        if queue is None and (not name or request.object_creation_type in CREATE):
            queue = Queue(self._state.new_id("qu"), name)
            self.queues[queue.id] = queue
        queue = found("Queue", name, queue)
        return api_pb2.QueueGetOrCreateResponse(queue_id=queue.id, metadata=api_pb2.QueueMetadata(name=name))

    async def QueueGetById(self, request: api_pb2.QueueGetByIdRequest, caller: Caller) -> api_pb2.QueueGetByIdResponse:
        queue = self._queue(request.queue_id)
        return api_pb2.QueueGetByIdResponse(queue_id=queue.id, metadata=api_pb2.QueueMetadata(name=queue.name))

    async def QueueHeartbeat(self, request: api_pb2.QueueHeartbeatRequest, caller: Caller) -> Empty:
        self._queue(request.queue_id)
        return Empty()

    async def QueueDelete(self, request: api_pb2.QueueDeleteRequest, caller: Caller) -> Empty:
        del self.queues[self._queue(request.queue_id).id]
        return Empty()

    async def QueuePut(self, request: api_pb2.QueuePutRequest, caller: Caller) -> Empty:
        queue = self._queue(request.queue_id)
        items = queue.items[request.partition_key]
        if any(len(value) > LARGEST_ITEM_BYTES for value in request.values):
            raise GRPCError(Status.INVALID_ARGUMENT, f"Queue items are limited to {LARGEST_ITEM_BYTES} bytes.")
        if len(items) + len(request.values) > MOST_ITEMS:
            raise GRPCError(Status.RESOURCE_EXHAUSTED, f"Queue is limited to {MOST_ITEMS} items.")
        for value in request.values:
            queue.puts += 1
            items.append((queue.puts, value))
        self._state.changes.tell()
        return Empty()

    async def QueueGet(self, request: api_pb2.QueueGetRequest, caller: Caller) -> api_pb2.QueueGetResponse:
        items = self._queue(request.queue_id).items[request.partition_key]
        if not items and request.timeout:
            await self._state.changes.until(lambda: items, request.timeout)
        taken = items[: request.n_values]
        del items[: request.n_values]
        return api_pb2.QueueGetResponse(values=[value for _, value in taken])

    async def QueueNextItems(
        self, request: api_pb2.QueueNextItemsRequest, caller: Caller
    ) -> api_pb2.QueueNextItemsResponse:
        """Items after one that was seen, which stay in the queue."""
        items = self._queue(request.queue_id).items[request.partition_key]
        seen = int(request.last_entry_id or 0)
        new = await self._state.changes.until(
            lambda: [(n, value) for n, value in items if n > seen], request.item_poll_timeout
        )
        return api_pb2.QueueNextItemsResponse(
            items=[api_pb2.QueueItem(value=value, entry_id=str(n)) for n, value in new]
        )

    async def QueueLen(self, request: api_pb2.QueueLenRequest, caller: Caller) -> api_pb2.QueueLenResponse:
        partitions = self._queue(request.queue_id).items
        wanted = partitions.values() if request.total else [partitions[request.partition_key]]
        return api_pb2.QueueLenResponse(len=sum(map(len, wanted)))

    async def QueueClear(self, request: api_pb2.QueueClearRequest, caller: Caller) -> Empty:
        partitions = self._queue(request.queue_id).items
        for items in partitions.values() if request.all_partitions else [partitions[request.partition_key]]:
            items.clear()
        return Empty()


class Dicts:
    def __init__(self, state: State) -> None:
        self.dicts: dict[str, Mapping] = {}
        self._state = state

    def _entries(self, dict_id: str) -> dict[bytes, bytes]:
        return found("Dict", dict_id, self.dicts.get(dict_id)).entries

    async def DictGetOrCreate(
        self, request: api_pb2.DictGetOrCreateRequest, caller: Caller
    ) -> api_pb2.DictGetOrCreateResponse:
        name = request.deployment_name
        mapping = next((one for one in self.dicts.values() if name and one.name == name), None)
        if mapping is None and (not name or request.object_creation_type in CREATE):
            mapping = Mapping(self._state.new_id("di"), name, {entry.key: entry.value for entry in request.data})
            self.dicts[mapping.id] = mapping
        mapping = found("Dict", name, mapping)
        return api_pb2.DictGetOrCreateResponse(dict_id=mapping.id, metadata=api_pb2.DictMetadata(name=name))

    async def DictGetById(self, request: api_pb2.DictGetByIdRequest, caller: Caller) -> api_pb2.DictGetByIdResponse:
        self._entries(request.dict_id)
        metadata = api_pb2.DictMetadata(name=self.dicts[request.dict_id].name)
        return api_pb2.DictGetByIdResponse(dict_id=request.dict_id, metadata=metadata)

    async def DictHeartbeat(self, request: api_pb2.DictHeartbeatRequest, caller: Caller) -> Empty:
        self._entries(request.dict_id)
        return Empty()

    async def DictDelete(self, request: api_pb2.DictDeleteRequest, caller: Caller) -> Empty:
        self._entries(request.dict_id)
        del self.dicts[request.dict_id]
        return Empty()

    async def DictUpdate(self, request: api_pb2.DictUpdateRequest, caller: Caller) -> api_pb2.DictUpdateResponse:
        entries = self._entries(request.dict_id)
        new = {update.key: update.value for update in request.updates}
        if request.if_not_exists and new.keys() & entries.keys():
            return api_pb2.DictUpdateResponse(created=False)
        entries.update(new)
        return api_pb2.DictUpdateResponse(created=True)

    async def DictGet(self, request: api_pb2.DictGetRequest, caller: Caller) -> api_pb2.DictGetResponse:
        value = self._entries(request.dict_id).get(request.key)
        return api_pb2.DictGetResponse(found=value is not None, value=value)

    async def DictPop(self, request: api_pb2.DictPopRequest, caller: Caller) -> api_pb2.DictPopResponse:
        value = self._entries(request.dict_id).pop(request.key, None)
        return api_pb2.DictPopResponse(found=value is not None, value=value)

    async def DictContains(self, request: api_pb2.DictContainsRequest, caller: Caller) -> api_pb2.DictContainsResponse:
        return api_pb2.DictContainsResponse(found=request.key in self._entries(request.dict_id))

    async def DictLen(self, request: api_pb2.DictLenRequest, caller: Caller) -> api_pb2.DictLenResponse:
        return api_pb2.DictLenResponse(len=len(self._entries(request.dict_id)))

    async def DictClear(self, request: api_pb2.DictClearRequest, caller: Caller) -> Empty:
        self._entries(request.dict_id).clear()
        return Empty()

    async def DictContents(
        self, request: api_pb2.DictContentsRequest, caller: Caller
    ) -> AsyncIterator[api_pb2.DictEntry]:
        for key, value in list(self._entries(request.dict_id).items()):
            yield api_pb2.DictEntry(key=key if request.keys else None, value=value if request.values else None)

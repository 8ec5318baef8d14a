"""Blobs: what is too large for a message goes over HTTP, as to Modal's object store: PUT with an ETag, and GET."""

import hashlib

from aiohttp import web
from modal_proto import api_pb2

from tests.loopback._state import Caller, State, found


class Blobs:
    """The HTTP server, and the calls that hand out its URLs. It holds blobs in memory until the plane closes."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._data: dict[str, bytes] = {}
        self._url = ""
        self._runner: web.AppRunner | None = None

    @property
    def sizes(self) -> list[int]:
        """The sizes of all blobs in bytes, in the order they came."""
        return [len(data) for data in self._data.values()]

    def read(self, blob_id: str) -> bytes:
        return found("Blob", blob_id, self._data.get(blob_id))

    async def open(self) -> None:
        application = web.Application(client_max_size=2**40)
        application.router.add_put("/{blob}", self._put)
        application.router.add_get("/{blob}", self._get)
        # Connections that stay open would outlive the test in the client's pool.
        self._runner = web.AppRunner(application, access_log=None, keepalive_timeout=1, shutdown_timeout=0)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self._url = "http://127.0.0.1:{1}".format(*self._runner.addresses[0])

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
        self._data.clear()

    async def _put(self, request: web.Request) -> web.Response:
        data = await request.read()
        self._data[request.match_info["blob"]] = data
        response = web.Response(headers={"ETag": f'"{hashlib.md5(data).hexdigest()}"'})
        response.force_close()
        return response

    async def _get(self, request: web.Request) -> web.Response:
        data = self._data.get(request.match_info["blob"])
        response = web.Response(status=404) if data is None else web.Response(body=data)
        response.force_close()
        return response

    async def BlobCreate(self, request: api_pb2.BlobCreateRequest, caller: Caller) -> api_pb2.BlobCreateResponse:
        blob_id = self._state.new_id("bl")
        url = f"{self._url}/{blob_id}"
        return api_pb2.BlobCreateResponse(
            blob_id=blob_id,
            upload_url=url,
            blob_ids=[blob_id],
            upload_urls=api_pb2.UploadUrlList(items=[url]),
        )

    async def BlobGet(self, request: api_pb2.BlobGetRequest, caller: Caller) -> api_pb2.BlobGetResponse:
        self.read(request.blob_id)
        return api_pb2.BlobGetResponse(download_url=f"{self._url}/{request.blob_id}")

"""Images and mounts: images are recorded, not built; the files of mounts are laid out where a container sees them.

Files are kept by what they hold, as Modal keeps them: a client sends each of them once to a store that several planes
share. A container sees what its function's mounts and its image's copied directories hold below `/root`, which is
where Python code goes; files for other places are recorded only (this machine's own files are there).
"""

import hashlib
import os
import shlex
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from modal_proto import api_pb2

from tests.loopback._blobs import Blobs
from tests.loopback._state import Caller, State, found

ROOT = PurePosixPath("/root")


class Store:
    """Files by their SHA-256, and trees of them, on disk; planes of one test session share it."""

    def __init__(self, directory: Path) -> None:
        self._files = directory / "files"
        self._trees = directory / "trees"
        self._files.mkdir(parents=True, exist_ok=True)
        self._trees.mkdir(exist_ok=True)

    def has(self, sha256: str) -> bool:
        return (self._files / sha256).exists()

    def put(self, data: bytes) -> None:
        path = self._files / hashlib.sha256(data).hexdigest()
        written = path.with_suffix(f".{os.getpid()}")
        written.write_bytes(data)
        written.rename(path)

    def tree(self, files: dict[PurePosixPath, str]) -> Path:
        """A directory with these files (paths below it, and SHA-256); the same one for the same files.

        So what a first container compiles, the next one finds compiled.
        """
        listing = "".join(f"{path}\n{sha256}\n" for path, sha256 in sorted(files.items()))
        tree = self._trees / hashlib.sha256(listing.encode()).hexdigest()[:16]
        if not tree.exists():
            building = tree.with_suffix(f".{os.getpid()}")
            building.mkdir()
            for path, sha256 in files.items():
                target = building / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes((self._files / sha256).read_bytes())
            building.rename(tree)
        return tree


@dataclass(frozen=True)
class Image:
    """An image as the client asked for it."""

    id: str
    definition: api_pb2.Image
    bases: "tuple[Image, ...]"

    @property
    def layers(self) -> "list[Image]":
        """Itself and what it is made from, the lowest first."""
        return [*(layer for base in self.bases for layer in base.layers), self]

    @property
    def commands(self) -> list[str]:
        """The lines of all its Dockerfiles, the lowest layer first."""
        return [line for layer in self.layers for line in layer.definition.dockerfile_commands]

    @property
    def environment(self) -> dict[str, str]:
        """The variables of its `ENV` lines."""
        words = [word for line in self.commands if line.startswith("ENV ") for word in shlex.split(line)[1:]]
        return dict(word.split("=", 1) for word in words if "=" in word)


class Mounts:
    def __init__(self, state: State, blobs: Blobs, store: Store) -> None:
        self.images: dict[str, Image] = {}
        self.mounts: dict[str, dict[str, str]] = {}
        self.python_version = ""
        self._state = state
        self._blobs = blobs
        self._store = store

    def tree(self, function: api_pb2.Function) -> Path:
        """The directory that stands for `/root` in a container of this function."""
        files = {}
        for mount_id in function.mount_ids:
            files.update(self.mounts[mount_id])
        image = self.images.get(function.image_id)
        for layer in image.layers if image else ():
            for line in layer.definition.dockerfile_commands:
                if line.startswith("COPY . ") and layer.definition.context_mount_id:
                    target = PurePosixPath("/", line.removeprefix("COPY . "))
                    copied = self.mounts[layer.definition.context_mount_id]
                    files.update({str(target / path.lstrip("/")): sha256 for path, sha256 in copied.items()})
        below = {path: sha256 for path, sha256 in files.items() if PurePosixPath(path).is_relative_to(ROOT)}
        return self._store.tree({PurePosixPath(path).relative_to(ROOT): sha256 for path, sha256 in below.items()})

    async def ImageGetOrCreate(
        self, request: api_pb2.ImageGetOrCreateRequest, caller: Caller
    ) -> api_pb2.ImageGetOrCreateResponse:
        """Every image is built at once: nothing is installed, and a base image's name is not looked up."""
        bases = tuple(self.images[base.image_id] for base in request.image.base_images)
        image = Image(self._state.new_id("im"), request.image, bases)
        self.images[image.id] = image
        return api_pb2.ImageGetOrCreateResponse(
            image_id=image.id,
            result=api_pb2.GenericResult(status=api_pb2.GenericResult.GENERIC_STATUS_SUCCESS),
            metadata=api_pb2.ImageMetadata(
                python_version_info=f"Python {self.python_version}",
                workdir=str(ROOT),
                image_builder_version=request.builder_version,
            ),
        )

    async def MountBatchedCheckExistence(
        self, request: api_pb2.MountBatchedCheckExistenceRequest, caller: Caller
    ) -> api_pb2.MountBatchedCheckExistenceResponse:
        missing = [sha256 for sha256 in request.sha256_hex_hashes if not self._store.has(sha256)]
        return api_pb2.MountBatchedCheckExistenceResponse(missing_sha256_hex_hashes=missing)

    async def MountPutFile(self, request: api_pb2.MountPutFileRequest, caller: Caller) -> api_pb2.MountPutFileResponse:
        self._store.put(self._blobs.read(request.data_blob_id) if request.data_blob_id else request.data)
        return api_pb2.MountPutFileResponse(exists=self._store.has(request.sha256_hex))

    async def MountGetOrCreate(
        self, request: api_pb2.MountGetOrCreateRequest, caller: Caller
    ) -> api_pb2.MountGetOrCreateResponse:
        """A mount that has a name is Modal's own (its client for containers): the container has that installed."""
        mount_id = self._state.new_id("mo")
        self.mounts[mount_id] = {file.filename: file.sha256_hex for file in request.files}
        listing = repr(sorted(self.mounts[mount_id].items())).encode()
        return api_pb2.MountGetOrCreateResponse(
            mount_id=mount_id,
            handle_metadata=api_pb2.MountHandleMetadata(
                content_checksum_sha256_hex=hashlib.sha256(listing).hexdigest()
            ),
        )

    def image(self, image_id: str) -> Image:
        return found("Image", image_id, self.images.get(image_id))

"""Volumes and secrets.

A volume is a directory of what was committed. Containers that mount it at one path share a working copy there, which
starts as what was committed once no other container holds it; `commit` publishes the changes in a working copy, and
`reload` brings in what other copies published (and publishes its own changes first, as Modal says it may). That is a
model: on Modal each container has a copy of its own. The mount path is a link on this machine, so it must lie below
the system's temporary directory and not exist yet.
"""

import contextlib
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError, Status
from modal_proto import api_pb2

from tests.loopback._state import Caller, State, found

CREATE = (api_pb2.OBJECT_CREATION_TYPE_CREATE_IF_MISSING, api_pb2.OBJECT_CREATION_TYPE_CREATE_FAIL_IF_EXISTS)

Listing = dict[str, tuple[int, int]]


@dataclass(eq=False)
class Copy:
    """A working copy: where it is linked to, the containers that hold it, and its files when it was last in step."""

    path: Path
    link: Path
    holders: set[str] = field(default_factory=set)
    in_step: Listing = field(default_factory=dict)


@dataclass(eq=False)
class Volume:
    """A volume: `path` holds what was committed."""

    id: str
    name: str
    path: Path
    commits: int = 0
    reloads: int = 0
    copies: dict[str, Copy] = field(default_factory=dict)


def listing(directory: Path) -> Listing:
    """The files below; a container may be renaming and removing some meanwhile."""
    found = {}
    for folder, _, names in os.walk(directory):
        for path in [Path(folder, name) for name in names]:
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                found[str(path.relative_to(directory))] = status.st_mtime_ns, status.st_size
    return found


def bring(names: set[str], source: Path, target: Path) -> None:
    """Make these files in `target` what they are in `source`, where they may be gone."""
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copy2(source / name, target / name)
        except FileNotFoundError:
            (target / name).unlink(missing_ok=True)


class Volumes:
    def __init__(self, state: State, directory: Path) -> None:
        self.volumes: dict[str, Volume] = {}
        self.known_secrets: dict[str, dict[str, str]] = {}
        self.secrets: dict[str, tuple[str, dict[str, str]]] = {}
        self._state = state
        self._directory = directory

    def by_name(self, name: str) -> Volume:
        return found("Volume", name, next((v for v in self.volumes.values() if v.name == name), None))

    def mount(self, function: api_pb2.Function, task_id: str) -> None:
        """Link the volumes of a function to where its container expects them."""
        for wanted in function.volume_mounts:
            volume = self.volumes[wanted.volume_id]
            copy = volume.copies.get(wanted.mount_path) or self._new_copy(volume, Path(wanted.mount_path))
            if not copy.holders:
                self._restore(volume, copy)
            copy.holders.add(task_id)

    def _new_copy(self, volume: Volume, link: Path) -> Copy:
        if not link.is_relative_to(tempfile.gettempdir()) or link.exists():
            raise ValueError(f"the loopback mounts volumes at new paths below {tempfile.gettempdir()} only, not {link}")
        copy = Copy(self._directory / f"{volume.id}-copy{len(volume.copies)}", link)
        copy.path.mkdir()
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(copy.path)
        volume.copies[str(link)] = copy
        return copy

    def unmount(self, task_id: str) -> None:
        """A container is gone. What it did not commit is lost to those that mount the volume after it."""
        for volume in self.volumes.values():
            for copy in volume.copies.values():
                copy.holders.discard(task_id)

    def close(self) -> None:
        for volume in self.volumes.values():
            for copy in volume.copies.values():
                copy.link.unlink(missing_ok=True)

    def _commit(self, volume: Volume, copy: Copy) -> None:
        now = listing(copy.path)
        changed = {name for name in now.keys() | copy.in_step.keys() if now.get(name) != copy.in_step.get(name)}
        bring(changed, copy.path, volume.path)
        copy.in_step = now

    def _restore(self, volume: Volume, copy: Copy) -> None:
        """Make a copy that nobody holds what was committed."""
        there, here = listing(volume.path), listing(copy.path)
        changed = {name for name in there.keys() | here.keys() if there.get(name) != here.get(name)}
        bring(changed, volume.path, copy.path)
        copy.in_step = listing(copy.path)

    def _reload(self, volume: Volume, copy: Copy) -> None:
        """Bring in what was published since; what the other holders of the copy write meanwhile stays."""
        there, before = listing(volume.path), copy.in_step
        bring(
            {name for name in there.keys() | before.keys() if there.get(name) != before.get(name)},
            volume.path,
            copy.path,
        )
        copy.in_step = there

    def _held(self, volume_id: str, caller: Caller) -> tuple[Volume, list[Copy]]:
        volume = found("Volume", volume_id, self.volumes.get(volume_id))
        if not caller.task_id:
            message = "Volume commit and reload can only be called from inside a container that mounts the volume."
            raise GRPCError(Status.FAILED_PRECONDITION, message)
        return volume, [copy for copy in volume.copies.values() if caller.task_id in copy.holders]

    async def VolumeGetOrCreate(
        self, request: api_pb2.VolumeGetOrCreateRequest, caller: Caller
    ) -> api_pb2.VolumeGetOrCreateResponse:
        name, kind = request.deployment_name, request.object_creation_type
        volume = next((v for v in self.volumes.values() if name and v.name == name), None)
        if volume is None and (kind in CREATE or not name):
            volume_id = self._state.new_id("vo")
            volume = self.volumes[volume_id] = Volume(volume_id, name, self._directory / volume_id)
            volume.path.mkdir(parents=True)
        volume = found("Volume", name, volume)
        return api_pb2.VolumeGetOrCreateResponse(volume_id=volume.id, metadata=api_pb2.VolumeMetadata(name=name))

    async def VolumeDelete(self, request: api_pb2.VolumeDeleteRequest, caller: Caller) -> Empty:
        """It is gone at once, also for containers that have it mounted: nobody knows what Modal does to those."""
        volume = found("Volume", request.volume_id, self.volumes.pop(request.volume_id, None))
        for copy in volume.copies.values():
            copy.link.unlink(missing_ok=True)
            shutil.rmtree(copy.path, ignore_errors=True)
        shutil.rmtree(volume.path)
        return Empty()

    async def VolumeHeartbeat(self, request: api_pb2.VolumeHeartbeatRequest, caller: Caller) -> Empty:
        return Empty()

    async def VolumeCommit(self, request: api_pb2.VolumeCommitRequest, caller: Caller) -> api_pb2.VolumeCommitResponse:
        volume, copies = self._held(request.volume_id, caller)
        for copy in copies:
            self._commit(volume, copy)
        volume.commits += 1
        return api_pb2.VolumeCommitResponse(skip_reload=True)

    async def VolumeReload(self, request: api_pb2.VolumeReloadRequest, caller: Caller) -> Empty:
        volume, copies = self._held(request.volume_id, caller)
        for copy in copies:
            self._commit(volume, copy)
            self._reload(volume, copy)
        volume.reloads += 1
        return Empty()

    async def SecretGetOrCreate(
        self, request: api_pb2.SecretGetOrCreateRequest, caller: Caller
    ) -> api_pb2.SecretGetOrCreateResponse:
        """A secret by name must be known to the plane (`plane.known_secrets`); one made in code brings its values."""
        name = request.deployment_name
        values = found("Secret", name, self.known_secrets.get(name)) if name else dict(request.env_dict)
        if absent := [key for key in request.required_keys if key not in values]:
            raise GRPCError(Status.NOT_FOUND, f"Secret is missing key(s): {', '.join(absent)}")
        secret_id = self._state.new_id("st")
        self.secrets[secret_id] = (name, values)
        return api_pb2.SecretGetOrCreateResponse(secret_id=secret_id)

    def environment(self, secret_ids: list[str]) -> dict[str, str]:
        return {key: value for one in secret_ids for key, value in self.secrets[one][1].items()}

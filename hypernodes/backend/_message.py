"""Messages to other machines as bytes: a plain header, and a pickle that can be used on a machine without a GPU.

The header is checked before anything is unpickled, since a pickle of one Python's functions may crash another.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

import cloudpickle

from hypernodes._plan import INHERIT, Inherit
from hypernodes._version import __version__
from hypernodes.backend._base import Backend
from hypernodes.backend._wire import Parts, loads
from hypernodes.cache._disk import DiskCache
from hypernodes.cache._envelope import KEY_VARIABLE
from hypernodes.errors import CacheError, RemoteExecutionError, SerializationError
from hypernodes.events import Event

if TYPE_CHECKING:
    from hypernodes.backend._remote import RemoteBackend

MAGIC = b"hypernodes"
Batch = tuple[int, list[Event]]
"""Events of a call with a number: a batch that may have been sent comes again under its number, and is told once."""
FORMAT = 3
_log = logging.getLogger("hypernodes")
_COUNT = struct.Struct("<I")
_LENGTH = struct.Struct("<Q")
_NAMED = (type, FunctionType, BuiltinFunctionType, ModuleType)
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
_HEADER = json.dumps({"format": FORMAT, "python": PYTHON, "hypernodes": __version__}).encode()


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # it has no types
    """Pickles what a GPU holds such that a machine without one can use it, and caches without their keys.

    Both wherever they hide. ``place`` is the backend that the message goes to: pipelines inside that ask for it are
    there already. ``modules`` are those that what is pickled names: they have to be there.
    """

    def __init__(self, file: Any, buffers: list[pickle.PickleBuffer], place: Backend | None) -> None:
        super().__init__(file, protocol=5, buffer_callback=buffers.append)
        self.modules: set[str] = set()
        self._place = place

    def reducer_override(self, obj: Any) -> Any:
        """Return how to rebuild an object; tensors come to the CPU, and the keys of caches stay here."""
        if isinstance(obj, Backend) and obj.remote:
            if obj is self._place:
                return _there_already, ()
            raise SerializationError(
                f"a pipeline inside of one that runs on {self._place!r} asks for {obj!r}: a container does not start "
                f"others; let the pipeline around them run locally"
            )
        if isinstance(obj, DiskCache):
            restore, (kind, path, key, *rest) = obj.__reduce__()
            return _cache_there, (restore, kind, path, key is not None, *rest)
        if "torch" in sys.modules and (how := _reduced_of_torch(sys.modules["torch"], obj)) is not None:
            return how
        how = super().reducer_override(obj)
        if how is NotImplemented and isinstance(obj, _NAMED):  # by its module and name
            module = obj.__name__ if isinstance(obj, ModuleType) else obj.__module__
            if isinstance(module, str):
                self.modules.add(module)
        return how


def _reduced_of_torch(torch: Any, obj: Any) -> tuple[Any, ...] | None:
    """Return how to rebuild a storage on the CPU, and a tensor that is a small part of its storage; None for others.

    All that torch pickles has its data in storages: parameters, modules, subclasses, sparse tensors.
    """
    if isinstance(obj, torch.TypedStorage):
        file = BytesIO()
        torch.save(obj, file, _use_new_zipfile_serialization=False)  # as torch pickles it
        return _storage_there, (pickle.PickleBuffer(file.getbuffer()),)
    if type(obj) is not torch.Tensor or obj.layout is not torch.strided or obj.device.type == "meta" or vars(obj):
        return None
    if obj.untyped_storage().nbytes() <= obj.nbytes:
        return None
    # torch pickles a row with the matrix that it is a view of.
    reduced: tuple[Any, ...] = obj.detach().clone().requires_grad_(obj.requires_grad).__reduce_ex__(5)
    return reduced


def _storage_there(saved: Any) -> Any:
    import torch  # type: ignore[import-not-found, unused-ignore]

    return torch.load(BytesIO(saved), map_location="cpu", weights_only=False)


def _there_already() -> Inherit:
    return INHERIT


def _cache_there(
    restore: Callable[..., DiskCache], kind: type[DiskCache], path: str, signed: bool, *rest: Any
) -> DiskCache:
    """Open a cache on this machine, with the key that this machine has been given."""
    key = os.environb.get(KEY_VARIABLE.encode()) or None
    if signed and key is None:
        raise CacheError(
            f"the results in the cache at {path!r} are signed, and the other machine has no key: keys are not sent "
            f"along. Give it the key as the environment variable {KEY_VARIABLE}: "
            f'ModalBackend(secrets=[modal.Secret.from_dict({{"{KEY_VARIABLE}": ...}})]), or modal.Secret.from_name(...)'
        )
    return restore(kind, path, key if signed else None, *rest)


def packed(
    kind: str, *message: Any, place: RemoteBackend | None = None, events: Sequence[Batch] | None = None
) -> bytes:
    """Return a message as bytes: a plain header, then its pickle with large arrays beside it.

    Args:
        kind: its first part.
        message: the others.
        place: the backend that it goes to.
        events: of a reply: what has not been told yet. They can be read when the rest cannot, and the other way round.

    Raises:
        RemoteExecutionError: the place lacks a module of this project that the message needs.
    """
    buffers: list[pickle.PickleBuffer] = []
    file = BytesIO()
    pickler = Pickler(file, buffers, place)
    pickler.dump((kind, *message))
    if events is not None:
        pickler.dump(events)  # by the same pickler: what both hold is sent once
    if place is not None:
        place.require(pickler.modules)
    parts: list[Any] = [file.getbuffer(), *(buffer.raw() for buffer in buffers)]
    lengths = b"".join(_LENGTH.pack(part.nbytes) for part in parts)
    return b"".join([MAGIC, _COUNT.pack(len(_HEADER)), _HEADER, _COUNT.pack(len(parts)), lengths, *parts])


def unpacked(data: bytes) -> Any:
    """Return a message from its bytes.

    Raises:
        RemoteExecutionError: it was written by another Python or version, or by something else.
        Exception: whatever unpickling runs into.
    """
    return loads(_parts(data))


def unpacked_reply(data: bytes) -> tuple[str, Any, list[Batch]]:
    """Return the kind of a reply, its answer, and the events that came with it.

    Raises:
        RemoteExecutionError: it cannot be rebuilt here.
    """
    pickled, *buffers = _parts(data)
    unpickler = pickle.Unpickler(BytesIO(pickled), buffers=buffers)
    try:
        kind, answer = unpickler.load()
    except Exception as error:  # unpickling runs the user's code
        reason = (
            f"there is no module {error.name!r}: install it here too"
            if isinstance(error, ModuleNotFoundError)
            else f"{type(error).__name__}: {error}"
        )
        raise RemoteExecutionError(
            f"what the other machine sent back cannot be rebuilt here: {reason}, or ask for other outputs with "
            f"output_name=..."
        ) from error
    try:
        return kind, answer, unpickler.load()
    except Exception as error:  # noqa: BLE001 - nobody loses a result over what callbacks would have been told
        _log.warning("some events of a run on another machine cannot be told here: %s", error)
        return kind, answer, []


def _parts(data: bytes) -> Parts:
    """Return the pickle of a message and its buffers, when the header says that it may be unpickled."""
    view = memoryview(data)
    if bytes(view[: len(MAGIC)]) != MAGIC:
        raise RemoteExecutionError("what came from the other machine is not a message of hypernodes")
    position = len(MAGIC)
    (length,) = _COUNT.unpack_from(view, position)
    position += _COUNT.size
    header = bytes(view[position : position + length])
    if header != _HEADER:
        _check(json.loads(header))
    position += length
    (count,) = _COUNT.unpack_from(view, position)
    position += _COUNT.size
    lengths = [_LENGTH.unpack_from(view, position + index * _LENGTH.size)[0] for index in range(count)]
    position += count * _LENGTH.size
    parts: Parts = []
    for length in lengths:
        # Arrays write into their buffers, as they could where they were made.
        parts.append(view[position : position + length] if not parts else bytearray(view[position : position + length]))
        position += length
    return parts


def _check(header: Mapping[str, Any]) -> None:
    """Raise an error that says what to do, if the two ends do not fit."""
    if header.get("python") != PYTHON:
        raise RemoteExecutionError(
            f"one end runs Python {header.get('python')} and the other Python {PYTHON}: functions can be sent between "
            f"equal versions only; choose the image's Python, as in debian_slim(python_version=...)"
        )
    if header.get("format") != FORMAT:
        raise RemoteExecutionError(
            f"one end has hypernodes {header.get('hypernodes')} and the other {__version__}, which do not fit: "
            f"install the same version in both"
        )

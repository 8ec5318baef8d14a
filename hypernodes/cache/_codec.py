"""From a node's result to the bytes of an entry, and back.

Unpickling runs code: what comes here has been unsealed, so it is what this library wrote, in this place and, with
a key, by someone who has the key.
"""

from __future__ import annotations

import pickle
import struct
from typing import Any

LARGE = 64 * 1024
"""Bytes from which a buffer, such as an array's, is stored beside the pickle and never copied into it."""
PICKLE, PICKLE_WITH_BUFFERS = 1, 2
_LENGTH = struct.Struct("<Q")
_SCALARS = frozenset({int, float, complex, bool, str, bytes, type(None)})


def encode(value: Any) -> tuple[int, list[Any]]:
    """Return the codec and the pieces of a value's payload.

    Classes and functions go by reference, so that what comes back is of the classes there are then, also those of a
    notebook; what has no name that others can import goes by value.

    Raises:
        Exception: whatever pickling runs into.
    """
    if type(value) in _SCALARS:
        return PICKLE, [pickle.dumps(value, protocol=5)]
    buffers: list[memoryview] = []

    def in_band(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < LARGE:
            return True
        buffers.append(view)
        return False

    try:
        data = pickle.dumps(value, protocol=5, buffer_callback=in_band)
    except Exception:  # noqa: BLE001 - lambdas, local classes and the like: cloudpickle decides whether it can be done
        import cloudpickle

        buffers.clear()
        data = cloudpickle.dumps(value, protocol=5, buffer_callback=in_band)
    if not buffers:
        return PICKLE, [data]
    lengths = [len(data), *(view.nbytes for view in buffers)]
    head = _LENGTH.pack(len(lengths)) + b"".join(map(_LENGTH.pack, lengths))
    return PICKLE_WITH_BUFFERS, [head, data, *buffers]


def decode(codec: int, payload: memoryview) -> Any:
    """Return the value of a payload.

    Raises:
        ValueError: the codec is unknown.
        Exception: whatever unpickling runs into, such as a class that is no longer there.
    """
    if codec == PICKLE:
        return pickle.loads(payload)
    if codec != PICKLE_WITH_BUFFERS:
        raise ValueError(f"codec {codec} is unknown to this version")
    (count,) = _LENGTH.unpack_from(payload)
    position = _LENGTH.size * (count + 1)
    parts = []
    for index in range(count):
        (length,) = _LENGTH.unpack_from(payload, _LENGTH.size * (index + 1))
        parts.append(payload[position : position + length])
        position += length
    # Arrays write into their buffers, as they could when they were made.
    buffers = [part if not part.readonly else bytearray(part) for part in parts[1:]]
    return pickle.loads(parts[0], buffers=buffers)

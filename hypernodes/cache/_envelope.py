"""The envelope around every cached value: whether it is whole, whose it is, and who signed it.

From the front: 32 bytes of header, the meta block, the payload and, if signed, the 32 bytes of an HMAC-SHA256.
The checksum is a CRC-32 of all that stands between itself and the signature. The signature covers the entry's key
and all that stands before itself; nothing of a payload is given out before it has been checked.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple
from zlib import crc32

from hypernodes.cache._store import size
from hypernodes.errors import CacheError

if TYPE_CHECKING:
    from typing_extensions import Buffer

KEY_VARIABLE = "HYPERNODES_CACHE_KEY"
"""In the environment, the key of caches that are given none."""
MAGIC = b"hnc\x1a"
VERSION = 1
SIGNED = 1

# Magic, checksum; version, codec, flags, bytes of meta, bytes of payload, CRC-32 of the key. Filled up to 32 bytes,
# so that a payload begins as its array wants it where the meta block's length is a multiple of 16.
_HEADER = struct.Struct("<4sIBBHIQI4x")
_CHECKED = struct.Struct("<BBHIQI4x")
HEADER_SIZE = _HEADER.size
_CHECKED_FROM = HEADER_SIZE - _CHECKED.size
_SIGNATURE_SIZE = 32
_HASHED_AT_ONCE = 1 << 16


class Header(NamedTuple):
    """What the front of an envelope says, unchecked."""

    codec: int
    signed: bool
    meta_size: int
    payload_size: int


class Refused(Exception):  # noqa: N818 - it is an answer: the entry is a miss
    """An envelope that must not be opened: for whoever asked, its entry is not there.

    ``damaged`` tells one that nobody can ever open from one that somebody else may.
    """

    def __init__(self, reason: str, *, damaged: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.damaged = damaged


def checked_key(key: bytes | str | None) -> bytes | None:
    """Return the key that a cache signs with: the one given, else that of the environment; None for none.

    Raises:
        CacheError: it is empty, or neither bytes nor text.
    """
    if key is None:
        return os.environb.get(KEY_VARIABLE.encode()) or None
    if isinstance(key, str):
        key = key.encode()
    if not isinstance(key, bytes) or not key:
        raise CacheError(f"key= must be bytes or text, and not empty; got {type(key).__name__}")
    return key


def seal(key: str, codec: int, meta: bytes, payload: Sequence[Buffer], secret: bytes | None) -> list[Buffer]:
    """Return the buffers of the envelope that holds a payload for a key; the payload's own are not copied.

    ``codec`` (0 to 255) says how the payload is to be read, and ``meta`` is a small block that can be read without it.
    """
    name = key.encode()
    flags = 0 if secret is None else SIGNED
    length = sum(map(size, payload))
    checked = _CHECKED.pack(VERSION, codec, flags, len(meta), length, crc32(name)) + meta
    checksum = crc32(checked)
    for buffer in payload:
        checksum = crc32(buffer, checksum)
    head = MAGIC + checksum.to_bytes(4, "little") + checked
    if secret is None:
        return [head, *payload]
    return [head, *payload, _signature(secret, name, [head, *payload])]


def unseal(key: str, data: Buffer, secret: bytes | None) -> tuple[int, memoryview]:
    """Open the envelope that was found under a key: the codec and the payload.

    With a secret, only envelopes signed with it are opened; without one, only unsigned ones.

    Raises:
        Refused: it must not be opened.
    """
    view = memoryview(data)
    total = view.nbytes
    try:
        magic, checksum, version, codec, flags, meta_size, payload_size, owner = _HEADER.unpack_from(data)
    except struct.error:
        raise Refused(f"torn: {total} bytes", damaged=True) from None
    if magic != MAGIC:
        raise Refused("no envelope", damaged=True)
    if version != VERSION or flags > SIGNED:
        raise Refused(f"written by another version (format {version}, flags {flags})")
    begin = HEADER_SIZE + meta_size
    end = begin + payload_size
    if total != (end + _SIGNATURE_SIZE if flags else end):
        raise Refused(f"torn: {total} bytes", damaged=True)
    name = key.encode()
    # A right signature vouches for more than the checksum does, which then need not be computed.
    if not (flags and secret is not None and _is_signature(view[end:], secret, name, view[:end])):
        if crc32(view[_CHECKED_FROM:end]) != checksum:
            raise Refused("damaged: the checksum is wrong", damaged=True)
        if crc32(name) != owner:
            raise Refused("stored under another key than its own")
        if flags:
            raise Refused(
                "signed with a key that this cache does not have"
                if secret is None
                else "altered, or signed with another key than this cache's"
            )
        if secret is not None:
            raise Refused("not signed, in a cache that has a key")
    return codec, view[begin:end]


def read_header(data: Buffer) -> Header:
    """Read the header at the front of an envelope, of which no more than that need be there.

    Raises ``Refused`` where there is none; nothing in it is checked.
    """
    try:
        magic, _, version, codec, flags, meta_size, payload_size, _ = _HEADER.unpack_from(data)
    except struct.error:
        raise Refused("torn", damaged=True) from None
    if magic != MAGIC or version != VERSION:
        raise Refused("no envelope of this version", damaged=magic != MAGIC)
    return Header(codec, bool(flags & SIGNED), meta_size, payload_size)


def _is_signature(claimed: memoryview, secret: bytes, name: bytes, signed: memoryview) -> bool:
    from hmac import compare_digest

    return compare_digest(claimed, _signature(secret, name, [signed]))


def _signature(secret: bytes, name: bytes, parts: Sequence[Buffer]) -> bytes:
    """HMAC-SHA256 of the key's name, a zero (which no key has) and the envelope."""
    import hmac  # with OpenSSL behind it: only a cache with a key pays for that

    if sum(map(size, parts)) < _HASHED_AT_ONCE:
        return hmac.digest(secret, b"".join([name, b"\0", *parts]), "sha256")
    mac = hmac.new(secret, name + b"\0", "sha256")
    for part in parts:
        mac.update(part)
    return mac.digest()

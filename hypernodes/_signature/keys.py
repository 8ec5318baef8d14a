"""From code and inputs to signatures: what an entry of a cache is stored under. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import sha256

from hypernodes._signature.values import ALGORITHM

DIGEST_SIZE = 32
Digest = bytes
"""32 bytes that stand for a value, or for the call that makes it."""

_FORMAT = f"hypernodes-1 {ALGORITHM} ".encode()


def call_prefix(code: Digest, names: Iterable[str], salts: Mapping[str, Digest], *, outputs: int) -> bytes:
    """Return what every signature of one function begins with: its code, parameter names, version and dependencies.

    ``outputs`` is how many names a tuple that it returns is unpacked under; 0 for a result that is kept whole.
    """
    salted = b"".join(b"%d:%s%s" % (len(name), name.encode(), salts[name]) for name in sorted(salts))
    return sha256(_FORMAT + b"%d " % outputs + code + "\n".join(names).encode() + b"\0" + salted).digest()


def part(signature: Digest, position: int) -> Digest:
    """Return the digest of one of several outputs of a call."""
    return sha256(b"part %d of " % position + signature).digest()


def listed(digests: Iterable[Digest]) -> Digest:
    """Return the digest of a list whose items have digests of their own, such as what a mapped pipeline makes."""
    return sha256(b"".join((_FORMAT, b"list", *digests))).digest()

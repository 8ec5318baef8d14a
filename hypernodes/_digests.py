"""What stands for a value in a run with a cache: its digest, why there is none, or those of a list's items."""

from __future__ import annotations

from enum import Enum, auto
from typing import Any

from hypernodes._signature.keys import Digest, listed
from hypernodes._signature.values import hash_value
from hypernodes.cache._session import CacheSession
from hypernodes.errors import UncacheableError


class Unhashed(Enum):
    """In place of the digest of a slot. One that nothing is known of yet has None."""

    BY_VALUE = auto()
    """Its value is there and has not been hashed."""
    NO_DIGEST = auto()
    """Its value has no identity that another process would know."""


BY_VALUE, NO_DIGEST = Unhashed.BY_VALUE, Unhashed.NO_DIGEST
FAILED: Digest = hash_value(None)
"""The digest of an item of a map that has failed: its position holds None."""


class Listed:
    """The digest of a list that a mapped pipeline has made: those of its items, and the list itself."""

    __slots__ = ("_digest", "_session", "items", "values")

    def __init__(self, items: list[Any], values: list[Any], session: CacheSession | None) -> None:
        self.items = items
        self.values = values
        self._session = session
        self._digest: Any = None

    @property
    def digest(self) -> Any:
        """The digest of the whole list; NO_DIGEST if an item has none. May hash values, so it may block."""
        if self._digest is None:
            if BY_VALUE in self.items and len(self.values) != len(self.items):
                # A function has changed the list meanwhile: what follows depends on what it is now.
                self._digest = hashed(self.values, self._session)
                return self._digest
            for index, digest in enumerate(self.items):
                if digest is BY_VALUE:
                    self.items[index] = hashed(self.values[index], self._session)
            flat = [each.digest if isinstance(each, Listed) else each for each in self.items]
            self._digest = NO_DIGEST if NO_DIGEST in flat else listed(flat)
        return self._digest

    def __reduce__(self) -> tuple[Any, ...]:
        return _Sent, (self.items, self.digest)


class _Sent(Listed):
    """One that has come from another process, where all its items have been hashed."""

    __slots__ = ()

    def __init__(self, items: list[Any], digest: Any) -> None:
        super().__init__(items, [], None)
        self._digest = digest


def settled(digest: Any, value: Any, session: CacheSession) -> Any:
    """Return a digest that another process can use: one that says that its value is to be hashed is hashed now."""
    if digest is BY_VALUE:
        return hashed(value, session)
    if isinstance(digest, Listed):
        digest.digest  # noqa: B018 - hashes its items
    return digest


def hashed(value: Any, session: CacheSession | None) -> Any:
    """Return the digest of a value, or NO_DIGEST."""
    assert session is not None
    try:
        return session.digest(value)
    except UncacheableError:
        return NO_DIGEST

"""Entries on their way out of a store: opened, unpickled, and given to each who asks as a value of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypernodes.cache._codec import decode
from hypernodes.cache._envelope import Refused, unseal


class Loaded:
    """What entries hold, by their keys. Who takes one gets a value of its own, as if it had been computed for it."""

    __slots__ = ("_sealed", "_secret", "_taken", "_values", "refused")

    def __init__(self, sealed: Mapping[str, Any], secret: bytes | None) -> None:
        """Unpickle entries; may block."""
        self._sealed = sealed
        self._secret = secret
        self._values: dict[str, Any] = {}
        """Those that nobody has taken whole."""
        self._taken: set[tuple[str, int]] = set()
        self.refused: dict[str, str] = {}
        """Why entries cannot be used."""
        for key, data in sealed.items():
            try:
                codec, payload = unseal(key, data, secret)
                self._values[key] = decode(codec, payload)
            except Refused as error:
                self.refused[key] = str(error)
            except Exception as error:  # noqa: BLE001 - unpickling runs the user's code
                self.refused[key] = f"it cannot be rebuilt: {type(error).__name__}: {error}"

    def __contains__(self, key: str) -> bool:
        return key in self._sealed and key not in self.refused

    def take(self, key: str, position: int | None) -> Any:
        """Return an entry's value, or one of several that it holds; to be called before any of them is used."""
        if key not in self._values or (key, position) in self._taken:
            codec, payload = unseal(key, self._sealed[key], self._secret)
            whole = decode(codec, memoryview(bytes(payload)))  # arrays would share the memory of the payload
        elif position is None:
            whole = self._values.pop(key)
        else:
            self._taken.add((key, position))
            whole = self._values[key]
        return whole if position is None else whole[position]

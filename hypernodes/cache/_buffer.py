"""Small entries on their way to a store: gathered by all runs of this process, written together."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

from hypernodes.cache._ledger import Gathered

MOST_ENTRIES = 2_000
MOST_BYTES = 8 << 20


class WriteBuffer:
    """What waits to be written to one store, and can be read from here meanwhile. Used by any thread."""

    __slots__ = ("__weakref__", "_bytes", "_lock", "_pending", "_writing", "histories")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: dict[str, bytes] = {}
        self._bytes = 0
        self._writing: list[dict[str, bytes]] = []
        self.histories = Gathered()

    def put(self, key: str, data: bytes) -> bool:
        """Add an entry; say whether it is time to write."""
        with self._lock:
            self._pending[key] = data
            self._bytes += len(data)
            return len(self._pending) >= MOST_ENTRIES or self._bytes >= MOST_BYTES

    def get(self, key: str) -> bytes | None:
        """Return an entry that has not been written yet."""
        data = self._pending.get(key)
        if data is None and self._writing:
            with self._lock:
                data = next((batch[key] for batch in reversed(self._writing) if key in batch), None)
        return data

    def __bool__(self) -> bool:
        return bool(self._pending or self._writing)

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None

    def take(self) -> dict[str, bytes]:
        """Return what is to be written now; to be given to :meth:`written` afterwards."""
        with self._lock:
            batch = self._pending
            if batch:
                self._writing.append(batch)  # first, since readers take no lock to see that there is nothing
                self._pending, self._bytes = {}, 0
            return batch

    def written(self, batch: dict[str, bytes]) -> None:
        """Forget a batch: it is in the store, or lost."""
        with self._lock:
            self._writing = [each for each in self._writing if each is not batch]

    def put_back(self, batch: dict[str, bytes]) -> None:
        """Keep a batch for later: nobody knows whether it was written."""
        with self._lock:
            self._pending = {**batch, **self._pending}
            self._bytes = sum(map(len, self._pending.values()))
            self._writing = [each for each in self._writing if each is not batch]


class Same:
    """Stands for a store that cannot be a key of a dict: equal to what stands for the very same store."""

    __slots__ = ("__weakref__", "_store")

    def __init__(self, store: Any) -> None:
        self._store = store

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other._store is self._store

    def __hash__(self) -> int:
        return id(self._store)


def identity(store: Any) -> Any:
    """Return what tells stores apart: a directory is the same cache, however often it is opened."""
    try:
        hash(store)
        weakref.ref(store)
    except TypeError:
        return Same(store)
    return store


class _Buffers:
    """The buffers of a process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_store: weakref.WeakKeyDictionary[Any, WriteBuffer] = weakref.WeakKeyDictionary()
        # What stands for a store lives in here, and the store with it, for as long as a run uses the buffer.
        self._by_stand_in: weakref.WeakValueDictionary[Same, WriteBuffer] = weakref.WeakValueDictionary()

    def of(self, store: Any) -> WriteBuffer:
        with self._lock:
            if isinstance(store, Same):
                return self._by_stand_in.setdefault(store, WriteBuffer())
            return self._by_store.setdefault(store, WriteBuffer())


_buffers = _Buffers()


def buffer_of(store: Any) -> WriteBuffer:
    """Return the one buffer of a store in this process; ``store`` is its :func:`identity`."""
    return _buffers.of(store)


def _forget_buffers() -> None:
    """In a forked child: the parent writes what it has gathered, and another thread may have held a lock."""
    global _buffers  # noqa: PLW0603 - nothing in it can be trusted
    _buffers = _Buffers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_buffers)

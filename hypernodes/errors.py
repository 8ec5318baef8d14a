"""Every error of hypernodes, in one tree.

An exception raised by a user's own function is never replaced by one of these: it leaves as itself,
with a note (PEP 678) that says in which node and where in the run it was raised.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hypernodes._mapping import ItemFailure

__all__ = [
    "AwaitedCancelledError",
    "CacheError",
    "CycleError",
    "DefinitionError",
    "DependencyError",
    "ExecutionError",
    "HyperNodesError",
    "MapInputError",
    "MapTypeError",
    "NodeTimeoutError",
    "OutputMismatchError",
    "PipelineRecursionError",
    "RemoteExecutionError",
    "RemoteTimeoutError",
    "SerializationError",
    "TooManyFailuresError",
    "TypeMismatchError",
    "UncacheableError",
    "WorkerCrashedError",
]


class HyperNodesError(Exception):
    """The base of every error that hypernodes itself raises."""


class DefinitionError(HyperNodesError, ValueError):
    """A node or pipeline cannot be built as written: a refused function, option, name or mapping."""


class CycleError(DefinitionError):
    """Nodes need each other's outputs in a circle; the message prints the whole cycle."""


class TypeMismatchError(DefinitionError, TypeError):
    """With ``strict_types=True``: what a node returns cannot be what its consumer's annotation asks for."""


class DependencyError(HyperNodesError, ValueError):
    """A call names an input, output or limit that does not exist, or leaves out one that is needed."""


class MapInputError(HyperNodesError, ValueError):
    """The values to map over do not fit together, such as lists of unequal length."""


class MapTypeError(MapInputError, TypeError):
    """A value to map over is not a list of items: a str, bytes, a dict, or nothing iterable."""


class ExecutionError(HyperNodesError):
    """The base of errors that happen while running and are not the user's function's own."""


class NodeTimeoutError(ExecutionError, TimeoutError):
    """A node, or a pipeline with a ``timeout``, did not finish within its seconds."""


class AwaitedCancelledError(ExecutionError):
    """A node awaited something that had been cancelled, while nobody had cancelled the node itself."""


class WorkerCrashedError(ExecutionError):
    """The process that ran a node or a map item died: killed, out of memory, or a crash in native code."""


class PipelineRecursionError(ExecutionError, RecursionError):
    """A pipeline runs itself from one of its own nodes, deeper and deeper."""


class RemoteExecutionError(ExecutionError):
    """A place outside this process could not run its part, or sent an exception that cannot be rebuilt here."""


class RemoteTimeoutError(RemoteExecutionError, TimeoutError):
    """A place outside this process did not finish within the seconds that its backend allows."""


class SerializationError(ExecutionError):
    """A value cannot be sent to another process; the message gives its path inside the inputs and why."""


class CacheError(HyperNodesError):
    """A cache cannot be used as asked: a refused directory, a missing key, a store that needs another event loop.

    A store that fails while a pipeline runs costs a warning and never raises this.
    """


class UncacheableError(CacheError, TypeError):
    """A value has no identity that holds in another process; the message gives its path and what to do."""


class OutputMismatchError(ExecutionError, ValueError):
    """A node declared several outputs and returned something else than a tuple of that many."""


class TooManyFailuresError(ExecutionError):
    """A map with ``on_error="collect"`` reached ``max_failures``; the last failure is its ``__cause__``.

    ``failures`` lists the :class:`~hypernodes.ItemFailure` seen until then.
    """

    def __init__(self, message: str, failures: Sequence[ItemFailure] = ()) -> None:
        super().__init__(message)
        self.failures = list(failures)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.args[0], self.failures)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest known name, or what there is to choose from."""
    import difflib

    choices = [choice for choice in known if isinstance(choice, str)]
    close = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    if not choices:
        return ""
    return f"; known here: {quoted(sorted(choices))}"


def quoted(names: Iterable[str]) -> str:
    """Return names for a message: ``'a', 'b' and 'c'``."""
    items = [repr(name) for name in names]
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} and {items[-1]}"

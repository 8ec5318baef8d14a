"""Async-first execution of pipelines: functions on single items become nodes, nodes become pipelines."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hypernodes._version import __version__ as __version__

if TYPE_CHECKING:
    from hypernodes import backend, cache, errors, events
    from hypernodes._callbacks import CallbackContext, PipelineCallback
    from hypernodes._definition import NestedPipeline
    from hypernodes._explanation import Explanation, NodeExplanation, Reason
    from hypernodes._kept import forget_kept
    from hypernodes._mapping import ItemFailure, ItemResult, MapResult
    from hypernodes._node import Input, Node, node
    from hypernodes._pipeline import Pipeline
    from hypernodes._plan import INHERIT
    from hypernodes._retry import RetryPolicy
    from hypernodes.backend._handle import RunHandle
    from hypernodes.cache import DiskCache
    from hypernodes.errors import (
        AwaitedCancelledError,
        CacheError,
        CycleError,
        DefinitionError,
        DependencyError,
        ExecutionError,
        HyperNodesError,
        MapInputError,
        MapTypeError,
        NodeTimeoutError,
        OutputMismatchError,
        PipelineRecursionError,
        RemoteExecutionError,
        RemoteTimeoutError,
        SerializationError,
        TooManyFailuresError,
        TypeMismatchError,
        UncacheableError,
        WorkerCrashedError,
    )


__all__ = [
    "INHERIT",
    "AwaitedCancelledError",
    "CacheError",
    "CallbackContext",
    "CycleError",
    "DefinitionError",
    "DependencyError",
    "DiskCache",
    "ExecutionError",
    "Explanation",
    "HyperNodesError",
    "Input",
    "ItemFailure",
    "ItemResult",
    "MapInputError",
    "MapResult",
    "MapTypeError",
    "NestedPipeline",
    "Node",
    "NodeExplanation",
    "NodeTimeoutError",
    "OutputMismatchError",
    "Pipeline",
    "PipelineCallback",
    "PipelineRecursionError",
    "Reason",
    "RemoteExecutionError",
    "RemoteTimeoutError",
    "RetryPolicy",
    "RunHandle",
    "SerializationError",
    "TooManyFailuresError",
    "TypeMismatchError",
    "UncacheableError",
    "WorkerCrashedError",
    "backend",
    "cache",
    "errors",
    "events",
    "forget_kept",
    "node",
]

_HOMES = {
    "INHERIT": "_plan",
    "CallbackContext": "_callbacks",
    "DiskCache": "cache",
    "Explanation": "_explanation",
    "Input": "_node",
    "ItemFailure": "_mapping",
    "ItemResult": "_mapping",
    "MapResult": "_mapping",
    "NestedPipeline": "_definition",
    "Node": "_node",
    "NodeExplanation": "_explanation",
    "Pipeline": "_pipeline",
    "PipelineCallback": "_callbacks",
    "Reason": "_explanation",
    "RetryPolicy": "_retry",
    "RunHandle": "backend._handle",
    "forget_kept": "_kept",
    "node": "_node",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is first asked for: a command line's ``--help`` needs no event loop."""
    if name in ("backend", "cache", "errors", "events"):
        value: Any = import_module(f"hypernodes.{name}")
    elif name in _HOMES:
        value = getattr(import_module(f"hypernodes.{_HOMES[name]}"), name)
    elif name in __all__:
        value = getattr(import_module("hypernodes.errors"), name)
    else:
        raise AttributeError(f"module 'hypernodes' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

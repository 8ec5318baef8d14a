"""Async-first execution of pipelines: functions on single items become nodes, nodes become pipelines."""

from hypernodes import errors, events
from hypernodes._callbacks import CallbackContext, PipelineCallback
from hypernodes._mapping import ItemFailure, ItemResult, MapResult
from hypernodes._node import Input, Node, node
from hypernodes._pipeline import NestedPipeline, Pipeline
from hypernodes._plan import INHERIT
from hypernodes._retry import RetryPolicy
from hypernodes.errors import *  # noqa: F403 - every error class, as listed in errors.__all__

__version__ = "0.5.0"

__all__ = [
    "INHERIT",
    "CallbackContext",
    "Input",
    "ItemFailure",
    "ItemResult",
    "MapResult",
    "NestedPipeline",
    "Node",
    "Pipeline",
    "PipelineCallback",
    "RetryPolicy",
    "errors",
    "events",
    "node",
    *errors.__all__,
]

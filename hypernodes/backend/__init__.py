"""Where pipelines run."""

from hypernodes._engine import PipelineExecutionEngine
from hypernodes.backend._base import Backend
from hypernodes.backend._local import LocalBackend

__all__ = ["Backend", "LocalBackend", "PipelineExecutionEngine"]

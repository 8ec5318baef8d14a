"""Where pipelines run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypernodes._engine import PipelineExecutionEngine
from hypernodes.backend._base import Backend
from hypernodes.backend._local import LocalBackend

if TYPE_CHECKING:
    from hypernodes.backend._dask import DaskBackend
    from hypernodes.backend._image import modal_image
    from hypernodes.backend._modal import ModalBackend
    from hypernodes.backend._preflight import Preflight
    from hypernodes.backend._remote import RemoteBackend

__all__ = [
    "Backend",
    "DaskBackend",
    "LocalBackend",
    "ModalBackend",
    "PipelineExecutionEngine",
    "Preflight",
    "RemoteBackend",
    "modal_image",
]

_HOMES = {
    "DaskBackend": "_dask",
    "ModalBackend": "_modal",
    "RemoteBackend": "_remote",
    "Preflight": "_preflight",
    "modal_image": "_image",
}


def __getattr__(name: str) -> Any:
    """Import a backend of another machine when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

"""The image that a container needs: this Python, and the packages of hypernodes in the versions that are here."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from hypernodes.errors import RemoteExecutionError

if TYPE_CHECKING:
    import modal

NEEDED = ("aiocache", "anyio", "cloudpickle", "tenacity")
"""What hypernodes needs to run. Hypernodes itself is sent along, as it is here, with each app."""


def modal_image(*packages: str) -> modal.Image:
    """Return an image of this Python for :class:`ModalBackend`, with these packages in it.

    Hypernodes is not installed in it: a run brings along the one that is imported here, an installed release as well
    as a checkout. A package without a version gets the one that is installed here, so that what is pickled at one end
    can be read at the other.

    Args:
        packages: names as for ``pip install``, such as ``"numpy"`` or ``"torch==2.9.1"``.

    Raises:
        RemoteExecutionError: Modal's client is not installed.
    """
    try:
        import modal
    except ModuleNotFoundError as error:
        raise RemoteExecutionError('modal_image needs Modal\'s client: pip install "hypernodes[modal]"') from error
    return modal.Image.debian_slim().pip_install(*(as_here(package) for package in (*NEEDED, *packages)))


def as_here(package: str) -> str:
    """Return a requirement with the version that is installed here; as it is, if it says one or none is installed."""
    try:
        # A local version, such as 2.9.1+cpu, is in no registry.
        return f"{package}=={version(package).partition('+')[0]}"
    except (PackageNotFoundError, ValueError):
        return package

"""The image that a container needs: this Python, and the packages of hypernodes in the versions that are here."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from hypernodes.errors import DefinitionError, RemoteExecutionError

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
        DefinitionError: a name is not text, or is that of a module of this project, which no registry has: add it with
            ``.add_local_python_source("name")``.
    """
    for package in packages:
        _refuse_own(package)
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


def _refuse_own(package: str) -> None:
    """Raise an error for a module of this project: pip would look for a stranger's package of that name."""
    from hypernodes.backend._site import is_local

    if not isinstance(package, str):
        raise DefinitionError(f'modal_image takes names of packages, such as modal_image("numpy"), not {package!r}')
    if as_here(package) == package and is_local(package):
        raise DefinitionError(
            f"{package!r} is a module of this project, and no package is installed by that name: "
            f'modal_image(...).add_local_python_source("{package}"); a package that is called so too needs a version, '
            f'such as "{package}==1.0"'
        )

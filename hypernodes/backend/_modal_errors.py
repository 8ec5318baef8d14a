"""What users read where Modal's client raises an error."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from typing import Any

from hypernodes._traceback import bare
from hypernodes.backend._image import NEEDED
from hypernodes.errors import ExecutionError, RemoteExecutionError, RemoteTimeoutError, WorkerCrashedError

A_RUN = "the run"
"""What errors call a run that is known by its id alone."""
_BLOB_BYTES = 2 << 20
"""Above this Modal's client sends arguments as a file of their own."""


@contextlib.contextmanager
def translated(what: str, but: Collection[int] = (), sent: int = 0) -> Any:
    """Raise one clear error of ours for what Modal's client raises, with its own as the cause.

    Errors whose ids are in ``but`` stay as they are: a node may use Modal, and its errors are the user's. ``sent`` is
    how many bytes were to go out.
    """
    import modal.exception as theirs

    try:
        yield
    except theirs.Error as error:
        if id(error) in but:
            raise
        raise _ours(what, error, sent) from bare(error)


@contextlib.contextmanager
def begun(what: str) -> Any:
    """Raise an error that says what to do, where a container cannot begin: all that ours raises comes in its reply."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise RemoteExecutionError(
            f"the image has no module {error.name!r}, which hypernodes needs to run {what} there: take "
            f"modal_image(...) of hypernodes.backend, or add image.pip_install({', '.join(map(repr, NEEDED))})"
        ) from bare(error)
    except (ImportError, SyntaxError, AttributeError, TypeError) as error:
        raise RemoteExecutionError(
            f"hypernodes cannot start in the container that is to run {what} ({type(error).__name__}: {error}): do its "
            f"Python and its packages fit those here? modal_image(...) of hypernodes.backend does"
        ) from bare(error)


def _ours(what: str, error: Exception, sent: int) -> ExecutionError:
    import modal.exception as theirs

    match error:
        case theirs.AuthError():
            return RemoteExecutionError(
                f"Modal refuses the account, or there is none ({said_by(error).partition('. ')[0]}): run "
                f"`modal token new`, or set MODAL_TOKEN_ID and MODAL_TOKEN_SECRET"
            )
        case theirs.FunctionTimeoutError():
            return RemoteTimeoutError(
                f"{what} took longer in its container than the backend's timeout allows: give it more seconds, as "
                f"ModalBackend(timeout=...)"
            )
        case theirs.InternalFailure() | theirs.InternalError():
            return WorkerCrashedError(
                f"the container that ran {what} died ({said_by(error)}): out of memory, for which there is "
                f"ModalBackend(memory=...), or a crash"
            )
        case theirs.ConnectionError():
            return RemoteExecutionError(
                f"Modal's servers do not answer ({error}): is this machine online? What ran there ends when its app is "
                f"not heard of any more"
            )
        case theirs.RemoteError() if type(error) is theirs.RemoteError and "cancelled" in str(error):
            return RemoteExecutionError(f"{what} was cancelled ({said_by(error)})")
        case theirs.RemoteError() if "app was stopped" in str(error):
            return RemoteExecutionError(
                f"{what} was ended with its app ({said_by(error)}): the `async with` block of its backend was left, or "
                f"someone stopped it on Modal's pages"
            )
        case theirs.NotFoundError() if what == A_RUN:
            return RemoteExecutionError(
                f"Modal knows no such run ({said_by(error)}): its id is what RunHandle.id was, and only the "
                f"account and the environment that started it know it, for some days"
            )
    said = f"Modal could not run {what}: {type(error).__name__}: {error}"
    if sent > _BLOB_BYTES:
        said += (
            f"; {sent / 2**20:.1f} MiB were to be sent: put large inputs into a modal.Volume, mount it with "
            f"volumes=..., and send their paths"
        )
    return RemoteExecutionError(said)


def said_by(error: Exception) -> str:
    """Return the text of an error, to go on after."""
    return str(error).rstrip(".")

"""Whole runs in one Modal container: one call goes out, the same engine runs there."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import anyio

from hypernodes._crew import Crew
from hypernodes._node import checked_seconds
from hypernodes._run import Job, Mode
from hypernodes._threads import current_async_library
from hypernodes.backend._remote import RemoteBackend, run_payload
from hypernodes.backend._sizes import mebibytes
from hypernodes.errors import DefinitionError, RemoteExecutionError, RemoteTimeoutError, WorkerCrashedError

if TYPE_CHECKING:
    import modal

_MOST_SECONDS = 86_400
_GPU = re.compile(r"[A-Za-z][\w-]*!?(:[1-9]\d*)?")
_DRAIN_S = 5.0
"""Seconds that one request for events waits for them."""


class ModalBackend(RemoteBackend):
    """Runs pipelines in a container on Modal: a run, or a whole map, is exactly one call.

    However many nodes and items there are, the caller holds one connection. The engine in the container is the one
    that runs here, so nesting, limits, retries, errors, caching and events are as they are locally. It uses the
    account that ``modal token new`` has set up. Needs ``pip install "hypernodes[modal]"`` and asyncio.

    Args:
        image: the ``modal.Image`` to run in; None for Debian with this Python and hypernodes. Packages that nodes
            import must be installed in it; modules of yours are added by ``image.add_local_python_source("name")``.
        gpu: such as ``"A100"`` or ``"H100:2"``, or a list of them in order of preference.
        cpu: cores to reserve; may be a fraction.
        memory: to reserve, in MiB or such as ``"32GB"``.
        timeout: seconds that one call may take, at most a day.
        volumes: ``modal.Volume`` by the absolute path where each is mounted. One that holds the run's
            :class:`~hypernodes.DiskCache` is reloaded before the run and committed after it.
        secrets: ``modal.Secret`` to be set as environment variables. The key of a :class:`~hypernodes.DiskCache` never
            travels with a run: where results are signed, give it to the container as a secret,
            ``modal.Secret.from_dict({"HYPERNODES_CACHE_KEY": ...})`` or ``modal.Secret.from_name(...)``.
        node_execution: as for :class:`PipelineExecutionEngine`, which runs in the container.
        map_execution: likewise.
        max_workers: likewise.
        max_concurrency: likewise.
        app_name: what the run is called on Modal's pages.
        environment: the Modal environment; None for the account's default.

    Raises:
        DefinitionError: an option is not what it must be.
    """

    def __init__(
        self,
        image: modal.Image | None = None,
        *,
        gpu: str | list[str] | None = None,
        cpu: float | None = None,
        memory: int | str | None = None,
        timeout: float = 3600,
        volumes: Mapping[str, modal.Volume] | None = None,
        secrets: Collection[modal.Secret] | None = None,
        node_execution: Mode = "async",
        map_execution: Mode = "async",
        max_workers: int | None = None,
        max_concurrency: int | None = None,
        app_name: str = "hypernodes",
        environment: str | None = None,
    ) -> None:
        super().__init__(
            node_execution=node_execution,
            map_execution=map_execution,
            max_workers=max_workers,
            max_concurrency=max_concurrency,
        )
        modal = _modal()
        self._image = _checked(image, modal.Image, "image", "modal.Image.debian_slim()")
        self._volumes = _checked_volumes(volumes or {}, modal)
        self._options: dict[str, Any] = {
            "gpu": _checked_gpu(gpu),
            "cpu": _checked_cpu(cpu),
            "memory": None if memory is None else mebibytes(memory, "memory"),
            "timeout": _checked_timeout(timeout),
            "secrets": [
                _checked(each, modal.Secret, "secrets", "modal.Secret.from_name(...)") for each in secrets or ()
            ],
        }
        self._app_name = app_name
        self._environment = environment

    async def submit(self, payload: bytes, job: Job, receive: Callable[[bytes], None] | None) -> bytes:
        """Call the container once and return its reply; leaving early ends the container."""
        if current_async_library() != "asyncio":
            raise RemoteExecutionError("Modal's client needs asyncio; under trio, call run() in a thread")
        modal = _modal()
        image = self._image or modal.Image.debian_slim().pip_install("hypernodes")
        app = modal.App(self._app_name)
        function = app.function(image=image, volumes=self._volumes, **self._options)(run_job)
        with _translated(job.plan.label):
            async with app.run.aio(environment_name=self._environment):
                mounted = list(self._volumes.values())
                if receive is None:
                    return await function.remote.aio(payload, mounted)  # type: ignore[no-any-return]
                async with modal.Queue.ephemeral.aio(environment_name=self._environment) as queue:
                    return await _draining(queue, receive, lambda: function.remote.aio(payload, mounted, queue))

    def __repr__(self) -> str:
        said = [f"{name}={value!r}" for name, value in self._options.items() if value and name != "secrets"]
        return f"ModalBackend({', '.join(said)})"


async def _draining(queue: Any, receive: Callable[[bytes], None], call: Callable[[], Any]) -> bytes:
    """Make a call, and hand over meanwhile what comes through a queue."""
    replies: list[bytes] = []

    async def drain(crew: Crew) -> None:
        while True:
            for batch in await queue.get_many.aio(100, timeout=_DRAIN_S):
                receive(batch)

    async def both(crew: Crew) -> None:
        crew.start(drain)
        replies.append(await call())
        crew.stop()

    await Crew.run(both)
    # What was sent last may have come in after the reply.
    for batch in await queue.get_many.aio(1_000, block=False):
        receive(batch)
    return replies[0]


async def run_job(payload: bytes, volumes: Collection[modal.Volume] = (), queue: modal.Queue | None = None) -> bytes:
    """What the container is called with; whatever happens, it is a reply.

    Args:
        payload: the job.
        volumes: those that are mounted.
        queue: where events go while the job runs.
    """
    async with _fresh(volumes):
        return await run_payload(payload, None if queue is None else partial(_post, queue))


async def _post(queue: Any, batch: bytes) -> None:
    await queue.put.aio(batch)


@contextlib.asynccontextmanager
async def _fresh(volumes: Collection[modal.Volume]) -> AsyncIterator[None]:
    """See what others have written to volumes, and let them see what is written here."""
    for volume in volumes:
        await volume.reload.aio()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        with anyio.CancelScope(shield=True):
            for volume in volumes:
                await volume.commit.aio()  # type: ignore[no-untyped-call]


def _modal() -> Any:
    try:
        import modal
    except ModuleNotFoundError as error:
        raise RemoteExecutionError('ModalBackend needs Modal\'s client: pip install "hypernodes[modal]"') from error
    return modal


@contextlib.contextmanager
def _translated(what: str) -> Any:
    """Raise one clear error of ours for what Modal's client raises, with its own as the cause."""
    import modal.exception as theirs

    try:
        yield
    except theirs.AuthError as error:
        raise RemoteExecutionError(
            f"Modal refuses the account ({error}): run `modal token new`, or set MODAL_TOKEN_ID and MODAL_TOKEN_SECRET"
        ) from error
    except theirs.FunctionTimeoutError as error:
        raise RemoteTimeoutError(f"{what} took longer in its container than the backend's timeout allows") from error
    except (theirs.InternalFailure, theirs.InternalError) as error:
        raise WorkerCrashedError(f"the container that ran {what} died ({error}): out of memory, or a crash") from error
    except theirs.Error as error:
        raise RemoteExecutionError(f"Modal could not run {what}: {type(error).__name__}: {error}") from error


def _checked(value: Any, kind: type, option: str, example: str) -> Any:
    if value is None and option == "image":
        return None
    if isinstance(value, kind):
        return value
    raise DefinitionError(f"{option} of ModalBackend takes a modal.{kind.__name__}, such as {example}, not {value!r}")


def _checked_gpu(gpu: Any) -> Any:
    several = list(gpu) if isinstance(gpu, list | tuple) else [gpu]
    if gpu is None or (several and all(isinstance(each, str) and _GPU.fullmatch(each) for each in several)):
        return gpu if gpu is None or isinstance(gpu, str) else several
    raise DefinitionError(f'gpu of ModalBackend is a type such as "A100" or "H100:2", or a list of them, not {gpu!r}')


def _checked_cpu(cpu: Any) -> float | None:
    if cpu is None or (isinstance(cpu, int | float) and not isinstance(cpu, bool) and cpu > 0):
        return cpu
    raise DefinitionError(f"cpu of ModalBackend is a number of cores above 0, not {cpu!r}")


def _checked_timeout(timeout: Any) -> int:
    seconds = checked_seconds(timeout, "ModalBackend")
    if seconds is None or not 1 <= seconds <= _MOST_SECONDS:
        raise DefinitionError(f"timeout of ModalBackend is 1 to {_MOST_SECONDS:,} seconds (a day), not {timeout!r}")
    return math.ceil(seconds)


def _checked_volumes(volumes: Any, modal: Any) -> dict[str, Any]:
    if not isinstance(volumes, Mapping):
        raise DefinitionError(f"volumes of ModalBackend is a dict of paths and modal.Volume, not {volumes!r}")
    for path, volume in volumes.items():
        if not isinstance(path, str) or not PurePosixPath(path).is_absolute():
            raise DefinitionError(f"volumes of ModalBackend: {path!r} is not an absolute path in the container")
        _checked(volume, modal.Volume, f"volumes[{path!r}]", "modal.Volume.from_name(...)")
    return dict(volumes)

"""Whole runs in one Modal container: one call goes out, the same engine runs there."""

from __future__ import annotations

import contextlib
import logging
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar
from uuid import uuid4

import anyio

from hypernodes._bridge import run_sync
from hypernodes._crew import Crew, unbroken
from hypernodes._node import checked_count, checked_seconds
from hypernodes._run import Mode
from hypernodes._threads import current_async_library, default_threads, in_thread
from hypernodes._traceback import bare
from hypernodes.backend._entry import Shared, run_payload
from hypernodes.backend._handle import RemoteCall
from hypernodes.backend._image import modal_image
from hypernodes.backend._modal_calls import end_call, reply_of, running, spawned
from hypernodes.backend._modal_errors import A_RUN, said_by, translated
from hypernodes.backend._remote import Line, Placing, RemoteBackend
from hypernodes.backend._replay import Receive
from hypernodes.backend._site import Site, site_of
from hypernodes.backend._sizes import mebibytes
from hypernodes.errors import (
    DefinitionError,
    ExecutionError,
    RemoteExecutionError,
    SerializationError,
    quoted,
)

if TYPE_CHECKING:
    import modal

_log = logging.getLogger("hypernodes")
_MOST_SECONDS = 86_400
_MOST_IDLE_S = 3_600
_GPU = re.compile(r"[A-Za-z][\w-]*!?(:[1-9]\d*)?")
ENTRY = "run_job"
"""The name of the function that every app has."""
CONTAINERS = 10
"""How many containers a distributed map takes where ``max_containers`` does not say."""
_INLINE_BYTES = 1 << 20
_PIECE_BYTES = 16 << 20
T = TypeVar("T")

SharedRef = tuple[str, Any, int]
"""What chunks share: its digest, itself or the ``modal.Dict`` that holds it, and in how many pieces."""

_POSTED_BYTES = 512 << 10
"""Of one item of a queue, which takes a mebibyte."""
_END = ("", 0, 0, b"")
"""Follows the last piece of an event in a queue."""
_BEAT_S = 0.25
"""Seconds between two turns of a loop that only waits: Jupyter's interrupt is noticed when it turns."""


class ModalBackend(RemoteBackend):
    """Runs pipelines in a container on Modal: a run, or a whole map, is exactly one call.

    However many nodes and items there are, the caller holds one connection. The engine in the container is the one
    that runs here, so nesting, limits, retries, errors, caching and events are as they are locally. It uses the
    account that ``modal token new`` has set up. Needs ``pip install "hypernodes[modal]"`` and asyncio.

    Each run starts an app of its own, and with it new containers; ``async with backend:`` keeps one app for the runs
    in the block, which find its containers warm.

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
        mode: ``"single"``: a run, or a whole map, is one call of one container; a stream reads its source to the end
            first. ``"distributed"``: a map goes out in chunks of items over up to ``max_containers`` containers; a
            chunk whose container dies is tried again, and an item that kills its container fails alone. Limits are
            shared out among them.
        chunk_size: items of a chunk of a distributed map; None to go by the time that they take.
        max_containers: how many there may be at once; None for Modal's own bound, and 10 for a distributed map.
        keep_warm: how many containers stay while their app does, also when there is nothing to do.
        scaledown_window: seconds that an idle container stays, 2 to 3600; None for Modal's default.
        app_name: what the run is called on Modal's pages.
        deployed: the name of an app that :meth:`adeploy` has made, to run on its containers instead of new ones.
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
        mode: Placing = "single",
        chunk_size: int | None = None,
        max_containers: int | None = None,
        keep_warm: int | None = None,
        scaledown_window: float | None = None,
        app_name: str = "hypernodes",
        deployed: str | None = None,
        environment: str | None = None,
    ) -> None:
        super().__init__(
            mode=mode,
            chunk_size=chunk_size,
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
            "max_containers": checked_count(max_containers, "max_containers", "ModalBackend"),
            "min_containers": checked_count(keep_warm, "keep_warm", "ModalBackend"),
            "scaledown_window": _checked_window(scaledown_window),
        }
        self._app_name = app_name
        self._environment = environment
        self._deployed = deployed
        if deployed is not None:
            if not isinstance(deployed, str) or not deployed:
                raise DefinitionError(f"deployed of ModalBackend is the name of an app, not {deployed!r}")
            _refuse_options(image, self._options)
        self._kept: _Kept | None = None

    def items_at_once(self) -> int:
        """Return how many items of a stream are on their way at once, where its caller does not say."""
        return super().items_at_once() * (self._width if self.mode == "distributed" else 1)

    def site(self) -> Site:
        """Return what the image says of itself: nothing is built, and nobody asked."""
        image = None if self._deployed else self._chosen_image()
        return site_of(image, self._volumes, bool(self._options["secrets"]))

    def _chosen_image(self) -> Any:
        return self._image or modal_image()

    @property
    def _width(self) -> int:
        return self._options["max_containers"] or CONTAINERS

    async def connected(self, label: str, receive: Receive | None, work: Callable[[Line], Awaitable[T]]) -> T:
        """Do some work with a container, or several, that are there meanwhile; leaving early ends them."""
        _need_asyncio()
        modal = _modal()
        kept = self._kept
        own: set[int] = set()

        async def working(line: Line) -> T:
            try:
                return await work(line)
            except Exception as error:
                own.add(id(error))
                raise

        with translated(label, own):
            async with contextlib.AsyncExitStack() as stack:
                if kept is not None:
                    function = kept.function
                elif self._deployed is not None:
                    function = await self._found()
                else:
                    function = await stack.enter_async_context(self._app())
                alone = kept is None and self._deployed is None
                line = ModalLine(function, list(self._volumes.values()), stack, self._environment, self._width, alone)
                if receive is not None:
                    line.queue = await stack.enter_async_context(
                        modal.Queue.ephemeral.aio(environment_name=self._environment)
                    )
                return await _listening(line.queue, receive, lambda: working(line))

    async def _found(self) -> Any:
        """Return the function of the deployed app."""
        modal = _modal()
        assert self._deployed is not None
        try:
            function = modal.Function.from_name(self._deployed, ENTRY, environment_name=self._environment)
            await function.hydrate.aio()
        except modal.exception.NotFoundError as error:
            raise RemoteExecutionError(
                f"no app {self._deployed!r} is deployed ({said_by(error)}): deploy it with "
                f"ModalBackend(image, ...).deploy({self._deployed!r})"
            ) from bare(error)
        return function

    @contextlib.asynccontextmanager
    async def _app(self, *, detach: bool = False) -> AsyncIterator[Any]:
        """Run an app of its own, which ends with the block; give its function."""
        app, function = self._defined()
        async with running(app, app.run.aio(environment_name=self._environment, detach=detach)):
            yield function

    def _defined(self) -> tuple[Any, Any]:
        modal = _modal()
        app = modal.App(self._app_name)
        return app, app.function(image=self._chosen_image(), volumes=self._volumes, **self._options)(run_job)

    async def __aenter__(self) -> Self:
        """Keep one app for the runs in the block, so that they find warm containers."""
        _need_asyncio()
        if self._deployed is not None:
            raise DefinitionError("a deployed app stays as it is; `async with` is for a ModalBackend without deployed=")
        if self._kept is None:
            with translated("the app"):
                app = self._app()
                opened = _Kept(app, await app.__aenter__())
            if self._kept is None:
                self._kept = opened
            else:  # two blocks began at once
                await unbroken(opened.close)
        self._kept.holders += 1
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        kept = self._kept
        assert kept is not None
        kept.holders -= 1
        if not kept.holders:
            self._kept = None
            with translated("the app"):
                await unbroken(kept.close)

    async def adeploy(self, name: str) -> None:
        """Deploy the app under a name, with this backend's image and resources; it stays until it is stopped.

        ``ModalBackend(deployed=name)`` runs on it, from any process, and finds its warm containers.
        """
        _need_asyncio()
        app, _ = self._defined()
        with translated(f"deploying {name!r}"):
            await app.deploy.aio(name=name, environment_name=self._environment)

    def deploy(self, name: str) -> None:
        """:meth:`adeploy` from sync code."""
        run_sync(lambda: self.adeploy(name))

    async def detached(self, payload: bytes, label: str) -> str:
        """Start a call that outlives this process; return the id that it is found by."""
        _need_asyncio()
        calls: list[Any] = []
        try:
            with translated(label, sent=len(payload)):
                async with contextlib.AsyncExitStack() as stack:
                    if self._deployed is not None:
                        function = await self._found()
                    else:
                        function = await stack.enter_async_context(self._app(detach=True))
                    calls.append(await spawned(function, (payload, list(self._volumes.values()))))
        except anyio.get_cancelled_exc_class():
            for call in calls:  # nobody gets its id
                await unbroken(partial(end_call, call))
            raise
        return f"modal:{calls[0].object_id}"

    def __getstate__(self) -> dict[str, Any]:
        """Return what it is, for another process of this machine; what Modal's client has made stays in this one."""
        if self._deployed is None or self._volumes:
            raise SerializationError(
                f"{self!r} cannot be sent to another process, since Modal's images, volumes and secrets cannot: let "
                f"the pipeline around it run its items in this one, without map_execution='parallel', or deploy the "
                f"app and use ModalBackend(deployed=...)"
            )
        return vars(self).copy()

    def __repr__(self) -> str:
        said = [f"{name}={value!r}" for name, value in self._options.items() if value and name != "secrets"]
        return f"ModalBackend({', '.join(said)})"


class ModalLine(Line):
    """The function of an app, for the calls of one run.

    Args:
        function: what is called.
        volumes: those that are mounted.
        stack: closed when the run ends.
        environment: the Modal environment.
        width: how many containers there may be.
        alone: whether the app is this run's own and ends with it.
    """

    def __init__(
        self,
        function: Any,
        volumes: list[Any],
        stack: contextlib.AsyncExitStack,
        environment: str | None,
        width: int,
        alone: bool,
    ) -> None:
        self.width = width
        self.queue: Any = None
        self._function = function
        self._volumes = volumes
        self._stack = stack
        self._environment = environment
        self._alone = alone

    async def call(self, payload: bytes, shared: SharedRef | None = None) -> bytes:
        """Call once."""
        arguments = (payload, self._volumes, self.queue, shared)
        with translated("the pipeline", sent=len(payload)):
            if self._alone:
                return await self._function.remote.aio(*arguments)  # type: ignore[no-any-return]
            return await reply_of(self._function, arguments)

    async def share(self, data: bytes) -> SharedRef:
        """Keep what calls share in a ``modal.Dict`` while the run lasts, unless it is small."""
        name, _ = await in_thread(lambda: Shared.name(data), default_threads())
        if len(data) <= _INLINE_BYTES:
            return name, data, 0
        store = await self._stack.enter_async_context(_modal().Dict.ephemeral.aio(environment_name=self._environment))
        pieces = range(0, len(data), _PIECE_BYTES)
        for number, start in enumerate(pieces):
            await store.put.aio(number, data[start : start + _PIECE_BYTES])
        return name, store, len(pieces)


async def _listening(queue: Any, receive: Receive | None, work: Callable[[], Awaitable[T]]) -> T:
    """Do some work; hand over meanwhile what comes through a queue, if there is one."""
    made: list[T] = []
    deaf: list[Exception] = []

    async def beat(crew: Crew) -> None:
        while True:  # noqa: ASYNC110 - that the loop turns is the point
            await anyio.sleep(_BEAT_S)

    async def drain(crew: Crew) -> None:
        assert receive is not None
        joined = _Joined(receive)
        try:
            # Without a timeout: it would raise where nothing comes for so long, as while a container starts.
            while _END not in (pieces := await queue.get_many.aio(100)):
                for piece in pieces:
                    await joined.take(*piece)
            for piece in pieces[: pieces.index(_END)]:
                await joined.take(*piece)
        except Exception as error:  # noqa: BLE001 - nobody loses a run over what callbacks would have been told
            _log.warning("the events of a run on Modal do not come any more: %s: %s", type(error).__name__, error)
            deaf.append(error)
            if not made:
                return
        crew.stop()

    async def all_three(crew: Crew) -> None:
        crew.start(beat)
        if receive is not None:
            crew.start(drain)
        made.append(await work())
        if receive is None or deaf:
            crew.stop()
            return
        try:
            # Told, not cancelled: a request that is given up may have taken pieces out of the queue already.
            await queue.put.aio(_END)
        except Exception:  # noqa: BLE001 - the result is there, whatever became of the events
            crew.stop()

    await Crew.run(all_three)
    return made[0]


async def _post(queue: Any, batch: bytes) -> None:
    """Send a batch of events, in pieces that a queue takes."""
    name, pieces = uuid4().hex, range(0, len(batch), _POSTED_BYTES)
    for number, start in enumerate(pieces):
        await queue.put.aio((name, number, len(pieces), batch[start : start + _POSTED_BYTES]))


class _Joined:
    """Joins the pieces of batches, which come from several containers at once."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._parts: dict[str, list[bytes]] = {}

    async def take(self, name: str, number: int, count: int, piece: bytes) -> None:
        """Take a piece; hand a batch over that is whole."""
        parts = self._parts.setdefault(name, [])
        parts.append(piece)
        if number + 1 == count:
            await self._receive(b"".join(self._parts.pop(name)))


async def run_job(
    payload: bytes,
    volumes: Collection[modal.Volume] = (),
    queue: modal.Queue | None = None,
    shared: SharedRef | None = None,
) -> bytes:
    """What the container is called with; whatever happens, it is a reply.

    Args:
        payload: the job, or a chunk of one.
        volumes: those that are mounted.
        queue: where events go while the job runs.
        shared: the job that a chunk is part of.
    """
    common = None if shared is None else Shared(shared[0], partial(_fetched, shared))
    async with _fresh(volumes):
        return await run_payload(payload, None if queue is None else partial(_post, queue), common)


async def _fetched(shared: SharedRef) -> bytes:
    _, data, pieces = shared
    if isinstance(data, bytes):
        return data
    return b"".join([await data.get.aio(number) for number in range(pieces)])


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


class ModalCall(RemoteCall):
    """A spawned call, by the id that Modal knows it by."""

    def __init__(self, id: str) -> None:
        self._call = _modal().FunctionCall.from_id(id)

    async def reply(self, seconds: float | None) -> bytes:
        """Wait for the reply, at most so long."""
        _need_asyncio()
        with translated(A_RUN):
            return await self._call.get.aio(timeout=seconds)  # type: ignore[no-any-return]

    def is_end(self, error: ExecutionError) -> bool:
        """Say whether it is an error of the call, and not of the account or the connection."""
        from modal.exception import AuthError, ConnectionError

        return not isinstance(error.__cause__, AuthError | ConnectionError)

    async def cancel(self) -> None:
        """End the call and its container."""
        _need_asyncio()
        with translated(A_RUN):
            await self._call.cancel.aio(terminate_containers=True)


def attached(id: str) -> RemoteCall:
    """Return a call by its id."""
    return ModalCall(id)


@dataclass(slots=True)
class _Kept:
    """An app that is kept for several runs, on whichever loop: Modal's client has a loop of its own."""

    app: contextlib.AbstractAsyncContextManager[Any]
    function: Any
    holders: int = 0

    async def close(self) -> None:
        await self.app.__aexit__(None, None, None)


def _need_asyncio() -> None:
    if current_async_library() != "asyncio":
        raise RemoteExecutionError("Modal's client needs asyncio; under trio, call run() in a thread")


def _modal() -> Any:
    try:
        import modal
    except ModuleNotFoundError as error:
        raise RemoteExecutionError('ModalBackend needs Modal\'s client: pip install "hypernodes[modal]"') from error
    return modal


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


def _checked_window(seconds: Any) -> int | None:
    if seconds is None:
        return None
    if isinstance(seconds, int | float) and not isinstance(seconds, bool) and 2 <= seconds <= _MOST_IDLE_S:
        return math.ceil(seconds)
    raise DefinitionError(f"scaledown_window of ModalBackend is 2 to {_MOST_IDLE_S:,} seconds, not {seconds!r}")


_OF_THE_APP = ("gpu", "cpu", "memory", "timeout", "secrets", "min_containers", "scaledown_window")


def _refuse_options(image: Any, options: Mapping[str, Any]) -> None:
    """Raise an error for options that a deployed app has already, given beside its name."""
    default = {"timeout": 3600}
    said = ["image"] if image is not None else []
    said += [name for name in _OF_THE_APP if options[name] and options[name] != default.get(name)]
    if said:
        raise DefinitionError(
            f"a deployed app has its own {quoted(said)}: give them to the ModalBackend that deploys it, and only "
            f"its name here"
        )


def _checked_volumes(volumes: Any, modal: Any) -> dict[str, Any]:
    if not isinstance(volumes, Mapping):
        raise DefinitionError(f"volumes of ModalBackend is a dict of paths and modal.Volume, not {volumes!r}")
    for path, volume in volumes.items():
        if not isinstance(path, str) or not PurePosixPath(path).is_absolute():
            raise DefinitionError(f"volumes of ModalBackend: {path!r} is not an absolute path in the container")
        _checked(volume, modal.Volume, f"volumes[{path!r}]", "modal.Volume.from_name(...)")
    return dict(volumes)

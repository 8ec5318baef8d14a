"""Whole runs in one Modal container: one call goes out, the same engine runs there."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import anyio

from hypernodes._bridge import run_sync
from hypernodes._crew import unbroken
from hypernodes._run import Mode
from hypernodes._traceback import bare, user_frames
from hypernodes.backend._image import modal_image
from hypernodes.backend._modal_calls import end_call, modal_client, need_asyncio, running, spawned
from hypernodes.backend._modal_errors import said_by, translated
from hypernodes.backend._modal_job import ENTRY, run_job
from hypernodes.backend._modal_line import ModalLine, listening
from hypernodes.backend._modal_options import (
    checked,
    checked_name,
    checked_volumes,
    function_options,
    refuse_beside_deployed,
)
from hypernodes.backend._remote import Line, Placing, RemoteBackend
from hypernodes.backend._replay import Receive
from hypernodes.backend._site import Site, site_of
from hypernodes.errors import DefinitionError, RemoteExecutionError, SerializationError

if TYPE_CHECKING:
    import modal

CONTAINERS = 10
"""How many containers a distributed map takes where ``max_containers`` does not say."""
T = TypeVar("T")


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
        deployed: the name of an app that :meth:`adeploy` has made, to run on its containers instead of new ones. Its
            volumes are named here too, where a cache is on one.
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
        given = locals()
        self._said = {name: given[name] for name, default in _SAID.items() if given[name] != default}
        super().__init__(
            mode=mode,
            chunk_size=chunk_size,
            node_execution=node_execution,
            map_execution=map_execution,
            max_workers=max_workers,
            max_concurrency=max_concurrency,
        )
        modal = modal_client()
        self._image = None if image is None else checked(image, modal.Image, "image", "modal.Image.debian_slim()")
        self._volumes = checked_volumes(volumes or {}, modal)
        self._options = function_options(
            modal,
            gpu=gpu,
            cpu=cpu,
            memory=memory,
            timeout=timeout,
            secrets=secrets,
            max_containers=max_containers,
            keep_warm=keep_warm,
            scaledown_window=scaledown_window,
        )
        self._app_name = checked_name(app_name, "app_name")
        self._environment = None if environment is None else checked_name(environment, "environment")
        self._deployed = deployed
        if deployed is not None:
            refuse_beside_deployed(deployed, image, self._options)
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
        need_asyncio()
        modal = modal_client()
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
                line = ModalLine(
                    label, function, list(self._volumes.values()), stack, self._environment, self._width, alone
                )
                if receive is not None:
                    line.queue = await stack.enter_async_context(
                        modal.Queue.ephemeral.aio(environment_name=self._environment)
                    )
                return await listening(line.queue, receive, lambda: working(line))

    async def _found(self) -> Any:
        """Return the function of the deployed app."""
        modal = modal_client()
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
        modal = modal_client()
        app = modal.App(self._app_name)
        return app, app.function(image=self._chosen_image(), volumes=self._volumes, **self._options)(run_job)

    async def __aenter__(self) -> Self:
        """Keep one app for the runs in the block, so that they find warm containers."""
        need_asyncio()
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
        need_asyncio()
        app, _ = self._defined()
        with translated(f"the deployment of {name!r}"):
            await app.deploy.aio(name=name, environment_name=self._environment)

    def deploy(self, name: str) -> None:
        """:meth:`adeploy` from sync code."""
        with user_frames:
            run_sync(lambda: self.adeploy(name))

    async def detached(self, payload: bytes, label: str) -> str:
        """Start a call that outlives this process; return the id that it is found by."""
        need_asyncio()
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
        return f"ModalBackend({', '.join(f'{name}={value!r}' for name, value in self._said.items())})"


_SAID = {
    name: parameter.default
    for name, parameter in inspect.signature(ModalBackend).parameters.items()
    if name not in ("image", "volumes", "secrets")
}
"""Options that a backend shows where they are not the default."""


@dataclass(slots=True)
class _Kept:
    """An app that is kept for several runs, on whichever loop: Modal's client has a loop of its own."""

    app: contextlib.AbstractAsyncContextManager[Any]
    function: Any
    holders: int = 0

    async def close(self) -> None:
        await self.app.__aexit__(None, None, None)

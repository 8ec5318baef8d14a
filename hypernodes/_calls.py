"""Calling one node's function: limits, timeout and retries around the place where it runs."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextvars import copy_context
from functools import partial
from typing import Any

import anyio

from hypernodes import events as ev
from hypernodes._context import await_in_copy
from hypernodes._cost import CHEAP_S
from hypernodes._feed import END
from hypernodes._mapping import Path
from hypernodes._program import BoundCall
from hypernodes._run import Bound, Scope, held, in_order
from hypernodes._threads import Spent, given_up, in_thread
from hypernodes.errors import NodeTimeoutError, OutputMismatchError

_UNSET: Any = object()


async def call_node(scope: Scope, step: BoundCall, values: list[Any], index: int | None) -> Any:
    """Call a step's function with its arguments from ``values``, as its node's options say."""
    if step.direct_sync and step.cost.inline:
        # It has no limit, timeout or retry: that is all there is to do.
        return await _inline(step, step.arguments(values), step.keyword_arguments(values))
    node = step.node
    if node.keep is None:
        return await _called(scope, step, values, index)
    # Imported by those alone who keep something.
    from hypernodes._kept import kept

    arguments, keywords = step.arguments(values), step.keyword_arguments(values)
    return await kept(scope.run, node, arguments, keywords, lambda: _called(scope, step, values, index))


async def _called(scope: Scope, step: BoundCall, values: list[Any], index: int | None) -> Any:
    policy = step.node.retry
    if policy is None:
        return await _attempt(scope, step, values, index)

    def tell(state: Any) -> None:
        if scope.wants(ev.NodeRetried):
            path = (*scope.at(index), step.name)
            error, wait = state.outcome.exception(), state.next_action.sleep
            scope.run.emit(ev.NodeRetried(scope.run.run_id, path, time.time(), state.attempt_number, error, wait))  # type: ignore[misc]

    async for attempt in policy.retrying(tell):
        with attempt:
            return await _attempt(scope, step, values, index)
    raise AssertionError("tenacity ends with a result or an error")


async def _attempt(scope: Scope, step: BoundCall, values: list[Any], index: int | None) -> Any:
    node = step.node
    bounds: list[Bound] = []
    if node.max_concurrency is not None:
        bounds.append(scope.run.bound(node, node.max_concurrency))
    if node.limit is not None:
        bounds.append(scope.limits[node.limit])
        if len(bounds) > 1:
            bounds = in_order(bounds)
    if step.place == "process":
        # Items of a parallel map keep their worker while they wait for a bound: there the worker comes first.
        first = scope.engine.map_execution == "parallel"
        bounds.insert(0 if first else len(bounds), scope.run.workers(scope.backend).tokens)
    if not bounds:
        return await _in_time(scope, step, values, index)
    async with held(bounds):
        return await _in_time(scope, step, values, index)


async def _in_time(scope: Scope, step: BoundCall, values: list[Any], index: int | None) -> Any:
    seconds = step.node.timeout
    if seconds is None:
        return await _placed(scope, step, values, index, None)
    result = _UNSET
    with anyio.move_on_after(seconds) as deadline:
        result = await _placed(scope, step, values, index, deadline)
    if result is _UNSET and deadline.cancelled_caught:
        raise NodeTimeoutError(f"node {step.name!r} did not finish within {seconds:g} s")
    return result


async def _placed(
    scope: Scope, step: BoundCall, values: list[Any], index: int | None, deadline: anyio.CancelScope | None
) -> Any:
    arguments = step.arguments(values)
    keywords = step.keyword_arguments(values)
    match step.node.kind:
        case "async":
            return await await_in_copy(step.func(*arguments, **keywords))
        case "async_generator":
            return await await_in_copy(_collect_async(scope, step, step.func(*arguments, **keywords), index))
    if step.place == "process":
        path = (*scope.at(index), step.name)
        return await scope.run.workers(scope.backend).call(
            step,
            arguments,
            keywords,
            path,
            tell=partial(_tell_chunk, scope, step, index),
            ready=partial(_start_again, deadline, step.node.timeout),
        )
    if step.node.kind == "generator":
        return await _collect(scope, step, arguments, keywords, index, deadline)
    if step.cost.inline:
        return await _inline(step, arguments, keywords)
    result, spent = await _in_thread(scope, step, lambda: step.func(*arguments, **keywords), deadline)
    if isinstance(result, Awaitable):
        # A sync function that hands out a coroutine, such as a decorated async one: finish it here.
        return await result
    step.cost.measured(*spent)
    return result


def _start_again(deadline: anyio.CancelScope | None, seconds: float | None) -> None:
    """Let a timeout begin now: starting a worker is not the function's time."""
    if deadline is not None and seconds is not None:
        deadline.deadline = anyio.current_time() + seconds


async def _inline(step: BoundCall, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    began = time.perf_counter()
    result = copy_context().run(step.func, *arguments, **keywords)
    now = time.perf_counter()
    if now - began > CHEAP_S:
        step.cost.doubted(now - began, now)
    return await result if isinstance(result, Awaitable) else result


async def _in_thread(
    scope: Scope, step: BoundCall, call: Callable[[], Any], deadline: anyio.CancelScope | None
) -> tuple[Any, Spent]:
    """Call in a worker thread; return the result and what it took there."""

    def leave() -> bool:
        if scope.run.leave_thread():
            return True
        # Past its deadline a thread is left to itself, or one that hangs would hold the run for ever.
        if deadline is None or not deadline.cancel_called:
            return False
        import logging

        logging.getLogger("hypernodes").warning(
            "node %r was given up, but Python cannot stop its thread: it runs on until it returns; "
            "run_in='process' can be stopped",
            step.name,
        )
        return True

    threads = scope.run.threads(scope.engine.max_workers)
    lanes = step.cost.lanes
    if lanes is None:
        return await in_thread(call, threads, leave)
    async with scope.run.lanes(step.cost, lanes):
        return await in_thread(call, threads, leave)


async def _collect(
    scope: Scope,
    step: BoundCall,
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
    index: int | None,
    deadline: anyio.CancelScope | None,
) -> list[Any]:
    """Read a generator into a list; between pieces it can be cancelled, also in a thread."""
    pieces: list[Any] = []
    wanted = scope.wants(ev.NodeChunk)
    if step.cost.inline:
        began = time.perf_counter()
        run = copy_context().run
        source = run(step.func, *arguments, **keywords)
        while (piece := run(next, source, END)) is not END:
            pieces.append(piece)
            if wanted:
                _tell_chunk(scope, step, index, piece)
            if time.perf_counter() > scope.run.yield_at:
                await scope.run.breathe()
        now = time.perf_counter()
        if now - began > CHEAP_S:
            step.cost.doubted(now - began, now)
        return pieces

    def read() -> None:
        from anyio.from_thread import run_sync

        for piece in step.func(*arguments, **keywords):
            if given_up():
                return
            pieces.append(piece)
            if wanted:
                run_sync(_tell_chunk, scope, step, index, piece)

    _, spent = await _in_thread(scope, step, read, deadline)
    step.cost.measured(*spent)
    return pieces


async def _collect_async(scope: Scope, step: BoundCall, source: Any, index: int | None) -> list[Any]:
    pieces: list[Any] = []
    wanted = scope.wants(ev.NodeChunk)
    try:
        async for piece in source:
            pieces.append(piece)
            if wanted:
                _tell_chunk(scope, step, index, piece)
            if time.perf_counter() > scope.run.yield_at:
                await scope.run.breathe()
    finally:
        with anyio.CancelScope(shield=True):
            await source.aclose()
    return pieces


def _tell_chunk(scope: Scope, step: BoundCall, index: int | None, piece: Any) -> None:
    if scope.wants(ev.NodeChunk):
        path: Path = (*scope.at(index), step.name)
        scope.run.emit(ev.NodeChunk(scope.run.run_id, path, time.time(), piece))  # type: ignore[misc]


def unpack(step: BoundCall, values: list[Any], result: Any) -> None:
    """Store the parts of a result under the names that the node declares for them."""
    if not isinstance(result, tuple) or len(result) != len(step.targets):
        got = f"a tuple of {len(result)}" if isinstance(result, tuple) else f"a {type(result).__name__}"
        names = ", ".join(step.node.outputs)
        raise OutputMismatchError(
            f"node {step.name!r} declares {len(step.targets)} outputs ({names}) and returned {got}; "
            f"return a tuple of that many, or name one output"
        )
    for target, part in zip(step.targets, result, strict=True):
        values[target] = part

"""Bounds of a run, for jobs of it that run where nobody can ask for their tokens."""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import anyio

from hypernodes._node import Node
from hypernodes._plan import ExecutionPlan, PlanStep, tokens_of
from hypernodes._run import Bound, BoundKey, Job, held

_MOST = 10_000


@contextlib.asynccontextmanager
async def sharing(job: Job) -> AsyncIterator[Job]:
    """Hold part of the bounds that a job needs while it runs elsewhere; give the job with that part as its bounds.

    It waits for one token of each, and takes what else is free then, as far as it can use it. So all jobs of a run that
    run at once hold together to what is allowed, wherever they are.
    """
    wanted = _wanted(job.plan, 1 if job.map is None else math.inf)
    bounds = {key: bound for key in wanted if (bound := _bound(job, key)) is not None}
    # All take them in one order, those in worker processes too: so none waits for another that waits for it.
    ordered = sorted({getattr(bound, "number", id(bound)): bound for bound in bounds.values()}.items())
    async with held(bound for _, bound in ordered):
        with contextlib.ExitStack() as taken:
            counts = {key: _more(bound, wanted[key], taken) for key, bound in bounds.items()}
            limits = {key: anyio.CapacityLimiter(count) for key, count in counts.items() if isinstance(key, str)}
            shares = [counts[key] for key in wanted if not isinstance(key, str)] if job.run is not None else None
            yield replace(job, limits=limits or None, shares=shares)


def tokens_within(job: Job) -> Iterable[int]:
    """Return how many tokens a job has of each bound that it needs."""
    yield from (tokens_of(bound) for bound in (job.limits or {}).values())
    if job.shares is not None:
        yield from job.shares
        return
    for key in _wanted(job.plan, 1):
        if not isinstance(key, str):
            yield tokens_of(_said(key))


def shared_bounds(plan: ExecutionPlan, shares: Sequence[int] | None) -> Mapping[BoundKey, int]:
    """Return what a job has of the bounds that its plan sets, by what its run knows them by; where it runs."""
    if shares is None:
        return {}
    return dict(zip((key for key in _wanted(plan, 1) if not isinstance(key, str)), shares, strict=True))


def _bound(job: Job, key: BoundKey) -> Bound | None:
    """Return a bound of the run that a job is part of; None where it has all of it."""
    if isinstance(key, str):
        return (job.limits or {}).get(key)
    return None if job.run is None else job.run.bound(key, _said(key))


def _said(key: Node[..., Any] | tuple[ExecutionPlan, str]) -> Any:
    """Return what a node, or a pipeline of one of its limits, says."""
    return key[0].settings.limits[key[1]] if isinstance(key, tuple) else key.max_concurrency


def _wanted(plan: ExecutionPlan, at_once: float) -> dict[BoundKey, float]:
    """Return the bounds that a plan's nodes hold, and how many nodes may want a token at once; in a fixed order."""
    found: dict[BoundKey, float] = {}
    _count(plan, {}, at_once, found)
    return found


def _count(plan: ExecutionPlan, around: Mapping[str, BoundKey], at_once: float, found: dict[BoundKey, float]) -> None:
    named = {**around, **{name: (plan, name) for name in plan.settings.limits}}
    for step in plan.steps:
        if isinstance(step, PlanStep):
            _count(step.plan, named, at_once if step.map is None else math.inf, found)
            continue
        keys: list[BoundKey] = [] if step.node.max_concurrency is None else [step.node]
        if (limit := step.node.limit) is not None:
            keys.append(named.get(limit, limit))
        for key in keys:
            found[key] = found.get(key, 0) + at_once


def _more(bound: Bound, uses: float, taken: contextlib.ExitStack) -> int:
    """Take what is free of a bound besides the token that is held; return how many there are then."""
    if not hasattr(bound, "max_value") and not hasattr(bound, "total_tokens"):
        return 1  # that of a worker process's parent, which can only be waited for
    most = int(min(uses, tokens_of(bound), _MOST))
    for count in range(1, most):
        try:
            taken.callback(_take(bound))
        except anyio.WouldBlock:
            return count
    return most


def _take(bound: Any) -> Callable[[], None]:
    """Take a token of a bound at once, and return what gives it back."""
    if isinstance(bound, anyio.CapacityLimiter):
        borrower = object()
        bound.acquire_on_behalf_of_nowait(borrower)
        return lambda: bound.release_on_behalf_of(borrower)
    bound.acquire_nowait()
    release: Callable[[], None] = bound.release
    return release

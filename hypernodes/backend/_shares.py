"""Limits of enclosing pipelines, for jobs that run where nobody can ask for their tokens."""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import anyio

from hypernodes._plan import ExecutionPlan, PlanStep, tokens_of
from hypernodes._run import Bound, Job, held

_MOST = 10_000


@contextlib.asynccontextmanager
async def sharing(job: Job) -> AsyncIterator[Job]:
    """Hold part of the limits that a job needs while it runs elsewhere; give the job with that part as its limits.

    It waits for one token of each limit, and takes what else is free then, as far as it can use it. So all jobs that
    run at once hold together to what is allowed, wherever they are.
    """
    limits = {name: (job.limits or {})[name] for name in sorted(job.plan.open_limits) if name in (job.limits or {})}
    if not limits:
        yield replace(job, limits=None)
        return
    async with held(limits.values()):
        with contextlib.ExitStack() as taken:
            parts = {name: _more(bound, _uses(job, name), taken) for name, bound in limits.items()}
            yield replace(job, limits={name: anyio.CapacityLimiter(count) for name, count in parts.items()})


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


def _uses(job: Job, name: str) -> float:
    """Return how many nodes of a job may want a token at once."""
    return math.inf if job.map is not None else max(1, _nodes(job.plan, name))


def _nodes(plan: ExecutionPlan, name: str) -> float:
    count: float = 0
    for step in plan.steps:
        if isinstance(step, PlanStep):
            inside = 0 if name in step.plan.settings.limits else _nodes(step.plan, name)
            count += math.inf if inside and step.map is not None else inside
        else:
            count += step.node.limit == name
    return count

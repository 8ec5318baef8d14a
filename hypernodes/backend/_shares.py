"""Bounds of a run, for jobs of it that run where nobody can ask for their tokens."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import anyio

from hypernodes._engine import DEFAULT_ITEMS
from hypernodes._node import Node
from hypernodes._plan import ExecutionPlan, PlanStep, needed_outputs, tokens_of
from hypernodes._run import Bound, BoundKey, Job, held, in_order

_MOST = 1_000
"""How many tokens a job takes at most."""
OwnKey = Node[..., Any] | tuple[ExecutionPlan, str]
"""What a bound is known by that the job's own plan sets."""


@dataclass(frozen=True, slots=True)
class Shares:
    """How much a job elsewhere has of the bounds of the run that it is part of. Picklable."""

    counts: list[int]
    """Tokens of each bound."""
    limits: Mapping[str, int]
    """The bounds of limits that enclosing pipelines set: positions in ``counts``. Two may be one."""
    own: list[int | None]
    """Likewise of what the job's plan bounds, in the order of its nodes; None for what the job has all of."""

    def there(
        self, plan: ExecutionPlan, wanted: Iterable[str] | None, parts: int
    ) -> tuple[Mapping[str, Bound], Mapping[BoundKey, Bound]]:
        """Return the limits and the other bounds for one of several equal parts of the job, where it runs."""
        bounds = [anyio.CapacityLimiter(max(1, count // parts)) for count in self.counts]
        own = zip(_own(_wanted(plan, wanted, 1)), self.own, strict=True)
        return (
            {name: bounds[position] for name, position in self.limits.items()},
            {key: bounds[position] for key, position in own if position is not None},
        )


@contextlib.asynccontextmanager
async def sharing(job: Job, items_at_once: int | None) -> AsyncIterator[Job]:
    """Hold part of the bounds that a job needs while it runs elsewhere; give the job with its part.

    It waits for one token of each, and takes what else is free then, as far as it can use it. So all jobs that run at
    once hold together to what is allowed, wherever they are.

    Args:
        job: what is to run; on its own, or as part of a run.
        items_at_once: of a map: how many items may run at once; None for any number.
    """
    if job.map is None:
        at_once = 1
    else:
        most = (items_at_once, job.total, job.map.max_concurrency, _MOST)
        at_once = min(count for count in most if count is not None)
    wanted = _wanted(job.plan, job.wanted, at_once)
    bounds = {key: bound for key in wanted if (bound := _bound(job, key)) is not None}
    distinct = in_order(bounds.values())
    async with held(bound for bound in distinct if not _endless(bound)):
        with contextlib.ExitStack() as taken:
            counts = [
                _more(bound, sum(wanted[key] for key, each in bounds.items() if each is bound), taken)
                for bound in distinct
            ]
            position = {id(bound): number for number, bound in enumerate(distinct)}
            found = {key: position[id(bound)] for key, bound in bounds.items()}
            limits = {key: number for key, number in found.items() if isinstance(key, str)}
            yield replace(job, limits=None, shares=Shares(counts, limits, [found.get(key) for key in _own(wanted)]))


def tokens_within(job: Job) -> Iterable[int]:
    """Return how many tokens a job has of each bound that it needs."""
    shares = job.shares or Shares([], {}, [])
    yield from shares.counts
    for number, key in enumerate(_own(_wanted(job.plan, job.wanted, 1))):
        if job.shares is None or shares.own[number] is None:
            yield tokens_of(_said(key))


def _bound(job: Job, key: BoundKey) -> Bound | None:
    """Return a bound that is not this job's alone; None for others."""
    if isinstance(key, str):
        return (job.limits or {}).get(key)
    if job.run is not None:
        return job.run.bound(key, _said(key))
    # Several runs may have a limiter of the user's.
    return said if isinstance(said := _said(key), anyio.CapacityLimiter) else None


def _said(key: OwnKey) -> Any:
    """Return what a node, or a pipeline of one of its limits, says."""
    return key[0].settings.limits[key[1]] if isinstance(key, tuple) else key.max_concurrency


def _own(keys: Iterable[BoundKey]) -> list[OwnKey]:
    return [key for key in keys if not isinstance(key, str)]


def _wanted(plan: ExecutionPlan, outputs: Iterable[str] | None, at_once: int) -> dict[BoundKey, int]:
    """Return the bounds that a plan's nodes hold, and how many nodes may want a token at once; in a fixed order."""
    found: dict[BoundKey, int] = {}
    _count(plan, plan.outputs if outputs is None else outputs, {}, at_once, found)
    return found


def _count(
    plan: ExecutionPlan,
    outputs: Iterable[str],
    around: Mapping[str, BoundKey],
    at_once: int,
    found: dict[BoundKey, int],
) -> None:
    named = {**around, **{name: (plan, name) for name in plan.settings.limits}}
    needed, _ = needed_outputs(plan, outputs)
    for step in plan.steps:
        if (made := needed.get(id(step))) is None:
            continue
        if isinstance(step, PlanStep):
            inside = [inner for inner, outer in step.inner_to_outer.items() if outer in made]
            times = 1 if step.map is None else step.map.max_concurrency or DEFAULT_ITEMS
            _count(step.plan, inside, named, at_once * times, found)
            continue
        keys: list[BoundKey] = [] if step.node.max_concurrency is None else [step.node]
        if (limit := step.node.limit) is not None:
            keys.append(named.get(limit, limit))
        for key in keys:
            found[key] = found.get(key, 0) + at_once


def _of_a_parent(bound: Any) -> bool:
    """Say whether a bound is kept by a worker process's parent, and can only be waited for."""
    return not hasattr(bound, "max_value") and not hasattr(bound, "total_tokens")


def _endless(bound: Any) -> bool:
    return not _of_a_parent(bound) and tokens_of(bound) == sys.maxsize


def _more(bound: Bound, uses: int, taken: contextlib.ExitStack) -> int:
    """Take what is free of a bound besides the token that is held; return how many there are then."""
    if _of_a_parent(bound):
        return 1
    if _endless(bound):
        return sys.maxsize
    most = min(uses, tokens_of(bound), _MOST)
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

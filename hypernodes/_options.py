"""Checks of what a user gives to a pipeline or to a call, each with a message that teaches."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import anyio

from hypernodes._callbacks import HOOK_NAMES
from hypernodes._node import REQUIRED, checked_count
from hypernodes._plan import EVERYTHING, ExecutionPlan, Inherit, PlanStep, describe, needed_outputs
from hypernodes.backend import Backend
from hypernodes.errors import DefinitionError, DependencyError, did_you_mean, quoted


def checked_backend(backend: Any) -> Backend:
    """Return a backend instance."""
    if isinstance(backend, Backend):
        return backend
    if isinstance(backend, type) and issubclass(backend, Backend):
        raise DefinitionError(f"backend takes an instance: write {backend.__name__}()")
    raise DefinitionError(f"backend takes a Backend such as LocalBackend(), not {backend!r}")


def checked_cache(cache: Any) -> Any:
    """Return a store, None for no cache, or INHERIT."""
    if cache is None or isinstance(cache, Inherit):
        return cache
    from hypernodes.cache._aiocache import as_store

    return as_store(cache)


def checked_callbacks(callbacks: Any) -> tuple[Any, ...]:
    """Return callbacks as a tuple; they need no common base class."""
    if isinstance(callbacks, str | bytes) or not isinstance(callbacks, Iterable):
        raise DefinitionError(f"callbacks takes a list of callbacks, [] for none, not {callbacks!r}")
    checked = tuple(callbacks)
    for each in checked:
        if isinstance(each, type):
            raise DefinitionError(f"callbacks takes instances: write {each.__name__}()")
        if not any(hasattr(each, name) for name in HOOK_NAMES):
            raise DefinitionError(f"{each!r} has none of the hooks of a PipelineCallback, so it would never be called")
        for name in HOOK_NAMES:
            hook = getattr(each, name, None)
            if inspect.iscoroutinefunction(hook) or inspect.isasyncgenfunction(hook):
                raise DefinitionError(
                    f"{name} of {type(each).__name__} is an `async def`: hooks are plain functions, called between "
                    f"steps; to await for each event, iterate over pipeline.aevents()"
                )
    return checked


def checked_limits(limits: Any) -> dict[str, Any]:
    """Return limits by name: whole numbers, or the user's own limiters."""
    if not isinstance(limits, Mapping):
        raise DefinitionError(f"limits takes a dict of names and counts, not {limits!r}")
    for name, value in limits.items():
        if not isinstance(name, str):
            raise DefinitionError(f"limits takes names, not {name!r}")
        if not isinstance(value, anyio.CapacityLimiter):
            checked_count(value if value is not None else 0, "the limit", name)
    return dict(limits)


def merged_inputs(inputs: Mapping[str, Any] | None, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of a call, given as a mapping and as keywords."""
    if inputs is None:
        return dict(keywords)
    if not isinstance(inputs, Mapping):
        raise DependencyError(f"inputs is a dict of values by name, not {type(inputs).__name__}")
    twice = set(inputs) & set(keywords)
    if twice:
        raise DependencyError(f"given twice, in inputs and as keyword: {quoted(sorted(twice))}")
    return {**inputs, **keywords}


def wanted_names(output_name: str | Sequence[str]) -> tuple[str, ...]:
    """Return the outputs that a call asks for."""
    single = isinstance(output_name, str) or not isinstance(output_name, Iterable)
    names: tuple[Any, ...] = (output_name,) if single else tuple(output_name)
    if not all(isinstance(name, str) for name in names):
        raise DependencyError(f"output_name is the name of an output, or a list of names, not {output_name!r}")
    return tuple(dict.fromkeys(names))


def refreshed_names(plan: ExecutionPlan, refresh: Any) -> frozenset[str]:
    """Return the outputs that a call recomputes, at any depth.

    Raises:
        DependencyError: nothing makes one of them.
    """
    if isinstance(refresh, bool):
        return frozenset([EVERYTHING]) if refresh else frozenset()
    names = wanted_names(refresh)
    known = set(_outputs_at_any_depth(plan))
    for name in names:
        if name not in known:
            raise DependencyError(f"refresh: {plan.label} makes no output {name!r}{did_you_mean(name, known)}")
    return frozenset(names)


def _outputs_at_any_depth(plan: ExecutionPlan) -> Iterator[str]:
    for step in plan.steps:
        yield from step.outputs
        if isinstance(step, PlanStep):
            yield from _outputs_at_any_depth(step.plan)


def check_call(plan: ExecutionPlan, given: Mapping[str, Any], wanted: tuple[str, ...] | None) -> None:
    """Check a call's names before anything runs.

    Raises:
        DependencyError: an input is missing, unknown, bound or made by a node; an output or limit is unknown.
    """
    for name in given:
        if name not in plan.inputs:
            raise DependencyError(_unknown_input(plan, name))
    if wanted is not None:
        plan.check_outputs(wanted)
    for name, default in plan.inputs.items():
        if default is REQUIRED and name not in given and (wanted is None or name in needed_outputs(plan, wanted)[1]):
            raise DependencyError(_missing_inputs(plan, given, wanted))
    for limit, user in plan.open_limits.items():
        raise DependencyError(
            f"node {user!r} asks for limit={limit!r}, which no pipeline sets: "
            f"add limits={{{limit!r}: count}} to {plan.label}{did_you_mean(limit, plan.settings.limits)}"
        )


def _unknown_input(plan: ExecutionPlan, name: Any) -> str:
    if not isinstance(name, str):
        return f"inputs of {plan.label} are given by name, a str, not {name!r}"
    if name in plan.constants:
        return f"input {name!r} of {plan.label} is fixed by bind(); bind it again to change it"
    if name in plan.producers:
        return (
            f"{name!r} is no input of {plan.label}: {describe(plan.producers[name])} makes it; "
            f"to give it yourself, replace({name}=...)"
        )
    return f"{plan.label} has no input {name!r}{did_you_mean(name, plan.inputs)}"


def _missing_inputs(plan: ExecutionPlan, given: Mapping[str, Any], wanted: tuple[str, ...] | None) -> str:
    asked = set(plan.inputs) if wanted is None else needed_outputs(plan, wanted)[1]
    missing = [name for name in plan.required if name in asked and name not in given]
    users = {name: next(step.name for step in plan.steps if name in step.inputs) for name in missing}
    listing = ", ".join(f"{name!r} (for {users[name]!r})" for name in missing)
    noun = "input" if len(missing) == 1 else "inputs"
    return f"{plan.label} needs the {noun} {listing}; given: {quoted(sorted(given)) or 'nothing'}"


def renamed_inputs(plan: ExecutionPlan, mapping: Mapping[str, str], step: str) -> dict[str, str]:
    """Return ``{outer: inner}`` for every input of a nested pipeline."""
    _check_mapping(mapping, "input_mapping", step)
    for outer, inner in mapping.items():
        if inner not in plan.inputs:
            swapped = (
                f" (input_mapping is {{outer: inner}}: write {{{inner!r}: {outer!r}}})" if outer in plan.inputs else ""
            )
            raise DefinitionError(
                f"input_mapping of nested pipeline {step!r}: {inner!r} is not an input of it"
                f"{swapped or did_you_mean(inner, plan.inputs)}"
            )
        if not isinstance(outer, str) or not outer.isidentifier():
            raise DefinitionError(f"input_mapping of nested pipeline {step!r}: {outer!r} is not a valid name")
    outer_names: dict[str, str] = {}
    for outer, inner in mapping.items():
        if inner in outer_names:
            raise DefinitionError(
                f"input_mapping of nested pipeline {step!r}: {inner!r} is given by both "
                f"{outer_names[inner]!r} and {outer!r}"
            )
        outer_names[inner] = outer
    renamed: dict[str, str] = {}
    for inner in plan.inputs:
        outer = outer_names.get(inner, inner)
        if outer in renamed:
            raise DefinitionError(
                f"input_mapping of nested pipeline {step!r}: the outer name {outer!r} would stand for both "
                f"{renamed[outer]!r} and {inner!r}; map {inner!r} to another name"
            )
        renamed[outer] = inner
    return renamed


def renamed_outputs(plan: ExecutionPlan, mapping: Mapping[str, str], step: str) -> dict[str, str]:
    """Return ``{inner: outer}`` for every output of a nested pipeline."""
    _check_mapping(mapping, "output_mapping", step)
    if not mapping:
        return {name: name for name in plan.outputs}
    for inner, outer in mapping.items():
        if inner not in plan.producers:
            swapped = (
                f" (output_mapping is {{inner: outer}}: write {{{outer!r}: {inner!r}}})"
                if outer in plan.producers
                else ""
            )
            raise DefinitionError(
                f"output_mapping of nested pipeline {step!r}: {inner!r} is not an output of it"
                f"{swapped or did_you_mean(inner, plan.producers)}"
            )
        if not isinstance(outer, str) or not outer.isidentifier():
            raise DefinitionError(f"output_mapping of nested pipeline {step!r}: {outer!r} is not a valid name")
    renamed = {inner: mapping.get(inner, inner) for inner in plan.outputs}
    inner_names: dict[str, str] = {}
    for inner, outer in renamed.items():
        if outer in inner_names:
            raise DefinitionError(
                f"output_mapping of nested pipeline {step!r}: both {inner_names[outer]!r} and {inner!r} "
                f"would be named {outer!r}"
            )
        inner_names[outer] = inner
    return renamed


def _check_mapping(mapping: Any, option: str, step: str) -> None:
    if not isinstance(mapping, Mapping):
        raise DefinitionError(f"{option} of nested pipeline {step!r} is a dict of names, not {mapping!r}")


def checked_name(name: Any) -> str | None:
    """Return a name, or None."""
    if name is None or (isinstance(name, str) and name):
        return name
    raise DefinitionError(f"a name is a str, not {name!r}")

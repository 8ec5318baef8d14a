"""What a run would do, before it does it: for each node and item a hit or a miss, and why."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from hypernodes._cached import BATCH, look_up
from hypernodes._digests import BY_VALUE, Listed
from hypernodes._engine import PipelineExecutionEngine, values_for
from hypernodes._explanation import Explanation, NodeExplanation, Reason, Status
from hypernodes._feed import END
from hypernodes._mapping import listed_rows
from hypernodes._plan import INHERIT
from hypernodes._program import BoundCall, BoundPlan, Program, bind
from hypernodes._run import Job, Run, Scope
from hypernodes._trace import UNNEEDED, Trace
from hypernodes.cache._ledger import SHORT, CodeRecord, History
from hypernodes.events import NotLoaded

_NEVER_RUN: Any = object()
"""In place of a value that is known only once it has been computed."""


async def explain(job: Job) -> Explanation:
    """Return what a backend would do with a job, as far as that can be said without running anything."""
    run = Run(job.run_id, None, job.refresh)
    over = job.map.over if job.map is not None else ()
    program = bind(job.plan, frozenset(job.inputs) | set(over), job.wanted, PipelineExecutionEngine().places)
    scope = Scope(run, job.plan, job.path, PipelineExecutionEngine(), None, {}, run.tracer(job.cache))  # type: ignore[arg-type]
    teller = _Teller()
    try:
        values = await values_for(scope, program, job.inputs, job=job)
        if job.map is None:
            await teller.tell(scope, program, values, None)
        else:
            assert job.feed is not None
            rows = []
            while (row := await job.feed.pull()) is not END:
                rows.append(row)
            slots = [program.slots[name] for name in over]
            await teller.tell_items(scope, program, values, slots, rows, None)
    finally:
        await run.aclose()
    return Explanation(job.plan.name, tuple(teller.told))


class _Teller:
    def __init__(self) -> None:
        self.told: list[NodeExplanation] = []
        self._histories: dict[str, _Known | None] = {}
        self._refused: dict[str, str] = {}
        """Entries that cannot be used, and why."""

    async def tell(self, scope: Scope, program: Program, values: list[Any], index: int | None) -> None:
        """Explain one run of a program; afterwards its trace knows what can be known of its outputs."""
        if not isinstance(values, Trace):
            for step in program.steps:
                self._without_cache(scope, step, index)
            return
        if None in values.hits:
            await self._look_up([values])
        await self._learn(scope, program)
        for position, step in enumerate(program.steps):
            if isinstance(step, BoundCall):
                self._call(scope, values, position, step, index)
            else:
                await self._nested(scope, values, step, index)
                await self._look_up([values])

    async def tell_items(
        self,
        scope: Scope,
        program: Program,
        template: list[Any],
        slots: Sequence[int],
        rows: Sequence[tuple[Any, ...]],
        digests: Iterable[tuple[Any, ...]] | None,
    ) -> list[Trace]:
        """Explain every item of a map; return their traces."""
        if not isinstance(template, Trace):
            for index in range(len(rows)):
                await self.tell(scope, program, template, index)
            return []
        known = iter(digests) if digests is not None else itertools.repeat((BY_VALUE,) * len(slots))
        traces: list[Trace] = []
        for row, row_digests in zip(rows, known, strict=False):
            trace = Trace(template.recipe, template, template.digests.copy())
            for slot, value, digest in zip(slots, row, row_digests, strict=True):
                trace[slot] = value
                trace.digests[slot] = digest
            traces.append(trace)
        for start in range(0, len(traces), BATCH):
            await self._look_up(traces[start : start + BATCH])
        for index, trace in enumerate(traces):
            await self.tell(scope, program, trace, index)
        return traces

    async def _look_up(self, traces: list[Trace]) -> None:
        """Look traces up; what is there and cannot be used is not there."""
        known = {key for trace in traces for key in trace.hit_keys()}
        await look_up(traces)
        found = {key for trace in traces for key in trace.hit_keys()} - known
        refused = await traces[0].recipe.tracer.session.check(found) if found else {}
        if refused:
            self._refused |= refused
            for trace in traces:
                trace.forget(refused)

    def _without_cache(self, scope: Scope, step: Any, index: int | None) -> None:
        path = (*scope.at(index), step.name)
        if isinstance(step, BoundPlan):
            inside = scope.inside(step.program.plan, path)
            for inner in step.program.steps:
                self._without_cache(inside, inner, None)
        else:
            self.told.append(NodeExplanation(path, "uncached", (Reason("not cached", "there is no cache"),)))

    def _call(self, scope: Scope, trace: Trace, position: int, step: BoundCall, index: int | None) -> None:
        path = (*scope.at(index), step.name)
        recipe = trace.recipe
        code = recipe.codes[position]
        known = None if code is None else self._histories.get(code.history)
        seconds = None if known is None else known.seconds
        opaque = () if code is None else code.fingerprint.opaque
        if trace.hits[position] is UNNEEDED:
            trace.recall(position)
            self.told.append(NodeExplanation(path, "unneeded", (Reason("unneeded"),), seconds, opaque))
            return
        if trace.hits[position]:
            trace.recall(position)
            self.told.append(NodeExplanation(path, "hit", opaque=opaque))
            return
        for target in step.targets:
            trace[target] = _NEVER_RUN
        if code is None or trace.keys[position] is None:
            status, reasons = self._keyless(trace, step, has_code=code is not None)
            self.told.append(NodeExplanation(path, status, reasons, seconds, opaque))
            for target in step.targets:
                trace.digests[target] = None
            return
        if step.node.keep is not None:
            kept = Reason("not cached", "it is kept by the process: keep='process'")
            self.told.append(NodeExplanation(path, "uncached", (kept,), seconds, opaque))
            return
        if recipe.refresh[position]:
            reasons = (Reason("refresh"),)
        elif (refused := self._refused.get(trace.keys[position] or "")) is not None:
            reasons = (Reason("refused", refused),)
        else:
            made = {name for name, slot in step.parameters if slot in recipe.producers}
            given = {name for name, slot in step.parameters if slot in recipe.program.given_slots}
            digests = dict(zip(code.names, (digest[:SHORT] for digest in trace.input_digests(position)), strict=True))
            reasons = _reasons(known, code.parts, trace.keys[position] or "", digests, made, given | made)
        self.told.append(NodeExplanation(path, "miss", reasons, seconds, opaque))

    def _keyless(self, trace: Trace, step: BoundCall, *, has_code: bool) -> tuple[Status, tuple[Reason, ...]]:
        """Return what can be said of a call that has no signature (yet)."""
        if not step.node.cache:
            return "uncached", (Reason("not cached", "cache=False"),)
        unknown = [name for name, slot in step.parameters if trace.digests[slot] is None]
        if has_code and unknown:
            return "unknown", tuple(Reason("unknown", name) for name in unknown)
        said = trace.recipe.tracer.session.reason(step.node).partition("; ")[0]  # the advice is in the log
        return "uncached", (Reason("uncacheable", said),)

    async def _nested(self, scope: Scope, trace: Trace, step: BoundPlan, index: int | None) -> None:
        path = (*scope.at(index), step.name)
        child = scope.inside(step.program.plan, path)
        program = step.program
        if step.inner_map is None:
            shared = {name: trace[slot] for name, slot in step.shared}
            inside = await values_for(child, program, shared, (trace, step))
            if isinstance(inside, Trace) and inside is not trace.children.get(step):
                self._forget_unknown(inside)
            await self.tell(child, program, inside, None)
            for target, (_, slot) in zip(step.targets, program.outputs, strict=True):
                traced = isinstance(inside, Trace)
                trace[target] = inside[slot] if traced else _NEVER_RUN
                trace.digests[target] = inside.digests[slot] if traced else None  # type: ignore[attr-defined]
            await self._by_value_elsewhere(trace, step, inside)
            return
        assert step.step.map is not None
        outside = dict(step.parameters)
        missing = [name for name in step.step.map.over if not await self._is_there(trace, outside[name])]
        if missing:
            self._unknown_items(child, program, missing)
            for target in step.targets:
                trace[target], trace.digests[target] = _NEVER_RUN, None
            return
        rows = list(listed_rows(step.step.map, step.inputs(trace), f"nested pipeline {step.name!r}"))
        shared = {name: trace[slot] for name, slot in step.shared}
        template = await values_for(child, program, shared, (trace, step))
        if isinstance(template, Trace):
            self._forget_unknown(template)
        slots = [program.slots[name] for name in step.inner_map.over]
        items = await self.tell_items(child, program, template, slots, rows, trace.rows_of_digests(step, len(rows)))
        for target, (_, slot) in zip(step.targets, program.outputs, strict=True):
            made = [item[slot] for item in items]
            digests = [item.digests[slot] for item in items]
            known = (
                bool(items) and all(digest is not None and digest is not BY_VALUE for digest in digests)
            ) or not rows
            trace[target] = made if known else _NEVER_RUN
            trace.digests[target] = None
            if known and isinstance(template, Trace):
                trace.digests[target] = Listed(digests, made, trace.recipe.tracer.session)
        await self._by_value_elsewhere(trace, step, template)

    async def _by_value_elsewhere(self, trace: Trace, step: BoundPlan, inside: list[Any]) -> None:
        """Load what a nested pipeline on a backend of its own makes: from there it comes as values, and counts so."""
        if step.program.plan.settings.backend is INHERIT or not isinstance(inside, Trace):
            return
        for target in step.targets:
            loaded, refused = await inside.recipe.tracer.session.load(trace.unloaded([target]))
            trace.put_in_place([target], loaded)
            there = trace[target] is not _NEVER_RUN and not refused
            trace.digests[target] = BY_VALUE if there else None

    def _forget_unknown(self, trace: Trace) -> None:
        for slot, value in enumerate(trace):
            if value is _NEVER_RUN and trace.digests[slot] is BY_VALUE:
                trace.digests[slot] = None

    async def _is_there(self, trace: Trace, slot: int) -> bool:
        """Say whether the items of a list are known, if need be by loading it."""
        value = trace[slot]
        if type(value) is NotLoaded:
            loaded, _ = await trace.recipe.tracer.session.load([value.key])
            trace.put_in_place([slot], loaded)
            value = trace[slot]
        return value is not _NEVER_RUN and type(value) is not NotLoaded

    def _unknown_items(self, scope: Scope, program: Program, names: Sequence[str]) -> None:
        reasons = tuple(Reason("unknown", name) for name in names)
        for step in program.steps:
            path = (*scope.path, step.name)
            if isinstance(step, BoundPlan):
                self._unknown_items(scope.inside(step.program.plan, path), step.program, names)
            else:
                self.told.append(NodeExplanation(path, "unknown", reasons))

    async def _learn(self, scope: Scope, program: Program) -> None:
        """Read what is remembered of a program's nodes."""
        tracer = scope.cache
        if tracer is None:
            return
        nodes = [step.node for step in program.steps if isinstance(step, BoundCall)]
        codes = [code for node in nodes if (code := tracer.session.code(node)) is not None]
        unread = [code.history for code in codes if code.history not in self._histories]
        if unread:
            histories = await tracer.session.histories(unread)
            self._histories |= {name: _Known(histories[name]) if name in histories else None for name in unread}


class _Known:
    """A history, arranged for finding the nearest entry."""

    def __init__(self, history: History) -> None:
        self.history = history
        latest = max(history.codes, key=lambda record: record.at, default=None)
        self.seconds = latest.seconds / latest.calls if latest and latest.calls else None
        self._seen: dict[int, tuple[set[bytes], list[set[bytes]], list[set[bytes]]]] = {}

    def nearest_code(self, parts: dict[str, str]) -> CodeRecord:
        """Return the state of the code that differs in the fewest parts, the latest of several."""
        return min(self.history.codes, key=lambda record: (len(_differing(record.parts, parts)), -record.at))

    def rows_of(self, record: CodeRecord) -> tuple[set[bytes], list[set[bytes]], list[set[bytes]]]:
        """Return the inputs that one state of the code has had: whole rows, rows without one input, each alone."""
        index = self.history.codes.index(record)
        seen = self._seen.get(index)
        if seen is None:
            width = len(self.history.names)
            whole = {row for code, row in self.history.rows.values() if code == index}
            without: list[set[bytes]] = [set() for _ in range(width)]
            alone: list[set[bytes]] = [set() for _ in range(width)]
            for row in whole:
                for position in range(width):
                    start, end = position * SHORT, (position + 1) * SHORT
                    without[position].add(row[:start] + row[end:])
                    alone[position].add(row[start:end])
            seen = self._seen[index] = whole, without, alone
        return seen


def _differing(old: dict[str, str], new: dict[str, str]) -> list[str]:
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def _reasons(
    known: _Known | None,
    parts: dict[str, str],
    key: str,
    digests: dict[str, bytes],
    made_here: set[str],
    given: set[str],
) -> tuple[Reason, ...]:
    """Return what changed since the nearest earlier entry of a node."""
    if known is None or not known.history.codes:
        return (Reason("new"),)
    history = known.history
    if bytes.fromhex(key)[:SHORT] in history.rows:
        return (Reason("gone"),)
    record = known.nearest_code(parts)
    reasons = [_code_reason(name) for name in _differing(record.parts, parts)]
    if history.names != tuple(digests):
        return tuple(reasons) or (Reason("new"),)
    whole, without, alone = known.rows_of(record)
    row = b"".join(digests.values())
    if row in whole:
        return tuple(reasons)
    changed = []
    for position, name in enumerate(digests):
        start, end = position * SHORT, (position + 1) * SHORT
        if row[:start] + row[end:] in without[position]:
            changed = [name]
            break
    else:
        changed = [name for position, name in enumerate(digests) if digests[name] not in alone[position]]
    # A default that was not given has been named already, as a part of the code.
    changed = [name for name in changed if name in given or not reasons] or ([] if reasons else list(digests))
    reasons += [Reason("upstream" if name in made_here else "input", name) for name in changed]
    return tuple(reasons)


def _code_reason(part: str) -> Reason:
    if part == "version":
        return Reason("version", part)
    return Reason("depends_on" if part.startswith("depends_on") else "code", part)

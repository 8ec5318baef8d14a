"""A nested map as one entry of the cache: the digests of what its items make, and so where each of them is.

With it a map whose inputs are known by their digests alone is answered without loading and hashing its rows, and
without looking up its items one by one.
"""

from __future__ import annotations

from hashlib import sha256
from time import perf_counter
from time import time as unix_time
from typing import Any

from hypernodes import events as ev
from hypernodes._digests import FAILED, Listed
from hypernodes._plan import INHERIT
from hypernodes._program import BoundCall, BoundPlan
from hypernodes._run import Scope
from hypernodes._signature.keys import DIGEST_SIZE
from hypernodes._threads import default_threads, in_thread
from hypernodes._trace import Trace
from hypernodes.events import NotLoaded


async def map_key(scope: Scope, trace: Trace, step: BoundPlan) -> str | None:
    """Return the key of a nested map as a whole, if it has one: outside of other maps, all its calls cached here."""
    settings = step.program.plan.settings
    if step.inner_map is None or settings.cache is not INHERIT or settings.backend is not INHERIT:
        return None
    if any(type(part) is int for part in scope.path):
        return None
    await trace.recipe.tracer.learn(step.program)
    key: str | None
    key, _ = await in_thread(lambda: _key(trace, step), default_threads())
    return key


def _key(trace: Trace, step: BoundPlan) -> str | None:
    program, spec = step.program, step.inner_map
    recipe = trace.recipe.inside(step)
    outer = step.step.map
    if spec is None or outer is None or any(recipe.refresh):
        return None
    # One item stands for all: with the digests of its mapped inputs open, those of its outputs tell everything else,
    # which is the code, how calls are joined, and what all items share.
    item = Trace(recipe, program.template, recipe.template.copy())
    pieces = [f"map {spec.mode}".encode()]
    slots = dict(step.parameters)
    for inner, name in zip(spec.over, outer.over, strict=True):
        digest = trace.digests[slots[name]]
        if isinstance(digest, Listed):
            digest = digest.digest
        if type(digest) is not bytes:
            return None
        pieces += [inner.encode(), digest]
        item.digests[program.slots[inner]] = sha256(b"item of " + inner.encode()).digest()
    for name, slot in step.shared:
        trace.settle(slot)
        item[program.slots[name]] = trace[slot]
        item.digests[program.slots[name]] = trace.digests[slot]
    item.predict()
    for _, slot in program.outputs:
        producer = program.steps[recipe.producers[slot]]
        # The digest of a call's only output is the key of its entry as well.
        if not isinstance(producer, BoundCall) or producer.target < 0 or type(item.digests[slot]) is not bytes:
            return None
        pieces.append(item.digests[slot])
    return sha256(b"\0".join(pieces)).hexdigest()


async def recall_map(scope: Scope, trace: Trace, step: BoundPlan, key: str, index: int | None) -> bool:
    """Put in place of what a nested map makes that its items are in the cache; say whether it was known."""
    session = trace.recipe.tracer.session
    # Who listens for every node is told of every node; and what has turned out to be damaged is looked for anew.
    if scope.wants(ev.NodeCached) or session.damaged:
        return False
    payload = await session.read_plain(key)
    if payload is None:
        return False
    began = perf_counter()
    width = DIGEST_SIZE * len(step.targets)
    total = len(payload) // width
    columns: list[list[Any]] = []
    for count, target in enumerate(step.targets):
        starts = range(count * DIGEST_SIZE, len(payload), width)
        digests = [payload[start : start + DIGEST_SIZE] for start in starts]
        values: list[Any] = [NotLoaded(digest.hex()) for digest in digests]
        trace[target] = values
        trace.digests[target] = Listed(digests, values, session)
        columns.append(values)
    _tell(scope, trace, step, index, columns, total, began)
    return True


async def keep_map(trace: Trace, step: BoundPlan, key: str) -> None:
    """Remember where the items of a map that has been run are, if all are."""
    listed = [trace.digests[target] for target in step.targets]
    if not all(isinstance(each, Listed) for each in listed):
        return
    columns = [each.items for each in listed]
    rows = list(zip(*columns, strict=True))
    if rows and all(type(digest) is bytes and digest is not FAILED for row in rows for digest in row):
        data = b"".join(digest for row in rows for digest in row)
        await trace.recipe.tracer.session.write_plain(key, data, step.name)


def _tell(
    scope: Scope, trace: Trace, step: BoundPlan, index: int | None, columns: list[list[Any]], total: int, began: float
) -> None:
    """Emit what a map emits whose items are all in the cache."""
    emit = scope.emit
    if emit is None:
        return
    run_id, path = scope.run.run_id, (*scope.at(index), step.name)
    shared = {name: trace[slot] for name, slot in step.shared}
    outputs = dict(zip(step.wanted, columns, strict=True))
    began_events: list[ev.Event] = [
        ev.NodeStarted(run_id, path, unix_time(), step.inputs(trace)),
        ev.PipelineStarted(run_id, path, unix_time(), shared),
        ev.MapStarted(run_id, path, unix_time(), total),
    ]
    for event in began_events:
        if type(event) in emit.kinds:
            emit(event)
    if ev.ItemCached in emit.kinds:
        for item, row in enumerate(zip(*columns, strict=True)):
            emit(ev.ItemCached(run_id, (*path, item), unix_time(), item, row[0].key))
    duration = perf_counter() - began
    ended: list[ev.Event] = [
        ev.MapFinished(run_id, path, unix_time(), duration),
        ev.PipelineFinished(run_id, path, unix_time(), outputs, duration),
        ev.NodeFinished(run_id, path, unix_time(), step.outputs(trace), duration),
    ]
    for event in ended:
        if type(event) in emit.kinds:
            emit(event)

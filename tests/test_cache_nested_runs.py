"""Runs that a node's function starts while another run computes the same: nobody waits for what waits for it."""

import threading

import anyio
import pytest

from hypernodes import Pipeline, PipelineCallback, node
from hypernodes.cache import _flight
from tests import _caching
from tests._caching import PATIENCE_S

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

cache = _caching.cache  # pytest finds fixtures among a module's names


class Begun(PipelineCallback):
    """Says when a node has begun, be it to wait for a token."""

    def __init__(self, name):
        self.name = name
        self.event = threading.Event()

    def on_node_start(self, node_id, inputs, ctx):
        if node_id == self.name:
            self.event.set()


async def test_a_run_inside_a_node_that_holds_a_token_does_not_wait_for_one_that_needs_it(cache, monkeypatch):
    """The function holds the limit's only token and needs a result that the run around it will compute with it."""
    monkeypatch.setattr(_flight, "ACROSS_LOOPS_S", 600)  # who waits for the other run hangs
    begun = Begun("compute")

    @node("key", limit="one")
    def compute(x):
        return x * 2

    inner = Pipeline([compute], cache=cache, limits={"one": 1})

    @node("asked", limit="one", cache=False)
    def ask(x):
        assert begun.event.wait(PATIENCE_S)
        return inner.run(x=x)["key"]

    outer = Pipeline([ask, compute], cache=cache, limits={"one": 1}, callbacks=[begun])
    with anyio.fail_after(PATIENCE_S):
        assert await outer.arun(x=1) == {"asked": 2, "key": 2}

"""Runs that a node's function starts while another run computes the same: nobody waits for what waits for it."""

import time

import anyio
import pytest

from hypernodes import DiskCache, Pipeline, node

pytestmark = pytest.mark.anyio


async def test_a_run_inside_a_node_that_holds_a_token_does_not_wait_for_one_that_needs_it(tmp_path):
    """The function holds the limit's only token and needs a result that the run around it will compute with it."""
    cache = DiskCache(tmp_path / "cache")

    @node("key", limit="one")
    def compute(x):
        return x * 2

    inner = Pipeline([compute], cache=cache, limits={"one": 1})

    @node("asked", limit="one", cache=False)
    def ask(x):
        time.sleep(0.1)  # for the run around it to begin with `compute`, which waits for the token
        return inner.run(x=x)["key"]

    outer = Pipeline([ask, compute], cache=cache, limits={"one": 1})
    with anyio.fail_after(10):
        assert await outer.arun(x=1) == {"asked": 2, "key": 2}

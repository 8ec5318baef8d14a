"""Entries that are another's: stored with another key, damaged, or in a store of the user's own."""

import pytest

from hypernodes import DiskCache, Pipeline, node

pytestmark = pytest.mark.anyio


@node("y")
def compute(x):
    return "a" * x


async def test_another_key_means_one_warning_and_an_honest_explanation(tmp_path, caplog):
    """Who mistypes the key is told so, before the run by explain and in the run by one line."""
    inputs = {"x": [1, 2, 3]}

    def pipeline(key):
        return Pipeline([compute], cache=DiskCache(tmp_path / "cache", key=key))

    await pipeline("right").amap(inputs, "x")
    explained = await pipeline("wrong").explain(inputs, "x")
    assert [each.status for each in explained] == ["miss"] * 3
    assert {reason.why for each in explained for reason in each.reasons} == {"refused"}
    caplog.clear()
    assert (await pipeline("wrong").amap(inputs, "x"))["y"] == ["a", "aa", "aaa"]
    (said,) = [record.getMessage() for record in caplog.records]
    assert "sign" in said
    assert "wrong" not in said


async def test_a_store_of_the_users_own_is_given_bytes():
    """Whatever the size of a result: a dict behind two methods is a store."""

    class Store:
        def __init__(self):
            self.entries = {}

        async def get_many(self, keys):
            return {key: self.entries[key] for key in keys if key in self.entries}

        async def set_many(self, entries):
            self.entries.update(entries)

    store = Store()
    pipeline = Pipeline([compute], cache=store)
    for x in (3, 300_000):
        await pipeline.arun(x=x)
    assert {type(value) for value in store.entries.values()} == {bytes}
    explained = await pipeline.explain(x=300_000)
    assert explained.hits == 1
    assert repr(explained) == str(explained)

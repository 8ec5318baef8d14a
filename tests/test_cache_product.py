"""Maps over all combinations with a cache: each value is hashed once, and rows that share values are told apart."""

import pytest

from hypernodes import DiskCache, Pipeline, node

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


class Counted:
    """A value that counts how often it is asked for its identity."""

    def __init__(self, name):
        self.name = name
        self.asked = 0

    def __cache_key__(self):
        self.asked += 1
        return self.name


@node("joined")
def join(left, right):
    """Both names."""
    return f"{left.name}{right.name}"


@node("doubled")
def double(joined, left):
    """The name again."""
    return joined + left.name


def counted(names):
    """One value for each letter."""
    return [Counted(name) for name in names]


@pytest.mark.parametrize("way", ["flat", "nested"])
async def test_a_value_is_hashed_once_however_many_rows_have_it(tmp_path, way):
    """Of 3 x 700 rows, in several batches, 703 values are asked for their identity, once each."""
    inner = Pipeline([join, double])
    pipeline = Pipeline([inner.as_node()]) if way == "nested" else inner
    pipeline = pipeline.with_cache(DiskCache(tmp_path / "cache"))
    left, right = counted("abc"), counted(str(number) for number in range(700))
    inputs = {"left": left, "right": right}
    first = await pipeline.amap(inputs, ["left", "right"], map_mode="product")
    assert {each.asked for each in (*left, *right)} == {1}
    assert first["doubled"] == [f"{a.name}{b.name}{a.name}" for a in left for b in right]
    again = await pipeline.amap(inputs, ["left", "right"], map_mode="product")
    assert again == first
    assert {each.asked for each in (*left, *right)} == {2}


async def test_values_that_a_row_alone_has_are_hashed_for_each(tmp_path):
    """What an uncached node makes is hashed by its value, row by row, beside mapped values that repeat."""

    @node("made", cache=False)
    def make(left, right):
        return [left.name, right.name]

    @node("kept")
    def keep(made, left):
        return "".join(made) + left.name

    pipeline = Pipeline([make, keep], cache=DiskCache(tmp_path / "cache"))
    for _ in range(2):
        found = await pipeline.amap(
            {"left": counted("ab"), "right": counted("xy")}, ["left", "right"], map_mode="product"
        )
        assert found["kept"] == ["axa", "aya", "bxb", "byb"]

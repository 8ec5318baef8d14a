"""The README's Python blocks run, from top to bottom, and print what their `# ->` comments say."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

README = Path(__file__).parent.parent / "README.md"


class Block(NamedTuple):
    line: int
    code: str


def blocks() -> list[Block]:
    text = README.read_text()
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the blocks above have defined."""
    return {"__name__": "readme"}


@pytest.mark.parametrize("block", blocks(), ids=lambda block: f"line {block.line}")
def test_example(block: Block, names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    padding = "\n" * (block.line - 1)  # so that a traceback shows the README's own lines
    exec(compile(padding + block.code, README, "exec"), names)
    said = re.findall(r"^ *# -> (.*)$", block.code, re.MULTILINE)
    assert [timeless(line) for line in capsys.readouterr().out.splitlines()] == [timeless(line) for line in said]


def timeless(line: str) -> str:
    """A line without what differs from run to run: seconds, and the width of a column of them."""
    return re.sub(r" +", " ", re.sub(r"\d[\d.]* (µs|ms|s)\b", "(seconds)", line))


def test_only_times_may_differ_from_what_the_readme_says() -> None:
    assert timeless("clean  3 hit  1.51 ms  new (1)") == timeless("clean  3 hit  212 µs   new (1)")
    assert timeless("clean  3 hit  1.51 ms") != timeless("clean  4 hit  1.51 ms")
    assert timeless("2 items") == "2 items"


def test_the_readme_has_examples() -> None:
    assert len(blocks()) > 5

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
    assert capsys.readouterr().out.splitlines() == said


def test_the_readme_has_examples() -> None:
    assert len(blocks()) > 5

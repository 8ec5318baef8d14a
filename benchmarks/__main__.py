"""Run every benchmark, each in a process of its own, and print the results as Markdown tables.

python -m benchmarks                  all of them, and the peers that are installed
python -m benchmarks chain io_map     only these
python -m benchmarks --write          all, and into benchmarks/README.md
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._harness import ROOT
from benchmarks._report import between_markers, document

README = ROOT / "benchmarks" / "README.md"
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
OTHERS = ("peers", "caches")
"""Comparisons, with tables of their own."""
PEERS = {"with_pipefunc": "pipefunc", "with_hamilton": "apache-hamilton", "with_dask": "dask"}
"""Module under `benchmarks.peers` -> the distribution it needs."""

EARLIER = "0.4.8"
EARLIER_SCRIPT = str(Path("benchmarks", "peers", "with_hypernodes_048.py"))


class ScriptError(Exception):
    """A script ended with an error, which it printed."""


def output_of(command: Sequence[str]) -> Any:
    """The JSON that a script printed."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise ScriptError(f"{' '.join(command)} ended with {done.returncode}")
    return json.loads(done.stdout)


def run_peers(quick: Sequence[str], earlier_python: str | None) -> tuple[list[Any], list[str]]:
    """What each framework printed, and a line for each that was left out."""
    reports, left_out = [], []
    for module, distribution in {"with_hypernodes": "anyio", **PEERS}.items():
        try:
            importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            left_out.append(f"{distribution} is left out: it is not installed")
            continue
        print(f"peers: {distribution if module in PEERS else 'hypernodes'}", file=sys.stderr)
        reports.append(output_of([sys.executable, "-m", f"benchmarks.peers.{module}", *quick]))
    command = earlier_command(earlier_python)
    if command is None:
        left_out.append(f"hypernodes {EARLIER} is left out: it needs `uv`, or --earlier-python")
        return reports, left_out
    print(f"peers: hypernodes {EARLIER}", file=sys.stderr)
    try:
        reports.append(output_of([*command, EARLIER_SCRIPT, *quick]))
    except ScriptError as failure:
        left_out.append(f"hypernodes {EARLIER} is left out: {failure}")
    return reports, left_out


def run_caches(quick: Sequence[str], earlier_python: str | None) -> Any:
    """What the comparison of caches printed."""
    print("caches", file=sys.stderr)
    earlier = earlier_command(earlier_python)
    command = [sys.executable, "-m", "benchmarks.caches.compare", *quick]
    if earlier is None:
        return output_of(command)
    try:
        return output_of([*command, "--earlier", *earlier])
    except ScriptError as failure:
        report = output_of(command)
        report["notes"].append(f"hypernodes {EARLIER} is left out: {failure}")
        return report


def earlier_command(python: str | None) -> list[str] | None:
    """What starts an interpreter that has the earlier release, which has this package's name.

    It does not look where PYTHONPATH says, as this package may be there.
    """
    if python:
        return [python, "-E"]
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        return None
    needs = [f"hypernodes=={EARLIER}", "anyio", "dask", "numpy"]
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    withs = [part for need in needs for part in ("--with", need)]
    return [uv, "run", "--quiet", "--isolated", "--no-project", "--python", version, *withs, "python", "-E"]


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Run the benchmarks, print tables")
    parser.add_argument(
        "name", nargs="*", choices=[*SCRIPTS, *OTHERS, []], help=f"only these: {', '.join([*SCRIPTS, *OTHERS])}"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything works")
    parser.add_argument("--write", action="store_true", help="also write the tables into benchmarks/README.md")
    parser.add_argument(
        "--earlier-python",
        metavar="PATH",
        help=f"an interpreter with hypernodes {EARLIER}, anyio, dask and numpy; without it, `uv` makes one",
    )
    arguments = parser.parse_args()
    if arguments.write and (arguments.name or arguments.quick):
        parser.error("--write is for a full run: without names and without --quick")
    return arguments


def main() -> int:
    """Exit code 1 when a script failed; targets that were missed are in the table."""
    arguments = parsed()
    names = arguments.name or [*SCRIPTS, *OTHERS]
    quick = ["--quick"] if arguments.quick else []
    reports, peers, left_out, caches = [], [], [], None
    try:
        for name in SCRIPTS:
            if name in names:
                print(name, file=sys.stderr)
                reports.append(output_of([sys.executable, "-m", f"benchmarks.{name}", *quick]))
        if "peers" in names:
            peers, left_out = run_peers(quick, arguments.earlier_python)
        if "caches" in names:
            caches = run_caches(quick, arguments.earlier_python)
    except ScriptError as failure:
        print(failure, file=sys.stderr)
        return 1
    text = document(reports, peers, left_out, caches)
    print(text, end="")
    if arguments.write:
        README.write_text(between_markers(README.read_text(encoding="utf-8"), text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

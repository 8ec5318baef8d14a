"""P7: ``import hypernodes`` against ``import anyio``, in an interpreter of its own, without its start."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable

from benchmarks._harness import ROOT, Options, Report, Target, compared, main, measure


def importing(statement: str, compiled: str) -> Callable[[], float]:
    """A subject: seconds that an import statement takes in a process of its own.

    Compiled files are kept in the folder ``compiled``, whatever this interpreter was told about them.
    """
    code = f"import time; begun = time.perf_counter(); {statement}; print(time.perf_counter() - begun)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = compiled
    command = [sys.executable, "-c", code]

    def seconds() -> float:
        done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
        return float(done.stdout)

    return seconds


def run(options: Options) -> Report:
    """The package alone, then what a first program uses of it, against what it uses of anyio itself."""
    with tempfile.TemporaryDirectory() as compiled:
        rows = [
            compared(
                subject,
                "ms",
                measure(
                    {each: importing(each, compiled) for each in (subject, reference)},
                    options.pick(21, 2),
                    warm_up=2,
                ),
                figure=lambda seconds: seconds * 1e3,
                target=target,
            )
            for subject, reference, target in (
                ("import hypernodes", "import anyio", Target("≤ 1.5 ×", "ratio", at_most=1.5)),
                (
                    "from hypernodes import Pipeline, node",
                    "from anyio import CapacityLimiter, create_task_group, from_thread, to_thread",
                    None,
                ),
            )
        ]
    return Report(rows)


if __name__ == "__main__":
    main("P7", "Import time", run)

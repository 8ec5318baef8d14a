"""P7: ``import hypernodes`` against ``import anyio``, in an interpreter of its own, without its start."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable

from benchmarks._harness import ROOT, Options, Report, Target, compared, main, measure


def importing(module: str, compiled: str) -> Callable[[], float]:
    """A subject: seconds that the import statement takes in a process of its own.

    Compiled files are kept in the folder ``compiled``, whatever this interpreter was told about them.
    """
    code = f"import time; begun = time.perf_counter(); import {module}; print(time.perf_counter() - begun)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = compiled

    def seconds() -> float:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        )
        return float(done.stdout)

    return seconds


def run(options: Options) -> Report:
    """Both from compiled files, as after the first import."""
    with tempfile.TemporaryDirectory() as compiled:
        costs = measure(
            {
                "import hypernodes": importing("hypernodes", compiled),
                "import anyio": importing("anyio", compiled),
            },
            options.pick(21, 2),
            warm_up=2,
        )
    target = Target("≤ 1.5 ×", "ratio", at_most=1.5)
    return Report(
        [compared("import hypernodes", "ms", costs, figure=lambda seconds: seconds * 1e3, target=target)]
    )


if __name__ == "__main__":
    main("P7", "Import time", run)

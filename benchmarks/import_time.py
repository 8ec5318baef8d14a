"""P7: ``import hypernodes`` against ``import anyio``, each in a fresh interpreter, without its start."""

import subprocess
import sys
from collections.abc import Callable

from benchmarks._harness import ROOT, Options, Report, Target, compared, main, measure


def importing(module: str) -> Callable[[], float]:
    """A subject: seconds that the import statement takes in a process of its own."""
    code = f"import time; begun = time.perf_counter(); import {module}; print(time.perf_counter() - begun)"

    def seconds() -> float:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
        )
        return float(done.stdout)

    return seconds


def run(options: Options) -> Report:
    """Both from compiled files, as after the first import."""
    costs = measure(
        {"import hypernodes": importing("hypernodes"), "import anyio": importing("anyio")},
        options.pick(21, 2),
        warm_up=2,
    )
    target = Target("≤ 1.5 ×", "ratio", at_most=1.5)
    return Report(
        [compared("import hypernodes", "ms", costs, figure=lambda seconds: seconds * 1e3, target=target)]
    )


if __name__ == "__main__":
    main("P7", "Import time", run)

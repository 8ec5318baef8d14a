"""The command ``hypernodes``: each subcommand is added by the package that it belongs to."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from hypernodes import __version__
from hypernodes.cache import _command as cache
from hypernodes.demo import command as demo
from hypernodes.demo import modal_command as modal

INTERRUPTED = 130  # what a shell gives for a command that SIGINT ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    try:
        arguments = _parser().parse_args(argv)
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("hypernodes: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader has gone, as with `| head`; the exit must not write there again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hypernodes",
        description="Pipelines of plain functions on single items, run side by side.",
        epilog="'hypernodes COMMAND --help' explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"hypernodes {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    demo.add_to(commands)
    modal.add_to(commands)
    cache.add_to(commands)
    return parser

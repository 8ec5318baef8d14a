"""``hypernodes cache``: look into a cache directory, check it, make it smaller, empty it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from hypernodes.errors import CacheError

if TYPE_CHECKING:
    from hypernodes.cache._disk import DiskCache
    from hypernodes.cache._reports import EntryInfo, Finding, PruneReport

_MOST_FINDINGS = 20
_LEDGER = "ledger-"
_HISTORIES = "(what explain() remembers)"
_UNREADABLE = "(cannot be read)"


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``cache``."""
    parser = commands.add_parser(
        "cache",
        help="list, check, prune or clear a cache directory",
        description="Look after the directory of a DiskCache. Results are never loaded, so none of this runs code "
        "from the cache, and a run that uses it meanwhile is not disturbed.",
        epilog="'hypernodes cache COMMAND --help' explains a command.",
    )
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    listing = _action(
        actions, "ls", _ls, "list results, the newest first: node, size, when stored, how long it took, key"
    )
    listing.add_argument("--node", metavar="NAME", help="only results of this node")
    listing.add_argument("--limit", type=_count, metavar="N", help="only the N newest")
    listing.add_argument("--json", action="store_true", help="a JSON object on each line; times in unix seconds")

    counting = _action(actions, "stats", _stats, "count results and bytes, in all and by node")
    counting.add_argument("--json", action="store_true", help="as one JSON object; times in unix seconds")

    checking = _action(
        actions,
        "verify",
        _verify,
        "read every result and check that it is whole; exit code 1 if one is damaged",
        "Signatures are checked with the key in the environment variable HYPERNODES_CACHE_KEY.",
    )
    checking.add_argument("--repair", action="store_true", help="drop what is damaged: it is then computed anew")

    pruning = _action(
        actions,
        "prune",
        _prune,
        "delete the results that were used longest ago",
        "Small results share files and go together. Without --max-size only what killed processes left is deleted.",
    )
    pruning.add_argument("--max-size", type=_size, metavar="SIZE", help='keep this much, such as "10GB" or "512MiB"')

    clearing = _action(actions, "clear", _clear, "delete all results")
    clearing.add_argument("--yes", action="store_true", help="do not ask; needed where there is no terminal")


def _action(
    actions: argparse._SubParsersAction[argparse.ArgumentParser], name: str, act: Any, text: str, more: str = ""
) -> argparse.ArgumentParser:
    description = f"{text[0].upper()}{text[1:]}.{more and f' {more}'}"
    parser = actions.add_parser(name, help=text, description=description)
    parser.add_argument("path", metavar="PATH", help="the cache's directory")
    parser.set_defaults(run=run, act=act)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Do what was asked for; returns the exit code."""
    try:
        code: int = arguments.act(_opened(arguments.path), arguments)
    except (CacheError, PermissionError) as error:
        return _fail(str(error))
    return code


def _opened(path: str) -> DiskCache:
    """Open a cache that is there; raise ``CacheError`` for any other path."""
    from hypernodes.cache._disk import DiskCache
    from hypernodes.cache._root import Root

    # Nothing is unpickled here, so it does not matter who else may write the directory.
    cache = DiskCache(path, allow_shared_directory=True)
    if not Root(cache.path, allow_shared=True).check():
        raise CacheError(f"there is no cache at {path}")
    return cache


# -- ls


class _Row(NamedTuple):
    """One entry, as its writer described it."""

    node: str
    entry: EntryInfo
    seconds: float | None
    """How long the node ran."""


def _row(entry: EntryInfo) -> _Row:
    if entry.key.startswith(_LEDGER):
        return _Row(_HISTORIES, entry, None)
    try:
        meta = json.loads(entry.meta)
        return _Row(str(meta["node"]), entry, float(meta["seconds"]))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return _Row(_UNREADABLE, entry, None)


def _ls(cache: DiskCache, arguments: argparse.Namespace) -> int:
    rows = [row for row in map(_row, cache.entries()) if row.node != _HISTORIES]
    if arguments.node is not None:
        names = {row.node for row in rows}
        rows = [row for row in rows if row.node == arguments.node]
        if not rows:
            known = f"it has results of {_shown(', '.join(sorted(names)))}" if names else "it is empty"
            return _fail(f"{arguments.path} has no result of a node {arguments.node!r}: {known}")
    rows.sort(key=lambda row: row.entry.stored_at, reverse=True)
    rows = rows[: arguments.limit]
    if arguments.json:
        for node, entry, seconds in rows:
            about = {"key": entry.key, "node": node, "size": entry.size, "stored_at": round(entry.stored_at, 3)}
            print(json.dumps({**about, "seconds": seconds, "place": entry.place}))
        return 0
    _print_table(
        ("node", "size", "stored", "took", "key"),
        [
            (node, _bytes(entry.size), _date(entry.stored_at), _took(seconds), entry.key)
            for node, entry, seconds in rows
        ],
    )
    return 0


# -- stats


def _stats(cache: DiskCache, arguments: argparse.Namespace) -> int:
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    seconds: dict[str, float] = {}
    for row in map(_row, cache.entries()):
        counts[row.node] += 1
        sizes[row.node] += row.entry.size
        seconds[row.node] = seconds.get(row.node, 0.0) + (row.seconds or 0.0)
    stats = cache.stats()
    nodes = sorted(counts, key=lambda name: (name.startswith("("), -sizes[name], name))
    if arguments.json:
        by_node = [
            {"node": name, "entries": counts[name], "bytes": sizes[name], "seconds": round(seconds[name], 6)}
            for name in nodes
        ]
        fields = ("entries", "entry_bytes", "files", "file_bytes", "unreadable", "oldest", "newest")
        print(json.dumps({**{name: getattr(stats, name) for name in fields}, "nodes": by_node}))
        return 0
    print(
        f"{stats.entries:,} entries, {_bytes(stats.entry_bytes)}, "
        f"in {stats.files:,} {'file' if stats.files == 1 else 'files'} of {_bytes(stats.file_bytes)}"
    )
    if stats.oldest is not None and stats.newest is not None:
        print(f"stored from {_date(stats.oldest)} to {_date(stats.newest)}")
    if stats.unreadable:
        print(f"{stats.unreadable:,} files cannot be read: see 'hypernodes cache verify {arguments.path}'")
    if nodes:
        print()
        _print_table(
            ("node", "entries", "size", "took"),
            [(name, f"{counts[name]:,}", _bytes(sizes[name]), _took(seconds[name] or None)) for name in nodes],
        )
    return 0


# -- verify, prune, clear


def _verify(cache: DiskCache, arguments: argparse.Namespace) -> int:
    report = cache.verify(repair=arguments.repair)
    damaged = [finding for finding in report.findings if finding.damaged]
    foreign = Counter(finding.reason for finding in report.findings if not finding.damaged)
    for finding in damaged[:_MOST_FINDINGS]:
        print(_told(finding))
    if len(damaged) > _MOST_FINDINGS:
        print(f"... and {len(damaged) - _MOST_FINDINGS:,} more")
    for reason, count in foreign.most_common():
        print(f"{count:,} cannot be opened here: {reason}")
    print(f"{report.entries:,} entries checked, {len(damaged):,} damaged", end="")
    print(f", {report.repaired:,} dropped" if arguments.repair and damaged else "")
    return 0 if len(damaged) <= report.repaired else 1


def _told(finding: Finding) -> str:
    return _shown(f"{finding.file}: {finding.key or 'the whole file'}: {finding.reason}")


def _prune(cache: DiskCache, arguments: argparse.Namespace) -> int:
    _print_removed(cache.prune(arguments.max_size))
    return 0


def _clear(cache: DiskCache, arguments: argparse.Namespace) -> int:
    if not arguments.yes:
        if not sys.stdin.isatty():
            return _fail("clear deletes all results, and nobody can be asked here: say --yes")
        stats = cache.stats()
        question = f"Delete all {stats.entries:,} entries ({_bytes(stats.file_bytes)}) of {arguments.path}? [y/N] "
        if input(question).strip().lower() not in ("y", "yes"):
            return _fail("nothing was deleted")
    _print_removed(cache.clear())
    return 0


def _print_removed(report: PruneReport) -> None:
    print(
        f"{report.entries:,} entries removed, {_bytes(report.file_bytes)} in {report.files:,} files; "
        f"{_bytes(report.bytes_left)} left"
    )


# -- For people


def _print_table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """Print columns: names at the left, figures at the right."""
    table = [head, *(tuple(map(_shown, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    right = [name in ("size", "took", "entries") for name in head]
    for row in table:
        cells = zip(row, widths, right, strict=True)
        print(
            "  ".join(cell.rjust(width) if to_right else cell.ljust(width) for cell, width, to_right in cells).rstrip()
        )


def _shown(text: str) -> str:
    """Text that others may have written, without what a terminal obeys."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def _bytes(count: int) -> str:
    """A size in decimal units, as those of ``max_size``: ``"1.3 MB"``."""
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}" if unit != "bytes" else f"{count} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"


def _date(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _took(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:,.3g} {unit}" if seconds < 1000 else f"{seconds:,.0f} s"
    return f"{seconds * 1e6:.3g} µs"


def _count(text: str) -> int:
    """A whole number from 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _size(text: str) -> str:
    """A size that ``max_size`` takes, for argparse."""
    from hypernodes.cache._disk import _bytes as parsed

    try:
        parsed(int(text) if text.isdecimal() else text)
    except CacheError:
        raise argparse.ArgumentTypeError(f'{text!r} is no size such as "10GB", "512MiB" or a number of bytes') from None
    return text


def _fail(message: str) -> int:
    print(f"hypernodes: {message}", file=sys.stderr)
    return 1

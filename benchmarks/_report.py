"""Reports as Markdown: pure functions from the scripts' JSON to text."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

BEGIN = "<!-- benchmarks: begin -->"
END = "<!-- benchmarks: end -->"

Json = Mapping[str, Any]


def document(
    reports: Sequence[Json], peers: Sequence[Json], left_out: Sequence[str], caches: Json | None = None
) -> str:
    """All of it: the targets, cost by size, the peers and the caches, as far as they were run."""
    by_size = ("growth", "many_machines")
    rows = [report for report in reports if report["row"] not in by_size]
    growth = [report for report in reports if report["row"] in by_size]
    parts = [environment_line([*reports, *peers, *([caches] if caches else [])])]
    if rows:
        parts += ["### Targets", target_table(rows), *notes_of(rows)]
    for report in growth:
        table = [growth_table(report)] if report["results"] else []
        parts += [f"### {report['title']}", *table, *notes_of([report])]
    if peers or left_out:
        parts += [
            "### Beside other frameworks",
            *([peer_table(peers)] if peers else []),
            *peer_notes(peers, left_out),
        ]
    if caches:
        parts += ["### Beside other caches", cache_table(caches), *cache_notes(caches)]
    return "\n\n".join(parts) + "\n"


def environment_line(reports: Sequence[Json]) -> str:
    """With what the figures were taken, and how busy the machine was."""
    here = reports[0]["environment"]
    loads = sorted(report["environment"]["load"] for report in reports)
    quick = " **Quick run: these figures mean nothing.**" if any(report["quick"] for report in reports) else ""
    return (
        f"{here['date']}, {here['implementation']} {here['python']}, {here['platform']}, {here['cpu']}, "
        f"{here['cores']} cores (load {loads[0]:g} to {loads[-1]:g}), hypernodes {here['hypernodes']}, "
        f"anyio {here['anyio']} on {here['event_loop']}.{quick}"
    )


def target_table(reports: Iterable[Json]) -> str:
    """A line for each figure, beside its reference and target."""
    return _table(
        ("", "workload", "n", "hypernodes (quartiles)", "reference", "ratio", "target", "reached"),
        [
            (
                report["row"],
                result["name"],
                str(result["n"]),
                f"{quantity(result)} ({spread(result)})",
                reference_text(result["reference"]),
                ratio_text(result["ratio"]),
                result["target"]["text"] if result["target"] else "",
                {True: "yes", False: "**no**", None: ""}[result["reached"]],
            )
            for report in reports
            for result in report["results"]
        ],
    )


def growth_table(report: Json) -> str:
    """A line for each series, a column for each size."""
    results = report["results"]
    sizes = sorted({result["size"] for result in results})
    series = list(dict.fromkeys(result["series"] for result in results))
    by_place = {(result["series"], result["size"]): result for result in results}
    lines = []
    for name in series:
        cells = [by_place.get((name, size)) for size in sizes]
        missed = [f"{cell['size']:,}" for cell in cells if cell and cell["reached"] is False]
        target = next(cell["target"]["text"] for cell in reversed(cells) if cell and cell["target"])
        unit = next(cell["unit"] for cell in cells if cell)
        figures = [number(cell["median"]) if cell else "" for cell in cells]
        lines.append((f"{name} ({unit})", *figures, target, f"**no**, at {', '.join(missed)}" if missed else "yes"))
    return _table(("", *(f"{size:,}" for size in sizes), "target", "reached"), lines)


def peer_table(peers: Sequence[Json]) -> str:
    """A line for each workload, a column for each framework; in brackets, how many times the work by hand."""
    workloads = list(dict.fromkeys(result["workload"] for peer in peers for result in peer["results"]))
    by_place = {(peer["peer"], result["workload"]): result for peer in peers for result in peer["results"]}
    columns = [(peer["peer"], _column(peer)) for peer in peers]
    lines = []
    for workload in workloads:
        cells = [by_place.get((name, workload)) for name, _ in columns]
        first = next(cell for cell in cells if cell)
        lines.append((f"{first['name']}, {first['unit']}", _by_hand(cells), *map(_peer_cell, cells)))
    return _table(("", "by hand", *(title for _, title in columns)), lines)


def _column(peer: Json) -> str:
    return peer["peer"] if peer["peer"].endswith(peer["version"]) else f"{peer['peer']} {peer['version']}"


def _by_hand(cells: Sequence[Json | None]) -> str:
    """What the same takes by hand: in the process of the first framework that has it."""
    references = [cell["reference"] for cell in cells if cell and cell["reference"]]
    return number(references[0]["median"]) if references else "–"


def _peer_cell(cell: Json | None) -> str:
    if cell is None:
        return "–"
    scaled = f", scaled from {cell['scaled_from']:,}" if cell["scaled_from"] else ""
    ratio = f"{ratio_text(cell['ratio'])}" if cell["ratio"] is not None else ""
    inside = f"{ratio}{scaled}".removeprefix(", ")
    return f"{number(cell['median'])} ({inside})" if inside else number(cell["median"])


def notes_of(reports: Iterable[Json]) -> list[str]:
    """What the scripts left out, as a list, if anything."""
    return _list(f"{report['row']}: {note}" for report in reports for note in report["notes"])


def peer_notes(peers: Iterable[Json], left_out: Iterable[str]) -> list[str]:
    """How each framework does the work, and which ones were left out."""
    return _list([*(f"{peer['peer']}: {note}" for peer in peers for note in peer["notes"]), *left_out])


def cache_table(report: Json) -> str:
    """What went wrong and what it takes, a line each; a column for each cache."""
    caches, cases = report["caches"], report["cases"]
    lines = [
        (
            f"stale results after {len(cases['edits'])} edits of code",
            *(_went_wrong(c, "stale", cases["edits"]) for c in caches),
        ),
        (
            f"stale results for {len(cases['values'])} other values",
            *(_went_wrong(c, "stale", cases["values"]) for c in caches),
        ),
        (
            f"computed again, of {len(cases['same'])} that are the same",
            *(_went_wrong(c, "again", cases["same"]) for c in caches),
        ),
        ("a hit, µs a node", *(number(cache["hit"]["median"]) for cache in caches)),
        ("a first run adds, µs a node", *(number(cache["first"]["median"]) for cache in caches)),
        (f"files after {caches[0]['many']:,} items", *(f"{cache['files']:,}{_counted(cache)}" for cache in caches)),
    ]
    return _table(("", *(_titled(cache) for cache in caches)), lines)


def _titled(cache: Json) -> str:
    return cache["cache"] if cache["cache"].endswith(cache["version"]) else f"{cache['cache']} {cache['version']}"


def _went_wrong(cache: Json, how: str, cases: Sequence[str]) -> str:
    return "–" if cache["wrong"] is None else str(len([name for name in cache["wrong"][how] if name in cases]))


def _counted(cache: Json) -> str:
    return "" if cache["counted"] == cache["many"] else f" (scaled from {cache['counted']:,})"


def cache_notes(report: Json) -> list[str]:
    """Which cases went wrong, and what was left out."""
    told = {"stale": "stale", "again": "computed again", "refused": "an error"}
    lines = [
        f"{cache['cache']}, {text}: {'; '.join(cache['wrong'][how])}"
        for cache in report["caches"]
        if cache["wrong"]
        for how, text in told.items()
        if cache["wrong"][how]
    ]
    return _list([*lines, *report["notes"]])


def _list(lines: Iterable[str]) -> list[str]:
    text = "\n".join(f"- {line}" for line in lines)
    return [text] if text else []


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def quantity(result: Json) -> str:
    """The median with its unit."""
    return f"{number(result['median'])} {result['unit']}"


def spread(result: Json) -> str:
    """First to third quartile."""
    return f"{number(result['spread']['q1'])} to {number(result['spread']['q3'])}"


def reference_text(reference: Json | None) -> str:
    """What the reference is, and its median."""
    return f"{reference['name']}: {quantity(reference)}" if reference else ""


def ratio_text(ratio: float | None) -> str:
    """As in "1.05 ×"."""
    return "" if ratio is None else f"{number(ratio)} ×"


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0 or abs(value) < 1e-4:
        return "0"
    rounded = float(f"{value:.3g}")
    if abs(rounded) >= 100:
        return f"{rounded:,.0f}"
    return f"{rounded:.2f}" if abs(rounded) >= 1 and abs(rounded) < 10 else f"{rounded:.3g}"


def between_markers(text: str, content: str) -> str:
    """``text`` with what stands between the markers replaced."""
    head, found, rest = text.partition(BEGIN)
    _, closed, tail = rest.partition(END)
    if not (found and closed):
        raise ValueError(f"the text has no {BEGIN} ... {END}")
    return f"{head}{BEGIN}\n{content}{END}{tail}"

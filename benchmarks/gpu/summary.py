"""What a run found, in Markdown: a table for each stage, from the files that the stage left."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from benchmarks.harness import outcomes
from benchmarks.harness.outcomes import entries_of, is_red, red_names
from benchmarks.harness.tables import duration, table_row
from benchmarks.harness.targets import TARGETS, Target

MOST = 40  # lines of a list
ROWS = (
    "row",
    "unit",
    "measured",
    "wall",
    "floor, H100",
    "target, H100",
    "of target",
    "peers, times ours",
    "red",
)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = tuple(header)
    return "\n".join(map(table_row, [header, ("---",) * len(header), *rows]))


def machine(work: Path) -> str:
    path = work / "machine.txt"
    return path.read_text() if path.exists() else ""


def tests(work: Path) -> str:
    """How many passed, what is red by op or family, and each red test with its reason."""
    entries = entries_of(work / "tests.json")
    counts = Counter(entry["outcome"] for entry in entries)
    lines = [", ".join(f"{count} {outcome}" for outcome, count in counts.items())]
    by_verdict: dict[str, list[str]] = {}
    for name, verdict in outcomes.verdicts(entries).items():
        by_verdict.setdefault(verdict, []).append(name)
    lines += [f"- {verdict}: {', '.join(names)}" for verdict, names in by_verdict.items()]
    return "\n".join([*lines, *reds(entries)])


def reds(entries: list[dict]) -> list[str]:
    """A line for each red test."""
    found = [entry for entry in entries if is_red(entry)]
    lines = [f"- RED {entry['name']}: {first_line(entry)}" for entry in found[:MOST]]
    return lines + [f"- and {len(found) - MOST} more"] * (len(found) > MOST)


def first_line(entry: dict) -> str:
    return entry.get("reason", "did not end: a crash, or the time was over").split("\n")[0][:200]


def rows(work: Path, name: str) -> str:
    """Each row with its target, and with what is red: itself, or the tests of what it runs on."""
    entries = entries_of(work / f"{name}.json")
    wrong = red_names(entries_of(work / "tests.json"))
    targets = {} if "no GPU:" in machine(work) else TARGETS
    cells = [row for entry in entries for row in row_cells(entry, wrong, targets)]
    skipped = Counter(first_line(e) for e in entries if e["outcome"] == outcomes.SKIPPED)
    left = sum(entry["outcome"] == outcomes.NOT_RUN for entry in entries)
    return "\n".join(
        [
            table(ROWS, cells),
            *reds(entries),
            *(f"- skipped: {reason} ({count})" for reason, count in skipped.items()),
            *([f"- not run: {left}"] if left else []),
        ]
    )


def row_cells(
    entry: dict, wrong: set[str], targets: dict[str, Target]
) -> Iterable[tuple[str, ...]]:
    figures = entry.get("extra_info", {})
    red = sorted(wrong & set(entry["covers"])) + (["this row"] if is_red(entry) else [])
    red += [figures["patch_error"]] if "patch_error" in figures else []
    wall = duration(figures["wall_seconds"]) if "wall_seconds" in figures else ""
    for name, measured in figures.get("rows", {}).items():
        target = targets.get(name)
        goal = ("", "", "")
        if target is not None:
            floor = "" if target.floor is None else f"{target.floor:,g}"
            goal = (floor, f"{target.target:,g}", f"{target.reached(measured['value']):.2f}x")
        value = f"{measured['value']:,.4g}"
        yield (name, measured["unit"], value, wall, *goal, peers(figures), ", ".join(red))
    if "curve" in figures:
        curve = f"{figures['curve']} {figures['x']}"
        yield (
            curve,
            "",
            f"{figures['value']:,.4g}",
            wall,
            "",
            "",
            "",
            peers(figures),
            ", ".join(red),
        )


def peers(figures: dict) -> str:
    """How many times as long as ours each peer takes."""
    measured = {
        name: p["speedup"] for name, p in figures.get("peers", {}).items() if "speedup" in p
    }
    if "speedup" in figures:
        measured[figures.get("peer") or figures["curve_peer"]] = figures["speedup"]
    return ", ".join(f"{name} {speedup:.2f}x" for name, speedup in measured.items())


def configs(work: Path) -> str:
    """What tuning found, in microseconds."""
    entries = [
        e
        for p in sorted((work / "configs").glob("*.json"))
        for e in json.loads(p.read_text())["configs"]
    ]
    cells = (
        (e["kernel"], str(e["shape"]), str(e["config"]), f"{e['us']:g}", f"{e['default_us']:g}")
        for e in entries
    )
    return table(("kernel", "shape", "config", "us", "us of the default"), cells)


def profile(work: Path) -> str:
    return "\n\n".join(path.read_text() for path in sorted(work.glob("profile-*.md")))


def sanitizer(work: Path) -> str:
    path = work / "sanitizer.json"
    verdicts = json.loads(path.read_text()) if path.exists() else {}
    return "\n".join(f"- {what}: {verdict}" for what, verdict in verdicts.items())

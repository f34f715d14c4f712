"""Stored benchmark runs as Markdown tables and plots.

    python -m benchmarks report out/bench.json    # prints the tables; writes out/bench.md and plots there
    python -m benchmarks report out/models.json out/kernels.json --out docs    # several runs of one machine

% of peak: the time that the bytes take at the measured bandwidth, or the operations at the measured GEMM
rate, whichever is longer, over the measured time. x reference: plain torch's time over this version's.
"""

import json
import sys
from pathlib import Path

from benchmarks.harness.tables import TABLES

NO_RESULTS = "holds no result of these benchmarks"


def add_arguments(parser) -> None:
    parser.add_argument(
        "files",
        type=Path,
        nargs="+",
        metavar="FILE.json",
        help="what `make bench` wrote, or a stage of `make gpu`",
    )
    parser.add_argument(
        "--out", type=Path, help="folder of tables and plots; default: the first file's"
    )


def run(args) -> int:
    try:
        stored = [read(path) for path in args.files]
    except (OSError, ValueError) as error:
        print(f"python -m benchmarks report: {error}", file=sys.stderr)
        return 2
    entries = [entry for part in stored for entry in part["benchmarks"]]
    rows = joined([entry["extra_info"] for entry in entries if entry.get("extra_info")])
    machine = stored[0]["machine_info"]
    tables = [
        table(of_kind, machine)
        for key, table in TABLES.items()
        if (of_kind := [row for row in rows if key in row])
    ]
    first = args.files[0]
    if not tables:
        print(f"python -m benchmarks report: {first}: {NO_RESULTS}", file=sys.stderr)
        return 1
    text = "\n".join([machine_line(machine), *tables, *missing(entries)])
    folder = args.out or first.parent
    folder.mkdir(parents=True, exist_ok=True)
    stem = first.stem if len(args.files) == 1 else "report"
    (folder / f"{stem}.md").write_text(text)
    print(text, end="")
    try:
        from benchmarks.harness import plots

        plots.draw(rows, folder / stem)
    except ImportError as error:
        print(f"no plot: {error}; `pip install matplotlib` adds it", file=sys.stderr)
    return 0


def read(path: Path) -> dict:
    """A stored run; OSError or ValueError, naming the file, where it holds none."""
    try:
        document = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    parts = document if isinstance(document, dict) else {}
    machine, entries = parts.get("machine_info"), parts.get("benchmarks")
    is_run = isinstance(machine, dict) and "device" in machine and isinstance(entries, list)
    if not is_run or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path}: {NO_RESULTS}")
    return document


def machine_line(machine: dict) -> str:
    return (
        f"{machine['device']}, {machine['threads']} CPU threads, torch {machine['torch']}, "
        f"load average {machine['load']:.1f} before the run.\n"
    )


def joined(rows: list[dict]) -> list[dict]:
    """One row per kernel: the first of its runs, with the peers of all of them."""
    result, kernels = [], {}
    for row in rows:
        name = row.get("kernel")
        if name in kernels:
            kernels[name]["peers"] |= row["peers"]
            continue
        if name is not None:
            kernels[name] = row = {**row, "peers": dict(row["peers"])}
        result.append(row)
    return result


def missing(entries: list[dict]) -> list[str]:
    """The benchmarks without a result, by reason."""
    reasons: dict[str, list[str]] = {}
    for entry in entries:
        if (outcome := entry.get("outcome", "passed")) != "passed":
            why = {"begun": "did not end", "skipped": ""}.get(outcome, outcome)
            reason = ": ".join(filter(None, (why, entry.get("reason", "").split("\n")[0])))
            reasons.setdefault(reason, []).append(entry["name"].split("::")[-1])
    if not reasons:
        return []
    lines = [
        f"- {reason}: {', '.join(names) if len(names) < 4 else f'{len(names)} benchmarks'}"
        for reason, names in reasons.items()
    ]
    return ["\n".join(["Without a result:", "", *lines]) + "\n"]

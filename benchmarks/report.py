"""A benchmark run as a Markdown table and a plot.

    embedfuse bench report out/bench.json    # prints the table; writes out/bench.md and out/bench.png

% of peak: the time that the bytes take at the measured bandwidth, or the operations at the measured GEMM
rate, whichever is longer, over the measured time. x reference: plain torch's time over this version's.
"""

import json
import sys
from pathlib import Path

MODEL_HEADER = (
    "model", "workload", "dtype", "original tokens/s", "patched tokens/s", "original", "patched",
    "speed-up", "lowest cosine",
)  # fmt: skip
PEER_HEADER = (
    "workload", "peer", "its dtype", "our dtype", "peer", "embedfuse", "speed-up", "lowest cosine",
    "note",
)  # fmt: skip
LOSS_HEADER = (
    "loss, forward and backward", "dtype", "peer", "peer's time", "embedfuse", "speed-up", "peer's TFLOP/s",
    "TFLOP/s", "peer's memory", "memory", "the logits",
)  # fmt: skip
HEADER = (
    "op", "sample", "dtype", "backend", "median", "GB/s", "TFLOP/s", "% of peak", "x reference",
)  # fmt: skip


def add_arguments(parser) -> None:
    parser.add_argument("file", type=Path, help="JSON that `make bench` or `make gpu` wrote")


def run(args) -> int:
    source = args.file
    stored = json.loads(source.read_text())
    rows = [entry["extra_info"] for entry in stored["benchmarks"] if "op" in entry["extra_info"]]
    models = [e["extra_info"] for e in stored["benchmarks"] if "model" in e["extra_info"]]
    peers = [entry["extra_info"] for entry in stored["benchmarks"] if "peer" in entry["extra_info"]]
    losses = [
        entry["extra_info"] for entry in stored["benchmarks"] if "loss" in entry["extra_info"]
    ]
    if not rows and not models and not peers and not losses:
        print(f"{source}: holds no result of this folder's benchmarks", file=sys.stderr)
        return 1
    parts = [machine_line(stored["machine_info"])]
    if models:
        parts.append(models_table(models))
    if peers:
        parts.append(peers_table(peers))
    if losses:
        parts.append(losses_table(losses))
    if rows:
        parts.append(ops_table(rows))
    text = "\n".join(parts)
    source.with_suffix(".md").write_text(text)
    print(text, end="")
    if not rows:
        return 0
    try:
        plot(rows, source.with_suffix(".png"))
    except ImportError as error:
        print(f"no plot: {error}; `pip install matplotlib` adds it", file=sys.stderr)
    return 0


def machine_line(machine: dict) -> str:
    return (
        f"{machine['device']}, {machine['threads']} CPU threads, torch {machine['torch']}, "
        f"load average {machine['load']:.1f} before the run.\n"
    )


def ops_table(rows: list[dict]) -> str:
    peaks = {row["dtype"]: row["peak_tflop_per_s"] for row in rows}
    rates = ", ".join(f"{dtype} GEMM {rate:.3g} TFLOP/s" for dtype, rate in peaks.items())
    lines = [
        f"Measured peaks: memory {rows[0]['peak_gb_per_s']:.3g} GB/s, {rates}. "
        "The reference is the plain torch that defines the op, and not tuned.",
        "",
        table_row(HEADER),
        table_row(["---"] * 4 + ["---:"] * 5),
        *(table_row(cells(row, rows)) for row in rows),
    ]
    return "\n".join(lines) + "\n"


def models_table(rows: list[dict]) -> str:
    """Time per call; speed-up is the median of the rounds' ratios."""
    lines = [table_row(MODEL_HEADER), table_row(["---"] * 3 + ["---:"] * 6)]
    for row in rows:
        entries = (
            *(row[key] for key in ("model", "workload", "dtype")),
            f"{row['original_tokens_per_s']:,.0f}",
            f"{row['patched_tokens_per_s']:,.0f}",
            duration(row["original_seconds"]),
            duration(row["patched_seconds"]),
            f"{row['speedup']:.2f}x",
            f"{row['lowest_cosine']:.7f}",
        )
        lines.append(table_row(entries))
    return "\n".join(lines) + "\n"


def peers_table(rows: list[dict]) -> str:
    """Medians of calls in turn."""
    sizes = sorted({row["sizes"] for row in rows if "sizes" in row})
    lines = [f"Random weights, true architecture: {'; '.join(sizes)}.", ""] if sizes else []
    lines += [table_row(PEER_HEADER), table_row(["---"] * 4 + ["---:"] * 4 + ["---"])]
    for row in rows:
        cosine = row.get("lowest_cosine")
        entries = (
            *(row[key] for key in ("workload", "peer", "peer_dtype", "dtype")),
            duration(row["peer_seconds"]),
            duration(row["seconds"]),
            f"{row['speedup']:.2f}x",
            "" if cosine is None else f"{cosine:.7f}",
            row.get("note", ""),
        )
        lines.append(table_row(entries))
    return "\n".join(lines) + "\n"


def losses_table(rows: list[dict]) -> str:
    """Medians of calls in turn; memory beyond inputs and gradients, at its peak."""
    lines = [table_row(LOSS_HEADER), table_row(["---"] * 3 + ["---:"] * 8)]
    for row in rows:
        seconds, sizes = ([row["peer_" + key], row[key]] for key in ("seconds", "bytes"))
        entries = (
            *(row[key] or "" for key in ("loss", "dtype", "loss_peer")),
            *("" if s is None else duration(s) for s in seconds),
            "" if seconds[0] is None else f"{seconds[0] / seconds[1]:.2f}x",
            *("" if s is None else f"{row['flops'] / s / 1e12:.3g}" for s in seconds),
            *("" if n is None else f"{n / 1e6:,.0f} MB" for n in (*sizes, row["logits_bytes"])),
        )
        lines.append(table_row(entries))
    return "\n".join(lines) + "\n"


def table_row(row) -> str:
    return f"| {' | '.join(row)} |"


def cells(row: dict, rows: list[dict]) -> list[str]:
    speedup = times_reference(row, rows)
    return [
        *(row[key] for key in ("op", "sample", "dtype", "backend")),
        duration(row["seconds"]),
        f"{row['gb_per_s']:.3g}",
        f"{row['tflop_per_s']:.3g}",
        f"{row['percent_of_peak']:.1f}",
        "" if speedup is None else f"{speedup:.2f}",
    ]


def times_reference(row: dict, rows: list[dict]) -> float | None:
    """None when the run holds no reference for the same call."""
    call = ("op", "sample", "dtype")
    for other in rows:
        if other["backend"] == "reference" and all(other[key] == row[key] for key in call):
            return other["seconds"] / row["seconds"]
    return None


def duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def plot(rows: list[dict], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.2 + 0.28 * len(rows)), layout="constrained")
    axes = figure.subplots()
    backends = sorted({row["backend"] for row in rows})
    for position, row in enumerate(rows):
        axes.barh(position, row["percent_of_peak"], color=f"C{backends.index(row['backend'])}")
        axes.text(row["percent_of_peak"], position, f" {duration(row['seconds'])}", va="center")
    labels = [" · ".join(row[key] for key in ("op", "sample", "dtype", "backend")) for row in rows]
    labels = [label if len(label) < 90 else f"{label[:60]} … {label[-25:]}" for label in labels]
    axes.set_yticks(range(len(rows)), labels, fontsize="small")
    axes.invert_yaxis()
    axes.axvline(100, color="black", linewidth=1)
    axes.set_xlabel("% of the measured peak")
    axes.margins(x=0.15, y=0.01)
    FigureCanvasAgg(figure).print_png(path)

"""The tables of a report, in Markdown: a function for each kind of row."""

from collections.abc import Callable

from benchmarks.harness import targets

TARGET_HEADER = ("row", "unit", "floor", "target", "measured", "of target", "published")
KERNEL_HEADER = (
    "kernel", "median", "GB/s", "TFLOP/s", "% of peak", "memory", "peer", "peer's time", "peer's memory",
    "speed-up",
)  # fmt: skip
CURVE_HEADER = ("model", "dtype", "", "peer", "peer's value", "embedfuse", "speed-up")
MODEL_HEADER = (
    "model", "workload", "dtype", "original tokens/s", "patched tokens/s", "original", "patched",
    "speed-up", "lowest cosine",
)  # fmt: skip
PEER_HEADER = (
    "workload", "peer", "peer's dtype", "our dtype", "peer's time", "embedfuse", "speed-up", "lowest cosine",
    "note",
)  # fmt: skip
QUERY_HEADER = (
    "model", "dtype", "queries", "", "by", "median", "99th percentile", "of the floor", "of the original",
    "of ONNX Runtime",
)  # fmt: skip
LOSS_HEADER = (
    "loss, forward and backward", "dtype", "peer", "peer's time", "embedfuse", "speed-up", "peer's TFLOP/s",
    "TFLOP/s", "peer's memory", "memory", "the logits",
)  # fmt: skip
HEADER = (
    "op", "sample", "dtype", "backend", "median", "GB/s", "TFLOP/s", "% of peak", "x reference",
)  # fmt: skip


def targets_table(rows: list[dict], machine: dict) -> str:
    """The first measurement of each row; targets only where they were set for this device."""
    first: dict[str, dict] = {}
    for row in rows:
        first |= {name: value for name, value in row["rows"].items() if name not in first}
    wanted = targets.of(machine["device"])
    lines = [table_row(TARGET_HEADER), table_row(["---"] * 2 + ["---:"] * 4 + ["---"])]
    for name, measured in first.items():
        target = wanted.get(name)
        value = (
            f"{measured['value']:,.3g}" if measured["value"] < 1e3 else f"{measured['value']:,.0f}"
        )
        entries = ["", "", value, "", ""]
        if target is not None:
            floor = "" if target.floor is None else f"{target.floor:,g}"
            reached = f"{target.reached(measured['value']):.2f}x"
            entries = [floor, f"{target.target:,g}", value, reached, target.published]
        lines.append(table_row((name, measured["unit"], *entries)))
    if left := [name for name in wanted if name not in first]:
        lines += ["", f"Targets without a measurement here: {'; '.join(left)}."]
    return "\n".join(lines) + "\n"


def models_table(rows: list[dict], machine: dict) -> str:
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


def peers_table(rows: list[dict], machine: dict) -> str:
    """Medians of interleaved calls."""
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


def curves_table(rows: list[dict], machine: dict) -> str:
    show: dict[str, tuple[str, Callable]] = {
        "length": ("texts of {} tokens, tokens/s", "{:,.0f}".format),
        "batch": ("latency, queries at once: {}", duration),
    }
    lines = [table_row(CURVE_HEADER), table_row(["---"] * 4 + ["---:"] * 3)]
    for row in rows:
        what, number = show[row["curve"]]
        values = number(row["peer_value"]), number(row["value"]), f"{row['speedup']:.2f}x"
        named = row["curve_model"], row["dtype"], what.format(row["x"]), row["curve_peer"]
        lines.append(table_row((*named, *values)))
    return "\n".join(lines) + "\n"


def queries_table(rows: list[dict], machine: dict) -> str:
    """Medians over those of the floor, the first of the same kind, and ONNX Runtime: lower is better."""
    lines = [
        "Floor: a plain sum over as many bytes as the weights that a call must read, taken in the same "
        "turns.",
        "",
        table_row(QUERY_HEADER),
        table_row(["---"] * 5 + ["---:"] * 5),
    ]
    for row in rows:
        first = (row["query_model"], row["dtype"], str(row["queries"]))
        medians = [(t["kind"], t["by"], t["seconds"]) for t in row["times"] if "seconds" in t]
        originals = {kind: seconds for kind, _, seconds in reversed(medians)}
        runtimes = {kind: seconds for kind, by, seconds in medians if by == "ONNX Runtime"}
        for t in row["times"]:
            entries = [t.get("reason", "").replace("|", "\\|"), "", "", "", ""]
            if "seconds" in t:
                floor = None if t["kind"] == "tokenise" else row["floor_seconds"]
                bases = (floor, originals[t["kind"]], runtimes.get(t["kind"]))
                ratios = ("" if base is None else times(t["seconds"] / base) for base in bases)
                # Of few calls it would be the slowest.
                p99 = duration(t["p99_seconds"]) if row["calls"] >= 100 else ""
                entries = [duration(t["seconds"]), p99, *ratios]
            lines.append(table_row((*first, t["kind"], t["by"], *entries)))
            first = ("",) * len(first)
    return "\n".join(lines) + "\n"


def losses_table(rows: list[dict], machine: dict) -> str:
    """Medians of interleaved calls; peak memory in addition to inputs and gradients."""
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


def kernels_table(rows: list[dict], machine: dict) -> str:
    """A line for each peer. Memory is what the call took in addition to its inputs."""
    lines = [table_row(KERNEL_HEADER), table_row(["---"] + ["---:"] * 5 + ["---"] + ["---:"] * 3)]
    for row in rows:
        ours = (
            row["kernel"],
            duration(row["seconds"]),
            f"{row['gb_per_s']:.3g}",
            f"{row['tflop_per_s']:.3g}",
            f"{row['percent_of_peak']:.1f}",
            f"{row['bytes'] / 1e6:,.0f} MB",
        )
        for theirs in [peer_cells(*item) for item in row["peers"].items()] or [("",) * 4]:
            lines.append(table_row((*ours, *theirs)))
            ours = ("",) * len(ours)
    return "\n".join(lines) + "\n"


def peer_cells(name: str, peer: dict) -> tuple[str, ...]:
    if reason := peer.get("reason"):
        return name, reason.replace("|", "\\|"), "", ""
    size = f"{peer['bytes'] / 1e6:,.0f} MB"
    return (
        f"{name} {peer['version']}".rstrip(),
        duration(peer["seconds"]),
        size,
        f"{peer['speedup']:.2f}x",
    )


def ops_table(rows: list[dict], machine: dict) -> str:
    peaks = {row["dtype"]: row["peak_tflop_per_s"] for row in rows}
    rates = ", ".join(f"{dtype} GEMM {rate:.3g} TFLOP/s" for dtype, rate in peaks.items())
    lines = [
        f"Measured peaks: memory {rows[0]['peak_gb_per_s']:.3g} GB/s, {rates}. "
        "The reference is the plain torch that defines the op; it is not tuned.",
        "",
        table_row(HEADER),
        table_row(["---"] * 4 + ["---:"] * 5),
        *(table_row(cells(row, rows)) for row in rows),
    ]
    return "\n".join(lines) + "\n"


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


def table_row(row) -> str:
    return f"| {' | '.join(row)} |"


def times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 100 else f"{ratio:,.0f}x"


def duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


# By the key that only rows of this kind have.
TABLES = {
    "rows": targets_table,
    "model": models_table,
    "peer": peers_table,
    "curve": curves_table,
    "query_model": queries_table,
    "loss": losses_table,
    "kernel": kernels_table,
    "op": ops_table,
}

"""The report's pictures: the roofline, and the two curves of whole models. Needs matplotlib."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

GREY = "0.35"
MARKERS = {"float32": "o", "bfloat16": "^"}


def draw(rows: list[dict], stem: Path) -> None:
    """stem-roofline.png and stem-curves.png, of what the rows hold."""
    computing = [row for row in rows if "peak_gb_per_s" in row and row["tflop_per_s"] > 0]
    if computing := [row for row in computing if row.get("backend") != "reference"]:
        save(roofline(computing), f"{stem}-roofline.png")
    if curves := [row for row in rows if "curve" in row]:
        save(both_curves(curves), f"{stem}-curves.png")


def save(figure: Figure, path: str) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110)


def roofline(rows: list[dict]) -> Figure:
    """Operations per byte that a call must move against TFLOP/s, under the ceilings of the same run."""
    figure = Figure(figsize=(9.5, 5.6), layout="constrained")
    axes = figure.subplots()
    points = [intensity(row) for row in rows]
    bandwidth = rows[0]["peak_gb_per_s"] * 1e9
    peaks = {row.get("dtype", "bfloat16"): row["peak_tflop_per_s"] for row in rows}
    left, right = min(points) / 2, max(*points, max(peaks.values()) * 1e12 / bandwidth) * 4
    for dtype, peak in peaks.items():
        ridge = peak * 1e12 / bandwidth
        axes.plot(
            (left, ridge, right), (left * bandwidth / 1e12, peak, peak), color=GREY, linewidth=1
        )
        note = f"{dtype} GEMM {peak:.3g} TFLOP/s"
        axes.annotate(
            note, (right, peak), (-4, 4), textcoords="offset points", ha="right", color=GREY
        )
    axes.annotate(
        f"memory {bandwidth / 1e9:.3g} GB/s",
        (left, left * bandwidth / 1e12),
        (10, 22),
        textcoords="offset points",
        color=GREY,
    )
    names = sorted({name_of(row) for row in rows})
    for row, x in zip(rows, points, strict=True):
        dtype = row.get("dtype", "bfloat16")
        color = f"C{names.index(name_of(row)) % 10}"
        marker = (
            MARKERS.get(dtype, "s") if names.index(name_of(row)) < 10 else "Dv"[dtype != "float32"]
        )
        axes.plot(x, row["tflop_per_s"], marker, color=color, markersize=7, alpha=0.85)
    for i, name in enumerate(names):
        axes.plot([], [], "o" if i < 10 else "D", color=f"C{i % 10}", label=name)
    axes.plot([], [], "o", color=GREY, fillstyle="none", label="float32: round, diamond")
    axes.plot([], [], "^", color=GREY, fillstyle="none", label="bfloat16: triangle")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.set_xlabel("operations per byte that must be moved")
    axes.set_ylabel("TFLOP/s")
    axes.grid(alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize="small")
    return figure


def intensity(row: dict) -> float:
    return row["tflop_per_s"] * 1e3 / row["gb_per_s"]


def name_of(row: dict) -> str:
    """The op; a kernel's row by its first word."""
    return row.get("op") or row["kernel"].split(" ")[0]


def both_curves(rows: list[dict]) -> Figure:
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    titles = {"length": "tokens per second", "batch": "latency of a call, ms"}
    below = {"length": "tokens of each text", "batch": "queries in the call"}
    for ax, (curve, title) in zip(axes, titles.items(), strict=True):
        found = [row for row in rows if row["curve"] == curve]
        lines(ax, found, 1 if curve == "length" else 1e3)
        ax.set_title(title, fontsize="medium")
        ax.set_xlabel(below[curve])
        ax.set_xscale("log", base=2)
        ax.set_xticks(sorted({row["x"] for row in found}))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.25)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(rows[0]["curve_model"], fontsize="medium")
    return figure


def lines(ax, rows: list[dict], unit: float) -> None:
    """Ours filled and solid, the peer's hollow and dashed; a colour for each dtype."""
    for color, dtype in enumerate(dict.fromkeys(row["dtype"] for row in rows)):
        found = sorted((row for row in rows if row["dtype"] == dtype), key=lambda row: row["x"])
        for key, name, style in (
            ("value", "embedfuse", {"linestyle": "-", "marker": "o"}),
            (
                "peer_value",
                rows[0]["curve_peer"],
                {"linestyle": "--", "marker": "o", "fillstyle": "none"},
            ),
        ):
            values = [row[key] * unit for row in found]
            ax.plot(
                [row["x"] for row in found],
                values,
                color=f"C{color}",
                label=f"{name}, {dtype}",
                **style,
            )

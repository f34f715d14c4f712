"""The plots of a report: the roofline, and the two curves of whole models. Needs matplotlib."""

import itertools
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

GREY = "0.35"
MARKERS = {"float32": "o", "bfloat16": "^"}  # the dtypes of benchmarks/harness/peaks.py


def draw(rows: list[dict], stem: Path) -> None:
    """Write stem-roofline.png and stem-curves.png, each where the rows have such figures."""
    computing = [
        row for row in rows if row.get("tflop_per_s", 0) > 0 and row.get("backend") != "reference"
    ]
    if computing:
        save(roofline(computing), f"{stem}-roofline.png")
    if curves := [row for row in rows if "curve" in row]:
        save(both_curves(curves), f"{stem}-curves.png")


def save(figure: Figure, path: str) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110)


def roofline(rows: list[dict]) -> Figure:
    """TFLOP/s over the operations per byte that a call must move, with the ceilings of the same run."""
    figure = Figure(figsize=(9.5, 5.6), layout="constrained")
    axes = figure.subplots()
    points = [intensity(row) for row in rows]
    bandwidth = rows[0]["peak_gb_per_s"] * 1e9
    peaks = {row.get("dtype", "bfloat16"): row["peak_tflop_per_s"] for row in rows}
    # The ceilings' names need room to the right of the last point.
    left, right = min(points) / 2, max(*points, max(peaks.values()) * 1e12 / bandwidth) * 60
    for dtype, peak in peaks.items():
        ridge = peak * 1e12 / bandwidth
        roof = (left * bandwidth / 1e12, peak, peak)
        axes.plot((left, ridge, right), roof, color=GREY, linewidth=1)
        label(axes, f"{dtype} GEMM {peak:.3g} TFLOP/s", right, peak, (-4, 4))
    ridge = min(peaks.values()) * 1e12 / bandwidth
    middle = left**0.2 * ridge**0.8
    label(axes, f"memory {bandwidth / 1e9:.3g} GB/s", middle, middle * bandwidth / 1e12, (-10, 4))
    names = sorted({name_of(row) for row in rows})
    shades = matplotlib.colormaps["tab20"].colors
    colors = dict(zip(names, itertools.cycle(shades[::2] + shades[1::2]), strict=False))
    for row, x in zip(rows, points, strict=True):
        marker = MARKERS[row.get("dtype", "bfloat16")]
        color = colors[name_of(row)]
        axes.plot(x, row["tflop_per_s"], marker, color=color, markersize=7, alpha=0.85)
    for name, color in colors.items():
        axes.plot([], [], "s", color=color, label=name)
    for dtype in peaks:
        axes.plot([], [], MARKERS[dtype], color=GREY, fillstyle="none", label=dtype)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.set_xlabel("operations per byte that must be moved")
    axes.set_ylabel("TFLOP/s")
    axes.grid(alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize="small")
    return figure


def label(axes, text: str, x: float, y: float, offset: tuple[int, int]) -> None:
    """To the left of the point and above it."""
    axes.annotate(text, (x, y), offset, textcoords="offset points", ha="right", color=GREY)


def intensity(row: dict) -> float:
    return row["tflop_per_s"] * 1e3 / row["gb_per_s"]


def name_of(row: dict) -> str:
    """The op, or the first word of the kernel's row."""
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
    """embedfuse filled and solid, the peer hollow and dashed; a colour for each dtype."""
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

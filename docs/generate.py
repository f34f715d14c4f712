"""Writes the generated parts of README.md and docs/, and the picture of README.md.

    python -m docs.generate

A part is between the lines "<!-- generated: NAME -->" and "<!-- end -->". It comes from the registry of ops,
from embedfuse.config, from the public names, or from the stored results in benchmarks/results.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import embedfuse
from embedfuse import config, registry
from embedfuse.native import DTYPES

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
NONE = "\N{EN DASH}"
RESULTS = ROOT / "benchmarks" / "results" / "amd-epyc-2-cores"
ONE_QUERY = ROOT / "benchmarks" / "results" / "intel-xeon-avx512-2-cores" / "one-query.json"
PICTURE = ROOT / "docs" / "images" / "speed.svg"
PART = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
CACHED = "sentence-transformers, cached, 256 rows at a time"
SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int8": "int8"}
# In the API pages; of other classes the methods are not for users.
WITH_METHODS = {"Csr", "Embedder", "NegativeQueue"}
MINILM, BGE_M3, E5_MISTRAL = "all-MiniLM-L6-v2", "BGE-M3", "E5-mistral, 4 of 32 layers"


def filled(text: str) -> str:
    """The page with its generated parts as they are now."""
    return PART.sub(lambda found: f"{found[1]}\n{PARTS[found[2]]()}\n{found[3]}", text)


# The ops, the environment variables and the public names


def kernels() -> str:
    rows = []
    for name, op in sorted(registry.OPS.items()):
        found = {i.backend: dtypes(i.dtypes) for i in op.implementations}
        cells = (found.get(backend, NONE) for backend in config.BACKENDS if backend != "reference")
        rows.append((f"`{name}`", *cells))
    return table(("op", "cpp", "triton", "cuda"), rows)


def dtypes(accepted: tuple) -> str:
    if set(accepted) == set(DTYPES):
        return "yes"
    return ", ".join(SHORT[str(dtype).removeprefix("torch.")] for dtype in accepted)


def variables() -> str:
    rows = []
    for name, variable in config.VARIABLES.items():
        accepted = ", ".join(f"`{v}`" for v in variable.accepted) if variable.accepted else "any"
        rows.append((f"`{name}`", variable.meaning, accepted, variable.default))
    return table(("variable", "meaning", "accepted", "default"), rows)


def api(package: ModuleType) -> Callable[[], str]:
    """mkdocstrings' directives for the public functions and classes, by the modules that define them."""

    def directives() -> str:
        lines = []
        for name in sorted(package.__all__, key=str.lower):
            found = getattr(package, name)
            if hasattr(found, "__qualname__"):
                lines.append(f"::: {found.__module__}.{found.__qualname__}")
            if name in WITH_METHODS:
                lines += ["    options:", "      members: null"]
        return "\n".join(lines) + "\n"

    return directives


# The stored results


def stored(name: str) -> list[dict]:
    """Rows of one stored run."""
    return rows_of(RESULTS / f"{name}.json")


def rows_of(path: Path) -> list[dict]:
    found = json.loads(path.read_text())["benchmarks"]
    return [entry["extra_info"] for entry in found if entry.get("extra_info")]


def row(name: str, **wanted) -> dict:
    """The first stored row with these values."""
    return next(r for r in stored(name) if all(r.get(key) == v for key, v in wanted.items()))


def times(r: dict) -> tuple[float, float, float]:
    """Seconds of the peer and of embedfuse, and the speed-up."""
    if "model" in r:
        return r["original_seconds"], r["patched_seconds"], r["speedup"]
    return r["peer_seconds"], r["seconds"], r.get("speedup", r["peer_seconds"] / r["seconds"])


def measured_cells(r: dict) -> tuple[str, str, str]:
    peer, own, speedup = times(r)
    return duration(peer), duration(own), ratio(speedup)


def summary() -> str:
    """Six rows of the front page."""
    minilm = {"model": MINILM, "dtype": "float32"}
    maxsim = "MaxSim, 1 x 32 against 1,000 x 300, masked, d = 128"
    bge, e5 = "BGE-M3 (random weights)", "E5-mistral (random weights, 4 of its 32 layers)"
    chosen = (
        ("bench", {**minilm, "workload": "requests of 32 texts"}, f"{MINILM}, 32 texts, fp32",
         "sentence-transformers", "test_models"),
        ("bench", {**minilm, "workload": "400 texts in bulk"}, f"{MINILM}, 400 texts, fp32",
         "sentence-transformers", "test_models"),
        ("bench", {"workload": "requests of 32 texts, dense", "dtype": "bfloat16"},
         f"{bge}, 32 texts, bf16", "sentence-transformers", "bge_m3"),
        ("e5-mistral", {"workload": "64 docstrings, 3,789 tokens; batch_size=8"},
         f"{e5}, 64 texts, bf16", "sentence-transformers", "e5_mistral"),
        ("late-interaction", {"workload": maxsim, "dtype": "float32"},
         "MaxSim, 1 query against 1,000 documents, fp32", "sentence-transformers",
         "late_interaction"),
        ("info-nce", {"loss_peer": CACHED, "dtype": "float32"},
         "InfoNCE, 1,024 against 65,536, with gradients, fp32",
         "sentence-transformers, cached", "info_nce"),
    )  # fmt: skip
    rows = [
        (title, peer, *measured_cells(row(file, **wanted)), f'`make bench ARGS="-k {test}"`')
        for file, wanted, title, peer, test in chosen
    ]
    head = ("", "compared with", "its time", "embedfuse", "speed-up", "command")
    return table(head, rows, right=(2, 3, 4))


def minilm() -> str:
    rows = []
    for r in stored("bench"):
        if "model" not in r:
            continue
        rate = (f"{r[f'{side}_tokens_per_s']:,.0f}" for side in ("original", "patched"))
        cosine = f"{r['lowest_cosine']:.6f}"
        rows.append((r["workload"], SHORT[r["dtype"]], *rate, *measured_cells(r), cosine))
    head = (
        "", "dtype", "tokens/s, original", "patched", "time, original", "patched", "speed-up",
        "lowest cosine",
    )  # fmt: skip
    return table(head, rows, right=range(2, 8))


def one_query() -> str:
    """Whole calls, tokenisation included."""
    sides = (
        "sentence-transformers", "ONNX Runtime", "OpenVINO", "embedfuse, SentenceTransformer",
        "embedfuse, Embedder",
    )  # fmt: skip
    rows = []
    for r in rows_of(ONE_QUERY):
        whole = {
            t["by"]: t["seconds"]
            for t in r["times"]
            if t["kind"] == "whole call" and "seconds" in t
        }
        if "embedfuse, Embedder" in whole and "width" not in r["query_model"]:
            cells = (duration(whole[side]) if side in whole else NONE for side in sides)
            floor = duration(r["floor_seconds"])
            rows.append((r["query_model"], str(r["queries"]), floor, *cells))
    head = ("", "queries", "reading the weights", *sides)
    return table(head, rows, right=range(1, 8))


def peers(name: str) -> Callable[[], str]:
    def rows() -> str:
        lines = []
        for r in stored(name):
            if "peer" not in r:
                continue
            own, theirs = SHORT[r["dtype"]], SHORT.get(r["peer_dtype"], r["peer_dtype"])
            dtype = own if own == theirs else f"{theirs}; {own}"
            cosine = f"{r['lowest_cosine']:.6f}" if "lowest_cosine" in r else ""
            note = f" ({r['note']})" if "note" in r else ""
            what = r["workload"] + note
            lines.append((what, r["peer"], dtype, *measured_cells(r), cosine))
        head = ["", "compared with", "dtype", "its time", "embedfuse", "speed-up", "lowest cosine"]
        if not any(line[-1] for line in lines):
            head, lines = head[:-1], [line[:-1] for line in lines]
        return table(head, lines, right=range(3, len(head)))

    return rows


def losses() -> str:
    rows = []
    for r in stored("info-nce"):
        alone = r["peer_seconds"] is None
        cells = ("", duration(r["seconds"]), "") if alone else measured_cells(r)
        memory = (
            "" if size is None else f"{size / 1e6:,.0f} MB"
            for size in (r["peer_bytes"], r["bytes"])
        )
        rows.append((r["loss"], r["loss_peer"] or NONE, SHORT[r["dtype"]], *cells, *memory))
    head = (
        "queries x documents", "compared with", "dtype", "its time", "embedfuse", "speed-up",
        "its memory", "embedfuse",
    )  # fmt: skip
    return table(head, rows, right=range(3, 8))


def curves() -> str:
    rows = []
    for r in stored("curves"):
        if r["curve"] == "length":
            what, show = f"texts of {r['x']} tokens, tokens/s", "{:,.0f}".format
        else:
            queries = "query" if r["x"] == 1 else "queries"
            what, show = f"{r['x']} {queries} in a call, time", duration
        cells = show(r["peer_value"]), show(r["value"]), ratio(r["speedup"])
        rows.append((what, SHORT[r["dtype"]], *cells))
    head = ("", "dtype", "sentence-transformers", "embedfuse", "speed-up")
    return table(head, rows, right=range(2, 5))


def op_rates() -> str:
    """The C++ version of each op on its longest sample, and the plain torch that defines it."""
    reference, longest = {}, {}
    for r in stored("bench"):
        if "op" not in r:
            continue
        op, call = (r["op"], r["dtype"]), (r["op"], r["sample"], r["dtype"])
        if r["backend"] == "reference":
            reference[call] = r["seconds"]
        elif op not in longest or r["seconds"] > longest[op]["seconds"]:
            longest[op] = r
    rows = [
        (
            *(f"`{op}`", r["sample"], SHORT[dtype], duration(r["seconds"])),
            f"{r['percent_of_peak']:.0f} %",
            ratio(reference[op, r["sample"], dtype] / r["seconds"]),
        )
        for (op, dtype), r in longest.items()
    ]
    head = ("op", "sample", "dtype", "time", "of the peak", "speed-up over plain torch")
    return table(head, rows, right=range(3, 6))


PARTS = {
    "api": api(embedfuse),
    "api-ops": api(embedfuse.ops),
    "api-losses": api(embedfuse.losses),
    "kernels": kernels,
    "variables": variables,
    "summary": summary,
    "minilm": minilm,
    "bge-m3": peers("bench"),
    "e5-mistral": peers("e5-mistral"),
    "late-interaction": peers("late-interaction"),
    "info-nce": losses,
    "curves": curves,
    "ops": op_rates,
    "one-query": one_query,
}


def table(head, rows, right=()) -> str:
    rule = ["---:" if i in right else "---" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)) + "\n"


def duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def ratio(speedup: float) -> str:
    digits = 2 if speedup < 2 else 1 if speedup < 10 else 0
    return f"{speedup:.{digits}f}x"


# The picture


def bars() -> dict[str, dict[str, float]]:
    """Model -> workload -> speed-up over sentence-transformers."""
    of = {
        MINILM: ("bench", "float32", "requests of 32 texts", "400 texts in bulk", "one query"),
        BGE_M3: (
            *("bench", "bfloat16", "requests of 32 texts, dense", "512 texts in bulk, dense"),
            "one query, dense",
        ),
        E5_MISTRAL: (
            *("e5-mistral", "bfloat16", "16 docstrings, dense"),
            *("64 docstrings, 3,789 tokens; batch_size=8", "one query of 8 tokens"),
        ),
    }
    names = ("a request of 16 or 32 texts", "bulk", "one query")
    return {
        f"{model}, {SHORT[dtype]}": {
            name: times(row(file, workload=workload, dtype=dtype))[2]
            for name, workload in zip(names, workloads, strict=True)
        }
        for model, (file, dtype, *workloads) in of.items()
    }


def draw(path: Path) -> None:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # The same bytes each time, and text as text.
    style = {"svg.hashsalt": "embedfuse", "svg.fonttype": "none", "font.family": "sans-serif"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        found = bars()
        workloads = list(next(iter(found.values())))
        for i, workload in enumerate(workloads):
            places = [3.6 * group + i for group in range(len(found))]
            values = [of[workload] for of in found.values()]
            drawn = axes.bar(places, values, 0.9, label=workload, color=f"C{i}")
            axes.bar_label(drawn, [ratio(value) for value in values], padding=2)
        axes.axhline(1, color="0.35", linewidth=1)
        axes.set_xticks([3.6 * group + 1 for group in range(len(found))], list(found))
        axes.set_ylabel("speed-up over\nsentence-transformers")
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.12)
        axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.2))
        figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> None:
    for page in PAGES:
        page.write_text(filled(page.read_text()))
    draw(PICTURE)


if __name__ == "__main__":
    main()

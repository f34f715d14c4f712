"""`python -m benchmarks report` on a small run with values that are easy to check."""

import json
import sys

import pytest

from benchmarks.__main__ import main
from benchmarks.harness import targets
from benchmarks.harness.targets import Target

SHARED = {"op": "mix", "sample": "x 2x3, mean", "dtype": "float32"}
PEAKS = {"peak_gb_per_s": 20.0, "peak_tflop_per_s": 0.3}
RUN = {
    "machine_info": {"device": "Some CPU", "threads": 2, "torch": "2.13.0", "load": 0.25},
    "benchmarks": [
        {
            "extra_info": {
                **(SHARED | PEAKS),
                "backend": "reference",
                "seconds": 0.0123456,
                "gb_per_s": 2.5,
                "tflop_per_s": 0.004,
                "percent_of_peak": 12.5,
            }
        },
        {
            "extra_info": {
                **(SHARED | PEAKS),
                "backend": "cpp",
                "seconds": 0.00061728,
                "gb_per_s": 50.0,
                "tflop_per_s": 0.08,
                "percent_of_peak": 62.54,
            }
        },
        {
            "extra_info": {
                **(SHARED | PEAKS),
                "dtype": "bfloat16",
                "peak_tflop_per_s": 2.1,
                "backend": "cpp",
                "seconds": 0.0001,
                "gb_per_s": 1.0,
                "tflop_per_s": 0.01,
                "percent_of_peak": 5.0,
            }
        },
        {"extra_info": {}},  # another suite's benchmark
    ],
}


MODEL = {
    "extra_info": {
        "model": "some-model",
        "workload": "one query",
        "dtype": "bfloat16",
        "original_seconds": 0.02,
        "patched_seconds": 0.0005,
        "original_tokens_per_s": 1234.4,
        "patched_tokens_per_s": 49376.0,
        "speedup": 39.876,
        "lowest_cosine": 0.99999912,
    }
}


PEER = {
    "peer": "other",
    "workload": "one query",
    "sizes": "A, 4 x 16",
    "dtype": "bfloat16",
    "peer_dtype": "float32",
    "peer_seconds": 2.5,
    "seconds": 0.5,
    "speedup": 5.0,
}


@pytest.fixture
def call(tmp_path, monkeypatch):
    source = tmp_path / "run.json"

    def run(content):
        source.write_text(json.dumps(content))
        return main(["report", str(source)])

    return run


def test_table(call, capsys, tmp_path):
    assert call(RUN) == 0
    text = capsys.readouterr().out
    assert (tmp_path / "run.md").read_text() == text
    lines = text.splitlines()
    assert lines[0] == "Some CPU, 2 CPU threads, torch 2.13.0, load average 0.2 before the run."
    assert "memory 20 GB/s, float32 GEMM 0.3 TFLOP/s, bfloat16 GEMM 2.1 TFLOP/s" in lines[2]
    shared = "| mix | x 2x3, mean |"
    assert lines[6:] == [
        f"{shared} float32 | reference | 12.3 ms | 2.5 | 0.004 | 12.5 | 1.00 |",
        f"{shared} float32 | cpp | 617 µs | 50 | 0.08 | 62.5 | 20.00 |",
        f"{shared} bfloat16 | cpp | 100 µs | 1 | 0.01 | 5.0 |  |",
    ]
    assert len({line.count("|") for line in lines[4:]}) == 1


def test_models_come_first(call, capsys, tmp_path):
    row = "| some-model | one query | bfloat16 | 1,234 | 49,376 | 20 ms | 500 µs | 39.88x | 0.9999991 |"
    assert call({**RUN, "benchmarks": [*RUN["benchmarks"], MODEL]}) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[4:6] == [row, ""]
    assert lines[6].startswith("Measured peaks")
    (tmp_path / "run-roofline.png").unlink(missing_ok=True)
    assert call({**RUN, "benchmarks": [MODEL]}) == 0
    assert capsys.readouterr().out.splitlines()[4:] == [row]
    assert not list(tmp_path.glob("*.png"))


def test_peers(call, capsys):
    other = {**PEER, "sizes": "B, 2 x 8", "lowest_cosine": 0.999, "note": "9 tokens/s"}
    rows = [{"extra_info": PEER}, {"extra_info": other}]
    assert call({**RUN, "benchmarks": rows}) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "Random weights, true architecture: A, 4 x 16; B, 2 x 8."
    shared = "| one query | other | float32 | bfloat16 | 2.5 s | 500 ms | 5.00x |"
    assert lines[6:] == [f"{shared}  |  |", f"{shared} 0.9990000 | 9 tokens/s |"]
    assert len({line.count("|") for line in lines[4:]}) == 1


H100 = {**RUN["machine_info"], "device": "NVIDIA H100 80GB HBM3"}


def measured(**rows: tuple[float, str]) -> dict:
    return {
        "extra_info": {"rows": {k: {"value": v, "unit": unit} for k, (v, unit) in rows.items()}}
    }


def test_targets(call, capsys, monkeypatch):
    monkeypatch.setattr(
        "benchmarks.harness.targets.TARGETS",
        {
            "a rate": Target("docs/s", 3000, 2000, "someone 500"),
            "a time": Target("ms", None, 5.0),
            "elsewhere": Target("x", 2.0, 1.0),
        },
    )
    rows = [measured(**{"a rate": (2500.0, "docs/s")}), measured(**{"a rate": (1.0, "docs/s")})]
    rows.append(measured(**{"a time": (20.0, "ms"), "without target": (70_000.0, "tokens/s")}))
    assert call({"machine_info": H100, "benchmarks": rows}) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[4:] == [
        "| a rate | docs/s | 3,000 | 2,000 | 2,500 | 1.25x | someone 500 |",
        "| a time | ms |  | 5 | 20 | 0.25x |  |",
        "| without target | tokens/s |  |  | 70,000 |  |  |",
        "",
        "Targets without a measurement here: elsewhere.",
    ]
    # Targets apply to the GPU that they were set for only.
    assert call({**RUN, "benchmarks": rows}) == 0
    assert "| a rate | docs/s |  |  | 2,500 |  |  |" in capsys.readouterr().out


def test_targets_of_the_table():
    assert Target("tokens/s", None, 52_000).reached(26_000) == 0.5
    assert Target("µs", None, 36).reached(72) == 0.5
    assert Target("x", 2.7, 2.3).reached(4.6) == 2
    for name, target in targets.TARGETS.items():
        assert target.unit in (*targets.RATES, "ms", "µs"), name
        if target.floor is not None:  # no target lies beyond the limit
            assert target.reached(target.floor) >= 1, name


KERNEL = {
    **PEAKS,
    "kernel": "MaxSim 1x32",
    "seconds": 0.0005,
    "gb_per_s": 10.0,
    "tflop_per_s": 0.15,
    "percent_of_peak": 50.0,
    "bytes": 3_000_000,
    "peers": {
        "torch einsum": {"version": "", "seconds": 0.002, "bytes": 70_000_000, "speedup": 4.0}
    },
}


def kernel(**changes) -> dict:
    return {"extra_info": KERNEL | changes}


def test_kernels(call, capsys):
    """Peers of one kernel are shown together, also when different tests measured them."""
    others = {
        "fast": {"version": "0.4.5", "seconds": 0.0006, "bytes": 4e6, "speedup": 1.5},
        "far": {"reason": "not installed: far"},
        "wrong": {"reason": "AssertionError: other values: |error|"},
    }
    again = kernel(seconds=0.0004, percent_of_peak=62.5, peers=others)
    rows = [kernel(), kernel(kernel="sparse", peers={}), again]
    assert call({**RUN, "benchmarks": rows}) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[4:] == [
        "| MaxSim 1x32 | 500 µs | 10 | 0.15 | 50.0 | 3 MB | torch einsum | 2 ms | 70 MB | 4.00x |",
        "|  |  |  |  |  |  | fast 0.4.5 | 600 µs | 4 MB | 1.50x |",
        "|  |  |  |  |  |  | far | not installed: far |  |  |",
        "|  |  |  |  |  |  | wrong | AssertionError: other values: \\|error\\| |  |  |",
        "| sparse | 500 µs | 10 | 0.15 | 50.0 | 3 MB |  |  |  |  |",
    ]


def curve(kind: str, x: int, peer: float, ours: float, speedup: float) -> dict:
    named = {"curve": kind, "x": x, "dtype": "float32", "curve_model": "m", "curve_peer": "p"}
    return {"extra_info": named | {"peer_value": peer, "value": ours, "speedup": speedup}}


CURVES = [
    curve("length", 16, 1000.0, 2500.0, 2.5),
    curve("length", 64, 2000.0, 3000.0, 1.5),
    curve("batch", 1, 0.01, 0.004, 2.5),
    curve("batch", 8, 0.08, 0.02, 4.0),
]


def test_curves(call, capsys):
    assert call({**RUN, "benchmarks": CURVES}) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[4] == "| m | float32 | texts of 16 tokens, tokens/s | p | 1,000 | 2,500 | 2.50x |"
    assert lines[-1] == "| m | float32 | latency, queries at once: 8 | p | 80 ms | 20 ms | 4.00x |"


def test_what_has_no_result_is_named(call, capsys):
    entries = [
        {"name": "a.py::test_x[1]", "outcome": "passed", "extra_info": PEER},
        {"name": "a.py::test_x[2]", "outcome": "failed", "reason": "RuntimeError: boom\nmore"},
        {"name": "a.py::test_x[3]", "outcome": "begun"},
        {"name": "a.py::test_x[4]", "outcome": "not run"},
        *(
            {"name": f"a.py::test_y[{i}]", "outcome": "skipped", "reason": "no peer"}
            for i in range(5)
        ),
    ]
    assert call({**RUN, "benchmarks": entries}) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4:] == [
        "- failed: RuntimeError: boom: test_x[2]",
        "- did not end: test_x[3]",
        "- not run: test_x[4]",
        "- no peer: 5 benchmarks",
    ]


def test_several_runs_in_one_report(tmp_path, capsys):
    paths = [tmp_path / "models.json", tmp_path / "kernels.json"]
    for path, rows in zip(paths, ([MODEL], RUN["benchmarks"]), strict=True):
        path.write_text(json.dumps({**RUN, "benchmarks": rows}))
    assert main(["report", *map(str, paths), "--out", str(tmp_path / "new")]) == 0
    text = (tmp_path / "new/report.md").read_text()
    assert text == capsys.readouterr().out
    assert "| some-model |" in text
    assert "| 617 µs |" in text


def test_plots(call, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    assert call({**RUN, "benchmarks": [*RUN["benchmarks"], *CURVES]}) == 0
    for name in ("run-roofline.png", "run-curves.png"):
        pixels = image.imread(tmp_path / name)[:, :, :3]
        colours = (pixels.max(2) - pixels.min(2)) > 0.2
        assert 200 < colours.sum() < 0.2 * colours.size, name  # markers and lines, on white


def test_roofline_has_the_measured_points():
    plots = pytest.importorskip("benchmarks.harness.plots")
    axes = plots.roofline([RUN["benchmarks"][1]["extra_info"]]).axes[0]
    roof, point = axes.lines[:2]
    assert list(point.get_xdata()) == [pytest.approx(1.6)]  # 0.08 TFLOP/s at 50 GB/s
    assert list(point.get_ydata()) == [0.08]
    left, ridge, _ = roof.get_xdata()
    assert ridge == pytest.approx(15)  # 0.3 TFLOP/s over 20 GB/s
    assert list(roof.get_ydata()) == pytest.approx([left * 0.02, 0.3, 0.3])


def test_without_matplotlib_there_is_a_table_and_a_hint(call, capsys, tmp_path, monkeypatch):
    for module in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert call(RUN) == 0
    output = capsys.readouterr()
    assert "| 617 µs |" in output.out
    assert "pip install matplotlib" in output.err
    assert not list(tmp_path.glob("*.png"))


def test_a_run_without_results_is_refused(call, capsys):
    assert call({**RUN, "benchmarks": RUN["benchmarks"][3:]}) == 1
    assert "run.json: holds no result" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory: '{file}'"),
        (b"", "{file}: not JSON (Expecting value: line 1 column 1 (char 0))"),
        (b"\xff", "{file}: not JSON ("),
        (b"[1]", "{file}: holds no result of these benchmarks"),
        (b'{"benchmarks": 3}', "{file}: holds no result of these benchmarks"),
        (b'{"benchmarks": [{}]}', "{file}: holds no result of these benchmarks"),
        (b'{"benchmarks": [{}], "machine_info": {}}', "{file}: holds no result of these"),
        (b'{"benchmarks": [7], "machine_info": {"device": ""}}', "{file}: holds no result of"),
    ],
)
def test_files_that_hold_no_run_are_refused_in_one_line(tmp_path, capsys, content, message):
    file, run = tmp_path / "file.json", tmp_path / "run.json"
    run.write_text(json.dumps(RUN))
    if content is not None:
        file.write_bytes(content)
    for files in ([file], [run, file], [file, run]):
        assert main(["report", *map(str, files)]) in (1, 2)
        found = capsys.readouterr()
        assert found.err.count("\n") == 1
        assert found.err.startswith("python -m benchmarks report: ")
        assert message.format(file=file) in found.err
        assert found.out == ""
    assert not (tmp_path / "report.md").exists()

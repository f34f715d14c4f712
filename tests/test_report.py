"""`embedfuse bench report` on a small run with values that are easy to check."""

import json
import sys

import pytest

from embedfuse.cli import main

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
        return main(["bench", "report", str(source)])

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
    (tmp_path / "run.png").unlink(missing_ok=True)
    assert call({**RUN, "benchmarks": [MODEL]}) == 0
    assert capsys.readouterr().out.splitlines()[4:] == [row]
    assert not (tmp_path / "run.png").exists()


def test_peers(call, capsys):
    other = {**PEER, "sizes": "B, 2 x 8", "lowest_cosine": 0.999, "note": "9 tokens/s"}
    rows = [{"extra_info": PEER}, {"extra_info": other}]
    assert call({**RUN, "benchmarks": rows}) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "Random weights, true architecture: A, 4 x 16; B, 2 x 8."
    shared = "| one query | other | float32 | bfloat16 | 2.5 s | 500 ms | 5.00x |"
    assert lines[6:] == [f"{shared}  |  |", f"{shared} 0.9990000 | 9 tokens/s |"]
    assert len({line.count("|") for line in lines[4:]}) == 1


def test_plot(call, tmp_path):
    pytest.importorskip("matplotlib")
    assert call(RUN) == 0
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_table_comes_and_the_plot_is_refused(
    call, capsys, tmp_path, monkeypatch
):
    for module in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert call(RUN) == 0
    output = capsys.readouterr()
    assert "| 617 µs |" in output.out
    assert "pip install matplotlib" in output.err
    assert not (tmp_path / "run.png").exists()


def test_a_run_without_results_is_refused(call, capsys):
    assert call({**RUN, "benchmarks": RUN["benchmarks"][3:]}) == 1
    assert "run.json: holds no result" in capsys.readouterr().err

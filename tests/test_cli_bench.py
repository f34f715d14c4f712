"""`embedfuse bench`: a row for each sample and backend, or the reason why there is no time."""

from pathlib import Path

import pytest
import torch

from embedfuse.cli import bench, main
from embedfuse.registry import OPS

OP = OPS["silu_mul"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small tensors, and no more repetitions than needed."""
    monkeypatch.setattr(bench, "SECONDS", 1e-3)

    def samples(device, dtype, size):
        assert size == "bench"
        return [
            tuple(torch.ones(3, n, dtype=dtype, device=device) for _ in "gu")
            for n in (2**14, 2**16)
        ]

    monkeypatch.setattr(OP, "make_samples", samples)


def lines(capsys, *arguments) -> list[list[str]]:
    assert main(["bench", *arguments]) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_a_row_for_each_sample_and_backend(capsys):
    first, header, *rows = lines(capsys, "silu_mul", "--device", "cpu")
    assert first[:3] == ["float32", "on", "cpu,"]
    assert header == ["op", "backend", "median", "x", "reference", "sample"]
    assert [row[:2] for row in rows[::2]] == [["silu_mul", "reference"]] * 2
    assert [row[4:] for row in rows[::2]] == [
        ["gate", f"3x{n},", "up", f"3x{n}"] for n in (2**14, 2**16)
    ]
    for row in rows:
        assert float(row[row.index("ms") - 1]) > 0
    for reference, cpp in zip(rows[::2], rows[1::2], strict=True):
        assert cpp[0] == "cpp"
        assert float(cpp[3]) == pytest.approx(float(reference[2]) / float(cpp[1]), rel=0.5)


def test_a_backend_that_cannot_run_has_a_reason(capsys, monkeypatch):
    refusals = {"cpp": "left out by the packager"}
    monkeypatch.setattr(OP, "refusal", lambda backend, *_: refusals.get(backend))
    rows = lines(capsys, "silu_mul", "--device", "cpu", "--dtype", "bfloat16")[2:]
    assert rows[1] == ["cpp", "left", "out", "by", "the", "packager"]
    monkeypatch.setattr(OP, "implementations", [])
    rows = lines(capsys, "silu_mul", "--device", "cpu")[2:]
    assert rows == [["silu_mul", "reference", "the", "only", "backend", "on", "cpu"]]


def test_unknown_ops_are_named():
    with pytest.raises(SystemExit, match=r"OP: gnome; accepted are .*silu_mul"):
        main(["bench", "silu_mul", "gnome"])


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    with pytest.raises(SystemExit, match="--device cuda: torch sees no GPU"):
        main(["bench", "--device", "cuda"])


def test_samples_are_described():
    schema_names = "x, weights, biases"
    linear = OPS["linear"]
    x, weight = torch.empty(8, 3), torch.empty(4, 3)
    sample = (x, [weight, weight], [torch.empty(4), torch.empty(4)])
    names = [argument.name for argument in linear.overload._schema.arguments]
    assert names[:3] == schema_names.split(", ")
    assert bench.describe(linear, sample) == "x 8x3, weights 4x3 + 4x3, biases 4 + 4"
    assert [bench.size(value) for value in (torch.empty(2, 5), torch.tensor(1.0), 64)] == [
        "2x5",
        "scalar",
        "64",
    ]


@pytest.mark.parametrize("name", ["report", "aot", "tune"])
def test_programs_of_0_1(name, capfd, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    assert main(["bench", name, "--help"]) == 0
    out, err = capfd.readouterr()
    assert f"usage: python -m benchmarks {name}" in out
    assert f"embedfuse bench {name} has moved to python -m benchmarks {name};" in err

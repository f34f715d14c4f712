"""The kernels' rows with several peers, with times that the tests set; peers in Triton's interpreter."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.gpu import rows
from benchmarks.gpu.checks import assert_close, check_loss
from benchmarks.harness.peaks import Peaks
from benchmarks.harness.targets import Target
from benchmarks.peers.gpu import Peer
from embedfuse.registry import Cost

ROOT = Path(__file__).parents[2]
WANTED = torch.tensor([1.0, 2.0, 4.0])


class Stopwatch:
    """A call takes the seconds of its keyword, and a tenth as many gigabytes."""

    def __init__(self):
        self.calls: list[tuple[float, int]] = []
        self.peak = 0

    def seconds(self, call, repeats: int, before=None) -> list[float]:
        call()
        taken = call.keywords["seconds"]
        self.calls.append((taken, repeats))
        self.peak = 100 + int(1e8 * taken)
        return [taken] * repeats


@pytest.fixture
def stopwatch(monkeypatch) -> Stopwatch:
    watch = Stopwatch()
    monkeypatch.setattr(rows, "seconds", watch.seconds)
    monkeypatch.setattr(rows, "time_once", lambda call: (10 * call.keywords["seconds"], None))
    monkeypatch.setattr(rows, "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: watch.peak)
    return watch


def answer(values=WANTED, seconds=1.0):
    return torch.as_tensor(values)


def peer(*packages: str, **settings) -> Peer:
    return Peer(functools.partial(answer, **settings), packages)


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 32.00 GiB.\nMore of it.")


def needs_what_is_not_there():
    import gnome_that_is_not_installed  # noqa: F401


PEERS = {
    "fast": peer("pytest", seconds=0.002),
    "slow": peer(seconds=3.0),
    "far": peer("pytest", "gnome-kernels"),
    "large": Peer(out_of_memory),
    "half": Peer(needs_what_is_not_there),
    "wrong": peer(values=[1.0, 2.0, 4.5], seconds=1.0),
    "nowhere": peer(values=[1.0, 2.0, torch.nan]),
}
REASONS = {
    "far": "not installed: gnome-kernels",
    "large": "OutOfMemoryError: CUDA out of memory. Tried to allocate 32.00 GiB.",
    "half": "ModuleNotFoundError: No module named 'gnome_that_is_not_installed'",
    "wrong": "AssertionError: other values: scores, error 0.1250 of the largest, above 0.01",
    "nowhere": "AssertionError: other values: scores, error nan of the largest, above 0.01",
}
check = functools.partial(assert_close, wanted=WANTED, share=0.01, what="scores")


def same(function):
    return function


def test_a_peer_that_is_missing_raises_or_is_wrong_is_named():
    calls, entries = rows.ready(PEERS, same, check)
    assert list(calls) == ["fast", "slow"]
    assert entries == {
        "fast": {"version": pytest.__version__},
        "slow": {"version": ""},
        **{name: {"reason": reason} for name, reason in REASONS.items()},
    }


def test_a_peer_that_loses_the_gpu_ends_the_row(monkeypatch):
    """All later calls would fail."""
    monkeypatch.setattr(rows, "lost_context", lambda: "an illegal memory access")
    with pytest.raises(
        RuntimeError, match="large lost the GPU's context: an illegal memory access"
    ):
        rows.ready({"large": PEERS["large"]}, same, check)


def test_slow_calls_are_repeated_less(stopwatch):
    calls = {str(s): functools.partial(answer, seconds=s) for s in (0.001, 0.1, 0.3, 0.6)}
    found = rows.time_interleaved(calls, None)
    assert found == {str(s): {"seconds": s, "bytes": int(1e8 * s)} for s in (0.001, 0.1, 0.3, 0.6)}
    once = [(0.001, 1), (0.1, 1), (0.3, 1), (0.6, 1)]
    assert stopwatch.calls == once + rows.GROUPS * [(0.001, 20), (0.1, 2)]


def test_a_row_from_its_measurement_to_the_report(stopwatch, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(rows, "TARGETS", {"a row": Target("ms", None, 2.0)})
    ours = functools.partial(answer, seconds=0.001)
    cost, peaks = Cost(bytes=500_000, flops=1_000), Peaks(1e9, {torch.bfloat16: 2e9})
    info = rows.figures(peaks, None, "a row", ours, cost, PEERS, same, check)
    assert info["rows"] == {"a row": {"value": 1.0, "unit": "ms"}}
    assert info["wall_seconds"] == 0.01
    assert info["percent_of_peak"] == pytest.approx(50)
    assert info["peers"]["fast"]["speedup"] == pytest.approx(2)
    assert "embedfuse" not in info["peers"]
    machine = {"device": "Some GPU", "threads": 2, "torch": "2.13.0", "load": 0.0}
    run = {"machine_info": machine, "benchmarks": [{"name": "a", "extra_info": info}]}
    (tmp_path / "run.json").write_text(json.dumps(run))
    assert main(["report", str(tmp_path / "run.json")]) == 0
    blank = "|  |  |  |  |  |  |"
    assert capsys.readouterr().out.splitlines()[-len(PEERS) :] == [
        f"| a row | 1 ms | 0.5 | 1e-06 | 50.0 | 0 MB | fast {pytest.__version__} | 2 ms | 0 MB | 2.00x |",
        f"{blank} slow | 3 s | 300 MB | 3000.00x |",
        *(f"{blank} {name} | {reason} |  |  |" for name, reason in REASONS.items()),
    ]


def test_a_peer_that_leaves_out_the_gradient_of_other_documents_is_wrong():
    torch.manual_seed(0)
    wanted = [
        torch.tensor(2.0),
        torch.randn(4, 8),
        torch.cat((torch.randn(4, 8), torch.ones(6, 8) / 1e4)),
    ]
    check_loss([x * 1.001 for x in wanted], wanted)
    found = [wanted[0], wanted[1], wanted[2].where(torch.arange(10)[:, None] < 4, 0)]
    with pytest.raises(AssertionError, match=r"gradient of the other documents, cosine 0\.0000"):
        check_loss(found, wanted)
    with pytest.raises(AssertionError, match=r"loss, error 0\.1000"):
        check_loss([wanted[0] * 1.1, *wanted[1:]], wanted)
    with pytest.raises(AssertionError, match="gradient of the queries, cosine -1"):
        check_loss([wanted[0], -wanted[1], wanted[2]], wanted)


def test_adapters_in_the_interpreter():
    """Of the installed libraries; without any, the skip names the missing ones."""
    pytest.importorskip("triton")
    cases = "tests/benchmarks/cases_gpu_peers.py"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", cases],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    if " passed" not in result.stdout:
        missing = sorted(set(re.findall("not installed: (.+)", result.stdout)))
        pytest.skip(f"not installed: {', '.join(missing)}")

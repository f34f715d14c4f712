"""The search for configs, with times that the tests set."""

import json
import math

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.__main__ import main
from benchmarks.gpu import tune
from benchmarks.gpu.search import Rejected, search
from embedfuse.triton_kernels import tuned

HEADER = {"chip": "sm_90", "device": "a GPU", "triton": "3.6.0", "torch": "2.11.0"}


@pytest.fixture
def kernel(monkeypatch):
    def default_config(dtype, hidden):
        return {"block": 8}

    tuned.import_kernels()
    monkeypatch.setattr(tuned, "TUNABLES", dict(tuned.TUNABLES))
    blocks = [{"block": block} for block in (8, 16, 32, 64)]
    return tuned.Tunable("fused_norm", default_config, lambda dtype, hidden: blocks)


@pytest.fixture
def run(kernel, tmp_path):
    """run(microseconds by block, hidden=...) tunes calls of such sizes; the stored file and the failures."""
    path = tmp_path / "configs" / "sm_90.json"

    def tune_them(times, hidden=(256,), budget=math.inf, dtype=torch.bfloat16):
        def call_of(size):
            x = torch.empty(1, dtype=dtype)
            return lambda: kernel.config(x, hidden=size)

        def attempt(call, tunable, config):
            assert tunable is kernel
            us = times[config["block"]]
            if isinstance(us, str):
                raise Rejected(us)
            return us

        document = tune.opened(path, HEADER)
        calls = [call_of(size) for size in hidden]
        names = ["fused_norm"]
        failed = search(calls, len(calls), names, attempt, path, document, budget)
        return json.loads(path.read_text()) if path.exists() else None, failed

    tune_them.path = path
    return tune_them


def entry(hidden, block, us, default_us, dtype="bfloat16"):
    return {
        "kernel": "fused_norm",
        "dtype": dtype,
        "shape": {"hidden": hidden},
        "config": {"block": block},
        "us": us,
        "default_us": default_us,
    }


def test_the_fastest_is_stored_with_the_defaults_time(run):
    document, failed = run({8: 30.0, 16: 20.126, 32: 10.0, 64: 40.0})
    assert document == {**HEADER, "configs": [entry(256, 32, 10.0, 30.0)]}
    assert failed == 0


def test_a_default_that_is_fastest_is_stored_too(run):
    document, _ = run({8: 5.0, 16: 5.0, 32: 6.0, 64: 7.0})
    assert document["configs"] == [entry(256, 8, 5.0, 5.0)]


def test_rejected_candidates_are_not_stored_and_are_counted(run, capsys):
    document, failed = run({8: 30.0, 16: "spill", 32: "wrong", 64: "spill"})
    assert document["configs"] == [entry(256, 8, 30.0, 30.0)]
    assert failed == 0
    assert "3 of 3 others tried, 2 spill, 1 wrong" in capsys.readouterr().err


def test_a_rejected_default_stores_nothing_and_counts(run, capsys):
    document, failed = run({8: "wrong", 16: 1.0, 32: 1.0, 64: 1.0})
    assert document is None
    assert failed == 1
    assert "default fails: wrong" in capsys.readouterr().err


def test_a_later_run_adds_and_replaces(run):
    run({8: 30.0, 16: 20.0, 32: 10.0, 64: 40.0}, hidden=(1024, 256))
    document, _ = run({8: 3.0, 16: 1.0, 32: 2.0, 64: 4.0}, hidden=(256, 4096))
    assert document["configs"] == [
        entry(256, 16, 1.0, 3.0),
        entry(1024, 32, 10.0, 30.0),
        entry(4096, 16, 1.0, 3.0),
    ]
    document, _ = run({8: 1.0, 16: 2.0, 32: 2.0, 64: 2.0}, dtype=torch.float32)
    assert len(document["configs"]) == 4
    assert document["configs"][-1] == entry(256, 8, 1.0, 1.0, "float32")
    assert not list(run.path.parent.glob("*.part"))


def test_without_time_only_the_default_is_timed(run, capsys):
    document, _ = run({8: 30.0, 16: 1.0, 32: 1.0, 64: 1.0}, budget=0)
    assert document["configs"] == [entry(256, 8, 30.0, 30.0)]
    assert "0 of 3 others tried" in capsys.readouterr().err


def test_a_shape_is_tuned_once_in_a_run(run, capsys):
    run({8: 30.0, 16: 1.0, 32: 1.0, 64: 1.0}, hidden=(256, 256))
    assert capsys.readouterr().err.count("fused_norm") == 1


def test_each_shape_is_saved_as_soon_as_it_is_known(kernel, tmp_path):
    path = tmp_path / "sm_90.json"

    def call():
        kernel.config(torch.empty(1), hidden=256)

    def lost():
        raise torch.AcceleratorError("the device is lost")

    with pytest.raises(torch.AcceleratorError):
        search([call, lost], 2, ["fused_norm"], lambda *_: 1.0, path, {**HEADER, "configs": []}, 9)
    assert json.loads(path.read_text())["configs"] == [entry(256, 8, 1.0, 1.0, "float32")]


def test_one_entry_a_line_that_launchers_load(run):
    run({8: 30.0, 16: 20.0, 32: 10.0, 64: 40.0}, hidden=(256, 1024))
    assert run.path.read_text() == (
        '{\n"chip": "sm_90",\n"device": "a GPU",\n"triton": "3.6.0",\n"torch": "2.11.0",\n"configs": [\n'
        '{"kernel": "fused_norm", "dtype": "bfloat16", "shape": {"hidden": 256}, "config": {"block": 32},'
        ' "us": 10.0, "default_us": 30.0},\n'
        '{"kernel": "fused_norm", "dtype": "bfloat16", "shape": {"hidden": 1024}, "config": {"block": 32},'
        ' "us": 10.0, "default_us": 30.0}\n]}\n'
    )
    assert len(tuned.load(run.path)["configs"]) == 2


def test_times_of_another_device_are_not_mixed_in(run, monkeypatch):
    run({8: 30.0, 16: 20.0, 32: 10.0, 64: 40.0})
    with pytest.raises(SystemExit, match=r"3\.6\.0.*3\.7\.0.*remove it or give --out"):
        tune.opened(run.path, {**HEADER, "triton": "3.7.0"})


def test_without_a_gpu_the_command_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    assert main(["tune"]) == 1
    assert "times kernels on a GPU, and torch sees none" in capsys.readouterr().err


def test_the_calls_to_tune_for_are_calls_of_the_ops():
    from benchmarks.gpu import calls as gpu_calls

    called = set()
    for call in gpu_calls.calls("meta", list(tuned.TUNABLES)):
        call.op(*call.args)
        called.add((call.op.name, call.args[0].dtype))
    for name in ("pool_normalize", "add_layer_norm", "add_rms_norm", "token_weights"):
        assert {(name, torch.float32), (name, torch.bfloat16)} <= called
    for name in ("info_nce_forward", "info_nce_backward"):
        assert {(name, torch.float32), (name, torch.bfloat16)} <= called
    assert ("lexical_scores", torch.float32) in called

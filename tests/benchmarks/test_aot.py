"""The table of what kernels use of a chip; compiling is tested in tests/aot."""

import json
import types

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.__main__ import main
from benchmarks.kernels import aot, machine_code
from embedfuse.registry import triton_interprets
from embedfuse.triton_kernels import add_layer_norm, maxsim, tuned


@pytest.fixture
def tuned_for_sm_90(tmp_path, monkeypatch):
    entry = {"kernel": "add_layer_norm", "dtype": "bfloat16", "shape": {"hidden": 1024}}
    entry |= {"config": {"num_warps": 8}, "us": 1.0, "default_us": 2.0}
    head = {"chip": "sm_90", "device": "a GPU", "triton": "3.6.0", "torch": "2.11.0"}
    (tmp_path / "sm_90.json").write_text(json.dumps({**head, "configs": [entry]}))
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    tuned.entries_of.cache_clear()
    yield
    tuned.entries_of.cache_clear()


def widths(launches, warps):
    return sorted(
        (x.dtype(), x.config()["B_D"]) for x in launches if x.config()["num_warps"] == warps
    )


def test_a_tuned_config_is_compiled_wherever_it_may_be_chosen(tuned_for_sm_90):
    before = machine_code.launches(add_layer_norm, "sm_80")
    after = machine_code.launches(add_layer_norm, "sm_90")
    # By default only 2,048 columns and more have 8 warps, and no call of aot_calls has so many but fewer
    # than 4,096; two to sixty-four elements per thread are 512 to 16,384. fp16 comes with many rows and one.
    assert widths(before, 8) == []
    assert widths(after, 8) == [
        *[("bf16", width) for width in (512, 1024, 1024, 4096, 4096, 8192)],
        *[("fp16", 1024)] * 2,
    ]
    assert len(after) == len(before) + 8


def test_config_keys_of_the_launcher_do_not_hide_tuned_configs():
    shape = {"depth": 128, "rows": 32, "queries": 1, "int8": False, "more": False}
    config = maxsim.default_config(torch.bfloat16, **shape) | {"programs": 2}
    entry = {"kernel": "maxsim", "dtype": "bfloat16", "shape": shape, "config": config}
    launches = machine_code.launches_with(maxsim, entry)
    assert (32, 128) in [launch.args[0].shape for launch in launches]


def test_calls_of_one_row_show_the_most_that_any_takes(monkeypatch):
    taken = iter([(128, 0, 1000), (100, 8, 2000)])
    keys = ("registers", "spilled", "shared")
    monkeypatch.setattr(
        machine_code, "resources", lambda _: dict(zip(keys, next(taken), strict=True))
    )
    compiled = types.SimpleNamespace(metadata=types.SimpleNamespace(num_warps=4))
    launch = types.SimpleNamespace(
        name=lambda: "norm",
        dtype=lambda: "bf16",
        config=lambda: {"B_D": 64, "num_warps": 4},
        compile=lambda chip: compiled,
    )
    rows = {}
    aot.add_launch(rows, launch, "sm_90")
    aot.add_launch(rows, launch, "sm_90")
    (row,) = rows.values()
    # 128 registers: 16 warps of 64.
    most = {"registers": 128, "spilled": 8, "shared": 2000, "blocks": 4, "occupancy": 25}
    assert row["sm_90"] == most
    text = aot.table({"triton": "3.6.0", "chips": ["sm_80", "sm_90"], "rows": [row]})
    assert text.endswith("| norm | bf16 | B_D 64, num_warps 4 | 4 |  | 128 · 1.95 · 8 · 25 % |\n")


@pytest.mark.skipif(triton_interprets(), reason="TRITON_INTERPRET=1: nothing is compiled")
def test_the_command_writes_the_table(tmp_path, capsys):
    out = tmp_path / "aot.json"
    options = ["--chip", "sm_90", "--kernel", "lexical_scores", "--out", str(out)]
    assert main(["aot", *options]) == 0
    stored = json.loads(out.read_text())
    assert [(row["kernel"], row["config"]["ALIGNED"]) for row in stored["rows"]] == [
        ("lexical_scores", True),
        ("lexical_scores", False),
    ]
    for row in stored["rows"]:
        assert 0 < row["sm_90"]["registers"] < 256
        assert row["sm_90"]["spilled"] == 0
        assert row["warps"] == row["config"]["num_warps"] == 4
    assert out.with_suffix(".md").read_text() == capsys.readouterr().out


def test_unknown_kernels_are_named():
    with pytest.raises(SystemExit, match=r"--kernel gnome: accepted are .*pool_normalize"):
        aot.compiled_rows(["sm_90"], ["gnome"])

"""Configs of kernels are read from a file per chip; no GPU is needed for a device of that type."""

import itertools
import json
import logging
import math

import pytest
import torch

pytest.importorskip("triton")

from embedfuse.triton_kernels import tuned

tuned.import_kernels()
GPU = torch.device("cuda", 0)
HEADER = {"device": "a GPU", "triton": "3.6.0", "torch": "2.11.0"}


class OnGPU:
    """The attributes that are read of a launcher's tensor."""

    device = GPU

    def __init__(self, dtype=torch.bfloat16):
        self.dtype = dtype


@pytest.fixture
def fused_norm(monkeypatch):
    """A tunable of a size, a kind, and blocks that must not exceed the size."""

    def default_config(dtype, hidden, kind):
        return {"block": 8}

    def candidates(dtype, hidden, kind):
        return [{"block": block} for block in (8, 16, 32, 64) if block <= hidden]

    monkeypatch.setattr(tuned, "TUNABLES", dict(tuned.TUNABLES))
    return tuned.Tunable("fused_norm", default_config, candidates)


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """stored(*entries) makes them the file of the GPU's chip, sm_90."""
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    monkeypatch.setattr(tuned, "chip_of", lambda device: "sm_90")

    def write(*entries, **header):
        document = {"chip": "sm_90", **HEADER, **header, "configs": list(entries)}
        path = tmp_path / "sm_90.json"
        path.write_text(json.dumps(document))
        clear()
        return path

    def clear():
        for cached in (tuned._config, tuned.entries_of, tuned._say_default):
            cached.cache_clear()

    clear()
    yield write
    monkeypatch.undo()
    clear()


def entry(hidden, block, kind="mean", dtype="bfloat16", kernel="fused_norm"):
    shape = {"hidden": hidden, "kind": kind}
    config = {"block": block}
    return {
        "kernel": kernel,
        "dtype": dtype,
        "shape": shape,
        "config": config,
        "us": 1.0,
        "default_us": 2.0,
    }


def test_distance_by_hand():
    assert tuned.distance({"hidden": 1023}, {"hidden": 255}) == 4
    assert tuned.distance({"a": 0, "b": 3, "kind": "x"}, {"a": 1, "b": 0, "kind": "y"}) == 5
    assert tuned.distance({"flag": True}, {"flag": False}) == 0


def test_the_nearest_in_log_space_gives_the_config(fused_norm, stored):
    stored(entry(256, 32), entry(1024, 64))
    # 500 is nearer to 256 by ratio, 520 to 1,024; by difference both are nearer to 256.
    for hidden, block in ((256, 32), (500, 32), (520, 64), (1024, 64), (4000, 64)):
        assert fused_norm.config(OnGPU(), hidden=hidden, kind="mean") == {"block": block}


def test_too_far_gives_the_default(fused_norm, stored):
    stored(entry(255, 32))
    assert fused_norm.config(OnGPU(), hidden=1023, kind="mean") == {"block": 32}
    assert fused_norm.config(OnGPU(), hidden=1024, kind="mean") == {"block": 8}


def test_kind_and_dtype_must_be_equal(fused_norm, stored):
    stored(entry(256, 32, kind="last"), entry(300, 16, dtype="float32"), entry(700, 64))
    assert fused_norm.config(OnGPU(), hidden=256, kind="last") == {"block": 32}
    assert fused_norm.config(OnGPU(torch.float32), hidden=256, kind="mean") == {"block": 16}
    assert fused_norm.config(OnGPU(), hidden=256, kind="mean") == {"block": 64}
    assert fused_norm.config(OnGPU(torch.float32), hidden=256, kind="last") == {"block": 8}


def test_fp16_takes_what_was_tuned_for_bf16(fused_norm, stored):
    stored(entry(256, 32))
    assert fused_norm.config(OnGPU(torch.float16), hidden=256, kind="mean") == {"block": 32}


def test_a_config_that_the_shape_does_not_allow_is_passed_over(fused_norm, stored):
    stored(entry(64, 64), entry(30, 16))
    assert fused_norm.config(OnGPU(), hidden=60, kind="mean") == {"block": 16}


def test_a_default_is_logged_once_per_kernel(fused_norm, stored, caplog):
    caplog.set_level(logging.INFO, logger="embedfuse")
    for hidden in (100, 200):
        assert fused_norm.config(OnGPU(), hidden=hidden, kind="mean") == {"block": 8}
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("embedfuse", logging.INFO)
    assert "fused_norm" in record.message
    assert "sm_90" in record.message
    stored(entry(256, 32))
    caplog.clear()
    fused_norm.config(OnGPU(), hidden=256, kind="mean")
    assert not caplog.records


def test_other_devices_take_the_default_silently(fused_norm, stored, caplog):
    stored(entry(256, 32))
    caplog.set_level(logging.INFO, logger="embedfuse")
    for device in ("meta", "cpu"):
        x = torch.empty(1, dtype=torch.bfloat16, device=device)
        assert fused_norm.config(x, hidden=256, kind="mean") == {"block": 8}
    assert not caplog.records


def test_a_shape_is_searched_once(fused_norm, stored, monkeypatch):
    stored(entry(256, 32))
    searches = []
    nearest = tuned.nearest
    monkeypatch.setattr(tuned, "nearest", lambda *args: searches.append(args) or nearest(*args))
    for _ in range(3):
        fused_norm.config(OnGPU(), hidden=256, kind="mean")
    assert len(searches) == 1


def test_choosing_ends_with_the_block(fused_norm, stored):
    stored(entry(256, 32))
    with tuned.choosing(lambda tunable, dtype, shape: {"block": shape["hidden"]}):
        assert fused_norm.config(OnGPU(), hidden=256, kind="mean") == {"block": 256}
    assert fused_norm.config(OnGPU(), hidden=256, kind="mean") == {"block": 32}


def without(key):
    return {k: v for k, v in entry(256, 32).items() if k != key}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (entry(256, 32, kernel="fused_gnome"), "no kernel 'fused_gnome', there are .*fused_norm"),
        (entry(256, 32, dtype="float8"), "dtype 'float8' is none of"),
        (without("us"), "has .*not .*'us'"),
        ({**entry(256, 32), "shape": {"hidden": 256}}, r"shape .* has \['hidden', 'kind'\]"),
        ({**entry(256, 32), "config": {"blocks": 32}}, "not among the kernel's candidates"),
        (entry(256, 48), "not among the kernel's candidates"),
        (entry(16, 32), "not among the kernel's candidates"),
    ],
)
def test_entries_that_do_not_fit_the_kernels_raise(fused_norm, stored, bad, message):
    path = stored(entry(256, 32), bad)
    with pytest.raises(ValueError, match=rf"sm_90.json: configs\[1\]: .*{message}"):
        tuned.load(path)
    with pytest.raises(ValueError, match=message):
        fused_norm.config(OnGPU(), hidden=256, kind="mean")


def test_a_file_of_another_chip_raises(fused_norm, stored):
    path = stored(chip="sm_80")
    with pytest.raises(ValueError, match=r"sm_90\.json: .*'sm_80'"):
        tuned.load(path)


def test_shipped_files_load():
    for path in tuned.FOLDER.glob("*.json"):
        assert tuned.load(path)["configs"]


# One shape per kernel, with its default worked out by hand.
DEFAULTS = {
    "add_layer_norm": ({"hidden": 1024}, {"num_warps": 4}),
    "add_rms_norm": ({"hidden": 128}, {"num_warps": 1}),
    "info_nce_update": ({"block": 2048}, {"num_warps": 4}),
    "info_nce_gradient": ({"block": 4096}, {"num_warps": 8}),
    "info_nce_statistics": (
        {"rows": 4096, "depth": 1024, "sigmoid": False, "masked": False},
        {"B_Q": 128, "B_N": 256, "B_D": 64, "num_warps": 8, "num_stages": 3},
    ),
    "info_nce_fused_gradient": (
        {"rows": 4096, "depth": 1024, "sigmoid": True, "masked": False},
        {"B_Q": 128, "B_N": 128, "B_D": 64, "num_warps": 8, "num_stages": 3},
    ),
    "pool_normalize": (
        {"hidden": 1024, "pooling": "mean", "aligned": True},
        {"B_T": 8, "STAGES": 4, "num_warps": 16, "maxnreg": 128},
    ),
    "token_weights": ({"hidden": 1024}, {"B_T": 4, "B_D": 1024, "num_warps": 4}),
    "lexical_scores": ({"entries": 16}, {"BLOCK": 64, "num_warps": 4}),
    "maxsim": (
        {"depth": 128, "rows": 32, "queries": 1, "int8": True, "more": False},
        {"SLOT": 32, "B_Q": 32, "B_T": 64, "B_D": 128}
        | {"num_warps": 4, "num_stages": 4, "programs": 3},
    ),
    "varlen_attention": (
        {"head_dim": 128, "rows": 64},
        {"B_M": 64, "B_N": 64, "B_D": 128, "B_K": 128}
        | {"num_warps": 8, "num_stages": 3, "maxnreg": 255},
    ),
}


def test_every_kernel_offers_a_choice_around_its_default():
    assert set(DEFAULTS) <= set(tuned.TUNABLES)
    for name, (shape, default) in DEFAULTS.items():
        first, *others = tuned.TUNABLES[name].space(torch.bfloat16, shape)
        assert first == default, name
        assert others, name
        assert all(config.keys() == default.keys() for config in others), name
        keys = [tuple(config.items()) for config in (first, *others)]
        assert len(set(keys)) == len(keys), f"{name}: twice the same config"


def test_candidates_stay_within_shared_memory():
    space = tuned.TUNABLES["info_nce_statistics"].space
    kinds = itertools.product((1, 4096), (False, True), (False, True))
    for rows, sigmoid, masked in kinds:
        shape = {"rows": rows, "depth": 1024, "sigmoid": sigmoid, "masked": masked}
        for c in space(torch.bfloat16, shape):
            assert 2 * (c["B_Q"] + c["B_N"]) * c["B_D"] * c["num_stages"] <= 160 * 1024
    for hidden in (37, 1024, 8192):
        shape = {"hidden": hidden, "pooling": "mean", "aligned": True}
        columns = 2 ** math.ceil(math.log2(hidden))
        for c in tuned.TUNABLES["pool_normalize"].space(torch.float32, shape):
            assert 4 * c["B_T"] * columns * c["STAGES"] <= 160 * 1024

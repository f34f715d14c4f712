"""Every op's Triton version in Triton's interpreter. Run by test_interpret.py, in a process of its own."""

import math

import pytest
import torch

from embedfuse import testing
from embedfuse.ops.info_nce.op import BACKWARD, FORWARD, MASKS, make_inputs
from embedfuse.ops.pool_normalize import POOLINGS
from embedfuse.ops.varlen_attention import OP as ATTENTION
from embedfuse.registry import OPS, use_backend
from embedfuse.triton_kernels import info_nce_fused, tuned
from tests import pool_normalize_checks as checks

TRITON_OPS = [op for op in OPS.values() if "triton" in testing.backends(op, "cpu")]

TUNED_OPS = sorted(
    {
        name
        for module in tuned.import_kernels()
        if hasattr(module, "tuning_calls")
        for dtype in (torch.float32, torch.bfloat16)
        for name, _ in module.tuning_calls("meta", dtype)
    }
)

per_op = pytest.mark.parametrize("op", TRITON_OPS, ids=lambda op: op.name)
per_dtype = pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)


@per_dtype
@per_op
def test_runs_here(op, dtype):
    assert op.refusal("triton", "cpu", dtype) is None


def samples(op, dtype) -> list[tuple]:
    """Without those of over a thousand rows: programs are the same for all rows."""
    calls = op.make_samples("cpu", dtype, "test")
    few = [call for call in calls if len(call[0]) < 1000]
    assert len(few) >= len(calls) - 1
    return few


# A kernel's types differ in loads and stores alone: all samples in fp32, every third in bf16. The next test
# has float16.
@pytest.mark.parametrize(("dtype", "step"), [(torch.float32, 1), (torch.bfloat16, 3)], ids=str)
@per_op
def test_samples(op, dtype, step):
    for args in samples(op, dtype)[::step]:
        testing.assert_close_to_reference(op, args, "triton")


@pytest.mark.parametrize("name", TUNED_OPS)
def test_samples_with_another_config(name):
    asked = []

    def choose(tunable, dtype, shape):
        asked.append(tunable)
        return tunable.space(dtype, shape)[-1]

    with tuned.choosing(choose):
        for args in samples(OPS[name], torch.float16):
            testing.assert_close_to_reference(OPS[name], args, "triton")
    assert asked


# Around the blocks of rows and of keys; fp32 reads its heads in slices.
ROWS = (1, 15, 16, 17, 33, 63, 64, 65, 129)
LENGTHS = [(torch.float16, rows) for rows in ROWS] + [(torch.float32, 17), (torch.float32, 65)]


@pytest.mark.parametrize(("dtype", "rows"), LENGTHS, ids=str)
def test_varlen_attention_lengths(dtype, rows):
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor([0, rows, rows + 3], dtype=torch.int32)
    q, k, v = (torch.randn(rows + 3, 2, 20, generator=generator).to(dtype) for _ in range(3))
    testing.assert_close_to_reference(ATTENTION, (q, k, v, ends, ends, 0.3, False, None), "triton")
    two = torch.tensor([0, 1, 3], dtype=torch.int32)
    args = (q[:3], k, v, two, ends, 0.3, False, None)
    testing.assert_close_to_reference(ATTENTION, args, "triton")


# 18 blocks of rows are two groups; parts=1: a launch for each of three tiles.
@pytest.mark.parametrize("parts", [info_nce_fused.PARTS, 1])
def test_info_nce_in_groups_and_launches(parts, monkeypatch):
    monkeypatch.setattr(info_nce_fused, "PARTS", parts)
    args = (*make_inputs("cpu", torch.float16, (2200, 300, 16), MASKS[:4]), False)
    testing.assert_close_to_reference(FORWARD, (*args, False), "triton")
    statistic = FORWARD._reference(*args, False)[0]
    grads = torch.randn(3, 2200, generator=torch.Generator().manual_seed(0))
    testing.assert_close_to_reference(BACKWARD, (*args, statistic, *grads, True, True), "triton")


@pytest.mark.parametrize("pooling", POOLINGS)
@per_dtype
def test_pool_normalize_nan(dtype, pooling):
    checks.check_nan("triton", "cpu", dtype, pooling)


# Means that take the interpreter through a million rows are left to the GPU.
SLOW = [("packed", "mean"), ("packed", "weighted_mean"), ("both ends", "mean")]
CASES = [case for case in checks.LARGE_CASES if case not in SLOW]


@pytest.mark.parametrize(("layout", "pooling"), CASES)
def test_pool_normalize_offsets_beyond_32_bits(layout, pooling, tmp_path):
    # A sparse file: 8 GiB of which a few rows exist.
    size = math.prod(checks.LARGE_SHAPE)
    rows = torch.from_file(str(tmp_path / "rows"), True, size, dtype=torch.bfloat16)
    with use_backend("triton"):
        checks.check_large_offsets(rows.view(checks.LARGE_SHAPE), layout, pooling)

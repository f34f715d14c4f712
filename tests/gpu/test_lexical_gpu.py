"""Long texts on the GPU's backends, and that only the sparse result waits for the GPU."""

import pytest
import torch

from embedfuse import ops, testing
from embedfuse.ops.lexical.kept import OP
from embedfuse.registry import use_backend
from tests import lexical_checks as checks

pytestmark = [pytest.mark.gpu, pytest.mark.covers("sparse_scatter")]


@pytest.fixture(params=testing.backends(OP, "cuda"))
def backend(request):
    if reason := OP.refusal(request.param, "cuda", torch.float32):
        pytest.skip(reason)
    with use_backend(request.param):
        yield request.param


# 2,048 tokens are the most that the CUDA kernel hashes in shared memory; 8,192 is BGE-M3's longest text.
@pytest.mark.parametrize("lengths", [[2048, 1, 2049, 0, 2047], [0, 8192, 0, 70_000]])
def test_long_sequences(backend, lengths):
    args = checks.long_sequences(lengths, "cuda")
    testing.assert_close_to_reference(OP, args, backend)
    checks.check_one_id(args, lengths)


def test_dense_waits_for_nothing(backend):
    weights, ids, cu_seqlens, _ = checks.long_sequences([300, 20], "cuda")
    expected = ops.sparse_scatter(weights, ids, cu_seqlens=cu_seqlens).dense(2000)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = ops.sparse_scatter(
            weights, ids, cu_seqlens=cu_seqlens, excluded=(2001,), vocabulary=2000
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, expected)

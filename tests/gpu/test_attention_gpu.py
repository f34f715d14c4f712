"""Attention on a GPU: FlashAttention and our kernel agree, and the kernel waits for nothing."""

import pytest
import torch

from embedfuse import testing, use_backend
from embedfuse.nn.attention import VARLEN, attention, choose
from embedfuse.nn.flash import Flash
from embedfuse.packing import unpadded

pytestmark = pytest.mark.gpu


def lengths(cu_seqlens):
    return cu_seqlens.diff().tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_flash_attention_is_the_op(dtype):
    """What is chosen without being asked, FlashAttention-3 where it is installed, over the op's samples."""
    served = 0
    for args in VARLEN.make_samples("cuda", dtype, "test"):
        query, key, value, cu_q, cu_k, scale, causal, window = args
        chosen = choose(query, key, value, 0.0)
        if not isinstance(chosen, Flash) or not len(query):
            continue
        served += 1
        packed, queries = (unpadded(lengths(cu), query.device) for cu in (cu_k, cu_q))
        found = chosen(query, key, value, queries, packed, scale, causal, window)
        own = VARLEN._reference(*args)
        exact = VARLEN._reference(*map(testing._widen, args))
        testing.assert_as_good(found, own, exact, name=chosen.name)
    assert served or torch.cuda.get_device_capability() < (8, 0)


@pytest.mark.parametrize("dtype", testing.DTYPES)
@torch.no_grad()
def test_kernel_waits_for_nothing_and_runs_in_a_graph(dtype):
    """Lengths change under a captured graph: all that it knows of them lies on the device."""
    packed, other = (unpadded(n, torch.device("cuda")) for n in ([70, 1, 29], [3, 90, 7]))
    q, k, v = torch.randn(3, 100, 4, 36, device="cuda", dtype=dtype)
    options = {"scale": 0.2, "dropout": 0.0, "causal": True, "window": 40}
    with use_backend("triton"):
        attention(q, k, v, packed, **options)  # compiled
        expected = attention(q, k, v, other, **options)
        torch.cuda.set_sync_debug_mode("error")
        try:
            attention(q, k, v, packed, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = attention(q, k, v, packed, **options)
    packed.cu_seqlens.copy_(other.cu_seqlens)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(captured, expected, rtol=0, atol=0)

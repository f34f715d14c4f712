import math

import pytest
import torch
from torch.testing import assert_close

from embedfuse import use_backend
from embedfuse.nn import attention as nn_attention
from embedfuse.nn.attention import attention, equal_length_groups
from embedfuse.packing import unpadded

CPU = torch.device("cpu")
SCALE = 0.3
LENGTHS = [[3, 1, 7], [4, 4, 4], [2, 2, 5, 5, 5, 1], [6]]


def plain(q, k, v, rows, tokens):
    """Plain attention, one sequence after another. rows, tokens: query rows and keys of each."""
    out = []
    for q_b, k_b, v_b in zip(q.split(rows), k.split(tokens), v.split(tokens), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q_b, k_b) * SCALE
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v_b).flatten(1))
    return torch.cat(out)


def inputs(rows, tokens, dtype=torch.float32, head_dim=8):
    torch.manual_seed(0)
    q = torch.randn(sum(rows), 2, head_dim, dtype=dtype)
    return q, *torch.randn(2, sum(tokens), 2, head_dim, dtype=dtype)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_attention_within_each_sequence(lengths, grad):
    q, k, v = inputs(lengths, lengths, torch.double)
    with torch.set_grad_enabled(grad):
        found = attention(q, k, v, unpadded(lengths, CPU), scale=SCALE, dropout=0.0)
    assert_close(found, plain(q, k, v, lengths, lengths), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["kernel", "sdpa"])
@pytest.mark.parametrize("head_dim", [8, 264])
@pytest.mark.parametrize("rows", [[1, 1, 1, 1], [2, 2, 1, 9], [3, 3, 7, 9]])
def test_fewer_query_rows_than_tokens(backend, head_dim, rows):
    tokens = [3, 3, 7, 9]
    q, k, v = inputs(rows, tokens, head_dim=head_dim)
    packed, queries = unpadded(tokens, CPU), unpadded(rows, CPU)
    expected = plain(*(x.double() for x in (q, k, v)), rows, tokens)
    with torch.set_grad_enabled(backend == "sdpa"):
        found = attention(q, k, v, packed, scale=SCALE, dropout=0.0, queries=queries)
    assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_gradient_of_fewer_query_rows():
    rows, tokens = [1, 1, 1], [4, 1, 6]
    leaves = [x.requires_grad_() for x in inputs(rows, tokens, torch.double)]
    packed, queries = unpadded(tokens, CPU), unpadded(rows, CPU)
    found = attention(*leaves, packed, scale=SCALE, dropout=0.0, queries=queries)
    upstream = torch.randn_like(found)
    expected = torch.autograd.grad(plain(*leaves, rows, tokens), leaves, upstream)
    for f, e in zip(torch.autograd.grad(found, leaves, upstream), expected, strict=True):
        assert_close(f, e, rtol=1e-10, atol=1e-12)


def test_who_computes(monkeypatch):
    """The kernel in inference on the CPU; SDPA if it has no version, and if gradients are recorded."""
    lengths = [4, 2]
    q, k, v = inputs(lengths, lengths)
    packed = unpadded(lengths, CPU)
    calls = []
    sdpa = nn_attention.F.scaled_dot_product_attention

    def counted(*args, **kwargs):
        calls.append(args)
        return sdpa(*args, **kwargs)

    monkeypatch.setattr(nn_attention.F, "scaled_dot_product_attention", counted)

    def launches(q=q, k=k, v=v):
        calls.clear()
        attention(q, k, v, packed, scale=SCALE, dropout=0.0)
        return len(calls)

    assert launches() == 2  # grad mode
    with torch.no_grad():
        with_kernel = nn_attention.VARLEN.refusal("cpp", "cpu", torch.float32) is None
        assert launches() == (0 if with_kernel else 2)
        assert launches(q.double(), k.double(), v.double()) == 2
        with torch.autocast("cpu", torch.bfloat16):
            assert launches() == 2
        for name in ("reference", "triton"):
            with use_backend(name):
                assert launches() == 2


def test_runs():
    queries, keys = unpadded([1, 1, 2, 2, 1], CPU), unpadded([5, 5, 5, 2, 2], CPU)
    assert equal_length_groups(queries, keys) == [(2, 1, 5), (1, 2, 5), (1, 2, 2), (1, 1, 2)]
    assert equal_length_groups(unpadded([], CPU), unpadded([], CPU)) == []


def test_no_tokens():
    q = torch.zeros(0, 2, 8)
    packed = unpadded([], torch.device("cpu"))
    assert attention(q, q, q, packed, scale=1.0, dropout=0.0).shape == (0, 16)


def test_dropout_scales_what_it_keeps():
    """With all values 1, an attention row sums to (kept weights) / (1 - p)."""
    torch.manual_seed(0)
    q = torch.zeros(64, 1, 4)
    v = torch.ones(64, 1, 4)
    packed = unpadded([64], torch.device("cpu"))
    out = attention(q, q, v, packed, scale=1.0, dropout=0.25)
    kept = out[:, 0] * 64 * 0.75
    assert_close(kept, kept.round(), rtol=0, atol=1e-3)
    assert math.isclose(out.mean().item(), 1, abs_tol=0.05)
    assert out.std() > 0.01


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("rows", [[3, 3, 7, 9], [1, 1, 1, 1], [2, 2, 1, 9]])
def test_causal_windows_and_shared_heads(rows, window, grad):
    tokens = [3, 3, 7, 9]
    q, k, v = (t.repeat(1, 2, 1) if i == 0 else t for i, t in enumerate(inputs(rows, tokens)))
    out = []
    parts = zip(q.split(rows), k.split(tokens), v.split(tokens), strict=True)
    for q_b, k_b, v_b in (map(torch.Tensor.double, part) for part in parts):
        k_b, v_b = k_b[:, [0, 0, 1, 1]], v_b[:, [0, 0, 1, 1]]
        scores = torch.einsum("qhd,khd->hqk", q_b, k_b) * SCALE
        for i in range(len(q_b)):
            own = len(k_b) - len(q_b) + i
            for j in range(len(k_b)):
                if j > own or (window and j <= own - window):
                    scores[:, i, j] = -math.inf
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v_b).flatten(1))
    packed, queries = unpadded(tokens, CPU), unpadded(rows, CPU)
    with torch.set_grad_enabled(grad):
        found = attention(
            *(q, k, v, packed),
            scale=SCALE,
            dropout=0.0,
            queries=queries,
            causal=True,
            window=window,
        )
    assert_close(found.double(), torch.cat(out), rtol=1e-5, atol=1e-5)

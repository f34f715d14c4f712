import math

import pytest
import torch
from torch.testing import assert_close

from embedfuse.nn.attention import attention
from embedfuse.packing import unpadded


@pytest.mark.parametrize("lengths", [[3, 1, 7], [4, 4, 4], [2, 2, 5, 5, 5, 1], [6]])
def test_attention_within_each_sequence(lengths):
    torch.manual_seed(0)
    tokens, heads, head_dim = sum(lengths), 2, 8
    q, k, v = torch.randn(3, tokens, heads, head_dim, dtype=torch.double)
    packed = unpadded(lengths, torch.device("cpu"))
    scale = 0.3
    found = attention(q, k, v, packed, scale=scale, dropout=0.0)
    expected, start = [], 0
    for n in lengths:
        rows = slice(start, start + n)
        scores = torch.einsum("qhd,khd->hqk", q[rows], k[rows]) * scale
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[rows])
        expected.append(mixed.reshape(n, heads * head_dim))
        start += n
    assert_close(found, torch.cat(expected), rtol=1e-10, atol=1e-12)


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

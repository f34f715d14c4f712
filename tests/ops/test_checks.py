"""Arrays that torch cannot share, such as x[::-1], are copied; which tensors a kernel may read."""

import numpy as np
import pytest
import torch

from embedfuse import Embedder
from embedfuse.ops import maxsim, maxsim_rerank, quantize_int8
from embedfuse.ops.checks import as_tensor, kernel_takes
from embedfuse.ops.silu_mul import OP as SILU_MUL
from embedfuse.registry import use_backend

Q = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 1.0], [0.0, 0.0]]]).numpy()
D = torch.tensor([[[0.5, 1.0]], [[2.0, -1.0]], [[0.0, 3.0]]]).numpy()
SCORES = [[2.5, 0.0, 6.0], [2.5, 5.0, 3.0]]


@pytest.mark.parametrize("flip", [lambda x: x[::-1], lambda x: x[:, ::-1], lambda x: x[..., ::-1]])
def test_maxsim_of_flipped_arrays(flip):
    """Flipped in memory and flipped back as a view: the same vectors."""
    q, d = (flip(np.ascontiguousarray(flip(x))) for x in (Q, D))
    assert min(q.strides) < 0
    assert maxsim(q, d).tolist() == SCORES
    assert maxsim(list(q), list(d)).tolist() == SCORES
    scores, order = maxsim_rerank(q[0], d)
    assert (scores.tolist(), order.tolist()) == ([6.0, 2.5, 0.0], [2, 0, 1])
    assert torch.equal(quantize_int8(d).values, quantize_int8(D).values)
    assert Embedder.colbert_score(q[0], d[2]) == 3.0


def test_others_are_shared():
    x = np.zeros((1, 1, 2), np.float32)
    y = x.transpose(2, 1, 0)[::1]
    for array in (x, y):
        assert as_tensor(array).data_ptr() == array.ctypes.data
    tensor = torch.zeros(2)
    assert as_tensor(tensor) is tensor


class Quantized(torch.Tensor):
    """Memory that only its class can read."""


def test_what_a_kernel_takes(use_isa):
    use_isa("avx2")
    x = torch.ones(2, 3)
    assert kernel_takes(SILU_MUL, x, torch.nn.Parameter(x), None)
    others = x.half(), x.to("meta"), x.to_sparse(), x.as_subclass(Quantized)
    for other in others:
        assert not kernel_takes(SILU_MUL, x, other)
    assert not kernel_takes(SILU_MUL, others[-1], x)
    assert not kernel_takes(SILU_MUL, x.double(), x.double())
    with use_backend("reference"):
        assert not kernel_takes(SILU_MUL, x)

"""Arrays that torch cannot share, such as x[::-1], are copied."""

import numpy as np
import pytest
import torch

from embedfuse import Embedder
from embedfuse.ops import maxsim, maxsim_rerank, quantize_int8
from embedfuse.ops.checks import as_tensor

Q = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 1.0], [0.0, 0.0]]]).numpy()
D = torch.tensor([[[0.5, 1.0]], [[2.0, -1.0]], [[0.0, 3.0]]]).numpy()
SCORES = [[2.5, 0.0, 6.0], [2.5, 5.0, 3.0]]


@pytest.mark.parametrize("turn", [lambda x: x[::-1], lambda x: x[:, ::-1], lambda x: x[..., ::-1]])
def test_maxsim_of_turned_arrays(turn):
    """Turned and stored that way around, they turn back: the same vectors."""
    q, d = (turn(np.ascontiguousarray(turn(x))) for x in (Q, D))
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

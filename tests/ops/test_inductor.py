"""Ops and their gradients compiled by inductor, whose first call in a process takes seconds."""

import pytest
import torch

from embedfuse import testing
from embedfuse.ops import pool_normalize
from embedfuse.registry import OPS

COMPILED = [op for op in OPS.values() if "cpp" in testing.backends(op, "cpu")]


def outputs(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("op", COMPILED, ids=lambda op: op.name)
def test_ops(cpp, op):
    args = op.make_samples("cpu", torch.float32, "test")[0]
    torch.compiler.reset()
    compiled = torch.compile(
        lambda *args: [2 * y for y in outputs(testing.run(op, args))], fullgraph=True
    )
    for got, wanted in zip(compiled(*args), outputs(testing.run(op, args)), strict=True):
        torch.testing.assert_close(got, 2 * wanted, rtol=0, atol=0, equal_nan=True)


def test_gradient():
    x = torch.randn(10, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ends = torch.tensor([0, 3, 3, 4, 10], dtype=torch.int32)
    torch.compiler.reset()
    pool_normalize(x, cu_seqlens=ends).sum().backward()
    eager, x.grad = x.grad, None
    compiled = torch.compile(lambda x: pool_normalize(x, cu_seqlens=ends).sum(), fullgraph=True)
    compiled(x).backward()
    torch.testing.assert_close(x.grad, eager, rtol=1e-5, atol=1e-6)

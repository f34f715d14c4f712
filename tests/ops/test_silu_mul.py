"""Values from tables of the exponential function, the gradient, and errors."""

import pytest
import torch
import torch.nn.functional as F

from embedfuse import testing
from embedfuse.ops import silu_mul
from embedfuse.ops.silu_mul import OP

INF, NAN = float("inf"), float("nan")


def randn(*shape, seed=0, dtype=torch.float32):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_values_by_hand(backend):
    # 1 / (1 + e^-1) = 0.731058579, 1 / (1 + e^2) = 0.119202922
    gate, up = torch.tensor([[0.0, 1.0, -2.0]]), torch.tensor([[5.0, 2.0, 10.0]])
    expected = torch.tensor([[0.0, 1.462117158, -2.38405844]])
    torch.testing.assert_close(silu_mul(gate, up), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("columns", [1, 8, 20])
def test_far_from_zero(backend, columns):
    """e^x overflows fp32 above 88.7 and is lost below -87.3."""
    far = torch.tensor([70.0, 90.0, 1e4, 3e38, INF, -80.0, -90.0, -1e4, -3e38])
    gate = far[:, None].repeat(1, columns)
    exact = F.silu(gate.double())
    out = silu_mul(gate, torch.ones_like(gate))
    torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=2e-36)
    for bad in (NAN, -INF):
        assert silu_mul(torch.full((2, columns), bad), torch.ones(2, columns)).isnan().all()


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 15, 16, 17, 31, 33, 1000])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_widths_around_a_register(cpp, columns, dtype):
    args = randn(20, 2 * columns, dtype=dtype).chunk(2, 1)
    testing.assert_close_to_reference(OP, args, cpp)


def test_the_halves_of_a_product(backend):
    product = randn(5, 66)
    gate, up = product.chunk(2, 1)
    torch.testing.assert_close(silu_mul(gate, up), F.silu(gate) * up, rtol=1e-6, atol=1e-6)


def test_rounded_once(backend):
    """silu(3) = 2.857722 is 2.859375 in bf16; times 1.5 that would be 4.28125, not 4.28658 -> 4.28125.

    With 7: 20.004056 -> 20, but 2.859375 * 7 = 20.015625 -> 20. With 99: 282.9145 -> 282, but
    2.859375 * 99 = 283.078 -> 284.
    """
    gate, up = (torch.tensor([[v]], dtype=torch.bfloat16) for v in (3.0, 99.0))
    assert silu_mul(gate, up).item() == 282
    assert (F.silu(gate) * up).item() == 284


def test_gradcheck():
    inputs = [randn(3, 5, seed=i).double().requires_grad_() for i in range(2)]
    torch.autograd.gradcheck(silu_mul, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_is_that_of_plain_torch(backend, dtype):
    inputs = [randn(6, 37, seed=i, dtype=dtype) for i in range(2)]
    upstream = randn(6, 37, seed=2, dtype=dtype)
    leaves = [t.clone().requires_grad_() for t in inputs]
    got = torch.autograd.grad(silu_mul(*leaves), leaves, upstream)
    exact = [t.double().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(F.silu(exact[0]) * exact[1], exact, upstream.double())
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8}[dtype]
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == dtype
        torch.testing.assert_close(g.double(), e, rtol=tolerance, atol=tolerance)


X = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("text", "args"),
    [
        (r"gate: shape \(3, 2, 4\)", (torch.ones(3, 2, 4), X)),
        (r"up: shape \(1, 4\); accepted is that of gate, \(3, 4\)", (X, X[:1])),
        ("up: torch.float16 on cpu", (X, X.half())),
        ("up: torch.float32 on meta", (X, X.to("meta"))),
    ],
)
def test_errors_name_the_argument(backend, text, args):
    with pytest.raises(ValueError, match=text):
        silu_mul(*args)

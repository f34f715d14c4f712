"""Values from tables of the normal distribution, the gradient, and errors."""

import pytest
import torch
import torch.nn.functional as F

import embedfuse
from embedfuse.ops import bias_gelu


@pytest.fixture(params=["reference"])
def backend(request):
    with embedfuse.use_backend(request.param):
        yield request.param


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_values_by_hand(backend):
    # Phi(1) = 0.841344746, Phi(2) = 0.977249868
    x, bias = torch.tensor([[0.0, 3.0, -1.0], [1.0, 1.0, 101.0]]), torch.tensor([1.0, -1.0, -1.0])
    expected = [[0.841344746, 1.954499736, -0.045500264], [1.954499736, 0.0, 100.0]]
    got = bias_gelu(x, bias)
    # Below zero 1 + erf cancels: what is left has the rounding errors of 1 and of erf near -1.
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-6, atol=4 * 2**-24)
    assert torch.equal(bias_gelu(x + bias), got)


def test_far_from_zero(backend):
    x = torch.tensor([[-1e30, -1e4, 1e4, 1e30, float("nan")]])
    expected = torch.tensor([[0, 0, 1e4, 1e30, float("nan")]])
    torch.testing.assert_close(bias_gelu(x), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("with_bias", [True, False])
def test_gradcheck(with_bias):
    inputs = [randn(4, 5, dtype=torch.float64), randn(5, seed=1, dtype=torch.float64)]
    inputs = [t.requires_grad_() for t in inputs[: 1 + with_bias]]
    torch.autograd.gradcheck(bias_gelu, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_is_that_of_plain_torch(backend, dtype):
    inputs = [randn(6, 37, dtype=dtype), randn(37, seed=1, dtype=dtype)]
    leaves = [t.clone().requires_grad_() for t in inputs]
    got = torch.autograd.grad(bias_gelu(*leaves), leaves, randn(6, 37, seed=2, dtype=dtype))
    expected = torch.autograd.grad(
        F.gelu(leaves[0] + leaves[1]), leaves, randn(6, 37, seed=2, dtype=dtype)
    )
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=0)


@pytest.mark.parametrize("which", range(2))
def test_gradient_of_one_input_alone(backend, which):
    inputs = [randn(3, 6), randn(6, seed=1)]
    inputs[which].requires_grad_()
    bias_gelu(*inputs).sum().backward()
    got, inputs[which].grad = inputs[which].grad, None
    F.gelu(inputs[0] + inputs[1]).sum().backward()
    torch.testing.assert_close(got, inputs[which].grad)


def test_gradient_through_compile(backend):
    inputs = [randn(3, 6).requires_grad_(), randn(6, seed=1).requires_grad_()]
    torch.compiler.reset()
    eager = torch.autograd.grad(bias_gelu(*inputs).sum(), inputs)
    compiled = torch.compile(
        lambda *args: bias_gelu(*args).sum(), fullgraph=True, backend="aot_eager"
    )
    for g, e in zip(torch.autograd.grad(compiled(*inputs), inputs), eager, strict=True):
        torch.testing.assert_close(g, e)


X = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("text", "args"),
    [
        (r"x: shape \(4,\); accepted is \(rows, columns\)", (X[0],)),
        (r"bias: shape \(3,\); accepted is \(4,\)", (X, X[:, 0])),
        ("bias: torch.float16 on cpu", (X, X[0].half())),
        ("bias: torch.float32 on meta", (X, X[0].to("meta"))),
    ],
)
def test_errors_name_the_argument(backend, text, args):
    with pytest.raises(ValueError, match=text):
        bias_gelu(*args)

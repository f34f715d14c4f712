"""Values worked out by hand, large means, the gradient, and errors."""

import pytest
import torch
import torch.nn.functional as F

from embedfuse import testing
from embedfuse.ops import add_layer_norm
from embedfuse.ops.add_layer_norm import OP

NAN = float("nan")


def randn(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def test_values_by_hand(backend):
    # Sums 1, 3 (mean 2, variance 1) and 10, 10 (variance 0).
    x = torch.tensor([[0.0, 3.0], [4.0, 5.0]])
    residual = torch.tensor([[1.0, 0.0], [6.0, 5.0]])
    weight, bias = torch.tensor([10.0, 100.0]), torch.tensor([1.0, 2.0])
    out = add_layer_norm(x, residual, weight, bias, eps=3.0)
    assert out.tolist() == [[-4, 52], [1, 2]]
    assert add_layer_norm(x, residual, weight, eps=3.0).tolist() == [[-5, 50], [0, 0]]


def test_is_layer_norm_of_the_sum(backend):
    x, residual, weight, bias = randn(9, 50), randn(9, 50, seed=1), randn(50), randn(50, seed=2)
    expected = F.layer_norm(x + residual, (50,), weight, bias, 1e-5)
    torch.testing.assert_close(add_layer_norm(x, residual, weight, bias), expected)


@pytest.mark.parametrize("hidden", [1, 7, 8, 9, 15, 16, 17, 31, 33, 1000])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_widths_around_a_register(cpp, hidden, dtype):
    x, residual = randn(70, hidden, dtype=dtype), randn(70, hidden, seed=1, dtype=dtype)
    weight, bias = randn(hidden, seed=2, dtype=dtype), randn(hidden, seed=3, dtype=dtype)
    testing.assert_close_to_reference(OP, (x, residual, weight, bias, 1e-12), cpp)


@pytest.mark.parametrize("mean", [1e3, 1e5])
def test_large_means_keep_precision(backend, mean):
    """Whole numbers around the mean: sum and deviations are exact in fp32, their squares' sum is not."""
    x = randn(5, 1024).mul(40).round() + mean
    residual = randn(5, 1024, seed=1).mul(40).round()
    out = add_layer_norm(x, residual, torch.ones(1024))
    exact = F.layer_norm(x.double() + residual.double(), (1024,), eps=1e-5)
    # Half a unit of a mean of 2e5 is 1.4e-4 standard deviations; the C++ version takes it back.
    shift = 0 if mean == 1e3 or backend == "cpp" else 1.6e-4
    largest = exact.abs().max()
    assert (out.double() - exact).abs().max() < shift + testing.FLOOR[torch.float32] * largest


def test_the_sum_is_not_rounded_to_16_bits(backend):
    """256 + 0.5 in bf16 would be 256; the halves are all that differs."""
    x = torch.full((1, 4), 256.0, dtype=torch.bfloat16)
    residual = torch.tensor([[0.0, 0.5, 0.0, 0.5]], dtype=torch.bfloat16)
    out = add_layer_norm(x, residual, torch.ones(4, dtype=torch.bfloat16), eps=0.0)
    assert out.tolist() == [[-1, 1, -1, 1]]


def test_nan_stays_in_its_row(backend):
    x = randn(3, 40)
    clean = add_layer_norm(x, x, torch.ones(40))
    x[1, 39] = NAN
    out = add_layer_norm(x, x, torch.ones(40))
    assert out[1].isnan().all()
    assert torch.equal(out[::2], clean[::2])


@pytest.mark.parametrize("with_bias", [True, False])
def test_gradcheck(with_bias):
    inputs = [randn(4, 5, seed=i, dtype=torch.float64) for i in range(2)]
    inputs += [randn(5, seed=i, dtype=torch.float64) for i in (2, 3)[: 1 + with_bias]]
    torch.autograd.gradcheck(
        lambda *args: add_layer_norm(*args, eps=1e-3), [t.requires_grad_() for t in inputs]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_is_that_of_plain_torch(backend, dtype):
    inputs = [randn(6, 37, seed=i, dtype=dtype) for i in range(2)]
    inputs += [randn(37, seed=i, dtype=dtype) for i in (2, 3)]
    upstream = randn(6, 37, seed=4, dtype=dtype)
    leaves = [t.clone().requires_grad_() for t in inputs]
    got = torch.autograd.grad(add_layer_norm(*leaves), leaves, upstream)
    exact = [t.double().requires_grad_() for t in inputs]
    out = F.layer_norm(exact[0] + exact[1], (37,), *exact[2:])
    expected = torch.autograd.grad(out, exact, upstream.double())
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8}[dtype]
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == dtype
        torch.testing.assert_close(g.double(), e, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("which", range(4))
def test_gradient_of_one_input_alone(backend, which):
    inputs = [randn(3, 6), randn(3, 6, seed=1), randn(6), randn(6, seed=2)]
    inputs[which].requires_grad_()
    add_layer_norm(*inputs).pow(2).sum().backward()
    got, inputs[which].grad = inputs[which].grad, None
    F.layer_norm(inputs[0] + inputs[1], (6,), *inputs[2:]).pow(2).sum().backward()
    torch.testing.assert_close(got, inputs[which].grad, rtol=1e-5, atol=1e-6)


def test_gradient_through_compile(backend):
    inputs = [t.requires_grad_() for t in (randn(3, 6), randn(3, 6, seed=1), randn(6), randn(6))]
    torch.compiler.reset()

    def loss(*args):
        return (add_layer_norm(*args) ** 3).sum()

    eager = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for g, e in zip(torch.autograd.grad(compiled(*inputs), inputs), eager, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-5)


X, W = torch.ones(3, 4), torch.ones(4)


@pytest.mark.parametrize(
    ("text", "args"),
    [
        (r"x: shape \(3, 2, 4\)", (torch.ones(3, 2, 4), X, W)),
        (r"x: shape \(3, 0\)", (X[:, :0], X[:, :0], W[:0])),
        (r"residual: shape \(1, 4\); accepted is \(3, 4\)", (X, X[:1], W)),
        (r"weight: shape \(3,\); accepted is \(4,\)", (X, X, W[:3])),
        (r"bias: shape \(4, 1\); accepted is \(4,\)", (X, X, W, W[:, None])),
        ("residual: torch.float16 on cpu", (X, X.half(), W)),
        ("weight: torch.bfloat16 on cpu", (X, X, W.bfloat16())),
        ("bias: torch.float32 on meta", (X, X, W, W.to("meta"))),
    ],
)
def test_errors_name_the_argument(backend, text, args):
    with pytest.raises(ValueError, match=text):
        add_layer_norm(*args)

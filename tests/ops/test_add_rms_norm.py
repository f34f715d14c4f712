"""Values worked out by hand, transformers' own module, the gradient, and errors."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from embedfuse import testing
from embedfuse.ops import add_rms_norm
from embedfuse.ops.add_rms_norm import OP
from embedfuse.registry import triton_interprets

NAN = float("nan")


def randn(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def by_transformers(summed, weight, eps):
    module = LlamaRMSNorm(len(weight), eps)
    module.weight = torch.nn.Parameter(weight, requires_grad=weight.requires_grad)
    return module(summed)


def test_values_by_hand(backend):
    # Sums 1, 7 (mean square 25) and 5, -5 (the same): divided by 5.
    x = torch.tensor([[0.0, 3.0], [4.0, -10.0]])
    residual = torch.tensor([[1.0, 4.0], [1.0, 5.0]])
    weight = torch.tensor([10.0, 100.0])
    normed, summed = add_rms_norm(x, residual, weight, eps=0.0)
    assert summed.tolist() == [[1, 7], [5, -5]]
    torch.testing.assert_close(normed, torch.tensor([[2.0, 140.0], [10.0, -100.0]]))
    # eps 75 makes it 100.
    normed, _ = add_rms_norm(x, residual, weight, eps=75.0)
    torch.testing.assert_close(normed, torch.tensor([[1.0, 70.0], [5.0, -50.0]]))


def test_without_residual(backend):
    x = torch.tensor([[1.0, 7.0]])
    normed, summed = add_rms_norm(x, None, torch.ones(2), eps=0.0)
    torch.testing.assert_close(normed, torch.tensor([[0.2, 1.4]]))
    assert summed is x


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounded_where_transformers_rounds(backend, dtype):
    """Whole rows may differ by a unit of the quotient, where fp32 sums in another order; few do."""
    if backend == "triton" and triton_interprets() and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cuts fp32 off to bf16 where the GPU rounds")
    x, residual = randn(40, 300, dtype=dtype), randn(40, 300, seed=1, dtype=dtype)
    weight = randn(300, seed=2, dtype=dtype)
    normed, summed = add_rms_norm(x, residual, weight, eps=1e-6)
    assert torch.equal(summed, x + residual)
    expected = by_transformers(x + residual, weight, 1e-6)
    assert (normed == expected).float().mean() > 0.999


@pytest.mark.parametrize("hidden", [1, 7, 8, 9, 15, 16, 17, 31, 33, 1000])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_widths_around_a_register(cpp, hidden, dtype):
    x, residual = randn(70, hidden, dtype=dtype), randn(70, hidden, seed=1, dtype=dtype)
    weight = randn(hidden, seed=2, dtype=dtype)
    testing.assert_close_to_reference(OP, (x, residual, weight, 1e-6), cpp)
    testing.assert_close_to_reference(OP, (x, None, weight, 1e-6), cpp)


def test_heads_of_a_product(backend):
    product = randn(5, 12 * 40)
    heads = product[:, 80:200].unflatten(1, (3, 40))
    normed, summed = add_rms_norm(heads, None, randn(40, seed=1))
    assert summed is heads
    rows, _ = add_rms_norm(heads.reshape(15, 40), None, randn(40, seed=1))
    torch.testing.assert_close(normed, rows.view(5, 3, 40))


def test_nan_stays_in_its_row(backend):
    x = randn(3, 40)
    clean, _ = add_rms_norm(x, x, torch.ones(40))
    x[1, 39] = NAN
    normed, summed = add_rms_norm(x, x, torch.ones(40))
    assert normed[1].isnan().all()
    assert torch.equal(normed[::2], clean[::2])
    assert summed.isnan().sum() == 1


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 5)])
def test_gradcheck(shape, with_residual):
    x, residual = (randn(*shape, seed=i, dtype=torch.float64) for i in range(2))
    weight = randn(5, seed=2, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in ((x, residual, weight) if with_residual else (x, weight))]

    def call(*args):
        x, *residual, weight = args
        return add_rms_norm(x, *(residual or [None]), weight, 1e-3)

    torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_is_that_of_transformers(backend, dtype):
    inputs = [randn(6, 37, dtype=dtype), randn(6, 37, seed=1, dtype=dtype), randn(37, dtype=dtype)]
    upstream = [randn(6, 37, seed=i, dtype=dtype) for i in (4, 5)]

    def gradients(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        return torch.autograd.grad(function(*leaves), leaves, [u.to(dtype) for u in upstream])

    def plain(x, residual, weight):
        summed = x + residual
        rms = (summed.square().mean(1, keepdim=True) + 1e-6).sqrt()
        return summed / rms * weight, summed

    got = gradients(add_rms_norm, dtype)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7}[dtype]
    for g, e in zip(got, gradients(plain, torch.float64), strict=True):
        assert g.dtype == dtype
        assert (g.double() - e).abs().max() <= tolerance * e.abs().max()


@pytest.mark.parametrize("which", range(3))
def test_gradient_of_one_input_alone(backend, which):
    inputs = [randn(3, 6), randn(3, 6, seed=1), randn(6)]
    inputs[which].requires_grad_()
    normed, summed = add_rms_norm(*inputs)
    (normed.pow(2).sum() + summed.pow(3).sum()).backward()
    got, inputs[which].grad = inputs[which].grad, None
    summed = inputs[0] + inputs[1]
    (by_transformers_grad(summed, inputs[2]).pow(2).sum() + summed.pow(3).sum()).backward()
    torch.testing.assert_close(got, inputs[which].grad, rtol=1e-5, atol=1e-5)


def by_transformers_grad(summed, weight):
    return torch.nn.functional.rms_norm(summed, weight.shape, weight, 1e-6)


X, W = torch.ones(3, 4), torch.ones(4)


@pytest.mark.parametrize(
    ("text", "args"),
    [
        (r"x: shape \(4,\)", (W, W, W)),
        (r"x: shape \(3, 0\)", (X[:, :0], X[:, :0], W[:0])),
        (r"residual: shape \(1, 4\); accepted is \(3, 4\)", (X, X[:1], W)),
        (r"weight: shape \(3,\); accepted is \(4,\)", (X, X, W[:3])),
        ("residual: torch.float16 on cpu", (X, X.half(), W)),
        ("weight: torch.bfloat16 on cpu", (X, None, W.bfloat16())),
        ("weight: torch.float32 on meta", (X, X, W.to("meta"))),
    ],
)
def test_errors_name_the_argument(backend, text, args):
    with pytest.raises(ValueError, match=text):
        add_rms_norm(*args)

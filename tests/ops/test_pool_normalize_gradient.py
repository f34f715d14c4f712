"""The gradient of pool_normalize: gradcheck in fp64, and autograd through plain torch."""

import pytest
import torch
import torch.nn.functional as F

from embedfuse.ops import pool_normalize
from embedfuse.ops.pool_normalize import POOLINGS

LENGTHS = [3, 0, 1, 6]
MASKS = {
    "right padding": [[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]],
    "left padding": [[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]],
    "hole": [[0, 1, 0, 1], [1, 0, 0, 0], [1, 0, 1, 1]],
}
INPUTS = ["packed", "no mask", *MASKS]


def make_input(inputs: str, dtype, hidden: int = 5):
    """Token states that require a gradient, and the keyword that bounds the sequences."""
    generator = torch.Generator().manual_seed(0)
    shape = (sum(LENGTHS), hidden) if inputs == "packed" else (3, 4, hidden)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    if inputs == "packed":
        return x, {"cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)}
    return x, {"attention_mask": torch.tensor(MASKS[inputs])} if inputs in MASKS else {}


def plain(x, *, cu_seqlens=None, attention_mask=None, pooling, normalize):
    """The same by a loop over sequences, for autograd to differentiate."""
    if cu_seqlens is not None:
        sequences = x.tensor_split(cu_seqlens[1:-1].long())
        masks = [torch.ones(len(s), dtype=torch.bool) for s in sequences]
    else:
        sequences = list(x)
        masks = torch.ones(x.shape[:2]) if attention_mask is None else attention_mask
    pooled = []
    for tokens, mask in zip(sequences, masks, strict=True):
        kept = mask.bool().nonzero()[:, 0]
        if len(kept) == 0:
            pooled.append(x.new_zeros(x.shape[-1]))
        elif pooling == "cls":
            pooled.append(tokens[kept[0]])
        elif pooling == "last":
            pooled.append(tokens[kept[-1]])
        elif pooling == "mean":
            pooled.append(tokens[kept].mean(0))
        else:
            t = (kept - kept[0] + 1).to(x.dtype)
            pooled.append(t @ tokens[kept] / t.sum())
    pooled = torch.stack(pooled)
    return F.normalize(pooled, dim=-1, eps=1e-12) if normalize else pooled


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("inputs", INPUTS)
def test_gradcheck(inputs, pooling, normalize):
    x, bounds = make_input(inputs, torch.float64)
    torch.autograd.gradcheck(
        lambda x: pool_normalize(x, **bounds, pooling=pooling, normalize=normalize), (x,)
    )


@pytest.mark.parametrize("norm", [0, 5e-13])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradcheck_near_the_zero_vector(pooling, norm):
    x = torch.full((2, 3, 4), norm / 2, dtype=torch.float64, requires_grad=True)
    # Steps of 1e-14 stay under 1e-12, where the result is linear: p / 1e-12.
    torch.autograd.gradcheck(lambda x: pool_normalize(x, pooling=pooling), (x,), eps=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("inputs", INPUTS)
def test_gradient_is_that_of_plain_torch(backend, inputs, pooling, normalize, dtype):
    x, bounds = make_input(inputs, dtype, hidden=37)
    out = pool_normalize(x, **bounds, pooling=pooling, normalize=normalize, out_dtype=torch.float32)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (got,) = torch.autograd.grad(out, x, upstream)
    exact = x.detach().double().requires_grad_()
    expected = plain(exact, **bounds, pooling=pooling, normalize=normalize)
    (expected,) = torch.autograd.grad(expected, exact, upstream.double())
    assert got.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}[dtype]
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance * 0.1)


def test_gradient_in_the_result_dtype(backend):
    """Where the result was rounded to bf16, its own rounding is all that the gradient loses."""
    x, bounds = make_input("hole", torch.bfloat16, hidden=64)
    pool_normalize(x, **bounds).sum().backward()
    exact = x.detach().double().requires_grad_()
    plain(exact, **bounds, pooling="mean", normalize=True).sum().backward()
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=2**-6, atol=2**-9)


@pytest.mark.parametrize("inputs", ["packed", "left padding"])
def test_gradient_of_zero_and_empty_sequences(backend, inputs):
    x, bounds = make_input(inputs, torch.float32)
    with torch.no_grad():
        x.zero_()
    pool_normalize(x, **bounds).sum().backward()
    exact = x.detach().double().requires_grad_()
    plain(exact, **bounds, pooling="mean", normalize=True).sum().backward()
    assert x.grad.max() > 1e11
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-5, atol=0)


@pytest.mark.parametrize("inputs", INPUTS)
def test_gradient_through_compile(backend, inputs):
    x, bounds = make_input(inputs, torch.float32)
    torch.compiler.reset()

    def loss(x):
        return (pool_normalize(2 * x, **bounds, pooling="weighted_mean") ** 3).sum()

    loss(x).backward()
    eager, x.grad = x.grad, None
    torch.compile(loss, fullgraph=True, backend="aot_eager")(x).backward()
    torch.testing.assert_close(x.grad, eager, rtol=1e-5, atol=1e-6)


def test_no_second_derivative():
    x, _ = make_input("no mask", torch.float64)
    (gradient,) = torch.autograd.grad((pool_normalize(x) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_no_graph_without_grad_mode(backend):
    x, bounds = make_input("packed", torch.float32)
    with torch.no_grad():
        assert not pool_normalize(x, **bounds).requires_grad
    with torch.inference_mode():
        assert pool_normalize(x, **bounds).is_inference()

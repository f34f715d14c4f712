"""Values worked out by hand, transformers' own function, the gradient, what is written, and errors."""

import math

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from embedfuse import testing
from embedfuse.ops import rope, rope_
from embedfuse.ops.rope import OP


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def angles(tokens, half, dtype=torch.float32):
    angle = torch.rand(tokens, half, generator=torch.Generator().manual_seed(9)) * 6.3
    return angle.cos().to(dtype), angle.sin().to(dtype)


def test_values_by_hand(backend):
    # Coordinates (1, 0) and (2, 3), as entries 0, 2 and 1, 3: turned by 90 and by 180 degrees.
    x = torch.tensor([[[1.0, 2.0, 0.0, 3.0]]])
    cos, sin = torch.tensor([[0.0, -1.0]]), torch.tensor([[1.0, 0.0]])
    assert rope(x, cos, sin).tolist() == [[[0, -2, 1, -3]]]
    assert x.tolist() == [[[1, 2, 0, 3]]]
    assert rope_(x, cos, sin) is x
    assert x.tolist() == [[[0, -2, 1, -3]]]


def test_only_the_distance_of_two_positions_matters(backend):
    position = torch.arange(10.0)[:, None]
    freq = torch.tensor([1.0, 0.1, 0.01])
    x = randn(1, 1, 6).expand(10, 1, 6)
    turned = rope(x, (position * freq).cos(), (position * freq).sin())[:, 0]
    products = turned @ turned.T
    for distance in range(1, 10):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert not math.isclose(products[0, 1], products[0, 2], rel_tol=1e-3)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_is_that_of_transformers(backend, dtype):
    x, (cos, sin) = randn(9, 3, 40, dtype=dtype), angles(9, 20, dtype)

    def by_transformers(x, cos, sin):
        twice = [torch.cat((t, t), -1) for t in (cos, sin)]
        return apply_rotary_pos_emb(x, x, *twice, unsqueeze_dim=1)[0]

    exact = by_transformers(x.double(), cos.double(), sin.double())
    testing.assert_as_good(rope(x, cos, sin), by_transformers(x, cos, sin), exact)


@pytest.mark.parametrize("half", [1, 7, 8, 9, 15, 16, 17, 31, 33, 64])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_widths_around_a_register(cpp, half, dtype):
    args = randn(20, 3, 2 * half, dtype=dtype), *angles(20, half, dtype)
    testing.assert_close_to_reference(OP, args, cpp)


def test_a_slice_of_a_product_and_nothing_else(backend):
    product, (cos, sin) = randn(7, 5 * 12), angles(7, 6)
    before = product.clone()
    heads = product[:, 12:36].unflatten(1, (2, 12))
    expected = rope(heads, cos, sin)
    rope_(heads, cos, sin)
    assert torch.equal(product[:, 12:36], expected.flatten(1))
    assert torch.equal(product[:, :12], before[:, :12])
    assert torch.equal(product[:, 36:], before[:, 36:])


@pytest.mark.parametrize("view", ["head_dim apart", "heads apart", "angles apart"])
def test_strided_inputs(backend, view):
    x, (cos, sin) = randn(6, 4, 16), angles(6, 8)
    expected = rope(x, cos, sin)
    if view == "head_dim apart":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif view == "heads apart":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    else:
        cos, sin = (t.repeat_interleave(2, 1)[:, ::2] for t in (cos, sin))
    assert rope_(x, cos, sin) is x
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)


def test_gradcheck(backend):
    x = randn(3, 2, 6).double().requires_grad_()
    cos, sin = (t.double() for t in angles(3, 3))
    if backend == "reference":
        torch.autograd.gradcheck(lambda x: rope(x, cos, sin), [x])
    leaf = x.detach().float().requires_grad_()
    upstream = randn(3, 2, 6, seed=5)
    (got,) = torch.autograd.grad(rope(leaf, cos.float(), sin.float()), leaf, upstream)
    (expected,) = torch.autograd.grad(_plain(x, cos, sin), x, upstream.double())
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)


def _plain(x, cos, sin):
    a, b = x.chunk(2, -1)
    turned = torch.complex(a, b) * torch.complex(cos, sin)[:, None]
    return torch.cat((turned.real, turned.imag), -1)


def test_in_place_refuses_a_gradient(backend):
    x, (cos, sin) = randn(3, 2, 6).requires_grad_(), angles(3, 3)
    with pytest.raises(RuntimeError, match="x: requires a gradient, which rope_ has not"):
        rope_(x * 1, cos, sin)
    with torch.no_grad():
        rope_(x, cos, sin)


X, A = torch.ones(3, 2, 4), torch.ones(3, 2)


@pytest.mark.parametrize(
    ("text", "args"),
    [
        (r"x: shape \(3, 8\)", (X.flatten(1), A, A)),
        (r"x: shape \(3, 2, 3\)", (X[..., :3], A, A)),
        (r"cos: shape \(3, 4\); accepted is \(3, 2\)", (X, X[:, 0], A)),
        (r"sin: shape \(2, 2\); accepted is \(3, 2\)", (X, A, A[:2])),
        ("sin: torch.float16 on cpu", (X, A, A.half())),
        ("cos: torch.float32 on meta", (X, A.to("meta"), A)),
        ("cos: requires a gradient", (X, A.clone().requires_grad_(), A)),
    ],
)
def test_errors_name_the_argument(backend, text, args):
    for call in (rope, rope_):
        with pytest.raises(ValueError, match=text):
            call(*args)

"""Gradients against autograd through all products, away from ties."""

import pytest
import torch

from embedfuse import testing
from embedfuse.ops import maxsim, maxsim_packed, segment_sum
from embedfuse.registry import use_backend


def leaf(*shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def dense(q, d, q_mask, d_mask, normalize, padding):
    """Plain torch, differentiated by torch."""
    if normalize:
        q, d = (torch.nn.functional.normalize(x, dim=-1, eps=1e-12) for x in (q, d))
    products = torch.einsum("aid,bjd->abij", q, d)
    left_out = 0.0 if padding == "zero_vector" else -float("inf")
    products = products.masked_fill(~d_mask[None, :, None], left_out)
    return (products.amax(3) * q_mask[:, None]).sum(2)


MASKS = {
    "right": torch.arange(9) < torch.tensor([[9], [4], [1]]),
    "left": torch.arange(9) >= torch.tensor([[0], [4], [8]]),
    "holes": torch.tensor([[1, 0, 1, 1, 0, 0, 1, 0, 1]] * 3, dtype=torch.bool),
}
Q_MASK = torch.arange(5) < torch.tensor([[5], [2]])


@pytest.mark.parametrize("padding", ["exclude", "zero_vector"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float64, *testing.DTYPES], ids=str)
def test_padded(backend, dtype, mask, normalize, padding):
    if dtype == torch.float64 and backend != "reference":
        pytest.skip("fp64 runs on the reference")
    q, d = leaf(2, 5, 12, seed=0, dtype=dtype), leaf(3, 9, 12, seed=1, dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in (q, d)]
    weights = torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.25, 1.0]])
    settings = {"normalize": normalize, "padding": padding}
    (maxsim(q, d, Q_MASK, MASKS[mask], **settings) * weights).sum().backward()
    (dense(*wide, Q_MASK, MASKS[mask], **settings) * weights).sum().backward()
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6}.get(dtype, testing.FLOOR[dtype])
    for x, exact in zip((q, d), wide, strict=True):
        assert x.grad.dtype == dtype
        error = (x.grad.double() - exact.grad).abs().max()
        assert error <= tolerance * exact.grad.abs().max()


def test_views_with_rows_between_the_texts(backend):
    wide = leaf(3, 9, 12, seed=0, dtype=torch.float32)
    copy, d = wide.detach().clone().requires_grad_(), leaf(3, 7, 12, seed=1, dtype=torch.float32)
    maxsim(wide[:, 2:5], d).square().sum().backward()
    maxsim(copy[:, 2:5].clone(), d).square().sum().backward()
    torch.testing.assert_close(wide.grad, copy.grad)
    assert wide.grad[:, 2:5].abs().min() > 0


def test_packed_and_pairs(backend):
    q, d = leaf(7, 6, seed=0, dtype=torch.float32), leaf(12, 6, seed=1, dtype=torch.float32)
    cu_q, cu_d = (torch.tensor(x, dtype=torch.int32) for x in ([0, 3, 3, 7], [0, 5, 6, 12]))
    pairs = torch.tensor([[2, 0], [0, 2], [2, 0], [1, 1], [2, 1]])
    for listed in (None, pairs):
        got = maxsim_packed(q, cu_q, d, cu_d, listed, reduction="mean")
        grads = torch.autograd.grad(got.square().sum(), (q, d))
        numbers = pairs if listed is not None else torch.cartesian_prod(*[torch.arange(3)] * 2)
        scores = [
            (q[cu_q[i] : cu_q[i + 1]] @ d[cu_d[j] : cu_d[j + 1]].T).amax(1).mean()
            if i != 1
            else q.new_zeros(())
            for i, j in numbers.tolist()
        ]
        wanted = torch.stack(scores)
        torch.testing.assert_close(got.flatten(), wanted)
        torch.testing.assert_close(grads, torch.autograd.grad(wanted.square().sum(), (q, d)))


def test_one_side_alone_and_views(backend):
    x = leaf(3, 8, 6, seed=0, dtype=torch.float32)
    q = leaf(2, 4, 6, seed=1, dtype=torch.float32).detach()
    maxsim(q, x[:, 1:]).sum().backward()
    own, x.grad = x.grad, None
    torch.einsum("aid,bjd->abij", q, x[:, 1:]).amax(3).sum().backward()
    torch.testing.assert_close(own, x.grad)
    assert own[:, 0].eq(0).all()


def test_of_equal_products_the_first_counts(backend):
    d = torch.ones(1, 3, 2, requires_grad=True)
    maxsim(torch.ones(1, 2, 2), d).sum().backward()
    assert d.grad.tolist() == [[[2, 2], [0, 0], [0, 0]]]


def test_empty(backend):
    for shapes in (((2, 0, 4), (3, 5, 4)), ((2, 3, 4), (3, 0, 4)), ((0, 3, 4), (3, 5, 4))):
        q, d = leaf(*shapes[0], seed=0), leaf(*shapes[1], seed=1)
        q, d = (x.detach().float().requires_grad_() for x in (q, d))
        maxsim(q, d).sum().backward()
        assert q.grad.eq(0).all()
        assert d.grad.eq(0).all()


def test_same_bits_on_several_threads(backend, restore_threads):
    q, d = (
        leaf(8, 20, 32, seed=0, dtype=torch.float32),
        leaf(9, 40, 32, seed=1, dtype=torch.float32),
    )

    def gradients():
        return torch.autograd.grad(maxsim(q, d, normalize=True).square().sum(), (q, d))

    torch.set_num_threads(1)
    alone = gradients()
    torch.set_num_threads(2)
    for _ in range(3):
        assert all(map(torch.equal, gradients(), alone))


def test_segment_sum_by_hand(backend):
    x = torch.tensor([[1.0, 2.0], [10.0, 20.0]])
    weights, index = torch.tensor([0.5, 1.0, -1.0]), torch.tensor([1, 0, 0])
    indptr = torch.tensor([0, 2, 2, 3])
    assert segment_sum(x, weights, index, indptr).tolist() == [[6, 12], [0, 0], [-1, -2]]


def test_segment_sum_errors():
    x, weights = torch.ones(2, 3), torch.ones(2)
    index, indptr = torch.tensor([0, 1]), torch.tensor([0, 2])
    cases = [
        ("x", (x[0], weights, index, indptr)),
        ("weights", (x, weights.half(), index, indptr)),
        ("index", (x, weights, index[:1], indptr)),
        ("indptr", (x, weights, index, indptr.int())),
        ("indptr", (x, weights, index, indptr[:0])),
        ("index", (x, weights, index + 1, indptr)),
        ("indptr", (x, weights, index, indptr + 1)),
    ]
    for name, args in cases:
        with pytest.raises(ValueError, match=f"^{name}: "), use_backend("cpp"):
            segment_sum(*args)

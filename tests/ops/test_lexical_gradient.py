"""Gradients of the lexical ops against autograd of dense definitions, and where they go at ties and zeros."""

import pytest
import torch

from embedfuse.ops import Csr, lexical_scores, lexical_weights, sparse_scatter
from embedfuse.registry import use_backend

VOCABULARY = 12
ENDS = torch.tensor([0, 9, 9, 10, 40], dtype=torch.int32)
LENGTHS = ENDS.diff().tolist()
EXCLUDED = (0, 3)


def leaf(*shape, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def token_ids(seed=5, count=40):
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def dense_scatter(weights, ids):
    """(batch, vocabulary) through a (length, vocabulary) matrix per text, as FlagEmbedding trains."""
    rows = []
    for w, i in zip(weights.split(LENGTHS), ids.split(LENGTHS), strict=True):
        matrix = torch.where(torch.nn.functional.one_hot(i, VOCABULARY) > 0, w.relu()[:, None], 0)
        rows.append(torch.cat([matrix, matrix.new_zeros(1, VOCABULARY)]).amax(0))
    dense = torch.stack(rows)
    keep = torch.ones(VOCABULARY)
    keep[list(EXCLUDED)] = 0
    return dense * keep


def gradients(loss, *leaves):
    return torch.autograd.grad(loss, leaves, retain_graph=True)


@pytest.mark.parametrize("vocabulary", [None, VOCABULARY])
def test_scatter(backend, vocabulary):
    weights, ids = leaf(40, seed=0), token_ids()
    factor = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(1))
    got = sparse_scatter(weights, ids, cu_seqlens=ENDS, excluded=EXCLUDED, vocabulary=vocabulary)
    got = got if vocabulary else got.dense(VOCABULARY)
    expected = dense_scatter(weights, ids)
    assert torch.equal(got, expected)
    (wanted,) = gradients((expected * factor).sum(), weights)
    assert wanted.count_nonzero() == expected.count_nonzero() == 10
    assert torch.equal(gradients((got * factor).sum(), weights)[0], wanted)


def test_padded_scatter(backend):
    weights = leaf(3, 5, seed=0)
    ids = token_ids(count=15).view(3, 5)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
    got = sparse_scatter(weights, ids, attention_mask=mask, vocabulary=VOCABULARY)
    zeros = torch.zeros(3, VOCABULARY)
    expected = zeros.scatter_reduce(1, ids, torch.where(mask > 0, weights, 0).relu(), "amax")
    assert torch.equal(got, expected)
    # Each nonzero entry's gradient reaches the one token of its weight.
    (grad,) = gradients(got.sum(), weights)
    assert torch.equal(grad.sum(1), expected.count_nonzero(1).float())
    assert grad[mask == 0].eq(0).all()


@pytest.mark.parametrize("vocabulary", [None, 8])
def test_ties_and_zeros(backend, vocabulary):
    weights = torch.tensor([1.0, 2.0, 2.0, 0.0, -1.0, 0.0, 3.0], requires_grad=True)
    ids = torch.tensor([5, 5, 5, 6, 6, 7, 1])
    ends = torch.tensor([0, 7], dtype=torch.int32)
    got = sparse_scatter(weights, ids, cu_seqlens=ends, excluded=(1,), vocabulary=vocabulary)
    got = got if vocabulary else got.dense(8)
    got.sum().backward()
    assert weights.grad.tolist() == [0, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("with_bias", [True, False])
def test_weights(backend, with_bias):
    hidden, weight, ids = leaf(40, 17, seed=0), leaf(17, seed=1), token_ids()
    bias = leaf(1, seed=2) if with_bias else None
    leaves = (hidden, weight, bias) if with_bias else (hidden, weight)
    factor = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(3))
    csr = lexical_weights(hidden, ids, weight, bias, cu_seqlens=ENDS, excluded=EXCLUDED)
    linear = hidden @ weight + (bias if with_bias else 0)
    expected = gradients((dense_scatter(linear, ids) * factor).sum(), *leaves)
    got = gradients((csr.dense(VOCABULARY) * factor).sum(), *leaves)
    for mine, wanted in zip(got, expected, strict=True):
        assert wanted.count_nonzero() > 0
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_in_16_bits(backend, dtype):
    def squares(*leaves):
        csr = lexical_weights(leaves[0], token_ids(), *leaves[1:], cu_seqlens=ENDS)
        return csr.weights.square().sum()

    leaves = [leaf(*shape, seed=len(shape), dtype=dtype) for shape in ((40, 17), (17,), ())]
    got = torch.autograd.grad(squares(*leaves), leaves)
    with use_backend("reference"):
        exact = [x.detach().double().requires_grad_() for x in leaves]
        expected = torch.autograd.grad(squares(*exact), exact)
    for mine, wanted in zip(got, expected, strict=True):
        assert mine.dtype == dtype
        assert (mine - wanted).abs().max() <= torch.finfo(dtype).eps * wanted.abs().max()


def test_a_nan_weight_has_a_nan_gradient(backend):
    hidden, weight = torch.ones(2, 3), torch.ones(3, requires_grad=True)
    hidden[1] = float("nan")
    csr = lexical_weights(
        hidden, torch.tensor([1, 2]), weight, cu_seqlens=torch.tensor([0, 2], dtype=torch.int32)
    )
    csr.weights.sum().backward()
    assert weight.grad.isnan().all()


def csr_leaf(lengths, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(VOCABULARY, generator=generator)[:n].sort().values for n in lengths]
    ids = torch.cat(rows)
    return Csr(torch.tensor([0, *lengths]).cumsum(0), ids, leaf(len(ids), seed=seed, dtype=dtype))


@pytest.mark.parametrize("aligned", [False, True])
def test_scores(backend, aligned):
    queries, documents = csr_leaf([4, 0, 9, 2], 0), csr_leaf([6, 5, 0, 12], 1)
    leaves = queries.weights, documents.weights
    got = lexical_scores(queries, documents, aligned=aligned)
    dense = queries.dense(VOCABULARY), documents.dense(VOCABULARY)
    expected = (dense[0] * dense[1]).sum(1) if aligned else dense[0] @ dense[1].T
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    factor = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    wanted = gradients((expected * factor).sum(), *leaves)
    for mine, want in zip(gradients((got * factor).sum(), *leaves), wanted, strict=True):
        assert want.count_nonzero() > 0
        torch.testing.assert_close(mine, want, rtol=1e-5, atol=1e-6)


def test_scores_where_one_side_is_fixed(backend):
    queries, documents = csr_leaf([4, 3], 0), csr_leaf([6, 5, 9], 1)
    fixed = Csr(documents.indptr, documents.token_ids, documents.weights.detach())
    for sides, leaves in (((queries, fixed), queries), ((fixed, queries), queries)):
        (grad,) = torch.autograd.grad(lexical_scores(*sides).sum(), leaves.weights)
        expected = fixed.dense(VOCABULARY).sum(0)[queries.token_ids]
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("aligned", [False, True])
def test_gradcheck(aligned):
    queries, documents = (csr_leaf([4, 0, 9], seed, torch.float64) for seed in (0, 1))

    def scores(q, d):
        q, d = (
            Csr(queries.indptr, queries.token_ids, q),
            Csr(documents.indptr, documents.token_ids, d),
        )
        return lexical_scores(q, d, aligned=aligned)

    assert torch.autograd.gradcheck(scores, (queries.weights, documents.weights))

    def weights(hidden, weight, bias):
        return lexical_weights(hidden, token_ids(), weight, bias, cu_seqlens=ENDS).dense(VOCABULARY)

    leaves = [leaf(*shape, seed=3, dtype=torch.float64) for shape in ((40, 5), (5,), (1,))]
    assert torch.autograd.gradcheck(weights, leaves)

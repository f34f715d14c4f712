"""Sparse vectors from weights: by hand, agreement with FlagEmbedding's definitions, and NaN."""

import itertools
import math
import random

import pytest
import torch

from embedfuse import testing
from embedfuse.ops import Csr, lexical_scores, lexical_weights, sparse_scatter
from embedfuse.ops.lexical import kept
from embedfuse.ops.lexical.kept import OP as SCATTER
from tests import lexical_checks as checks

NAN = float("nan")
# Three texts, the second without tokens. 7 stands twice in the first, and 0, 2 are special tokens.
IDS = [0, 7, 5, 7, 9, 2, 3, 5]
WEIGHTS = [4.0, 1.0, 0.5, 2.0, -1.0, 8.0, 0.0, 0.25]
CU_SEQLENS = [0, 6, 6, 8]


def cu_seqlens(*values):
    return torch.tensor(values, dtype=torch.int32)


def as_lists(csr: Csr) -> list[dict]:
    """One {id: weight} per row, in the order of the entries."""
    bounds, ids, weights = csr.indptr.tolist(), csr.token_ids.tolist(), csr.weights.tolist()
    return [dict(zip(ids[a:b], weights[a:b], strict=True)) for a, b in itertools.pairwise(bounds)]


def scattered(weights=WEIGHTS, ids=IDS, ends=CU_SEQLENS, **options):
    weights, ids = torch.tensor(weights), torch.tensor(ids, dtype=torch.int64)
    return sparse_scatter(weights, ids, cu_seqlens=cu_seqlens(*ends), **options)


def test_scatter(backend):
    csr = scattered(excluded=(0, 2))
    assert csr.indptr.tolist() == [0, 2, 2, 3]
    assert csr.token_ids.tolist() == [5, 7, 5]
    assert csr.weights.tolist() == [0.5, 2, 0.25]
    assert as_lists(scattered()) == [{0: 4, 2: 8, 5: 0.5, 7: 2}, {}, {5: 0.25}]
    assert list(as_lists(scattered())[0]) == [0, 2, 5, 7]


def test_dense_scatter(backend):
    got = scattered(excluded=(0, 2), vocabulary=10)
    expected = torch.zeros(3, 10)
    expected[0, 5], expected[0, 7], expected[2, 5] = 0.5, 2, 0.25
    assert torch.equal(got, expected)
    half = sparse_scatter(
        torch.tensor(WEIGHTS).bfloat16(), torch.tensor(IDS), cu_seqlens=cu_seqlens(*CU_SEQLENS)
    )
    assert half.weights.dtype == torch.bfloat16
    assert torch.equal(half.dense(10)[:, 3:], expected.bfloat16()[:, 3:])


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
def test_padded_scatter_reads_no_padding(backend, mask_dtype):
    weights = torch.tensor([[NAN, 1.0, 3.0, 2.0], [1.0, 2.0, NAN, 9.0]])
    ids = torch.tensor([[-100, 5, 5, 2**40], [4, 6, -100, 6]])
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0]]).to(mask_dtype)
    csr = sparse_scatter(weights, ids, attention_mask=mask)
    assert as_lists(csr) == [{5: 3}, {4: 1, 6: 2}]
    dense = sparse_scatter(weights, ids, attention_mask=mask, vocabulary=7)
    assert torch.equal(dense, csr.dense(7))
    whole = sparse_scatter(weights[:, 1:2], ids[:, 1:2])
    assert as_lists(whole) == [{5: 1}, {6: 2}]


def test_nothing_to_keep(backend):
    for weights, excluded in (([-1.0, 0.0], ()), ([2.0, 3.0], (5, 6))):
        csr = scattered(weights, [5, 6], [0, 1, 2], excluded=excluded)
        assert as_lists(csr) == [{}, {}]
        dense = scattered(weights, [5, 6], [0, 1, 2], excluded=excluded, vocabulary=8)
        assert torch.equal(dense, torch.zeros(2, 8))
    assert as_lists(scattered([], [], [0])) == []
    assert as_lists(scattered([], [], [0, 0, 0])) == [{}, {}]
    assert scattered([], [], [0], vocabulary=4).shape == (0, 4)
    assert scattered([], [], [0, 0, 0], vocabulary=4).eq(0).all()
    assert sparse_scatter(torch.ones(2, 0), torch.ones(2, 0).long(), vocabulary=4).shape == (2, 4)


def test_more_excluded_ids_than_kernels_take(backend):
    ids = list(range(kept.MOST_EXCLUDED + 3))
    for left in (0, 5, len(ids) - 1):
        excluded = [token_id for token_id in ids if token_id != left]
        csr = scattered([1.0] * len(ids), ids, [0, len(ids)], excluded=excluded)
        assert as_lists(csr) == [{left: 1}]
    if backend != "reference":
        ends = cu_seqlens(0, 1)
        with pytest.raises(ValueError, match="excluded: 9 ids; accepted are at most 8"):
            SCATTER(torch.ones(1), torch.ones(1).long(), ends, list(range(9)))


def test_nan_and_infinity_show(backend):
    weights = [1.0, NAN, float("inf"), NAN, float("inf"), -float("inf")]
    got = scattered(weights, [5, 5, 5, 6, 7, 8], [0, 6])
    assert got.token_ids.tolist() == [5, 6, 7]
    assert got.weights.isnan().tolist() == [True, True, False]
    assert got.weights[2] == float("inf")
    dense = scattered(weights, [5, 5, 5, 6, 7, 8], [0, 6], vocabulary=9)
    assert dense[0, 5:7].isnan().all()
    assert dense[0, :5].eq(0).all()
    # A special token's NaN counts as little as its other weights.
    assert as_lists(scattered([NAN, 1.0], [0, 4], [0, 2], excluded=(0,))) == [{4: 1}]


def test_first_of_equal_weights_is_kept(backend):
    weights = torch.tensor([1.0, 2.0, 2.0, NAN, NAN, 0.5])
    ids = torch.tensor([5, 5, 5, 3, 3, 9])
    index, indptr, order = SCATTER(weights, ids, cu_seqlens(0, 5, 6), [])
    assert index.tolist() == [3, 1, 5, -1, -1, -1]
    assert indptr.tolist() == [0, 2, 3]
    assert order.tolist() == [1, 0, 0, -1, -1, -1]
    excluded = SCATTER(weights, ids, cu_seqlens(0, 5, 6), [9, 5])
    assert [x.tolist() for x in excluded] == [[3, *[-1] * 5], [0, 1, 1], [0, *[-1] * 5]]


def test_dicts_are_in_the_order_of_the_text(backend):
    """By the first token of an id that counts, be it not the one kept."""
    weights = torch.tensor([-1.0, 2.0, 1.0, 3.0, 0.5, 1.0, 4.0])
    csr = scattered(weights, [3, 9, 7, 9, 3, 8, 2], [0, 5, 5, 7])
    assert csr.token_ids.tolist() == [3, 7, 9, 2, 8]
    wanted = [[("9", 3), ("7", 1), ("3", 0.5)], [], [("8", 1), ("2", 4)]]
    assert [list(row.items()) for row in csr.dicts()] == wanted
    assert [list(row.items()) for row in csr[[2, 0]].dicts()] == [wanted[2], wanted[0]]
    by_id = Csr(csr.indptr, csr.token_ids, csr.weights)
    joined = Csr.cat([by_id, csr]).dicts()
    assert [list(row.items()) for row in joined[3:]] == wanted
    assert list(joined[0]) == ["3", "7", "9"]


def test_ids_of_every_width(backend):
    ids = [2**31 - 1, 2**24, 2**16, 2**16 - 1, 255, 256, 0, 2**24 - 1]
    csr = scattered([1.0] * 16, ids * 2, [0, 16])
    assert csr.token_ids.tolist() == sorted(ids)


# 8,192 is BGE-M3's longest text.
@pytest.mark.parametrize("lengths", [[1500, 0, 1, 2049], [0, 8192, 0]])
def test_sequences_long_enough_for_threads(backend, lengths, restore_threads):
    args = checks.long_sequences(lengths, "cpu")
    testing.assert_close_to_reference(SCATTER, args, backend)
    checks.check_one_id(args, lengths)
    if backend == "cpp":
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            testing.assert_close_to_reference(SCATTER, args, backend)


def test_lexical_weights(backend):
    hidden = torch.tensor([[1.0, 0.0], [3.0, 1.0], [0.0, 4.0], [1.0, 1.0], [9.0, 9.0], [1.0, 0.0]])
    ids = torch.tensor([5, 5, 6, 8, 0, 5])
    weight, bias = torch.tensor([1.0, -0.5]), torch.tensor([0.25])
    ends = cu_seqlens(0, 5, 6)
    got = lexical_weights(hidden, ids, weight, bias, cu_seqlens=ends, excluded=(0,))
    assert as_lists(got) == [{5: 2.75, 8: 0.75}, {5: 1.25}]
    assert got.weights.dtype == torch.float32
    without = lexical_weights(hidden, ids, weight, cu_seqlens=ends, excluded=(0,))
    assert as_lists(without) == [{5: 2.5, 8: 0.5}, {5: 1}]
    scalar = lexical_weights(hidden, ids, weight, bias[0], cu_seqlens=ends, excluded=(0,))
    assert as_lists(scalar) == as_lists(got)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_lexical_weights_are_not_rounded_to_16_bits(backend, dtype):
    hidden = torch.tensor([[1.0, 2.0**-12]]).to(dtype)
    got = lexical_weights(
        hidden, torch.tensor([3]), torch.ones(2).to(dtype), cu_seqlens=cu_seqlens(0, 1)
    )
    assert as_lists(got) == [{3: 1 + 2.0**-12}]


def test_nan_hidden_states_show(backend):
    hidden = torch.ones(3, 40)
    hidden[1, 33] = NAN
    got = lexical_weights(
        hidden, torch.tensor([4, 5, 6]), torch.ones(40), cu_seqlens=cu_seqlens(0, 3)
    )
    assert got.token_ids.tolist() == [4, 5, 6]
    assert got.weights.isnan().tolist() == [False, True, False]


def flag_embedding_weights(weights, ids, unused) -> dict[str, float]:
    """As `_process_token_weights` of FlagEmbedding defines it, for one text."""
    result = {}
    for weight, token_id in zip(weights, ids, strict=True):
        if token_id not in unused and weight > 0:
            result[str(token_id)] = max(weight, result.get(str(token_id), 0))
    return result


def flag_embedding_score(first: dict, second: dict) -> float:
    return math.fsum(weight * second[key] for key, weight in first.items() if key in second)


def texts(seed, count, vocabulary):
    rng = random.Random(seed)
    for _ in range(count):
        ids = [rng.randrange(vocabulary) for _ in range(rng.choice([1, 5, 40, 90]))]
        yield torch.tensor([rng.gauss(0, 1) for _ in ids]).tolist(), ids


def test_flag_embedding(backend):
    batch = list(texts(0, 20, 60))
    unused = (0, 1, 2, 3)
    expected = [flag_embedding_weights(*text, set(unused)) for text in batch]
    ends = torch.tensor([0, *(len(ids) for _, ids in batch)]).cumsum(0).tolist()
    weights, ids = (list(itertools.chain(*column)) for column in zip(*batch, strict=True))
    csr = scattered(weights, ids, ends, excluded=unused)
    assert csr.dicts() == expected
    queries, documents = csr[:7], csr[7:]
    scores = [[flag_embedding_score(q, d) for d in expected[7:]] for q in expected[:7]]
    got = lexical_scores(queries, documents)
    torch.testing.assert_close(got, torch.tensor(scores), rtol=1e-6, atol=1e-6)
    got = lexical_scores(csr, csr[torch.arange(19, -1, -1)], aligned=True)
    scores = [flag_embedding_score(a, b) for a, b in zip(expected, expected[::-1], strict=True)]
    torch.testing.assert_close(got, torch.tensor(scores), rtol=1e-6, atol=1e-6)

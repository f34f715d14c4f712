"""Token weights and scores of sparse vectors: values worked out by hand, and NaN."""

import pytest
import torch

from embedfuse import testing
from embedfuse.ops import Csr, lexical_scores
from embedfuse.ops.lexical.scores import OP as SCORES
from embedfuse.ops.lexical.weights import token_weights

NAN = float("nan")


def csr_of(*rows: dict) -> Csr:
    ids = [token_id for row in rows for token_id in row]
    weights = [weight for row in rows for weight in row.values()]
    indptr = torch.tensor([0, *map(len, rows)]).cumsum(0)
    return Csr(indptr, torch.tensor(ids, dtype=torch.int64), torch.tensor(weights))


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_token_weights(backend, dtype):
    hidden = torch.tensor([[1.0, 0.0], [3.0, 1.0], [0.0, 4.0], [1, 2.0**-7], [NAN, 1]]).to(dtype)
    weight, bias = torch.tensor([1.0, -0.5]).to(dtype), torch.tensor([0.25]).to(dtype)
    # Not rounded to 16 bits.
    wanted = torch.tensor([1.25, 2.75, 0, 1.25 - 2.0**-8, NAN])
    got = token_weights(hidden, weight, bias)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
    got = token_weights(hidden, weight)
    wanted = torch.tensor([1, 2.5, 0, 1 - 2.0**-8, NAN])
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


QUERIES = ({3: 1.0, 5: 2.0}, {}, {4: 0.5, 5: 1.0, 90: 4.0})
DOCUMENTS = ({5: 3.0, 7: 1.0}, {3: 10.0, 4: 2.0, 90: 0.25}, {})
SCORED = [[6, 10, 0], [0, 0, 0], [3, 2, 0]]


def test_scores(backend):
    queries, documents = csr_of(*QUERIES), csr_of(*DOCUMENTS)
    assert lexical_scores(queries, documents).tolist() == SCORED
    assert lexical_scores(queries, documents, aligned=True).tolist() == [6, 0, 0]
    for rows in ([0], [2]):
        assert lexical_scores(queries[rows], documents).tolist() == [SCORED[rows[0]]]
        expected = [[row[rows[0]]] for row in SCORED]
        assert lexical_scores(queries, documents[rows]).tolist() == expected
    assert lexical_scores(queries[[]], documents).shape == (0, 3)
    assert lexical_scores(queries, documents[[]]).shape == (3, 0)
    assert lexical_scores(queries[[]], documents[[]], aligned=True).shape == (0,)


@pytest.mark.parametrize("aligned", [False, True])
def test_nan_scores_only_where_it_is_shared(backend, aligned):
    queries = csr_of({1: 1.0, 4: NAN}, {1: 1.0, 4: NAN}, {2: 1.0})
    documents = csr_of({1: 2.0, 3: NAN}, {4: 5.0}, {2: NAN})
    got = lexical_scores(queries, documents, aligned=aligned)
    expected = [[2, NAN, 0], [2, NAN, 0], [0, 0, NAN]]
    expected = torch.tensor([2, NAN, NAN] if aligned else expected)
    torch.testing.assert_close(got, expected, equal_nan=True)


def random_csr(lengths, vocabulary, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(vocabulary, generator=generator)[:n].sort().values for n in lengths]
    ids = torch.cat(rows)
    weights = torch.rand(len(ids), generator=generator)
    return weights, ids, torch.tensor([0, *lengths]).cumsum(0)


# One query and many documents, and many queries: which of them threads share.
@pytest.mark.parametrize(("queries", "documents"), [(1, 400), (40, 30)])
def test_scores_large_enough_for_threads(cpp, queries, documents, restore_threads):
    args = (*random_csr([90] * queries, 3000, 0), *random_csr([300] * documents, 3000, 1), False)
    testing.assert_close_to_reference(SCORES, args, cpp)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(SCORES(*args))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])

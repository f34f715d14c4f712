"""Scores of a patched BGEM3FlagModel."""

import numpy as np
import pytest

import embedfuse
from tests.integrations.flag import TEXTS
from tests.integrations.flag_m3 import load

pytest.importorskip("FlagEmbedding")
from FlagEmbedding.inference.embedder.encoder_only.m3 import M3Embedder

KEYS = ["colbert", "sparse", "dense", "sparse+dense", "colbert+sparse+dense"]
PAIRS = [(TEXTS[i % 5], text) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def pair(m3_folder):
    original, model = load(m3_folder), load(m3_folder)
    embedfuse.patch(model)
    return original, model


@pytest.fixture(scope="module")
def lexical(pair):
    flags = {"return_dense": False, "return_sparse": True}
    return [model.encode(TEXTS, **flags)["lexical_weights"] for model in pair]


def assert_same(found: dict[str, list[float]], expected: dict[str, list[float]]) -> None:
    assert list(found) == list(expected) == KEYS
    for name, column in expected.items():
        assert type(found[name]) is type(column)
        assert found[name] == pytest.approx(column, abs=1e-4), name


@pytest.mark.parametrize("weights", [None, [0.4, 0.2, 0.4], [1, 0, 3]], ids=str)
def test_compute_score(pair, weights):
    # One pair at a time: in a batch FlagEmbedding counts a padded passage token as similarity 0.
    call = {"batch_size": 1, "weights_for_different_modes": weights}
    expected = pair[0].compute_score(PAIRS, **call)
    assert_same(pair[1].compute_score(PAIRS, **call), expected)
    assert_same(pair[1].compute_score(PAIRS, weights_for_different_modes=weights), expected)


@pytest.mark.parametrize("as_type", [tuple, list])
def test_one_pair(pair, as_type):
    expected, found = (model.compute_score(as_type(PAIRS[1])) for model in pair)
    assert_same(found, expected)
    assert {type(x) for x in found.values()} == {float}


def test_more_than_two_columns_are_passed_over(pair):
    rows = [(*PAIRS[1], "label")]
    expected, found = (model.compute_score(rows) for model in pair)
    assert_same(found, expected)


def test_lengths(pair):
    call = {"max_query_length": 4, "max_passage_length": 9, "batch_size": 1}
    expected, found = (model.compute_score(PAIRS[:9], **call) for model in pair)
    assert_same(found, expected)


def test_no_pairs(pair):
    assert [model.compute_score([]) for model in pair] == [[], []]


def test_wrong_weights(pair):
    with pytest.raises(ValueError, match="weights_for_different_modes: 2 of them; accepted are 3"):
        pair[1].compute_score(PAIRS[:2], weights_for_different_modes=[1, 2])


def test_lexical_score_of_lists(pair, lexical):
    original, model = pair
    expected = original.compute_lexical_matching_score(lexical[0], lexical[0][:9])
    found = model.compute_lexical_matching_score(lexical[1], lexical[1][:9])
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert found.max() > 1
    full = [i for i, row in enumerate(lexical[0]) if len(row) > 20][:5]
    rows = [lexical[0][i] for i in full]
    found, expected = (m.compute_lexical_matching_score(rows, rows) for m in (model, original))
    assert found.dtype == expected.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_lexical_score_of_dicts(pair, lexical):
    expected, found = (m.compute_lexical_matching_score(*lexical[0][:2]) for m in pair)
    assert type(found) is type(expected)
    assert found == expected


def test_lexical_score_by_token_strings(pair, lexical):
    rows = lexical[0][:8]
    original, model = (m.convert_id_to_token(rows) for m in pair)
    assert original == model
    assert not set(original[0]) & set(rows[0])
    expected, found = (m.compute_lexical_matching_score(original, original) for m in pair)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert pair[1].convert_id_to_token(rows[0]) == original[0]


@pytest.mark.parametrize(
    ("queries", "passages"),
    [
        ([{"a": np.float32(1)}], [{"b": np.float32(1)}]),
        ([{"a": np.float32(2)}, {}], [{"a": np.float32(3)}]),
        ([{}], [{}]),
        ([], [{"a": np.float32(1)}]),
        ([{"a": 2.0, 7: 1.5}], [{"a": 3.0, 7: 2.0}]),
        ([{"a": np.float32(2)}], [{"a": 3}]),
    ],
)
def test_lexical_score_of_odd_lists(pair, queries, passages):
    expected, found = (m.compute_lexical_matching_score(queries, passages) for m in pair)
    assert np.array_equal(found, expected)
    assert found.shape == expected.shape


def test_lexical_score_of_a_dict_and_a_list(pair, lexical):
    for model in pair:
        with pytest.raises(ValueError, match="format of lexical_weights is not correct"):
            model.compute_lexical_matching_score(lexical[0], lexical[0][0])


def test_colbert_score_of_encoded_texts(pair):
    flags = {"return_dense": False, "return_colbert_vecs": True}
    sides = [model.encode(TEXTS[:2], **flags)["colbert_vecs"] for model in pair]
    expected, found = (m.colbert_score(*arrays) for m, arrays in zip(pair, sides, strict=True))
    assert found.item() == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-3), ("float32", 1e-5)])
def test_colbert_score(pair, dtype, tolerance, monkeypatch):
    generator = np.random.default_rng(0)
    # All similarities are negative, so that a zero vector among them shows.
    q, p = (generator.random((rows, 40)) + 0.1 for rows in (5, 33))
    q, p = (q / np.linalg.norm(q, axis=1)[:, None]).astype(dtype), (-p / 4).astype(dtype)
    exact = (q.astype(float) @ p.astype(float).T).max(1).mean()
    expected = pair[0].colbert_score(q, p)
    monkeypatch.setattr(M3Embedder, "colbert_score", None)
    found = pair[1].colbert_score(q, p)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.item() == pytest.approx(exact, abs=tolerance)
    assert expected.item() == pytest.approx(exact, abs=tolerance)


def test_colbert_score_of_nothing(pair):
    q, p = np.zeros((0, 8), np.float32), np.ones((2, 8), np.float32)
    assert [model.colbert_score(q, p).isnan().item() for model in pair] == [True, True]
    for model in pair:
        with pytest.raises(IndexError):
            model.colbert_score(p, q)

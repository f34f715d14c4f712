"""Embedder's scores of text pairs against their formulas."""

import numpy as np
import pytest
import torch

from embedfuse.ops import Csr
from embedfuse.pipeline import pipeline

WEIGHTS = (0.4, 0.2, 0.7)


@pytest.fixture(scope="module")
def pairs(texts):
    passages = [*texts[10:20], "", texts[11]]
    return [(texts[i % 4], passage) for i, passage in enumerate(passages)] + [("", texts[2])]


def by_formula(reference, pairs) -> dict[str, list[float]]:
    columns = {"colbert": [], "sparse": [], "dense": []}
    for pair in pairs:
        q, p = (reference([text]) for text in pair)
        columns["dense"].append((q["dense"] @ p["dense"].T).item())
        columns["sparse"].append((q["sparse"] @ p["sparse"].T).item())
        best = [max((row @ other).item() for other in p["multi"]) for row in q["multi"]]
        columns["colbert"].append(sum(best) / len(best))
    return columns


def test_scores(embedder, plain, pairs):
    found = embedder.compute_score(pairs, WEIGHTS)
    expected = by_formula(plain, pairs)
    assert list(found) == ["colbert", "sparse", "dense", "sparse+dense", "colbert+sparse+dense"]
    for name, column in expected.items():
        assert found[name] == pytest.approx(column, abs=1e-5), name
    rows = zip(expected["dense"], expected["sparse"], expected["colbert"], strict=True)
    for row, (dense, sparse, colbert) in enumerate(rows):
        two = (0.4 * dense + 0.2 * sparse) / 0.6
        three = (0.4 * dense + 0.2 * sparse + 0.7 * colbert) / 1.3
        assert found["sparse+dense"][row] == pytest.approx(two, abs=1e-5)
        assert found["colbert+sparse+dense"][row] == pytest.approx(three, abs=1e-5)


def test_default_weights_are_equal(embedder, pairs):
    found = embedder.compute_score(pairs[:2])
    columns = np.array([found[name] for name in ("dense", "sparse", "colbert")])
    assert found["colbert+sparse+dense"] == pytest.approx(columns.mean(0).tolist(), abs=1e-6)
    assert found["sparse+dense"] == pytest.approx(columns[:2].mean(0).tolist(), abs=1e-6)


def test_order_across_windows(embedder, pairs, monkeypatch):
    expected = embedder.compute_score(pairs)
    monkeypatch.setattr(pipeline, "WINDOW_TEXTS", 3)
    monkeypatch.setattr(embedder._pipeline.budget, "tokens", 50)
    for name, column in embedder.compute_score(pairs).items():
        assert column == pytest.approx(expected[name], abs=2e-6), name


def test_repeated_texts_are_embedded_once(embedder, texts, monkeypatch):
    embedded = []
    run = embedder._pipeline.run

    def spy(sequences, *args, **kwargs):
        embedded.append(len(sequences))
        return run(sequences, *args, **kwargs)

    monkeypatch.setattr(embedder._pipeline, "run", spy)
    found = embedder.compute_score([(texts[0], text) for text in texts[:6] + texts[:6]])
    assert embedded == [1, 6]
    assert found["dense"][:6] == found["dense"][6:]
    assert found["dense"][0] == pytest.approx(1, abs=1e-6)


def test_no_pairs(embedder):
    keys = ["colbert", "sparse", "dense", "sparse+dense", "colbert+sparse+dense"]
    assert embedder.compute_score([]) == {key: [] for key in keys}


@pytest.mark.parametrize("weights", [(), (1.0,), (1, 1, 1, 1)])
def test_wrong_weights(embedder, weights):
    message = f"weights: {len(weights)} of them; accepted are 3"
    with pytest.raises(ValueError, match=message):
        embedder.compute_score([("a", "b")], weights)


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        (("a query", "a passage"), TypeError, r"pairs\[0\]: 'a query'; accepted is \(query, pa"),
        ([("a", "b"), ("a", "b", "c")], TypeError, r"pairs\[1\]: \('a', 'b', 'c'\); accepted"),
        ([("a", "b"), ("a",)], TypeError, r"pairs\[1\]: \('a',\); accepted"),
        ([("a", "b"), 7], TypeError, r"pairs\[1\]: 7; accepted"),
        ([("a", "b"), ("a", None)], TypeError, r"passages\[1\]: NoneType; accepted is str"),
        ([("a\ud800", "b")], ValueError, r"queries\[0\]: lone surrogate"),
    ],
)
def test_bad_pairs(embedder, pairs, error, message):
    with pytest.raises(error, match=message):
        embedder.compute_score(pairs)


def test_bad_text_in_a_later_window(embedder, monkeypatch):
    monkeypatch.setattr(pipeline, "WINDOW_TEXTS", 2)
    with pytest.raises(ValueError, match=r"passages\[5\]: lone surrogate"):
        embedder.compute_score([("a", "b")] * 5 + [("a", "\udfff")])


def test_lexical_matching_score(embedder):
    def csr(*rows):
        indptr = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
        ids = torch.tensor([i for row in rows for i in row])
        return Csr(indptr, ids, torch.tensor([w for row in rows for w in row.values()]))

    queries = csr({5: 0.5, 9: 2.0}, {7: 1.0})
    passages = csr({5: 0.25}, {9: 0.5, 11: 3.0}, {5: 1.0, 9: 1.0})
    found = embedder.lexical_matching_score(queries, passages)
    assert found.tolist() == [[0.125, 1.0, 2.5], [0.0, 0.0, 0.0]]


def test_lexical_matching_score_is_that_of_compute_score(embedder, pairs):
    queries, passages = ([pair[side] for pair in pairs] for side in (0, 1))
    q, p = (embedder.encode(x, ("sparse",)).sparse for x in (queries, passages))
    diagonal = np.diagonal(embedder.lexical_matching_score(q, p))
    assert diagonal.tolist() == pytest.approx(embedder.compute_score(pairs)["sparse"], abs=1e-6)


def test_colbert_score(embedder):
    query = np.array([[1.0, 0.0], [0.0, 1.0]], dtype=np.float32)
    passage = np.array([[0.5, 0.0], [0.0, 0.25], [-1.0, -1.0]], dtype=np.float32)
    assert embedder.colbert_score(query, passage) == 0.375
    assert embedder.colbert_score(query[:1], -passage[:2]) == 0
    assert embedder.colbert_score(query.astype(np.float16), passage.astype(np.float16)) == 0.375

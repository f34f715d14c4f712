"""What the tests of BGEM3FlagModel share: loading one, and comparisons of its outputs."""

from collections import defaultdict

import numpy as np
import pytest

ALL = {"return_dense": True, "return_sparse": True, "return_colbert_vecs": True}
KEYS = ["dense_vecs", "lexical_weights", "colbert_vecs"]


def load(folder: str, **kwargs):
    library = pytest.importorskip("FlagEmbedding")
    return library.BGEM3FlagModel(folder, use_fp16=False, devices="cpu", **kwargs)


def assert_same(found: dict, expected: dict) -> None:
    assert list(found) == list(expected) == KEYS
    for name in KEYS:
        assert (found[name] is None) == (expected[name] is None), name
        assert type(found[name]) is type(expected[name]), name
    if expected["dense_vecs"] is not None:
        assert_same_rows(found["dense_vecs"], expected["dense_vecs"])
    if expected["lexical_weights"] is not None:
        rows = zip(found["lexical_weights"], expected["lexical_weights"], strict=True)
        for row, wanted in rows:
            assert_same_weights(row, wanted)
    if expected["colbert_vecs"] is not None:
        for array, wanted in zip(found["colbert_vecs"], expected["colbert_vecs"], strict=True):
            assert_same_array(array, wanted)


def assert_same_array(found: np.ndarray, expected: np.ndarray) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def assert_same_rows(found: np.ndarray, expected: np.ndarray) -> None:
    assert_same_array(found, expected)
    product = (found.astype(np.float64) * expected).sum(-1)
    lengths = np.linalg.norm(found, axis=-1) * np.linalg.norm(expected, axis=-1)
    assert (product / lengths).min() >= 0.99999


def assert_same_weights(found: dict, expected: dict) -> None:
    assert type(found) is type(expected) is defaultdict
    assert found.default_factory is expected.default_factory is int
    assert {type(w) for w in found.values()} == {type(w) for w in expected.values()}
    assert list(found) == list(expected)
    for token, weight in expected.items():
        assert found[token] == pytest.approx(weight, abs=1e-4), token

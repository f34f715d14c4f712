"""A patched SentenceTransformer loaded from BGE-M3's folder: same vectors, pruned last layer."""

import numpy as np
import pytest

import embedfuse
from embedfuse import Embedder
from tests.integrations.flag import TEXTS, counted

st = pytest.importorskip("sentence_transformers")


@pytest.fixture
def model(m3_folder):
    return st.SentenceTransformer(m3_folder, device="cpu")


def test_vectors(model, m3_folder, tmp_path):
    expected = model.encode(TEXTS)
    report = embedfuse.patch(model)
    assert "cls pooling and normalisation in one kernel" in report.fused
    np.testing.assert_allclose(model.encode(TEXTS), expected, rtol=0, atol=1e-5)
    assert not report.original_calls
    model.save(str(tmp_path))  # with the names that sentence-transformers 6 has for its settings
    for folder in (m3_folder, str(tmp_path)):
        found = Embedder(folder, device="cpu").encode(TEXTS).dense
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    embedfuse.unpatch(model)
    assert np.array_equal(model.encode(TEXTS), expected)


def test_the_last_layer_is_pruned(model, monkeypatch):
    embedfuse.patch(model)
    inner = model[0].model
    rows = []
    run = type(inner).run_layers

    def spy(self, batch, wanted):
        rows.append((batch.packed.cu_seqlens[:-1].tolist(), wanted.tolist()))
        return run(self, batch, wanted)

    monkeypatch.setattr(type(inner), "run_layers", spy)
    model.encode(TEXTS[:5])
    (starts, wanted), *more = rows
    assert not more
    assert wanted == starts
    assert len(wanted) == 5


def test_long_texts_are_cut_at_max_seq_length(model):
    assert model.max_seq_length == 8192
    model.max_seq_length = 12
    expected = model.encode(TEXTS)
    embedfuse.patch(model)
    with counted(model[0].model) as tokens:
        np.testing.assert_allclose(model.encode(TEXTS), expected, rtol=0, atol=1e-5)
    assert sum(tokens) <= 12 * len(TEXTS)

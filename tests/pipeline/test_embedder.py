"""Embedder's three outputs against their definition on transformers' padded forward."""

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

import embedfuse
from embedfuse import Embedder
from embedfuse.pipeline.embeddings import Embeddings
from tests.pipeline.reference import Reference, assert_close, tensors

ALL = ("dense", "sparse", "multi")
VOCABULARY = 2000


def test_all_outputs(embedder, plain, exact, texts):
    found = embedder.encode(texts, ALL)
    assert len(found) == len(texts)
    assert (found.dense.dtype, found.sparse.weights.dtype) == (np.float32, torch.float32)
    assert {x.dtype for x in found.multi} == {np.dtype("float32")}
    lengths = [len(ids) for ids in plain.states(texts)[0]]
    assert [len(x) for x in found.multi] == [n - 1 for n in lengths]
    assert_close(tensors(found, VOCABULARY), plain(texts), exact(texts))
    assert not embedder.report.original_calls


def test_the_texts_are_told_apart(embedder, texts):
    # Otherwise a wrong order would pass every other test.
    dense = embedder.encode(texts).dense
    similar = dense @ dense.T - 2 * np.eye(len(texts))
    similar[texts.index(""), texts.index(" ")] = similar[texts.index(" "), texts.index("")] = 0
    assert similar.max() < 0.9999


@pytest.mark.parametrize(
    "outputs", [c for n in (1, 2) for c in itertools.combinations(ALL, n)], ids="+".join
)
def test_some_outputs_are_those_of_all(embedder, texts, outputs):
    everything = tensors(embedder.encode(texts, ALL), VOCABULARY)
    found = tensors(embedder.encode(texts, outputs), VOCABULARY)
    assert found.keys() == set(outputs)
    for name in outputs:
        torch.testing.assert_close(found[name], everything[name], rtol=0, atol=2e-6)


def test_dense_alone_prunes_the_last_layer(embedder, texts, monkeypatch):
    poolings = []
    states = type(embedder.model).sequence_states

    def spy(self, input_ids, packed, pooling=None):
        poolings.append(pooling)
        return states(self, input_ids, packed, pooling)

    monkeypatch.setattr(type(embedder.model), "sequence_states", spy)
    embedder.encode(texts[:3])
    embedder.encode(texts[:3], ["dense"])
    embedder.encode(texts[:3], ("dense", "sparse"))
    assert poolings == ["cls", "cls", None]


def test_long_documents(embedder, plain, texts):
    everything = " ".join(texts)
    long = (everything + " ") * (60_000 // len(everything) + 1)
    found = embedder.encode([texts[0], long, texts[1]], ALL)
    assert len(found.multi[1]) == 8191
    row = tensors(Embeddings(found.dense[1:2], found.sparse[1:2], found.multi[1:2]), VOCABULARY)
    # Alone, because the padded forward of all three takes gigabytes.
    for name, expected in plain([long]).items():
        torch.testing.assert_close(row[name], expected, rtol=0, atol=1e-5)


def test_max_length(m3_folder, plain, exact, texts):
    found = Embedder(m3_folder, max_length=9).encode(texts, ALL)
    assert max(len(x) for x in found.multi) == 8
    assert_close(tensors(found, VOCABULARY), plain(texts, 9), exact(texts, 9))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits(m3_folder, exact, texts, dtype):
    texts = texts[::3]
    embedder = Embedder(m3_folder, dtype=dtype, device="cpu")
    assert embedder.model.dtype == getattr(torch, dtype)
    own = Reference(m3_folder, getattr(torch, dtype))(texts)
    for outputs in (ALL, ("dense",)):
        found = embedder.encode(texts, outputs)
        assert found.dense.dtype == np.float32
        assert_close(tensors(found, VOCABULARY), own, exact(texts))


def test_dimensions(m3_folder, embedder, texts):
    found = Embedder(m3_folder, device="cpu", dimensions=10).encode(texts, ("dense", "multi"))
    whole = embedder.encode(texts, ("dense", "multi"))
    for got, rows in ((found.dense, whole.dense), (found.multi[3], whole.multi[3])):
        rows = rows[:, :10] / np.linalg.norm(rows[:, :10], axis=1, keepdims=True)
        np.testing.assert_allclose(got, rows, rtol=0, atol=2e-6)
    for wrong in (0, 65):
        with pytest.raises(ValueError, match=f"dimensions={wrong}: accepted is 1 to 64"):
            Embedder(m3_folder, device="cpu", dimensions=wrong)


def test_tokens_are_counted(embedder, plain, texts):
    count = sum(map(len, plain.states(texts)[0]))
    assert embedder.encode(texts, ALL).tokens == count
    assert embedder.encode(texts, ("sparse",)).tokens == count
    assert embedder.encode([]).tokens == 0


def test_options_are_looked_at_before_the_weights():
    for wrong in ({"reuse_prefixes": True}, {"dtype": "int8"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*: accepted are"):
            Embedder("no such folder", **wrong)


def test_array_dtype(embedder, texts):
    full = embedder.encode(texts, ALL)
    half = embedder.encode(texts, ALL, array_dtype="float16")
    assert half.dense.dtype == np.float16
    assert np.array_equal(half.dense, full.dense.astype(np.float16))
    for a, b in zip(half.multi, full.multi, strict=True):
        assert a.dtype == np.float16
        assert np.array_equal(a, b.astype(np.float16))
    assert torch.equal(half.sparse.weights, full.sparse.weights)


def test_arrays_are_the_callers_own(embedder, texts):
    found = embedder.encode(texts, ALL)
    for array in found.multi:
        assert array.base is None  # not a view into the batch, which would keep all of it alive
        assert array.flags.writeable
        assert array.nbytes == 4 * len(array) * 64
    before = copy.deepcopy(found.dense)
    embedder.encode(texts[::-1], ALL)
    assert np.array_equal(found.dense, before)
    found.dense[:] = 0  # writable


def test_lexical_weights_as_dicts(embedder, plain, texts):
    rows = embedder.encode(texts, ("sparse",)).sparse.dicts()
    expected = plain(texts)["sparse"]
    for row, weights in zip(rows, expected, strict=True):
        assert {int(token) for token in row} == set(weights.nonzero()[:, 0].tolist())
        assert all(row[str(i)] == pytest.approx(weights[i].item(), abs=1e-5) for i in map(int, row))
    assert max(map(len, rows)) > 50
    assert rows[texts.index("")] == {}


def test_texts_may_be_any_iterable(embedder, texts):
    texts = texts[:5]
    expected = embedder.encode(texts).dense
    for given in (tuple(texts), iter(texts), np.array(texts, dtype=object), dict.fromkeys(texts)):
        assert np.array_equal(embedder.encode(given).dense, expected)


def test_model_is_patched_and_reported(embedder, m3_folder):
    assert embedder.report is embedfuse.report(embedder.model)
    assert "3 layers without padding" in embedder.report.fused
    assert embedder.tokenizer.model_max_length == embedder.max_length == 8192
    assert not embedder.model.training
    assert not any(p.requires_grad for p in embedder.model.parameters())


def test_a_model_that_the_packed_forward_refuses_gives_the_same(m3_folder, embedder, texts):
    hooked = Embedder(m3_folder, device="cpu")
    hooked.model.encoder.layer[1].register_forward_hook(lambda *args: None)
    found = tensors(hooked.encode(texts, ALL), VOCABULARY)
    for name, expected in tensors(embedder.encode(texts, ALL), VOCABULARY).items():
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-5)
    assert sum(hooked.report.original_calls.values()) > 0


def test_model_may_be_a_path(m3_folder):
    texts = ["a text"]
    found, expected = (Embedder(name).encode(texts).dense for name in (Path(m3_folder), m3_folder))
    np.testing.assert_array_equal(found, expected)

"""What fits one batch: no thread, no bar, no gather; the values of any other call."""

import concurrent.futures
import threading

import numpy as np
import pytest
import torch

from embedfuse import embedder as embedder_module
from embedfuse.pipeline import batches, pipeline
from embedfuse.pipeline.embeddings import Embeddings, Vectors
from embedfuse.transfers import to_device
from tests.pipeline.reference import tensors

ALL = ("dense", "sparse", "multi")
TEXTS = ["a query", "Return a list of the words in the string.", "x"]


def refuse(*args, **kwargs):
    raise AssertionError("made for a short call")


@pytest.fixture
def nothing_started(monkeypatch):
    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setattr(concurrent.futures.ThreadPoolExecutor, "__init__", refuse)
    monkeypatch.setattr(batches, "ThreadPoolExecutor", refuse)
    monkeypatch.setattr(embedder_module, "tqdm", refuse)
    monkeypatch.setattr(torch.Tensor, "argsort", refuse)


@pytest.mark.parametrize(
    "texts", [TEXTS[:1], TEXTS[1::-1], []], ids=["one", "longest first", "none"]
)
def test_a_short_call_starts_nothing(embedder, texts, monkeypatch, request):
    monkeypatch.setattr(pipeline, "WINDOW_TEXTS", 1)
    parts = list(embedder.iter_encode(texts, ALL))  # a window for each: with threads
    monkeypatch.undo()
    request.getfixturevalue("nothing_started")
    found = embedder.encode(texts, ALL)
    assert len(found) == len(texts)
    if texts:
        expected = tensors(Embeddings.cat(parts), 2000)
        for name, value in tensors(found, 2000).items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-6)


def test_results_have_memory_of_their_own(embedder):
    found = embedder.encode(TEXTS[:1], ALL)
    for array in (found.dense, *found.multi):
        assert array.flags.owndata
        assert array.flags.writeable


def test_several_texts_of_one_batch_come_in_order(embedder):
    found = embedder.encode(TEXTS, ALL)
    for i, text in enumerate(TEXTS):
        one = embedder.encode([text], ALL)
        np.testing.assert_allclose(found.dense[i], one.dense[0], rtol=0, atol=2e-6)
        np.testing.assert_allclose(found.multi[i], one.multi[0], rtol=0, atol=2e-6)
        assert found.sparse.dicts()[i].keys() == one.sparse.dicts()[0].keys()
    assert found.tokens == sum(embedder.encode([text]).tokens for text in TEXTS)


def test_one_part_is_not_joined():
    rows = Vectors(torch.tensor([[1.0], [2.0]]), tokens=5)
    assert Vectors.collect([([0, 1], rows)]) is rows
    assert Vectors.collect([([1, 0], rows)]).dense.tolist() == [[2.0], [1.0]]
    part = Embeddings(np.zeros((1, 2)), None, None)
    assert Embeddings.cat([part]) is part
    assert len(Embeddings.cat([part, part])) == 2


def test_host_tensors_need_no_copy_for_the_cpu():
    tensors = torch.ones(2), torch.zeros(3)
    assert to_device(torch.device("cpu"), *tensors) == tensors


def test_the_device_is_the_models(embedder):
    assert embedder._pipeline.device == embedder.model.device

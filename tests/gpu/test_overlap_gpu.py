"""The pipeline on a GPU: its forward waits for nothing, results travel meanwhile, nothing is left behind."""

import functools
import gc

import numpy as np
import pytest
import torch

from embedfuse import Embedder
from embedfuse.cli.corpus import stdlib_docstrings
from embedfuse.pipeline import pipeline
from embedfuse.pipeline.embeddings import OUTPUTS
from embedfuse.transfers import ToHost, to_device
from tests.pipeline.families import make, write_sentence_transformers
from tests.pipeline.reference import tensors

# Reading the corpus takes seconds, so of several processes one does it.
pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("overlap")]


@functools.cache
def corpus() -> list[str]:
    return ["", "x", "日本語のテキスト", *stdlib_docstrings(60)]


INSTRUCTION = "Instruct: find the docstring that answers the question. Query: "


@pytest.fixture
def no_waits(monkeypatch):
    """Any wait inside a forward raises, from the second call on: the first one loads kernels."""
    forward, calls = pipeline.EmbeddingPipeline._forward, []

    def watched(self, *args):
        calls.append(len(args[0]))
        torch.cuda.set_sync_debug_mode("error" if len(calls) > 1 else "default")
        try:
            return forward(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(pipeline.EmbeddingPipeline, "_forward", watched)
    return calls


@pytest.mark.parametrize("outputs", [("dense",), OUTPUTS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_encoder(m3_folder, no_waits, monkeypatch, dtype, outputs):
    embedder = Embedder(m3_folder, dtype=dtype, device="cuda")
    expected = tensors(embedder.encode(corpus(), outputs), 2000)
    monkeypatch.setattr(pipeline, "WINDOW_TEXTS", 8)
    monkeypatch.setattr(embedder._pipeline.budget, "tokens", 300)
    no_waits.clear()
    found = embedder.encode(corpus(), outputs)
    assert len(no_waits) > 16  # windows of several batches
    bound = {"rtol": 0, "atol": 1e-5 if dtype == "float32" else 0.05}
    for name, value in tensors(found, 2000).items():
        torch.testing.assert_close(value, expected[name], **bound)


@pytest.mark.parametrize("kind", ["mistral", "llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("reuse", ["off", "stream"])
def test_a_decoder(tmp_path, no_waits, monkeypatch, kind, reuse):
    write_sentence_transformers(make(tmp_path, kind), "lasttoken")
    texts = [INSTRUCTION + text for text in corpus()]
    expected = Embedder(str(tmp_path), device="cpu").encode(texts).dense
    monkeypatch.setattr(pipeline, "WINDOW_TEXTS", 8)
    found = Embedder(str(tmp_path), device="cuda", reuse_prefixes=reuse).encode(texts).dense
    assert len(no_waits) > 4
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_copies_in_both_directions():
    device = torch.device("cuda", torch.cuda.current_device())
    to_host = ToHost(device)
    rows = torch.arange(2**20).view(-1, 64)
    waits = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(20):
            on_device, ends = to_device(device, rows + i, torch.tensor([0, i], dtype=torch.int32))
            torch.cuda._sleep(2_000_000)
            waits.append(to_host(on_device * 2, ends, None))
            del on_device, ends  # their memory may go to the next, but not before it was read
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for i, wait in enumerate(waits):
        found, ends, nothing = wait()
        assert torch.equal(found, (rows + i) * 2)
        assert (ends.tolist(), ends.dtype, nothing) == ([0, i], torch.int32, None)
        assert found.is_pinned()


def test_a_copy_waits_for_what_it_copies_and_the_host_does_not():
    device = torch.device("cuda", torch.cuda.current_device())
    values = torch.zeros(1024, device=device)
    ToHost(device)(values)()  # the first pinned memory may be waited for
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    values += 1
    wait = ToHost(device)(values)
    assert not torch.cuda.current_stream().query()  # still asleep, and the host is here
    assert wait()[0].sum() == 1024


def test_memory_that_runs_out_loses_nothing(m3_folder, monkeypatch):
    embedder = Embedder(m3_folder, device="cuda")
    expected = embedder.encode(corpus()).dense
    states = embedder.model.sequence_states

    def forward(input_ids, packed, pooling=None):
        if packed.tokens > max(500, packed.max_seqlen):
            torch.empty(2**50, dtype=torch.uint8, device="cuda")
        return states(input_ids, packed, pooling)

    monkeypatch.setattr(embedder.model, "sequence_states", forward, raising=False)
    found = embedder.encode(corpus()).dense
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert embedder._pipeline.budget.tokens <= 500


def test_an_abandoned_stream_leaves_no_memory(m3_folder, monkeypatch):
    embedder = Embedder(m3_folder, device="cuda")
    monkeypatch.setattr(pipeline, "WINDOW_TEXTS", 8)

    def abandon():
        stream = embedder.iter_encode(corpus(), OUTPUTS)
        next(stream)
        stream.close()
        del stream
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    before = [abandon() for _ in range(3)][-1]  # by then graphs are captured
    assert [abandon() for _ in range(5)] == [before] * 5

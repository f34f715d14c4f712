"""BGE-M3's three outputs on a GPU agree with their definition."""

import functools

import pytest
import torch

import embedfuse
from embedfuse.cli.corpus import stdlib_docstrings
from tests.pipeline.reference import Reference, assert_close, tensors

# Reading the corpus takes seconds, so of several processes one does it.
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.covers("xlm_roberta"),
    pytest.mark.xdist_group("embedder"),
]

OUTPUTS = ("dense", "sparse", "multi")


@functools.cache
def corpus() -> list[str]:
    return ["", "x", "日本語のテキスト", "word " * 300, *stdlib_docstrings(40)]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_outputs(m3_folder, dtype):
    """Error against fp64 at most twice that of transformers' own forward in this dtype on the CPU."""
    exact, own = (Reference(m3_folder, d)(corpus()) for d in (torch.float64, getattr(torch, dtype)))
    embedder = embedfuse.Embedder(m3_folder, dtype=dtype, device="cuda")
    found = embedder.encode(corpus(), OUTPUTS)
    assert_close(tensors(found, embedder.model.config.vocab_size), own, exact)
    assert not embedder.report.original_calls


def test_dense_alone_and_scores(m3_folder):
    gpu, cpu = (embedfuse.Embedder(m3_folder, device=device) for device in ("cuda", "cpu"))
    pruned = torch.from_numpy(gpu.encode(corpus()).dense)
    torch.testing.assert_close(
        pruned, torch.from_numpy(cpu.encode(corpus()).dense), rtol=0, atol=1e-4
    )
    pairs = list(zip(corpus()[4:20], corpus()[20:36], strict=True))
    expected, found = cpu.compute_score(pairs), gpu.compute_score(pairs)
    for name, scores in expected.items():
        assert found[name] == pytest.approx(scores, abs=1e-4), name

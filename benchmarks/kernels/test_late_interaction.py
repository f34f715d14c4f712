"""Scoring functions of sentence-transformers and PyLate compared with those of embedfuse, on the CPU.

Calls of both sides are interleaved; the ratio is that of their medians. A skip names a library that is not
installed.
"""

import statistics
import time

import pytest
import torch
from torch import Tensor

from benchmarks.harness.timing import DEVICE

ROUNDS = 9
DIM = 128
# Queries, their tokens, documents, their tokens.
SHAPES = {"rerank": (1, 32, 1000, 300), "all pairs": (16, 32, 64, 180)}

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="compares CPU paths")


def sentence_transformers() -> tuple:
    peer = pytest.importorskip(
        "sentence_transformers.multi_vector_encoder",
        reason="the peer sentence-transformers (6.0 or later) is not installed",
    )
    from embedfuse.integrations.sentence_transformers import scoring

    return "sentence-transformers maxsim", peer.maxsim, scoring.maxsim


def pylate() -> tuple:
    peer = pytest.importorskip("pylate.scores", reason="the peer PyLate is not installed")
    from embedfuse.integrations import pylate

    return "PyLate colbert_scores", peer.colbert_scores, pylate.colbert_scores


def inputs(shape: str, dtype: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit vectors, and masks that on average leave out a quarter of the documents' tokens."""
    queries, query_tokens, documents, tokens = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(queries, query_tokens, DIM, generator=generator)
    d = torch.randn(documents, tokens, DIM, generator=generator)
    q, d = (torch.nn.functional.normalize(x, dim=-1).to(getattr(torch, dtype)) for x in (q, d))
    lengths = torch.randint(tokens // 2, tokens + 1, (documents, 1), generator=generator)
    return q, d, torch.ones(q.shape[:2]), (torch.arange(tokens) < lengths).float()


def described(shape: str) -> str:
    queries, query_tokens, documents, tokens = SHAPES[shape]
    return f"MaxSim, {queries} x {query_tokens} against {documents:,} x {tokens}, masked"


def compare(benchmark, library: tuple, workload: str, dtype: str, call: tuple, gradient=False):
    peer, *functions = library

    def run(function) -> Tensor:
        if not gradient:
            return function(*call)
        leaves = [x.detach().requires_grad_() for x in call[:2]]
        return torch.autograd.grad(function(*leaves, *call[2:]).sum(), leaves)[1]

    theirs, ours = (run(function).float() for function in functions)
    torch.testing.assert_close(ours, theirs, rtol=3e-2, atol=0.3 if dtype == "bfloat16" else 1e-4)
    seconds = {function: [] for function in functions}
    for _ in range(ROUNDS):
        for function in functions:
            start = time.perf_counter()
            run(function)
            seconds[function].append(time.perf_counter() - start)
    medians = [statistics.median(seconds[function]) for function in functions]
    benchmark.extra_info.update(
        peer=peer,
        workload=f"{workload}{' with gradients' if gradient else ''}, d = {DIM}",
        dtype=dtype,
        peer_dtype=dtype,
        peer_seconds=medians[0],
        seconds=medians[1],
        speedup=medians[0] / medians[1],
    )
    benchmark.pedantic(lambda: None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("library", [sentence_transformers, pylate])
def test_masked_tensors(library, shape, dtype, benchmark):
    compare(benchmark, library(), described(shape), dtype, inputs(shape, dtype))


@pytest.mark.parametrize("library", [sentence_transformers, pylate])
def test_gradients(library, benchmark):
    """In fp32 only: rounded to bf16, the products that the libraries take the maximum of are often equal."""
    call = inputs("all pairs", "float32")
    compare(benchmark, library(), described("all pairs"), "float32", call, gradient=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lists(dtype, benchmark):
    q, d, _, mask = inputs("rerank", dtype)
    documents = [x[kept.bool()] for x, kept in zip(d, mask, strict=True)]
    workload = "MaxSim, 1 x 32 against a list of 1,000 x 150 to 300"
    compare(benchmark, sentence_transformers(), workload, dtype, ([q[0]], documents))

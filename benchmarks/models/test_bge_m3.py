"""BGE-M3 at full size with random weights, compared with sentence-transformers and FlagEmbedding.

All load the same folder. Calls of peer and embedfuse on the same texts (docstrings, cut to 512 tokens) are
interleaved; the ratio is that of their medians. FlagEmbedding runs with its defaults, on a CPU in fp32. A
full run takes a quarter of an hour on two cores; `--bge-m3 FOLDER` uses a checkpoint that
`python -m benchmarks checkpoints` wrote before.
"""

import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import pytest
import torch

import embedfuse
from benchmarks.harness.timing import DEVICE
from benchmarks.models.checkpoints import make_bge_m3
from benchmarks.models.workloads import BULK_TEXTS, LONGEST
from embedfuse.cli.corpus import stdlib_docstrings

ALL = ("dense", "sparse", "multi")
LENGTH, TEXTS = LONGEST, BULK_TEXTS["cpu"]["BGE-M3"]
QUERY = "open a file and read it"
LOWEST_COSINE = {"float32": 0.99999, "bfloat16": 0.99}

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="compares CPU paths")


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory) -> str:
    given = request.config.getoption("--bge-m3")
    return given or str(make_bge_m3(tmp_path_factory.mktemp("bge-m3")))


@pytest.fixture(autouse=True)
def sizes(folder, benchmark) -> None:
    config = embedder(folder, "float32").model.config
    benchmark.extra_info["sizes"] = f"BGE-M3, {config.num_hidden_layers} x {config.hidden_size}"


@functools.cache
def sentence_transformer(folder: str, dtype: str):
    library = pytest.importorskip("sentence_transformers")
    model = library.SentenceTransformer(
        folder, device="cpu", model_kwargs={"dtype": getattr(torch, dtype)}
    )
    model.max_seq_length = LENGTH
    return model


@functools.cache
def flag_model(folder: str):
    library = pytest.importorskip("FlagEmbedding")
    return library.BGEM3FlagModel(folder, devices="cpu", use_fp16=False)


@functools.cache
def embedder(folder: str, dtype: str) -> embedfuse.Embedder:
    return embedfuse.Embedder(folder, dtype=dtype, device="cpu", max_length=LENGTH)


def calls_of(workload: str) -> list[list[str]]:
    texts = stdlib_docstrings(32 + TEXTS)
    return {
        "requests of 32 texts": [texts[:32], texts[32:64], texts[64:96]],
        "512 texts in bulk": [texts[32:]],
        "one query": [[QUERY]] * 10,
    }[workload]


def compare(benchmark, theirs: Callable, ours: Callable, calls: list, **info) -> tuple[list, list]:
    """Each call by the peer and by embedfuse, interleaved; returns the results of both."""
    seconds = {theirs: [], ours: []}
    results = {theirs: [], ours: []}
    for call in calls:
        for run in (theirs, ours):
            start = time.perf_counter()
            results[run].append(run(call))
            seconds[run].append(time.perf_counter() - start)
    medians = [statistics.median(seconds[run]) for run in (theirs, ours)]
    benchmark.extra_info.update(
        peer_seconds=medians[0], seconds=medians[1], speedup=medians[0] / medians[1], **info
    )
    benchmark.pedantic(lambda: None)
    return results[theirs], results[ours]


def check(info: dict, found: list, wanted: list, dtype: str) -> None:
    """Record the lowest cosine between dense vectors."""
    found, wanted = (np.concatenate(x).astype(np.float64) for x in (found, wanted))
    cosine = (
        (found * wanted).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)
    )
    info["lowest_cosine"] = float(cosine.min())
    assert cosine.min() >= LOWEST_COSINE[dtype]


@pytest.mark.parametrize("dtype", LOWEST_COSINE)
@pytest.mark.parametrize("workload", ["requests of 32 texts", "512 texts in bulk", "one query"])
def test_dense_vs_sentence_transformers(workload, dtype, folder, benchmark):
    if (workload, dtype) == ("512 texts in bulk", "float32"):
        pytest.skip("takes minutes and shows what bfloat16 shows")
    model, ours = sentence_transformer(folder, dtype), embedder(folder, dtype)
    model.encode([QUERY]), ours.encode([QUERY])
    calls = calls_of(workload)
    if (workload, dtype) == ("requests of 32 texts", "float32"):
        calls = calls[:1]  # a minute each
    wanted, found = compare(
        benchmark,
        lambda texts: model.encode(texts, convert_to_tensor=True).float().numpy(),
        lambda texts: ours.encode(texts).dense,
        calls,
        peer="sentence-transformers",
        workload=f"{workload}, dense",
        dtype=dtype,
        peer_dtype=dtype,
    )
    check(benchmark.extra_info, found, wanted, dtype)


def test_all_outputs_vs_flag_embedding(folder, benchmark):
    model, ours = flag_model(folder), embedder(folder, "bfloat16")
    ours.encode([QUERY], ALL)
    wanted = {"return_dense": True, "return_sparse": True, "return_colbert_vecs": True}
    peer, found = compare(
        benchmark,
        lambda texts: model.encode(texts, max_length=LENGTH, **wanted),
        lambda texts: ours.encode(texts, ALL),
        calls_of("requests of 32 texts")[:1],
        peer="FlagEmbedding",
        workload="a request of 32 texts, all three outputs",
        dtype="bfloat16",
        peer_dtype="float32",
    )
    dense = [x.dense for x in found], [x["dense_vecs"] for x in peer]
    check(benchmark.extra_info, *dense, "bfloat16")


def test_all_outputs_vs_dense_alone(folder, benchmark):
    ours = embedder(folder, "bfloat16")
    compare(
        benchmark,
        lambda texts: ours.encode(texts, ALL),
        lambda texts: ours.encode(texts),
        calls_of("requests of 32 texts"),
        peer="embedfuse, all three outputs",
        workload="requests of 32 texts, dense alone",
        dtype="bfloat16",
        peer_dtype="bfloat16",
    )


def test_scores_of_pairs_vs_flag_embedding(folder, benchmark):
    model, ours = flag_model(folder), embedder(folder, "float32")
    texts = stdlib_docstrings(64)
    pairs = [(" ".join(text.split()[:8]), text) for text in texts]
    peer, found = compare(
        benchmark,
        lambda pairs: model.compute_score(pairs, max_passage_length=LENGTH),
        ours.compute_score,
        [pairs],
        peer="FlagEmbedding",
        workload="compute_score of 64 pairs",
        dtype="float32",
        peer_dtype="float32",
    )
    for name, scores in peer[0].items():
        assert np.abs(np.array(scores) - found[0][name]).max() < 1e-4


def test_lexical_dicts_vs_a_loop(benchmark):
    """From the weights of 32 x 512 tokens to dicts: the step after the forward."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 16000, (32, LENGTH), generator=generator)
    weights = torch.randn(32, LENGTH, generator=generator).relu()
    bounds = torch.arange(33, dtype=torch.int32) * LENGTH

    def ours(_):
        csr = embedfuse.ops.sparse_scatter(weights.flatten(), ids.flatten(), cu_seqlens=bounds)
        return csr.dicts()

    peer, found = compare(
        benchmark,
        lambda _: [lexical_loop(*row) for row in zip(weights.numpy(), ids.tolist(), strict=True)],
        ours,
        [None] * 15,
        peer="a loop over tokens, as FlagEmbedding's",
        workload="32 x 512 token weights to dicts",
        dtype="float32",
        peer_dtype="float32",
    )
    assert peer[0] == found[0]


def lexical_loop(weights: np.ndarray, ids: list[int]) -> dict[str, np.float32]:
    row = defaultdict(int)
    for weight, token in zip(weights, ids, strict=True):
        if weight > 0:
            key = str(token)
            if weight > row[key]:
                row[key] = weight
    return row

"""Whole models on a GPU, at full size with random weights, compared with the libraries that run them.

`on the GPU` and `docs`: from token ids to vectors on the GPU, both sides in equal batches, timed between CUDA
events. `end to end` and `on the host`: from texts to arrays, by the wall clock. A skip names a peer that is
not installed or fails. A model whose self-check fails, or whose vectors differ, is timed all the same, and
says so. A rehearsal runs all of it on the CPU with small models.
"""

import gc
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import pytest
import torch

import embedfuse
from benchmarks.harness.record import one_line
from benchmarks.harness.rehearsal import REHEARSAL, size
from benchmarks.harness.targets import TARGETS
from benchmarks.harness.timing import DEVICE, interleaved
from benchmarks.models import workloads
from benchmarks.models.pairs import ModelPair, patched_pair
from benchmarks.models.workloads import BULK_TEXTS, INSTRUCTED, INSTRUCTION, LONGEST, MIXED, QUERY

ALL = ("dense", "sparse", "multi")
BATCH = size(64, 4)  # texts
ROUNDS, TEXT_ROUNDS, QUERY_ROUNDS = size(5, 1), size(3, 1), size(50, 2)
LOWEST_COSINE = 0.99
FAMILIES = {"BGE-M3": "xlm_roberta", "E5-mistral-7B": "mistral", "BERT-base": "bert"}
OTHERS = [
    pytest.param(
        "transformers, flash-attn",
        marks=pytest.mark.skipif(not find_spec("flash_attn"), reason="not installed: flash-attn"),
    ),
    pytest.param(
        "transformers, torch.compile",
        marks=pytest.mark.skipif(REHEARSAL, reason="compiles for minutes"),
    ),
]
DOCS, MIXED_DOCS, ONE = f"{LONGEST}-token docs", "10-500-token docs", "one 32-token query"

pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not REHEARSAL, reason="needs a GPU")


def of(*names: str):
    params = [pytest.param(n, marks=pytest.mark.covers(FAMILIES[n])) for n in names]
    return pytest.mark.parametrize("models", params, indirect=True)


@pytest.fixture(scope="module")
def models(request) -> Iterator[ModelPair]:
    with pytest.MonkeyPatch.context() as patch:
        yield patched_pair(request.param, DEVICE, patch)
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def sizes(models, benchmark) -> None:
    config = models.original.config
    sizes = f"{models.name}, {config.num_hidden_layers} x {config.hidden_size}"
    benchmark.extra_info.update(sizes=sizes, dtype="bfloat16", peer_dtype="bfloat16")
    if models.patch_error:
        benchmark.extra_info["patch_error"] = models.patch_error


def lengths_of(workload: str, model: str) -> list[int]:
    """Sorted, as sentence-transformers sorts texts, so that the peer computes little padding."""
    docs = [size(LONGEST, 48)] * size(BULK_TEXTS["cuda"][model], 6)
    mixed = [min(n, size(n, 48)) for n in MIXED.lengths()][: size(MIXED.texts, 6)]
    return sorted({DOCS: docs, MIXED_DOCS: mixed, ONE: QUERY.lengths()}[workload])


def compare(benchmark, theirs: Callable, ours: Callable, inputs: list, rounds: int, **info) -> list:
    """All inputs by both, interleaved, and the lowest cosine between the vectors of the first."""
    with torch.inference_mode():
        wanted, found = (torch.as_tensor(run(inputs[0])).double() for run in (theirs, ours))
    cosine = torch.nn.functional.cosine_similarity(found, wanted).min().item()
    runs = [lambda run=run: [run(x) for x in inputs] for run in (theirs, ours)]
    times = interleaved(runs, rounds, warmup=3 if len(inputs) == 1 else 1)
    benchmark.extra_info.update(lowest_cosine=cosine, **info)
    benchmark.pedantic(lambda: None)
    return times


def record(info: dict, seconds: list[float], row: str, texts: int, tokens: int, note="") -> None:
    """Add the figures of a row; AssertionError afterwards where `compare` found other vectors.

    Args:
        info: The extra_info of the benchmark.
        seconds: Of the peer and of embedfuse.
        row: The name of the row. The unit is that of its target; rows without target get tokens/s.
        texts: Number of texts.
        tokens: Number of tokens of all texts.
        note: Shown in the report.
    """
    unit = "ms" if texts == 1 else TARGETS[row].unit if row in TARGETS else "tokens/s"
    value = {
        "docs/s": texts / seconds[1],
        "tokens/s": tokens / seconds[1],
        "ms": seconds[1] * 1e3,
    }[unit]
    info.update(
        workload=row,
        peer_seconds=seconds[0],
        seconds=seconds[1],
        speedup=seconds[0] / seconds[1],
        rows={row: {"value": value, "unit": unit}},
        note=note,
    )
    assert info.get("lowest_cosine", 1) >= LOWEST_COSINE, "other vectors than the peer's"


def forward(models: ModelPair, peer: str, workload: str, benchmark, peaks) -> None:
    try:
        theirs = models.forward_of(peer)
    except ImportError as error:
        pytest.skip(f"the peer {peer} is not installed: {error}")
    lengths = lengths_of(workload, models.name)
    parts = [lengths[i : i + BATCH] for i in range(0, len(lengths), BATCH)]
    batches = [workloads.token_ids(part, models.padding, models.device) for part in parts]
    try:
        theirs(batches[0])
    except Exception as error:  # a peer may raise anything; the others are still measured
        pytest.skip(f"the peer {peer} fails: {one_line(error)}")
    rounds = QUERY_ROUNDS if workload == ONE else ROUNDS
    # Reading a mask back makes the GPU wait for the host; a query alone needs none. End to end includes it.
    ours = models.embed_unpadded if workload == ONE else models.embed
    times = compare(benchmark, theirs, ours, batches, rounds, peer=peer)
    row = f"{models.name}, {workload}" + " on the GPU" * (workload == ONE)
    walls = f"wall clock {times[1].wall * 1e3:,.1f} ms, peer {times[0].wall * 1e3:,.1f} ms"
    benchmark.extra_info["wall_seconds"] = times[1].wall
    rate = 2 * matrix_elements(models) * sum(lengths) / times[1].on_device
    share = f"; {rate / peaks.flops[torch.bfloat16]:.0%} of the GEMM rate" * (workload != ONE)
    seconds = [t.on_device for t in times]
    record(benchmark.extra_info, seconds, row, len(lengths), sum(lengths), walls + share)


def matrix_elements(models: ModelPair) -> int:
    """Elements of the layers' weight matrices: two operations per token each.

    Attention and the pruning of the last layer are not counted.
    """
    layers = getattr(models.original, "layers", None) or models.original.encoder.layer
    return sum(p.numel() for p in layers.parameters() if p.dim() == 2)


@of("BGE-M3", "E5-mistral-7B", "BERT-base")
@pytest.mark.parametrize("workload", [DOCS, ONE])
def test_forward(models, workload, benchmark, peaks):
    forward(models, "transformers", workload, benchmark, peaks)


@of("BGE-M3", "BERT-base")
def test_mixed_lengths(models, benchmark, peaks):
    forward(models, "transformers", MIXED_DOCS, benchmark, peaks)


@of("E5-mistral-7B")
def test_shared_instruction(models, benchmark):
    lengths = [INSTRUCTION + n for n in INSTRUCTED.lengths()]
    batch = workloads.token_ids(lengths, models.padding, models.device, shared=INSTRUCTION)
    runs = {}
    for reuse in ("off", "batch"):
        embedfuse.unpatch(models.patched)
        embedfuse.patch(models.patched, reuse_prefixes=reuse)
        runs[reuse] = interleaved([lambda: models.embed(batch)], ROUNDS * 2, warmup=2)[0].on_device
    embedfuse.unpatch(models.patched)
    embedfuse.patch(models.patched, reuse_prefixes="off")
    gain = runs["off"] / runs["batch"]
    row = f"{models.name}, {len(lengths)} queries with a {INSTRUCTION}-token instruction"
    benchmark.extra_info.update(
        peer="embedfuse, reuse_prefixes='off'",
        workload=row,
        peer_seconds=runs["off"],
        seconds=runs["batch"],
        speedup=gain,
        rows={row: {"value": gain, "unit": "x"}},
    )
    benchmark.pedantic(lambda: None)


@of("BGE-M3")
@pytest.mark.covers("token_weights", "sparse_scatter")
def test_all_outputs_on_the_host(models, benchmark):
    lengths = lengths_of(DOCS, models.name)
    texts, embedder = models.texts(lengths), models.embedder
    calls = [lambda: embedder.encode(texts), lambda: embedder.encode(texts, ALL)]
    seconds = [times.wall for times in interleaved(calls, TEXT_ROUNDS)]
    row = f"{models.name}, {DOCS}, all three outputs on the host"
    record(benchmark.extra_info, seconds, row, len(lengths), sum(lengths))
    benchmark.extra_info["peer"] = "embedfuse, only dense on the host"
    benchmark.pedantic(lambda: None)


@of("BGE-M3", "E5-mistral-7B")
@pytest.mark.parametrize("workload", [ONE, DOCS])
def test_texts_vs_sentence_transformers(models, workload, benchmark):
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    lengths = lengths_of(workload, models.name)
    texts = models.texts(lengths)
    model, embedder = models.sentence_transformer, models.embedder
    times = compare(
        benchmark,
        lambda texts: model.encode(texts, batch_size=BATCH, convert_to_tensor=True).float().cpu(),
        lambda texts: embedder.encode(texts).dense,
        [texts],
        QUERY_ROUNDS if workload == ONE else TEXT_ROUNDS,
        peer="sentence-transformers",
    )
    seconds = [t.wall for t in times]
    row = f"{models.name}, {workload} end to end"
    record(benchmark.extra_info, seconds, row, len(lengths), sum(lengths))


@of("BGE-M3", "E5-mistral-7B", "BERT-base")
@pytest.mark.parametrize("workload", [DOCS, ONE])
@pytest.mark.parametrize("peer", OTHERS)
def test_forward_vs_other_libraries(models, workload, peer, benchmark, peaks):
    forward(models, peer, workload, benchmark, peaks)

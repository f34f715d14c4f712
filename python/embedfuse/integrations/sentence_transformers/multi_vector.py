"""sentence-transformers' MultiVectorEncoder, and its scoring functions on ops.maxsim.

A patched model scores so in `similarity` and `similarity_pairwise`. Losses and evaluators hold functions of
their own, which no patch of a model reaches and which several modules of the library import by name; give
them the functions of this module:

    MultiVectorMultipleNegativesRankingLoss(model, similarity_fct=colbert_scores)
    MultiVectorDistillKLDivLoss(model, similarity_fct=colbert_kd_scores)
    MultiVectorMarginMSELoss(model, similarity_fct=colbert_scores_pairwise)
    MultiVectorInformationRetrievalEvaluator(..., score_functions={"maxsim": maxsim})

functools.partial(..., length_normalize=True) makes them MeanMaxSim. They take what the library's functions
take and return what these return: masked tokens are excluded; without a mask, rows of zeros in a padded
tensor are its padding; a document without tokens scores -1e9 (the library also warns). Scores are fp32, and
fp64 of fp64 vectors, where the library rounds. chunk_elements has no effect, because no similarity of two
tokens is kept. Where `device` is not the documents' own, or a query mask holds other weights than 0 and 1
(under torch.compile: is not bool), the library's own function computes.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from sentence_transformers import MultiVectorEncoder as _ORIGINAL
from sentence_transformers.multi_vector_encoder import scoring
from sentence_transformers.util import similarity
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from embedfuse import ops
from embedfuse.integrations.sentence_transformers.model import transformers_model
from embedfuse.integrations.sentence_transformers.scoring import (
    LateInteractionModel,
    check_groups,
    is_weighted,
    matched,
)

Embeddings = list | np.ndarray | Tensor

_EMPTY_DOCUMENT = -1e9  # the library's score of a document without tokens


class MultiVectorEncoder(LateInteractionModel, _ORIGINAL):
    original = _ORIGINAL

    @classmethod
    def inner_model(cls, model: _ORIGINAL) -> nn.Module:
        return transformers_model(model)

    @classmethod
    def probe(cls, model: _ORIGINAL, texts: list[str]) -> tuple[list[Tensor], list[Tensor]]:
        call = {"show_progress_bar": False}
        return model.encode_query(texts, **call), model.encode_document(texts, **call)

    def scores_padding(self, features: dict) -> bool:
        expansion = features.get("query_expansion_positions")
        return expansion is not None and bool((expansion & (features["attention_mask"] == 0)).any())

    @functools.wraps(_ORIGINAL.similarity)
    def similarity(self, embeddings1, embeddings2, **kwargs):
        return maxsim(embeddings1, embeddings2, **self._mean_or_sum(kwargs))

    @functools.wraps(_ORIGINAL.similarity_pairwise)
    def similarity_pairwise(self, embeddings1, embeddings2, **kwargs):
        return maxsim_pairwise(embeddings1, embeddings2, **self._mean_or_sum(kwargs))

    def _mean_or_sum(self, kwargs: dict) -> dict:
        return {"length_normalize": self.similarity_fn_name == "meanmaxsim"} | kwargs


def maxsim(
    a: Embeddings,
    b: Embeddings,
    a_mask: Tensor | None = None,
    b_mask: Tensor | None = None,
    chunk_elements: int | None = None,
    length_normalize: bool = False,
    device: str | torch.device | None = None,
) -> Tensor:
    """sentence_transformers.util.maxsim: each query's score with each document, (queries, documents)."""
    sides = _sides(a, b, a_mask, b_mask, device)
    if sides is None:
        return similarity.maxsim(a, b, a_mask, b_mask, chunk_elements, length_normalize, device)
    q, d = sides
    scores = ops.maxsim(q.texts, d.texts, q.mask, d.mask)
    return _finished(scores, q.lengths()[:, None], d.lengths(), length_normalize)


def maxsim_pairwise(
    a: Embeddings,
    b: Embeddings,
    a_mask: Tensor | None = None,
    b_mask: Tensor | None = None,
    chunk_elements: int | None = None,
    length_normalize: bool = False,
    device: str | torch.device | None = None,
) -> Tensor:
    """sentence_transformers.util.maxsim_pairwise: score of query i with document i, (pairs,)."""
    sides = _sides(a, b, a_mask, b_mask, device)
    if sides is None:
        return similarity.maxsim_pairwise(
            a, b, a_mask, b_mask, chunk_elements, length_normalize, device
        )
    q, d = sides
    if len(q.texts) != len(d.texts):
        raise ValueError(
            f"b: {len(d.texts)} documents; accepted are as many as queries, {len(q.texts)}"
        )
    pairs = matched(len(q.texts), 1, d.texts[0].device)
    scores = ops.maxsim(q.texts, d.texts, q.mask, d.mask, pairs=pairs)
    return _finished(scores, q.lengths(), d.lengths(), length_normalize)


def colbert_scores(
    queries_embeddings: Embeddings,
    documents_embeddings: Embeddings,
    queries_mask: Tensor | None = None,
    documents_mask: Tensor | None = None,
    chunk_elements: int | None = None,
    length_normalize: bool = False,
) -> Tensor:
    """multi_vector_encoder.scoring.colbert_scores: queries (Q, tokens, dim) with all documents of groups
    (D, N, tokens, dim), as (Q, D * N), group by group."""
    documents, mask = _flattened(documents_embeddings, documents_mask)
    queries = _tensor(queries_embeddings)
    return maxsim(queries, documents, queries_mask, mask, chunk_elements, length_normalize)


def colbert_scores_pairwise(
    queries_embeddings: Embeddings,
    documents_embeddings: Embeddings,
    queries_mask: Tensor | None = None,
    documents_mask: Tensor | None = None,
    chunk_elements: int | None = None,
    length_normalize: bool = False,
) -> Tensor:
    """multi_vector_encoder.scoring.colbert_scores_pairwise: maxsim_pairwise under the losses' names."""
    return maxsim_pairwise(
        queries_embeddings,
        documents_embeddings,
        queries_mask,
        documents_mask,
        chunk_elements,
        length_normalize,
    )


def colbert_kd_scores(
    queries_embeddings: Embeddings,
    documents_embeddings: Embeddings,
    queries_mask: Tensor | None = None,
    documents_mask: Tensor | None = None,
    chunk_elements: int | None = None,
    length_normalize: bool = False,
) -> Tensor:
    """multi_vector_encoder.scoring.colbert_kd_scores: query i of (Q, tokens, dim) with its own documents of
    (Q, N, tokens, dim), as (Q, N)."""
    queries, documents = _tensor(queries_embeddings), _tensor(documents_embeddings)
    check_groups(queries, documents)
    shape = documents.shape[:2]
    documents, mask = _flattened(documents, documents_mask)
    sides = _sides(queries, documents, queries_mask, mask, None)
    if sides is None:
        return scoring.colbert_kd_scores(
            queries_embeddings,
            documents_embeddings,
            queries_mask,
            documents_mask,
            chunk_elements,
            length_normalize,
        )
    q, d = sides
    pairs = matched(*shape, queries.device)
    scores = ops.maxsim(q.texts, d.texts, q.mask, d.mask, pairs=pairs)
    lengths = q.lengths()[:, None], d.lengths().view(shape)
    return _finished(scores.view(shape), *lengths, length_normalize)


@dataclass
class _Side:
    """Texts (tokens, dim) each, or (texts, tokens, dim) with a mask (texts, tokens) of those that count."""

    texts: list[Tensor] | Tensor
    mask: Tensor | None = None

    @classmethod
    def of(cls, name: str, texts: Embeddings, mask: Tensor | None, device: torch.device) -> "_Side":
        if isinstance(texts, list):
            texts = [_tensor(text).to(device) for text in texts]
            if mask is None:
                return cls(texts)
            texts = pad_sequence(texts, batch_first=True)
        texts = _tensor(texts).to(device)
        if texts.dim() == 2:
            texts, mask = texts[None], mask if mask is None else mask.view(1, -1)
        if mask is None:
            return cls(texts, _has_values(texts))
        if mask.shape[-1] != texts.shape[1]:
            raise ValueError(
                f"{name}_mask: {mask.shape[-1]} tokens; accepted are those of {name}, {texts.shape[1]}"
            )
        return cls(texts, mask.to(device).bool().expand(len(texts), -1))

    def lengths(self) -> Tensor:
        if self.mask is None:
            return torch.tensor([len(text) for text in self.texts], device=self.texts[0].device)
        return self.mask.sum(1)


def _sides(a, b, a_mask, b_mask, device) -> tuple[_Side, _Side] | None:
    """Queries and documents on the documents' device; None where the library's function has to compute."""
    if len(a) == 0 or len(b) == 0:
        return None
    a_mask, b_mask = _joined(a_mask), _joined(b_mask)
    home = _device_of(b) or _device_of(a) or torch.device("cpu")
    if is_weighted(a_mask) or (device is not None and torch.device(device) != home):
        return None
    return _Side.of("a", a, a_mask, home), _Side.of("b", b, b_mask, home)


def _finished(scores: Tensor, queries: Tensor, documents: Tensor, mean: bool) -> Tensor:
    """With the numbers of tokens of queries and documents, each of a shape that goes with that of scores."""
    scores = scores.masked_fill(documents == 0, _EMPTY_DOCUMENT)
    return scores / queries.clamp_min(1) if mean else scores


def _tensor(x: Embeddings) -> Tensor:
    if isinstance(x, list):
        x = torch.stack([torch.as_tensor(row) for row in x])
    x = torch.as_tensor(x)
    return x if x.is_floating_point() else x.float()


def _flattened(documents: Embeddings, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(queries, ways, tokens, dim) as (documents, tokens, dim), and its mask likewise."""
    return _tensor(documents).flatten(0, 1), None if mask is None else mask.flatten(0, 1)


def _joined(mask: Tensor | np.ndarray | list | None) -> Tensor | None:
    if isinstance(mask, list | tuple):
        return pad_sequence([torch.as_tensor(row) for row in mask], batch_first=True)
    return mask if mask is None else torch.as_tensor(mask)


def _device_of(texts: Embeddings) -> torch.device | None:
    first = texts[0] if isinstance(texts, list) else texts
    return first.device if isinstance(first, Tensor) else None


def _has_values(x: Tensor) -> Tensor:
    """Which rows of x (texts, tokens, dim) hold anything but zeros."""
    if not torch.compiler.is_compiling():
        # Of a row of zeros the first is one, so one column is mostly all that is read.
        first = x[..., 0] != 0
        if first.all():
            return first
    return torch.linalg.vector_norm(x.detach(), 1, dim=-1) != 0

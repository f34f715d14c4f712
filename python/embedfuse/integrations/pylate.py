"""PyLate's ColBERT, and its scoring functions on ops.maxsim.

A patched model scores so in `similarity` and `similarity_pairwise`. Losses, evaluators and `rank.rerank`
hold functions of their own, which no patch of a model reaches and which several modules of the library
import by name; use those of this module:

    losses.Contrastive(model, score_metric=ColBERTScores())  # CachedContrastive too
    losses.Distillation(model, score_metric=colbert_kd_scores)
    rerank(documents_ids, queries_embeddings, documents_embeddings)

They take what the library's functions take and return what these return, of the same dtype: a masked
document token counts as similarity 0, and so do the zeros that `rerank` pads with. Sums are fp32, no
similarity of two tokens is kept, and what a mask leaves out is never read. Where `backend` is named, or a
mask holds other weights than 0 and 1 (under torch.compile: is not bool), the library's own function computes.

PyLate 1.6 asks for sentence-transformers 5.3. Beside 6.2 its functions and losses work, its ColBERT does not;
there MultiVectorEncoder loads the same checkpoints.
"""

from collections.abc import Sequence

import numpy as np
import torch
from pylate import rank, scores
from pylate.models import ColBERT as _ORIGINAL
from pylate.utils import convert_to_tensor
from sentence_transformers.models import Transformer
from torch import Tensor, nn

from embedfuse import ops
from embedfuse.integrations.sentence_transformers.scoring import (
    LateInteractionModel,
    check_groups,
    end_to_end,
    is_weighted,
    matched,
    score_all,
)

Embeddings = list | np.ndarray | Tensor


class ColBERT(LateInteractionModel, _ORIGINAL):
    original = _ORIGINAL

    @classmethod
    def inner_model(cls, model: _ORIGINAL) -> nn.Module:
        if type(model[0]) is not Transformer:
            raise TypeError(
                f"model: its first module is {type(model[0]).__name__}; accepted is Transformer"
            )
        return model[0].auto_model

    @classmethod
    def probe(cls, model: _ORIGINAL, texts: list[str]) -> tuple[list[Tensor], list[Tensor]]:
        longest = model.max_seq_length  # every encode sets it
        call = {"convert_to_tensor": True, "show_progress_bar": False}
        vectors = [model.encode(texts, is_query=is_query, **call) for is_query in (True, False)]
        model.max_seq_length = longest
        return tuple(vectors)

    def scores_padding(self, features: dict) -> bool:
        # Nothing marks queries, but when expanded they are all of one width.
        if not self.do_query_expansion or features["input_ids"].shape[1] != self.query_length:
            return False
        return not features["attention_mask"].all()

    @property
    def similarity(self):
        return colbert_scores

    @property
    def similarity_pairwise(self):
        return colbert_scores_pairwise


def colbert_scores(
    queries_embeddings: Embeddings,
    documents_embeddings: Embeddings,
    queries_mask: Tensor | None = None,
    documents_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """pylate.scores.colbert_scores: queries (Q, tokens, dim) with documents (D, tokens, dim), (Q, D)."""
    sides = _sides(queries_embeddings, documents_embeddings, queries_mask, documents_mask)
    q, d, q_mask, d_mask = sides
    if backend is not None or is_weighted(q_mask) or is_weighted(d_mask):
        return scores.colbert_scores(*sides, backend=backend)
    found = ops.maxsim(q, d, q_mask, d_mask, padding="zero_vector")
    return found.to(_dtype(*sides))


def colbert_scores_pairwise(
    queries_embeddings: Embeddings, documents_embeddings: Embeddings, backend: str | None = None
) -> Tensor:
    """pylate.scores.colbert_scores_pairwise: query i with document i, of any lengths, (pairs,)."""
    count = min(len(queries_embeddings), len(documents_embeddings))
    if backend is not None or count == 0:
        return scores.colbert_scores_pairwise(
            queries_embeddings, documents_embeddings, backend=backend
        )
    sides = queries_embeddings[:count], documents_embeddings[:count]
    q, d = ([convert_to_tensor(text) for text in side] for side in sides)
    found = ops.maxsim(q, d, pairs=matched(count, 1, q[0].device))
    return found.to(q[0].dtype)


def colbert_kd_scores(
    queries_embeddings: Embeddings,
    documents_embeddings: Embeddings,
    queries_mask: Tensor | None = None,
    documents_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """pylate.scores.colbert_kd_scores: query i of (Q, tokens, dim) with its own documents of
    (Q, N, tokens, dim), (Q, N)."""
    sides = _sides(queries_embeddings, documents_embeddings, queries_mask, documents_mask)
    q, d, q_mask, d_mask = sides
    if backend is not None or is_weighted(q_mask) or is_weighted(d_mask):
        return scores.colbert_kd_scores(*sides, backend=backend)
    check_groups(q, d)
    shape = d.shape[:2]
    d_mask = None if d_mask is None else d_mask.flatten(0, 1)
    pairs = matched(*shape, q.device)
    found = ops.maxsim(q, d.flatten(0, 1), q_mask, d_mask, padding="zero_vector", pairs=pairs)
    return found.view(shape).to(_dtype(*sides))


class ColBERTScores(scores.ColBERTScores):
    """pylate.scores.ColBERTScores: queries (Q, tokens, dim) with all documents of groups
    (D, N, tokens, dim), (Q, D * N), group by group."""

    def __call__(
        self,
        queries_embeddings: Embeddings,
        documents_embeddings: Embeddings,
        queries_mask: Tensor | None = None,
        documents_mask: Tensor | None = None,
        backend: str | None = None,
    ) -> Tensor:
        q, d, q_mask, d_mask = _sides(
            queries_embeddings, documents_embeddings, queries_mask, documents_mask
        )
        mask = None if d_mask is None else d_mask.flatten(0, 1)
        return colbert_scores(q, d.flatten(0, 1), q_mask, mask, backend)


def rerank(
    documents_ids: list[list[int | str]],
    queries_embeddings: Sequence[Embeddings],
    documents_embeddings: Sequence[Sequence[Embeddings]],
    device: str | None = None,
) -> list[list[rank.RerankResult]]:
    """pylate.rank.rerank: each query's documents, best first, of equal scores the first given first."""
    single = isinstance(queries_embeddings, np.ndarray | Tensor) and queries_embeddings.ndim == 2
    queries = queries_embeddings[None] if single else queries_embeddings
    results = []
    for ids, query, documents in zip(documents_ids, queries, documents_embeddings, strict=False):
        query = convert_to_tensor(query)
        query = query if device is None else query.to(device)
        documents = [convert_to_tensor(document).to(query.device) for document in documents]
        if not documents:  # pylate's own raises
            results.append([])
            continue
        width = max(map(len, documents))
        found = score_all(*end_to_end([query]), documents, width)[0].to(query.dtype)
        best, order = found.sort(descending=True, stable=True)
        ranked = zip(order.tolist(), best.tolist(), strict=True)
        results.append([rank.RerankResult(id=ids[i], score=score) for i, score in ranked])
    return results


def _sides(
    q: Embeddings, d: Embeddings, *masks: Embeddings | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """As tensors, a mask of one text for all texts of its side."""
    q, d = convert_to_tensor(q), convert_to_tensor(d)
    q_mask, d_mask = (
        None if mask is None else convert_to_tensor(mask).expand(side.shape[:-1])
        for side, mask in zip((q, d), masks, strict=True)
    )
    return q, d, q_mask, d_mask


def _dtype(q: Tensor, d: Tensor, *masks: Tensor | None) -> torch.dtype:
    """What the library's products with its masks come out in."""
    dtype = q.dtype
    for mask in masks:
        dtype = dtype if mask is None else torch.promote_types(dtype, mask.dtype)
    return dtype

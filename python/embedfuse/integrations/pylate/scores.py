"""Drop-ins for PyLate's scoring functions and its `rank.rerank`, on ops.maxsim."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from embedfuse import ops
from embedfuse.compatibility import explained
from embedfuse.integrations.late_interaction import (
    check_groups,
    end_to_end,
    is_weighted,
    matched,
    score_all,
)

with explained("pylate"):
    from pylate import rank, scores
    from pylate.utils import convert_to_tensor

Embeddings = list | np.ndarray | Tensor


def colbert_scores(
    queries_embeddings: Embeddings,
    documents_embeddings: Embeddings,
    queries_mask: Tensor | None = None,
    documents_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Scores of each query with each document, as pylate.scores.colbert_scores.

    score[i, j] = sum over tokens q of query i of (max over tokens d of document j of <q, d>)

    Args:
        queries_embeddings: (Q, tokens, dim): a tensor, an array or a list of equally long texts.
        documents_embeddings: (D, tokens, dim), likewise.
        queries_mask: (Q, tokens), nonzero at tokens; (1, tokens) holds for all texts. None masks nothing.
        documents_mask: (D, tokens), likewise. A masked token has similarity 0 with every query token.
        backend: Where it is named, the library's function computes.

    Returns:
        (Q, D), in the dtype of the embeddings and masks promoted. Differentiable.

    Raises:
        ValueError: The sides differ in dtype or dim.
    """
    sides = _sides(queries_embeddings, documents_embeddings, queries_mask, documents_mask)
    q, d, q_mask, d_mask = sides
    if backend is not None or is_weighted(q_mask) or is_weighted(d_mask):
        return scores.colbert_scores(*sides, backend=backend)
    found = ops.maxsim(q, d, q_mask, d_mask, padding="zero_vector")
    return found.to(_dtype(*sides))


def colbert_scores_pairwise(
    queries_embeddings: Embeddings, documents_embeddings: Embeddings, backend: str | None = None
) -> Tensor:
    """Score of query i with document i, as pylate.scores.colbert_scores_pairwise.

    Args:
        queries_embeddings: Texts (tokens, dim) of any lengths, or (pairs, tokens, dim), all of it tokens.
        documents_embeddings: Likewise. What one side has more than the other is left out.
        backend: Where it is named, the library's function computes.

    Returns:
        (pairs,), in the dtype of the first query. Differentiable.

    Raises:
        ValueError: The sides differ in dtype or dim.
    """
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
    """Scores of query i with the documents of group i, as pylate.scores.colbert_kd_scores.

    Args:
        queries_embeddings: (Q, tokens, dim).
        documents_embeddings: (Q, N, tokens, dim): a group of N documents for each query.
        queries_mask: (Q, tokens), nonzero at tokens; (1, tokens) holds for all texts. None masks nothing.
        documents_mask: (Q, N, tokens), likewise. A masked token has similarity 0 with every query token.
        backend: Where it is named, the library's function computes.

    Returns:
        (Q, N), in the dtype of the embeddings and masks promoted. Differentiable.

    Raises:
        ValueError: Groups are not as many as queries, or the sides differ in dtype or dim.
    """
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
    """Scores of each query with the documents of all groups, as pylate.scores.ColBERTScores.

    It has no state; each call takes the embeddings.
    """

    def __call__(
        self,
        queries_embeddings: Embeddings,
        documents_embeddings: Embeddings,
        queries_mask: Tensor | None = None,
        documents_mask: Tensor | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """Score as `colbert_scores`.

        Args:
            queries_embeddings: (Q, tokens, dim).
            documents_embeddings: (G, N, tokens, dim): G groups of N documents.
            queries_mask: (Q, tokens), as in `colbert_scores`.
            documents_mask: (G, N, tokens), as in `colbert_scores`.
            backend: Where it is named, the library's function computes.

        Returns:
            (Q, G * N), group by group; dtype as `colbert_scores`. Differentiable.

        Raises:
            ValueError: As `colbert_scores`.
        """
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
    """Sort each query's documents by score, as pylate.rank.rerank.

    Args:
        documents_ids: For each query the ids of its documents.
        queries_embeddings: Queries (tokens, dim), or one query alone, as a tensor or an array.
        documents_embeddings: For each query its documents (tokens, dim), in the order of the ids.
        device: Where to compute; None: where the queries are.

    Returns:
        For each query its documents with their scores, the highest first. Documents of equal score keep their
        order.
    """
    single = isinstance(queries_embeddings, np.ndarray | Tensor) and queries_embeddings.ndim == 2
    queries = queries_embeddings[None] if single else queries_embeddings
    results = []
    for ids, query, documents in zip(documents_ids, queries, documents_embeddings, strict=False):
        query = convert_to_tensor(query)
        query = query if device is None else query.to(device)
        documents = [convert_to_tensor(document).to(query.device) for document in documents]
        if not documents:  # the library's function raises
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
    """All as tensors; a mask of one text is expanded to all texts of its side."""
    q, d = convert_to_tensor(q), convert_to_tensor(d)
    q_mask, d_mask = (
        None if mask is None else convert_to_tensor(mask).expand(side.shape[:-1])
        for side, mask in zip((q, d), masks, strict=True)
    )
    return q, d, q_mask, d_mask


def _dtype(q: Tensor, d: Tensor, *masks: Tensor | None) -> torch.dtype:
    """The dtype of the library's scores, which are products with its masks."""
    dtype = q.dtype
    for mask in masks:
        dtype = dtype if mask is None else torch.promote_types(dtype, mask.dtype)
    return dtype

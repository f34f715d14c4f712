"""Drop-ins for sentence-transformers' late-interaction scoring, on ops.maxsim.

    from embedfuse.integrations.sentence_transformers import scoring

    MultiVectorMultipleNegativesRankingLoss(model, similarity_fct=scoring.colbert_scores)
    MultiVectorDistillKLDivLoss(model, similarity_fct=scoring.colbert_kd_scores)
    MultiVectorMarginMSELoss(model, similarity_fct=scoring.colbert_scores_pairwise)
    MultiVectorInformationRetrievalEvaluator(..., score_functions={"maxsim": scoring.maxsim})

A patched MultiVectorEncoder uses these functions in `similarity` and `similarity_pairwise`. Losses and
evaluators call the library's functions, which patching a model does not change, so they take these as an
argument. functools.partial(..., length_normalize=True) makes each of them MeanMaxSim.

Arguments and results are those of the library's functions of the same name: masked tokens are excluded;
without a mask, rows of zeros in a padded tensor are padding; a document without tokens scores -1e9 (the
library also warns). Scores are fp32, and fp64 of fp64 vectors, where the library rounds. `chunk_elements`
has no effect, because no similarity of two tokens is stored. The library's function computes where `device`
is not the documents' device, or a query mask holds other weights than 0 and 1 (under torch.compile: is not
bool).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from embedfuse import ops
from embedfuse.compatibility import explained
from embedfuse.integrations.late_interaction import check_groups, is_weighted, matched

with explained("sentence-transformers"):
    from sentence_transformers.multi_vector_encoder import scoring
    from sentence_transformers.util import similarity

Embeddings = list | np.ndarray | Tensor

_EMPTY_DOCUMENT = -1e9  # the library's score of a document without tokens


def maxsim(
    a: Embeddings,
    b: Embeddings,
    a_mask: Tensor | None = None,
    b_mask: Tensor | None = None,
    chunk_elements: int | None = None,
    length_normalize: bool = False,
    device: str | torch.device | None = None,
) -> Tensor:
    """Scores of each query with each document, as sentence_transformers.util.maxsim.

    score[i, j] = sum over tokens q of query i of (max over tokens d of document j of <q, d>)

    Args:
        a: Queries: a list of (tokens, dim), or a padded (queries, tokens, dim), as tensors or arrays.
        b: Documents, in the same forms.
        a_mask: (queries, tokens), nonzero at tokens. None takes all rows of a list, and of a padded tensor
            those that are not all zeros.
        b_mask: (documents, tokens), likewise.
        chunk_elements: Has no effect.
        length_normalize: Divide each score by the number of tokens of its query (MeanMaxSim).
        device: None, or the documents' device; with another the library's function computes.

    Returns:
        (queries, documents), fp32, or fp64 of fp64 vectors. Differentiable.

    Raises:
        ValueError: A mask has another number of tokens than its side, or the sides differ in dtype or dim.
    """
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
    """Score of query i with document i, as sentence_transformers.util.maxsim_pairwise.

    Args:
        a: Queries, as in `maxsim`.
        b: As many documents.
        a_mask: (queries, tokens), as in `maxsim`.
        b_mask: (documents, tokens), as in `maxsim`.
        chunk_elements: Has no effect.
        length_normalize: Divide each score by the number of tokens of its query (MeanMaxSim).
        device: As in `maxsim`.

    Returns:
        (queries,), fp32, or fp64 of fp64 vectors. Differentiable.

    Raises:
        ValueError: Documents are not as many as queries, or as in `maxsim`.
    """
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
    """Scores of each query with the documents of all groups, as multi_vector_encoder.scoring.colbert_scores.

    Args:
        queries_embeddings: (Q, tokens, dim).
        documents_embeddings: (G, N, tokens, dim): G groups of N documents.
        queries_mask: (Q, tokens), as in `maxsim`.
        documents_mask: (G, N, tokens), as in `maxsim`.
        chunk_elements: Has no effect.
        length_normalize: Divide each score by the number of tokens of its query (MeanMaxSim).

    Returns:
        (Q, G * N), group by group; dtype as `maxsim`. Differentiable.

    Raises:
        ValueError: As `maxsim`.
    """
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
    """`maxsim_pairwise` with the argument names of multi_vector_encoder.scoring.colbert_scores_pairwise.

    Args:
        queries_embeddings: (pairs, tokens, dim).
        documents_embeddings: (pairs, tokens, dim).
        queries_mask: (pairs, tokens), as in `maxsim`.
        documents_mask: (pairs, tokens), as in `maxsim`.
        chunk_elements: Has no effect.
        length_normalize: Divide each score by the number of tokens of its query (MeanMaxSim).

    Returns:
        (pairs,); dtype as `maxsim`. Differentiable.

    Raises:
        ValueError: As `maxsim_pairwise`.
    """
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
    """Scores of query i with the documents of group i, as multi_vector_encoder.scoring.colbert_kd_scores.

    Args:
        queries_embeddings: (Q, tokens, dim).
        documents_embeddings: (Q, N, tokens, dim): a group of N documents for each query.
        queries_mask: (Q, tokens), as in `maxsim`.
        documents_mask: (Q, N, tokens), as in `maxsim`.
        chunk_elements: Has no effect.
        length_normalize: Divide each score by the number of tokens of its query (MeanMaxSim).

    Returns:
        (Q, N); dtype as `maxsim`. Differentiable.

    Raises:
        ValueError: Groups are not as many as queries, or as `maxsim`.
    """
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
    """Queries or documents: (tokens, dim) each, or (texts, tokens, dim) with a bool mask (texts, tokens)."""

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
    """Queries and documents on the documents' device; None where the library's function computes."""
    if len(a) == 0 or len(b) == 0:
        return None
    a_mask, b_mask = _padded_mask(a_mask), _padded_mask(b_mask)
    documents_device = _device_of(b) or _device_of(a) or torch.device("cpu")
    if is_weighted(a_mask) or (device is not None and torch.device(device) != documents_device):
        return None
    return _Side.of("a", a, a_mask, documents_device), _Side.of("b", b, b_mask, documents_device)


def _finished(scores: Tensor, queries: Tensor, documents: Tensor, mean: bool) -> Tensor:
    """Scores with those of empty documents set, divided for MeanMaxSim.

    queries, documents: their numbers of tokens, of a shape that broadcasts with scores.
    """
    scores = scores.masked_fill(documents == 0, _EMPTY_DOCUMENT)
    return scores / queries.clamp_min(1) if mean else scores


def _tensor(x: Embeddings) -> Tensor:
    if isinstance(x, list):
        x = torch.stack([torch.as_tensor(row) for row in x])
    x = torch.as_tensor(x)
    return x if x.is_floating_point() else x.float()


def _flattened(documents: Embeddings, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(groups, N, tokens, dim) as (documents, tokens, dim), and its mask likewise."""
    return _tensor(documents).flatten(0, 1), None if mask is None else mask.flatten(0, 1)


def _padded_mask(mask: Tensor | np.ndarray | list | None) -> Tensor | None:
    if isinstance(mask, list | tuple):
        return pad_sequence([torch.as_tensor(row) for row in mask], batch_first=True)
    return mask if mask is None else torch.as_tensor(mask)


def _device_of(texts: Embeddings) -> torch.device | None:
    first = texts[0] if isinstance(texts, list) else texts
    return first.device if isinstance(first, Tensor) else None


def _has_values(x: Tensor) -> Tensor:
    """(texts, tokens), bool: which rows of x (texts, tokens, dim) are not all zeros."""
    if not torch.compiler.is_compiling():
        # A row whose first value is not zero is no row of zeros: mostly one column decides.
        first = x[..., 0] != 0
        if first.all():
            return first
    return torch.linalg.vector_norm(x.detach(), 1, dim=-1) != 0

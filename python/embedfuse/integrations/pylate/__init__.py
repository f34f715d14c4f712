"""PyLate: a patched ColBERT, and its scoring functions on ops.maxsim.

    from embedfuse.integrations.pylate import ColBERTScores, colbert_kd_scores, rerank

    losses.Contrastive(model, score_metric=ColBERTScores())  # CachedContrastive too
    losses.Distillation(model, score_metric=colbert_kd_scores)
    rerank(documents_ids, queries_embeddings, documents_embeddings)

A patched ColBERT uses these functions in `similarity` and `similarity_pairwise`. Losses, evaluators and
`rank.rerank` call the library's functions, which patching a model does not change, so they take these as an
argument, or are replaced by the function of the same name.

Arguments, results and their dtypes are those of the library's functions: a masked document token counts as
similarity 0, and so do the zeros that `rerank` pads with. Sums are fp32, no similarity of two tokens is
stored, and masked embeddings are never read. The library's function computes where `backend` is named, or a
mask holds other weights than 0 and 1 (under torch.compile: is not bool).

PyLate 1.6 asks for sentence-transformers 5.3. With 6.2 its functions and losses work, its ColBERT does not;
there MultiVectorEncoder loads the same checkpoints.
"""

from embedfuse.deprecation import moved
from embedfuse.integrations.pylate.scores import (
    ColBERTScores,
    colbert_kd_scores,
    colbert_scores,
    colbert_scores_pairwise,
    rerank,
)

__all__ = [
    "ColBERTScores",
    "colbert_kd_scores",
    "colbert_scores",
    "colbert_scores_pairwise",
    "rerank",
]


def __getattr__(name: str):
    return moved(__name__, name, {"ColBERT": "model", "Embeddings": "scores"})

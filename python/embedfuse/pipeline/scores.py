"""Relevance of text pairs by BGE-M3's three embeddings, computed for the pairs alone."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from embedfuse.ops import lexical_scores, maxsim_packed
from embedfuse.pipeline.embeddings import OUTPUTS, Vectors
from embedfuse.pipeline.pipeline import EmbeddingPipeline, length_of, windows
from embedfuse.pipeline.tokenize import check_texts


def score_pairs(
    pipeline: EmbeddingPipeline,
    pairs: Sequence[tuple[str, str]],
    weights: Sequence[float],
    max_query_length: int,
    max_passage_length: int,
    advance: Callable[[int], None] = lambda pairs: None,
    at_most: int | None = None,
) -> dict[str, list[float]]:
    """FlagEmbedding's scores of (query, passage) pairs, under its keys.

    dense: q . p. sparse: sum of the products of shared tokens' weights. colbert: mean over query tokens
    of the best dot product with a passage token. sparse+dense and colbert+sparse+dense: means weighted
    with `weights`, in the order (dense, sparse, colbert).

    A text that stands in several neighbouring pairs is embedded once. at_most: tokens of one forward.
    """
    pipeline.check_outputs(OUTPUTS)
    columns = {name: [torch.zeros(0)] for name in ("dense", "sparse", "colbert")}
    longest = 16 * max(max_query_length, max_passage_length)
    for start, window in windows(
        pairs, lambda pair: sum(length_of(text, longest) for text in pair)
    ):
        sides = []
        for side, max_length in ((0, max_query_length), (1, max_passage_length)):
            texts = [pair[side] for pair in window]
            check_texts(texts, name=("queries", "passages")[side], start=start)
            distinct = list(dict.fromkeys(texts))
            place = {text: i for i, text in enumerate(distinct)}
            ids = pipeline.tokenize(distinct, max_length)
            vectors = pipeline.vectors(ids, OUTPUTS, at_most=at_most)
            sides.append((vectors, [place[text] for text in texts]))
        for name, scores in _scores(*sides).items():
            columns[name].append(scores.float().cpu())
        advance(len(window))
    dense, sparse, colbert = map(torch.cat, columns.values())
    d, s, c = weights
    return {
        "colbert": colbert.tolist(),
        "sparse": sparse.tolist(),
        "dense": dense.tolist(),
        "sparse+dense": ((sparse * s + dense * d) / (s + d)).tolist(),
        "colbert+sparse+dense": ((colbert * c + sparse * s + dense * d) / (c + s + d)).tolist(),
    }


def _scores(
    queries: tuple[Vectors, list[int]], passages: tuple[Vectors, list[int]]
) -> dict[str, Tensor]:
    (q, q_rows), (p, p_rows) = queries, passages
    pairs = torch.tensor([q_rows, p_rows]).T.to(q.dense.device)
    return {
        "dense": (q.dense[q_rows] * p.dense[p_rows]).sum(1),
        "sparse": lexical_scores(q.sparse[q_rows], p.sparse[p_rows], aligned=True),
        "colbert": maxsim_packed(*_packed(q.multi), *_packed(p.multi), pairs, reduction="mean"),
    }


def _packed(multi: list[Tensor]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([0, *map(len, multi)])
    return torch.cat(multi), lengths.cumsum(0).to(multi[0].device, torch.int32)

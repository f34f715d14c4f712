"""Relevance of text pairs by BGE-M3's three embeddings, computed for the pairs alone."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from embedfuse.ops import Csr, lexical_scores, maxsim_packed
from embedfuse.packing import cu_seqlens_of
from embedfuse.pipeline.batches import ahead, behind
from embedfuse.pipeline.embeddings import OUTPUTS, BatchVectors, Vectors
from embedfuse.pipeline.pipeline import EmbeddingPipeline, length_of, windows
from embedfuse.pipeline.tokenize import check_texts
from embedfuse.transfers import ToHost, to_device


@dataclass(frozen=True)
class Side:
    """Queries or passages of some pairs. ids: of the distinct texts. rows: which of these each pair has."""

    ids: list[list[int]]
    rows: list[int]


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
    From a GPU scores travel while the next pairs run.
    """
    pipeline.check_outputs(OUTPUTS)
    longest = 16 * max(max_query_length, max_passage_length)
    limits = {"queries": max_query_length, "passages": max_passage_length}
    to_host = ToHost(pipeline.model.device)

    def sides_of(window: tuple[int, list[tuple[str, str]]]) -> list[Side]:
        start, of_window = window
        sides = []
        for side, (name, max_length) in enumerate(limits.items()):
            texts = [pair[side] for pair in of_window]
            check_texts(texts, name=name, start=start)
            place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
            ids = pipeline.tokenize(list(place), max_length)
            sides.append(Side(ids, [place[text] for text in texts]))
        return sides

    def started() -> Iterator[Callable[[], tuple[Tensor, ...]]]:
        cut = windows(pairs, lambda pair: sum(length_of(text, longest) for text in pair))
        for sides in ahead(sides_of, cut):
            yield start(pipeline, *sides, to_host, at_most)

    parts = [(torch.zeros(0),) * 3]
    for arrive in behind(started(), to_host.behind):
        parts.append(arrive())
        advance(len(parts[-1][0]))
    dense, sparse, colbert = map(torch.cat, zip(*parts, strict=True))
    d, s, c = weights
    return {
        "colbert": colbert.tolist(),
        "sparse": sparse.tolist(),
        "dense": dense.tolist(),
        "sparse+dense": ((sparse * s + dense * d) / (s + d)).tolist(),
        "colbert+sparse+dense": ((colbert * c + sparse * s + dense * d) / (c + s + d)).tolist(),
    }


def start(
    pipeline: EmbeddingPipeline, queries: Side, passages: Side, to_host: ToHost, at_most: int | None
) -> Callable[[], tuple[Tensor, ...]]:
    """Starts the scores of pairs; what comes back waits for them: (pairs,) dense, sparse, colbert.

    Sparse vectors are scored on the host: their sizes, which it would have to wait for, are known there.
    """
    (q, q_sparse), (p, p_sparse) = (
        embedded(pipeline, side.ids, to_host, at_most) for side in (queries, passages)
    )
    (pairs,) = to_device(q.dense.device, torch.tensor([queries.rows, passages.rows]).T)
    dense = (q.dense[pairs[:, 0]] * p.dense[pairs[:, 1]]).sum(1)
    colbert = maxsim_packed(*packed(q.multi), *packed(p.multi), pairs, reduction="mean")
    arrive = to_host(dense.float(), colbert.float())

    def scores() -> tuple[Tensor, ...]:
        dense, colbert = arrive()
        sides = q_sparse()[queries.rows], p_sparse()[passages.rows]
        return dense, lexical_scores(*sides, aligned=True).float(), colbert

    return scores


def embedded(
    pipeline: EmbeddingPipeline, ids: list[list[int]], to_host: ToHost, at_most: int | None
) -> tuple[Vectors, Callable[[], Csr]]:
    """Dense and multi-vector embeddings on the model's device, and what waits for the sparse ones."""

    def leave(found: BatchVectors) -> tuple[Vectors, Callable[[], Vectors]]:
        sparse = replace(found, dense=None, multi=None)
        return replace(found, kept=None).vectors(), sparse.send(to_host)

    batches, parts = zip(*pipeline.run(ids, OUTPUTS, leave, at_most=at_most), strict=True)
    vectors, arriving = zip(*parts, strict=True)

    def sparse() -> Csr:
        arrived = [arrive() for arrive in arriving]
        return Vectors.collect(zip(batches, arrived, strict=True)).sparse

    return Vectors.collect(zip(batches, vectors, strict=True)), sparse


def packed(multi: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Multi-vectors end to end, and cu_seqlens."""
    return torch.cat(multi), to_device(multi[0].device, cu_seqlens_of([len(x) for x in multi]))[0]

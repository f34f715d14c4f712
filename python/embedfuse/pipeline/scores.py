"""Relevance scores of text pairs by BGE-M3's three embeddings."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from embedfuse.ops import Csr, lexical_scores, maxsim_packed
from embedfuse.packing import cu_seqlens_of
from embedfuse.pipeline.batches import delayed, prefetch_map
from embedfuse.pipeline.embeddings import OUTPUTS, BatchVectors, Vectors
from embedfuse.pipeline.pipeline import EmbeddingPipeline, length_of, windows
from embedfuse.pipeline.tokenize import check_texts
from embedfuse.transfers import ToHost, to_device


@dataclass(frozen=True)
class Side:
    """The queries or the passages of several pairs.

    Attributes:
        ids: token ids of the distinct texts.
        rows: the index of each pair's text in `ids`.
    """

    ids: list[list[int]]
    rows: list[int]


def score_pairs(
    pipeline: EmbeddingPipeline,
    pairs: Sequence[tuple[str, str]],
    weights: Sequence[float],
    max_query_length: int,
    max_passage_length: int,
    advance: Callable[[int], object] = lambda pairs: None,
    max_batch_tokens: int | None = None,
) -> dict[str, list[float]]:
    """FlagEmbedding's scores of (query, passage) pairs, under its keys.

    dense: q . p. sparse: sum over shared tokens of the product of their weights. colbert: mean over the
    query's tokens of the largest dot product with a passage token. sparse+dense and colbert+sparse+dense:
    means weighted by `weights`, in the order (dense, sparse, colbert).

    A text that occurs in several pairs of a window is embedded once. Scores are copied from a GPU while
    the next pairs are computed.

    Args:
        pipeline: of a model with all three outputs.
        pairs: (query, passage) texts.
        weights: of the dense, sparse and colbert score in the combined ones.
        max_query_length: tokens.
        max_passage_length: tokens.
        advance: called with the number of pairs that have been finished since the last call.
        max_batch_tokens: limits the tokens of one forward further than the budget does.
    """
    pipeline.check_outputs(OUTPUTS)
    longest = 16 * max(max_query_length, max_passage_length)
    limits = {"queries": max_query_length, "passages": max_passage_length}
    to_host = ToHost(pipeline.model.device)

    def tokenize(window: tuple[int, list[tuple[str, str]]]) -> list[Side]:
        start, window_pairs = window
        sides = []
        for side, (name, max_length) in enumerate(limits.items()):
            texts = [pair[side] for pair in window_pairs]
            check_texts(texts, name=name, start=start)
            index = {text: i for i, text in enumerate(dict.fromkeys(texts))}
            ids = pipeline.tokenize(list(index), max_length)
            sides.append(Side(ids, [index[text] for text in texts]))
        return sides

    def scores() -> Iterator[Callable[[], tuple[Tensor, ...]]]:
        cut = windows(pairs, lambda pair: sum(length_of(text, longest) for text in pair))
        for sides in prefetch_map(tokenize, cut):
            yield start_scores(pipeline, *sides, to_host, max_batch_tokens)

    parts = [(torch.zeros(0),) * 3]
    for wait in delayed(scores(), to_host.in_flight):
        parts.append(wait())
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


def start_scores(
    pipeline: EmbeddingPipeline,
    queries: Side,
    passages: Side,
    to_host: ToHost,
    max_batch_tokens: int | None,
) -> Callable[[], tuple[Tensor, ...]]:
    """Start computing the scores, and return a function that waits for (pairs,) dense, sparse, colbert.

    Sparse vectors are scored on the host, because a GPU would have to report their sizes first.
    """
    (q, q_sparse), (p, p_sparse) = (
        start_embeddings(pipeline, side.ids, to_host, max_batch_tokens)
        for side in (queries, passages)
    )
    (pairs,) = to_device(q.dense.device, torch.tensor([queries.rows, passages.rows]).T)
    dense = (q.dense[pairs[:, 0]] * p.dense[pairs[:, 1]]).sum(1)
    multi = *concatenate(q.multi), *concatenate(p.multi)
    colbert = maxsim_packed(*multi, pairs, reduction="mean")
    wait = to_host(dense.float(), colbert.float())

    def scores() -> tuple[Tensor, ...]:
        dense, colbert = wait()
        sides = q_sparse()[queries.rows], p_sparse()[passages.rows]
        return dense, lexical_scores(*sides, aligned=True).float(), colbert

    return scores


def start_embeddings(
    pipeline: EmbeddingPipeline,
    ids: list[list[int]],
    to_host: ToHost,
    max_batch_tokens: int | None,
) -> tuple[Vectors, Callable[[], Csr]]:
    """Dense and multi-vector embeddings on the device, and a function that waits for the sparse ones."""

    def finish(vectors: BatchVectors) -> tuple[Vectors, Callable[[], Vectors]]:
        sparse = replace(vectors, dense=None, multi=None)
        return replace(vectors, kept=None).vectors(), sparse.send(to_host)

    run = pipeline.run(ids, OUTPUTS, finish, max_batch_tokens=max_batch_tokens)
    batches, parts = zip(*run, strict=True)
    vectors, waits = zip(*parts, strict=True)

    def sparse() -> Csr:
        arrived = [wait() for wait in waits]
        return Vectors.collect(zip(batches, arrived, strict=True)).sparse

    return Vectors.collect(zip(batches, vectors, strict=True)), sparse


def concatenate(multi: list[Tensor]) -> tuple[Tensor, Tensor]:
    """All rows, and the cu_seqlens of the texts."""
    return torch.cat(multi), to_device(multi[0].device, cu_seqlens_of([len(x) for x in multi]))[0]

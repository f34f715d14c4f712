"""Late interaction: each query token's best dot product with a token of the document, summed.

Formula: s_ab = sum over the tokens i of query a of max over the tokens j of document b of q_ai . d_bj.
Limits: one dtype and device for both sides, or Int8 documents, which give no gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from embedfuse.ops.checks import (
    FLOATS,
    as_tensor,
    check_cu_seqlens,
    check_cu_seqlens_values,
    check_device,
    check_tensors,
    is_readable,
    needs_gradient,
)
from embedfuse.ops.maxsim.int8 import Int8
from embedfuse.ops.maxsim.op import OP, MaxSim
from embedfuse.ops.maxsim.spans import neighbours, padded_spans
from embedfuse.transfers import to_device

Texts = Tensor | Int8 | Sequence[Tensor] | Sequence[Int8]
REDUCTIONS = ("sum", "mean")
PADDINGS = ("exclude", "zero_vector")


def maxsim(
    q: Texts,
    d: Texts,
    q_mask: Tensor | None = None,
    d_mask: Tensor | None = None,
    *,
    reduction: str = "sum",
    normalize: bool = False,
    padding: str = "exclude",
    pairs: Tensor | None = None,
) -> Tensor:
    """s_ab = sum over the tokens i of query a of max over the tokens j of document b of q_ai . d_bj, for
    every query with every document.

    A query without tokens scores 0, and so does a document without. A NaN product makes the score NaN.
    Sums are fp32 (fp64 for fp64 input). Of equal products the first has the gradient; a zero vector has none.
    For Int8 every score is that of q with scale * values in fp32, and q is not rounded: a CPU that multiplies
    bytes finds by them the tokens that can hold a maximum, by a bound that no product passes, and multiplies
    those in fp32. Differentiable in q and d, with the same bits each time; keeps 4 Lq bytes a score.

    Source: ColBERT, arXiv 2004.12832.

    Args:
        q: (Nq, Lq, dim), or a list of (tokens, dim); tensors or arrays in float16, bfloat16, float32 or
            float64.
        d: (Nd, Ld, dim), of q's dtype, or Int8 of that shape (quantize_int8), or a list of (tokens, dim),
            which the CPU reads where they lie.
        q_mask, d_mask: (Nq, Lq) and (Nd, Ld), nonzero marks tokens; what they leave out is never read, even
            if it is NaN. A mask with holes between tokens costs a copy of its side, and any mask on a GPU is
            waited for.
        reduction: "sum", or "mean", which divides by the query's number of tokens (BGE-M3, arXiv 2402.03216).
        normalize: score x / max(|x|_2, 1e-12) in place of every token's x.
        padding: "exclude", the maximum is over tokens; "zero_vector", over the document's padding too, taken
            as zero vectors, so that no maximum is negative there (FlagEmbedding's BGE-M3).
        pairs: (P, 2) int64, query and document by number: these alone.

    Returns:
        (Nq, Nd), with pairs (P,), fp32 (fp64 for fp64 input).

    Raises:
        TypeError: for what is no tensor or array.
        ValueError: for shapes, dtypes, devices or names that do not fit; on the CPU for pairs out of range;
            for a mask with a list; and for Int8 if q requires grad.
    """
    if padding not in PADDINGS:
        raise ValueError(f"padding={padding!r}: accepted are {', '.join(PADDINGS)}")
    return _scores_of_sides("q", q, q_mask, "d", d, d_mask, padding, normalize, reduction, pairs)


def maxsim_packed(
    q: Tensor,
    cu_q: Tensor,
    d: Tensor | Int8,
    cu_d: Tensor,
    pairs: Tensor | None = None,
    *,
    reduction: str = "sum",
    normalize: bool = False,
) -> Tensor:
    """maxsim of texts that lie end to end, of every query with every document or of the pairs listed.

    Differentiable in q and d; what is kept for that grows with the longest query, whose length a GPU is
    waited for. Everything else is as in maxsim.

    Args:
        q: (tokens_q, dim).
        cu_q: (Nq + 1,) int32, 0 = first <= ... <= last = tokens_q: where each query starts, and the end.
        d: (tokens_d, dim), of q's dtype, or Int8 of that shape.
        cu_d: (Nd + 1,) int32, likewise.
        pairs: (P, 2) int64, query and document by number.
        reduction, normalize: as in maxsim.

    Returns:
        (Nq, Nd), with pairs (P,), fp32 (fp64 for fp64 input).

    Raises:
        TypeError: for sides that are no tensors, and for cu_q and cu_d that are none.
        ValueError: for shapes, dtypes, devices or names that do not fit, and on the CPU for impossible values
            of cu_q, cu_d or pairs.
    """
    for name, side in (("q", q), ("d", d)):
        if not isinstance(side, Tensor | Int8):
            raise TypeError(f"{name}: {type(side).__name__}; accepted are tensors, and Int8 for d")
        _check_side(name, side, q, "(tokens, dim)", 2)
    d, scale = _values_and_scale(d)
    if scale is not None:
        scale = scale.expand(len(d))
    spans = []
    for name, cu_seqlens, x in (("cu_q", cu_q, q), ("cu_d", cu_d, d)):
        check_cu_seqlens(name, cu_seqlens)
        check_device(name, cu_seqlens, "q", q)
        check_cu_seqlens_values(name, cu_seqlens, len(x))
        spans.append(neighbours(cu_seqlens.long()))
    if pairs is not None:
        _check_pairs(pairs, q, len(cu_q) - 1, len(cu_d) - 1)
    width = 0
    if needs_gradient(q, d) and len(cu_q) > 1:
        width = int(cu_q.diff().amax())
    sides = q, spans[0], [d], spans[1], scale
    return _scores(*sides, None, pairs, normalize, reduction, width)


def maxsim_rerank(
    query: Tensor,
    documents: Texts,
    top_k: int | None = None,
    *,
    reduction: str = "sum",
    normalize: bool = False,
) -> tuple[Tensor, Tensor]:
    """The documents of the largest maxsim with one query, best first.

    No gradient goes through the order.

    Args:
        query: (tokens, dim).
        documents: as d of maxsim.
        top_k: how many; None for all.
        reduction, normalize: as in maxsim.

    Returns:
        Scores (top_k,) fp32 and the numbers of the documents (top_k,) int64; of equal scores the first
        document comes first.

    Raises:
        ValueError: as maxsim does, and for top_k below 1.
    """
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: accepted are 1 and more, or None for all")
    query = as_tensor(query)
    if query.dim() != 2:
        raise ValueError(f"query: shape {tuple(query.shape)}; accepted is (tokens, dim)")
    sides = "query", query[None], None, "documents", documents, None
    scores = _scores_of_sides(*sides, "exclude", normalize, reduction)[0]
    values, indices = scores.sort(descending=True, stable=True)
    return values[:top_k], indices[:top_k]


def _scores_of_sides(
    q_name, q, q_mask, d_name, d, d_mask, padding: str, normalize: bool, reduction: str, pairs=None
) -> Tensor:
    if isinstance(q, Int8) or (isinstance(q, list | tuple) and any(isinstance(x, Int8) for x in q)):
        raise ValueError(f"{q_name}: Int8; accepted are tensors and arrays, Int8 for {d_name}")
    queries, width, query_spans, *_ = _rows(q_name, q, q_mask, None)
    query = queries[0] if len(queries) == 1 else torch.cat(queries)
    documents, _, document_spans, padded, scale = _rows(d_name, d, d_mask, query)
    if len(documents) > 1 and needs_gradient(query, *documents):
        documents = [torch.cat(documents)]
    if pairs is not None:
        _check_pairs(pairs, query, len(query_spans), len(document_spans))
    zero = padded if padding == "zero_vector" else None
    sides = query, query_spans, documents, document_spans, scale
    return _scores(*sides, zero, pairs, normalize, reduction, width)


def _rows(
    name: str, x: Texts, mask: Tensor | None, q: Tensor | None
) -> tuple[list[Tensor], int, Tensor, Tensor | None, Tensor | None]:
    """Matrices that hold the rows of the texts, the number of rows of the longest text, then as padded_spans.

    q: the tensor whose dtype, dim and device are accepted; None for queries, which set them.
    """
    if isinstance(x, list | tuple):
        if mask is not None:
            raise ValueError(f"{name}_mask: accepted is None where {name} is a {type(x).__name__}")
        return _rows_of_texts(name, x, q)
    if not isinstance(x, Int8):
        x = _as_array(name, x, "tensors, arrays, Int8, and lists of these")
    values, scale = _values_and_scale(x)
    _check_side(name, x, values if q is None else q, "(texts, tokens, dim)", 3)
    if mask is not None:
        mask = _as_array(f"{name}_mask", mask, "tensors and arrays")
    rows, spans, padded, scale = padded_spans(name, values, mask, scale)
    return [rows], values.shape[1], spans, padded, scale


def _as_array(name: str, x, accepted: str) -> Tensor:
    if not hasattr(x, "__array__"):
        raise TypeError(f"{name}: {type(x).__name__}; accepted are {accepted}")
    return as_tensor(x)


def _rows_of_texts(name: str, x: Sequence, q: Tensor | None):
    if not x and q is None:
        raise ValueError(f"{name}: no text; accepted are one or more, or a tensor (0, tokens, dim)")
    texts = [
        text
        if isinstance(text, Int8)
        else _as_array(f"{name}[{i}]", text, "tensors, arrays and Int8")
        for i, text in enumerate(x)
    ]
    like = _values_and_scale(texts[0])[0] if q is None else q
    for i, text in enumerate(texts):
        if isinstance(text, Int8) != isinstance(texts[0], Int8):
            raise ValueError(f"{name}[{i}]: Int8 and others; accepted are all or none")
        _check_side(f"{name}[{i}]", text, like, "(tokens, dim)", 2)
    parts = [_values_and_scale(text) for text in texts] or [(like[:0], None)]
    rows = [values for values, _ in parts]
    lengths = [text.shape[0] for text in rows]  # not len(): a tensor's takes microseconds
    ends = torch.tensor([0, *lengths], device="cpu").cumsum(0)
    (ends,) = to_device(like.device, ends)
    spans = neighbours(ends)[: len(texts)]
    scales = [s.expand(n) for (_, s), n in zip(parts, lengths, strict=True) if s is not None]
    return rows, max(lengths), spans, None, torch.cat(scales) if scales else None


def _values_and_scale(d: Tensor | Int8) -> tuple[Tensor, Tensor | None]:
    """The tensor of values, and the scale of Int8."""
    return (d.values, d.scale) if isinstance(d, Int8) else (d, None)


def _check_side(name: str, side: Tensor | Int8, q: Tensor, shape: str, dims: int) -> None:
    x, scale = _values_and_scale(side)
    if x.dim() != dims or x.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"{name}: shape {tuple(x.shape)}; accepted is {shape}, dim the same for q and d"
        )
    if scale is None and (x.dtype != q.dtype or x.dtype not in FLOATS):
        raise ValueError(
            f"{name}: {x.dtype} with {q.dtype}; accepted are float16, bfloat16, float32 and float64, "
            "the same for q and d, or Int8 for d"
        )
    check_device(name, x, "q", q)


def _check_pairs(pairs: Tensor, q: Tensor, queries: int, documents: int) -> None:
    check_tensors(pairs=pairs)
    if pairs.dtype != torch.int64 or pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(
            f"pairs: {pairs.dtype} of shape {tuple(pairs.shape)}; accepted is int64 (pairs, 2)"
        )
    check_device("pairs", pairs, "q", q)
    if not is_readable(pairs) or len(pairs) == 0:
        return
    limits = torch.tensor([queries, documents], device="cpu")
    if pairs.amin() < 0 or (pairs.amax(0) >= limits).any():
        raise ValueError(f"pairs: accepted are numbers below {queries} and {documents}, from 0")


def _scores(
    q, query_spans, documents, document_spans, scale, zero, pairs, normalize, reduction, width
) -> Tensor:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r}: accepted are {', '.join(REDUCTIONS)}")
    if scale is not None and needs_gradient(q):
        raise ValueError(
            "q: requires grad, which Int8 documents do not give; accepted is q.detach()"
        )
    if needs_gradient(q, *documents):
        sides = q, query_spans, documents[0], document_spans
        scores = MaxSim.apply(*sides, zero, pairs, normalize, max(width, 1))
    else:
        sides = q, query_spans, documents, document_spans
        scores = OP(*sides, scale, zero, pairs, normalize, 0)[0]
    if pairs is None:
        scores = scores.view(len(query_spans), len(document_spans))
    if reduction == "sum":
        return scores
    tokens = query_spans.diff(dim=1)[:, 0].clamp_min(1)
    return scores / (tokens[:, None] if pairs is None else tokens[pairs[:, 0]])

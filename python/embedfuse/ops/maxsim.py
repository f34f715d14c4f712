"""Late interaction: each query token's best dot product with a token of the document, summed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from embedfuse import native
from embedfuse.ops.cu_seqlens import check_layout, check_values
from embedfuse.ops.maxsim_op import OP, MaxSim
from embedfuse.ops.maxsim_spans import padded_spans

REDUCTIONS = ("sum", "mean")
PADDINGS = ("exclude", "zero_vector")


def maxsim(
    q: Tensor,
    d: Tensor,
    q_mask: Tensor | None = None,
    d_mask: Tensor | None = None,
    *,
    reduction: str = "sum",
    normalize: bool = False,
    padding: str = "exclude",
) -> Tensor:
    """s_ab = sum over the tokens i of query a of max over the tokens j of document b of q_ai . d_bj (ColBERT,
    arXiv 2004.12832), for every query with every document.

    q: (Nq, Lq, dim). d: (Nd, Ld, dim), of q's dtype.
    q_mask: (Nq, Lq). d_mask: (Nd, Ld). Nonzero marks tokens; what they leave out is never read, be it NaN. A
        mask with holes between tokens costs a copy of its side, and on a GPU any mask a wait for it.
    reduction: "mean" divides by the query's number of tokens (BGE-M3, arXiv 2402.03216).
    normalize: score x / max(|x|_2, 1e-12) in place of every token's x.
    padding: "exclude", the maximum is over tokens; "zero_vector", over the document's padding too, taken as
        zero vectors, so that no maximum is negative there (FlagEmbedding's BGE-M3).

    A query without tokens scores 0, and so does a document without. A NaN product makes the score NaN.
    Sums are fp32 (fp64 for fp64 input). Of equal products the first has the gradient; a zero vector has none.

    Returns (Nq, Nd), fp32. Differentiable in q and d, with the same bits each time; keeps 4 Nq Nd Lq bytes.
    Raises ValueError for shapes, dtypes, devices or names that do not fit.
    """
    if padding not in PADDINGS:
        raise ValueError(f"padding={padding!r}: accepted are {', '.join(PADDINGS)}")
    _check_sides(q, d, "(texts, tokens, dim)", 3)
    width = q.shape[1]
    q, query_spans, _ = padded_spans("q", q, q_mask)
    d, document_spans, padded = padded_spans("d", d, d_mask)
    zero = padded if padding == "zero_vector" else None
    return _scores(q, query_spans, d, document_spans, zero, None, normalize, reduction, width)


def maxsim_packed(
    q: Tensor,
    cu_q: Tensor,
    d: Tensor,
    cu_d: Tensor,
    pairs: Tensor | None = None,
    *,
    reduction: str = "sum",
    normalize: bool = False,
) -> Tensor:
    """maxsim of texts that lie end to end, of every query with every document or of the pairs listed.

    q: (tokens_q, dim). d: (tokens_d, dim), of q's dtype. cu_q, cu_d: (texts + 1,) int32, 0 = first <= ... <=
        tokens: where each text starts, and the end.
    pairs: (P, 2) int64, query and document by number.

    Returns (Nq, Nd), with pairs (P,), fp32. Differentiable in q and d; what is kept for that grows with the
    longest query, whose length a GPU is waited for.
    Raises ValueError for shapes, dtypes, devices or names that do not fit, and on the CPU for values of cu_q,
    cu_d or pairs that cannot be. Other arguments, and everything else, as in maxsim.
    """
    _check_sides(q, d, "(tokens, dim)", 2)
    spans = []
    for name, cu_seqlens, x in (("cu_q", cu_q, q), ("cu_d", cu_d, d)):
        check_layout(name, cu_seqlens)
        _check_device(name, cu_seqlens, q)
        check_values(name, cu_seqlens, len(x))
        spans.append(torch.stack((cu_seqlens[:-1], cu_seqlens[1:]), 1).long())
    if pairs is not None:
        _check_pairs(pairs, q, len(cu_q) - 1, len(cu_d) - 1)
    width = 0
    if _wants_gradient(q, d) and len(cu_q) > 1:
        width = int(cu_q.diff().amax())
    return _scores(q, spans[0], d, spans[1], None, pairs, normalize, reduction, width)


def maxsim_rerank(
    query: Tensor,
    documents: Tensor | Sequence[Tensor],
    top_k: int | None = None,
    *,
    reduction: str = "sum",
    normalize: bool = False,
) -> tuple[Tensor, Tensor]:
    """The documents of the largest maxsim with one query, best first.

    query: (tokens, dim). documents: (n, tokens, dim), or a sequence of (tokens, dim), which are laid end to
        end and not padded; tensors of query's dtype, or arrays. top_k: how many; default all.

    Returns scores (top_k,) fp32 and the documents' numbers (top_k,) int64; of equal scores the first document
    comes first. No gradient goes through the order. Raises ValueError as maxsim_packed does, and for top_k
    below 1. Other arguments as in maxsim.
    """
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: accepted are 1 and more, or None for all")
    query = torch.as_tensor(query)
    if query.dim() != 2:
        raise ValueError(f"query: shape {tuple(query.shape)}; accepted is (tokens, dim)")
    settings = {"reduction": reduction, "normalize": normalize}
    if hasattr(documents, "shape"):
        scores = maxsim(query[None], torch.as_tensor(documents), **settings)[0]
    else:
        documents = [torch.as_tensor(document) for document in documents]
        for i, document in enumerate(documents):
            wanted = (2, query.shape[1], query.dtype)
            if (document.dim(), document.shape[-1], document.dtype) != wanted:
                raise ValueError(
                    f"documents[{i}]: {document.dtype} of shape {tuple(document.shape)}; "
                    f"accepted is {query.dtype} of (tokens, {query.shape[1]})"
                )
        lengths = torch.tensor([0, *map(len, documents)])
        cu_d = lengths.cumsum(0).to(query.device, torch.int32)
        cu_q = torch.tensor([0, len(query)], dtype=torch.int32, device=query.device)
        rows = torch.cat(documents) if documents else query[:0]
        scores = maxsim_packed(query, cu_q, rows, cu_d, **settings)[0]
    values, indices = scores.sort(descending=True, stable=True)
    return values[:top_k], indices[:top_k]


def _check_sides(q: Tensor, d: Tensor, shape: str, dims: int) -> None:
    for name, x in (("q", q), ("d", d)):
        if x.dim() != dims or x.shape[-1] != q.shape[-1]:
            raise ValueError(
                f"{name}: shape {tuple(x.shape)}; accepted is {shape}, dim the same for q and d"
            )
        if x.dtype != q.dtype or x.dtype not in (*native.DTYPES, torch.float64):
            raise ValueError(
                f"{name}: {x.dtype}; accepted are float16, bfloat16, float32 and float64, "
                "the same for q and d"
            )
        _check_device(name, x, q)


def _check_device(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name}: on {x.device}; accepted is the device of q, {q.device}")


def _check_pairs(pairs: Tensor, q: Tensor, queries: int, documents: int) -> None:
    if pairs.dtype != torch.int64 or pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(
            f"pairs: {pairs.dtype} of shape {tuple(pairs.shape)}; accepted is int64 (pairs, 2)"
        )
    _check_device("pairs", pairs, q)
    if pairs.is_cuda or len(pairs) == 0:  # reading them would wait for the GPU
        return
    limits = torch.tensor([queries, documents])
    if pairs.amin() < 0 or (pairs.amax(0) >= limits).any():
        raise ValueError(f"pairs: accepted are numbers below {queries} and {documents}, from 0")


def _wants_gradient(q: Tensor, d: Tensor) -> bool:
    return torch.is_grad_enabled() and (q.requires_grad or d.requires_grad)


def _scores(q, query_spans, d, document_spans, zero, pairs, normalize, reduction, width) -> Tensor:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r}: accepted are {', '.join(REDUCTIONS)}")
    args = (q, query_spans, d, document_spans, zero, pairs, normalize)
    scores = MaxSim.apply(*args, max(width, 1)) if _wants_gradient(q, d) else OP(*args, 0)[0]
    if pairs is None:
        scores = scores.view(len(query_spans), len(document_spans))
    if reduction == "sum":
        return scores
    tokens = query_spans.diff(dim=1)[:, 0].clamp_min(1)
    return scores / (tokens[:, None] if pairs is None else tokens[pairs[:, 0]])

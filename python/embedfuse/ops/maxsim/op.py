"""The operator behind maxsim: texts as spans of rows, all pairs or those listed, and its gradient.

Formula: s_ab = sum over the rows i of query a of max over the rows j of document b of q_i . d_j.
Limits: the gradient needs one matrix of documents and none in int8; argmax takes 4 bytes for each query row
of a score.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from embedfuse import native
from embedfuse.ops.maxsim.int8 import quantize_int8
from embedfuse.ops.segment_sum import segment_sum
from embedfuse.registry import Cost, Op, triton_function

EPS = 1e-12

# Each text is a span of rows, *_spans (n, 2) int64: first row, row after the last. documents: matrices whose
# rows are numbered through; a text lies within one. scale (rows of documents,) fp32: these are
# int8, each times its scale. zero (documents,) bool: whether a zero vector counts as a further row.
# pairs (pairs, 2) int64: query, document; None: all, documents changing fastest. Returns scores (pairs,)
# and argmax (pairs, width): for each query row the row of the document that gave its maximum, -1 for none.
# width: rows of the longest query, or 0 for no argmax.
OP = Op(
    "maxsim(Tensor query, Tensor query_spans, Tensor[] documents, Tensor document_spans, Tensor? scale, "
    "Tensor? zero, Tensor? pairs, bool normalize, int width) -> (Tensor, Tensor)",
    "late interaction (MaxSim), int8 documents included",
    differentiable=True,
)


def listed_pairs(query_spans: Tensor, document_spans: Tensor, pairs: Tensor | None) -> Tensor:
    """(pairs, 2) query and document by number: `pairs`, or all of them where that is None."""
    if pairs is not None:
        return pairs
    numbers = (torch.arange(len(s), device=s.device) for s in (query_spans, document_spans))
    return torch.cartesian_prod(*numbers).view(-1, 2)


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.clamp_min(EPS), norm


@OP.reference
def _(query, query_spans, documents, document_spans, scale, zero, pairs, normalize, width):
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, document = query.to(dtype), torch.cat(documents).to(dtype)
    if scale is not None:
        document = document * scale[:, None]
    pairs = listed_pairs(query_spans, document_spans, pairs)
    scores = query.new_zeros(len(pairs))
    argmax = query_spans.new_full((len(pairs) if width else 0, width), -1, dtype=torch.int32)
    spans = query_spans.tolist(), document_spans.tolist()
    for p, (i, j) in enumerate(pairs.tolist()):
        q, d = query[slice(*spans[0][i])], document[slice(*spans[1][j])]
        if 0 in (len(q), len(d)):
            continue
        if normalize:
            q, d = _unit(q)[0], _unit(d)[0]
        best, place = (q @ d.T).max(1)
        if zero is not None and zero[j]:
            place = torch.where(best <= 0, -1, place)
            best = torch.where(best <= 0, 0, best)
        scores[p] = best.sum()
        if width:
            argmax[p, : len(q)] = place
    return scores, argmax


@OP.fake
def _(query, query_spans, documents, document_spans, scale, zero, pairs, normalize, width):
    every = query_spans.shape[0] * document_spans.shape[0]
    count = every if pairs is None else pairs.shape[0]
    return (
        query.new_empty(count, dtype=torch.promote_types(query.dtype, torch.float32)),
        query.new_empty((count if width else 0, width), dtype=torch.int32),
    )


class MaxSim(torch.autograd.Function):
    """dL/dq_i = sum over the pairs of g d_argmax, dL/dd_j = sum of g q_i over the maxima that j gave."""

    @staticmethod
    def forward(ctx, q, query_spans, d, document_spans, zero, pairs, normalize, width):
        sides = q, query_spans, [d], document_spans
        scores, argmax = OP(*sides, None, zero, pairs, normalize, width)
        ctx.save_for_backward(q, query_spans, d, document_spans, pairs, argmax)
        ctx.normalize = normalize
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, query_spans, d, document_spans, given, argmax = ctx.saved_tensors
        pairs = listed_pairs(query_spans, document_spans, given)
        rows_q = query_spans[pairs[:, 0], :1] + torch.arange(argmax.shape[1], device=q.device)
        rows_d = torch.where(argmax < 0, -1, document_spans[pairs[:, 1], :1] + argmax)
        weights = grad[:, None].expand(argmax.shape)
        of_q, of_d = _direction(q, ctx.normalize), _direction(d, ctx.normalize)
        grad_q = grad_d = None
        if ctx.needs_input_grad[0] and given is None and len(pairs):
            grad_q = _of_all_pairs(of_d, rows_d, weights, query_spans, len(q))
        elif ctx.needs_input_grad[0]:
            grad_q = _of_entries(of_d, rows_q, rows_d, weights, rows_d >= 0, len(q))
        if ctx.needs_input_grad[2]:
            grad_d = _of_entries(of_q, rows_d, rows_q, weights, rows_d >= 0, len(d))
        grad_q, grad_d = (_through(x, g, ctx.normalize) for x, g in ((q, grad_q), (d, grad_d)))
        return grad_q, None, grad_d, None, None, None, None, None


def _direction(x: Tensor, normalize: bool) -> Tensor:
    return _unit(x.to(torch.promote_types(x.dtype, torch.float32)))[0] if normalize else x


def _of_entries(other, rows, other_rows, weights, found, count: int) -> Tensor:
    """(count, depth): each entry that is found adds weight times a row of `other` to a row."""
    rows = torch.where(found, rows, count).reshape(-1)  # flatten has no rule for batched gradients
    # Half the passes of int64.
    rows, order = (rows.int() if count < 2**31 else rows).sort(stable=True)
    indptr = torch.searchsorted(rows, torch.arange(count + 1, device=rows.device, dtype=rows.dtype))
    return segment_sum(other, weights.reshape(-1)[order], other_rows.reshape(-1)[order], indptr)


def _of_all_pairs(d, rows_d, weights, query_spans, count: int) -> Tensor:
    """_of_entries for the rows of the queries, which lie one after the other: nothing has to be sorted.

    Entries (queries, documents, width) of a query row are put side by side. Places past the end of a query
    hold no row of a document, so they may count to any row.
    """
    queries, width = len(query_spans), rows_d.shape[1]
    documents = len(rows_d) // max(queries, 1)
    weights, rows_d = (
        x.reshape(queries, documents, width).mT.reshape(-1) for x in (weights, rows_d)
    )
    rows, starts = torch.arange(count + 1, device=d.device), query_spans[:, 0].contiguous()
    query = torch.searchsorted(starts, rows, right=True) - 1
    place = rows - starts[query.clamp_min(0)]
    indptr = (query * width + place.clamp_max(width)).clamp(0, queries * width) * documents
    return segment_sum(d, weights, rows_d, indptr)


def _through(x: Tensor, grad: Tensor | None, normalize: bool) -> Tensor | None:
    """The gradient to x, given that to its direction."""
    if grad is None:
        return None
    if normalize:
        y, norm = _unit(x.to(grad.dtype))
        # Below EPS the division is by a constant, so nothing is projected out.
        along = (y * grad).sum(1, keepdim=True) * (norm >= EPS)
        grad = (grad - y * along) / norm.clamp_min(EPS)
    return grad.to(x.dtype)


def _equal_strides(matrices: list[Tensor]) -> tuple[list[Tensor], int]:
    """The matrices with adjacent columns, copied where needed, and the stride that all their rows have."""
    if len(matrices) == 1 and matrices[0].stride(1) == 1:
        return matrices, matrices[0].stride(0)
    return [x.contiguous() for x in matrices], matrices[0].shape[1]


def _load_cpp():
    kernel = native.cpu().maxsim

    def run(query, query_spans, documents, document_spans, scale, zero, pairs, normalize, width):
        alive, sides = [], []  # alive: copies, until the kernel has run
        for matrices, spans in (([query], query_spans), (documents, document_spans)):
            matrices, stride = _equal_strides(matrices)
            places = torch.tensor([(x.data_ptr(), x.shape[0]) for x in matrices])
            spans, first = spans.contiguous(), matrices[0]
            alive += [matrices, places, spans]
            of_texts = (spans.data_ptr(), len(spans))
            sides.append(
                (places.data_ptr(), len(matrices), stride, first.element_size(), *of_texts)
            )
        scale, zero, pairs = (None if x is None else x.contiguous() for x in (scale, zero, pairs))
        count = len(query_spans) * len(document_spans) if pairs is None else len(pairs)
        scores = query.new_empty(count, dtype=torch.float32)
        argmax = query_spans.new_empty((count if width else 0, width), dtype=torch.int32)
        if count:
            kernel(
                *sides,
                native.DTYPES[query.dtype],
                0 if scale is None else scale.data_ptr(),
                query.shape[1],
                0 if zero is None else zero.data_ptr(),
                0 if pairs is None else pairs.data_ptr(),
                0 if pairs is None else count,
                normalize,
                scores.data_ptr(),
                argmax.data_ptr(),
                width,
            )
        return scores, argmax

    return run


OP.impl("cpp", _load_cpp)
OP.impl("triton", triton_function("maxsim:maxsim"))


@OP.samples
def _(device, dtype, size):
    generator = torch.Generator().manual_seed(0)

    def side(lengths, dim, gap=0):
        """Texts with `gap` unused rows of NaN after each."""
        ends = (torch.tensor([0, *lengths]) + gap).cumsum(0) - gap
        starts = ends[:-1] + gap
        x = torch.randn(int(ends[-1]) + gap, dim, generator=generator) / dim**0.5
        spans = torch.stack((starts, starts + torch.tensor(lengths, dtype=torch.int64)), 1)
        used = torch.zeros(len(x), dtype=torch.bool)
        for start, end in spans.tolist():
            used[start:end] = True
        x[~used] = float("nan")
        return x.to(device, dtype), spans.to(device)

    def call(
        queries, documents, zero=None, pairs=None, normalize=False, width=0, int8=False, parts=None
    ):
        numbers = None if pairs is None else torch.tensor(pairs, device=device).view(-1, 2)
        flags = None if zero is None else torch.tensor(zero, device=device)
        (rows, spans), scale = documents, None
        if int8:
            rows, scale = (x.to(device) for x in vars(quantize_int8(rows)).values())
        matrices = list(rows.split(parts or max(len(rows), 1)))
        return *queries, matrices, spans, scale, flags, numbers, normalize, width

    if size == "bench":
        return [
            call(side([32], 128), side([300] * 1000, 128)),
            call(side([32], 1024), side([300] * 100, 1024)),
            call(side([32] * 16, 128), side([300] * 128, 128), width=32),
            call(side([32], 128), side([300] * 1000, 128), int8=True),
            call(side([32], 1024), side([300] * 100, 1024), int8=True),
        ]
    queries, documents = side([5, 0, 33, 16, 1], 40), side([7, 130, 0, 1, 64], 40, gap=2)
    pairs = [[0, 1], [2, 1], [2, 0], [1, 4], [3, 2], [4, 3], [2, 1]]
    zero = [True, False, True, True, False]
    wide, columns = side([20, 50], 70), slice(10, 43)
    return [
        call(queries, documents),
        call(queries, documents, zero=zero, width=33),
        call(queries, documents, pairs=pairs, normalize=True, width=40),
        call(side([49, 100, 3], 129), side([40], 129, gap=1), normalize=True),
        call(side([3] * 40, 16), side([9, 1, 2], 16), zero=[False, True, True], width=3),
        call((wide[0][:, columns], wide[1]), (wide[0][:, columns], wide[1]), width=50),
        call(side([4, 17], 1030), side([40, 33], 1030), normalize=True, width=17),
        call(side([2], 8), side([3000], 8), width=2),
        call(side([], 8), side([3], 8)),
        call(side([3], 8), side([], 8), width=3),
        call(side([3, 2], 1), side([4], 1), pairs=[], width=3),
        call(queries, side([60, 0, 20, 40], 40), parts=60),
        call(queries, documents, int8=True),
        call(queries, documents, zero=zero, width=33, int8=True),
        call(queries, documents, pairs=pairs, normalize=True, width=40, int8=True),
        call(side([49, 3], 129), side([1100], 129, gap=1), int8=True, normalize=True),
        call(side([4, 17], 1030), side([400, 33], 1030), int8=True, width=17),
        call(queries, side([60, 0, 20, 40], 40), int8=True, parts=60),
        call(side([3], 8), side([], 8), int8=True),
    ]


@OP.cost
def _(query, query_spans, documents, document_spans, scale, zero, pairs, normalize, width):
    pairs = listed_pairs(query_spans, document_spans, pairs)
    rows = query_spans.diff(dim=1), document_spans.diff(dim=1)
    products = int((rows[0][pairs[:, 0]] * rows[1][pairs[:, 1]]).sum())
    widths = query.element_size(), 1 if scale is not None else query.element_size()
    read = sum(int(r.sum()) * query.shape[1] * w for r, w in zip(rows, widths, strict=True))
    return Cost(bytes=read + 4 * len(pairs) * (1 + width), flops=2 * products * query.shape[1])

"""Lexical matching: the dot product of sparse vectors over the token ids that they share.

Formula: s_qd = sum over the ids v that both hold of w_qv w_dv.
Limits: the gradient takes memory for every entry of the queries with every document; ids below 2^31.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from embedfuse import native
from embedfuse.ops.checks import FLOATS, needs_gradient
from embedfuse.ops.lexical.csr import Csr
from embedfuse.registry import Cost, Op, triton_function

OP = Op(
    "lexical_scores(Tensor query_weights, Tensor query_ids, Tensor query_indptr, "
    "Tensor document_weights, Tensor document_ids, Tensor document_indptr, bool aligned) -> Tensor",
    "scores of sparse vectors: dot product over shared token ids",
    differentiable=True,
)


def lexical_scores(queries: Csr, documents: Csr, *, aligned: bool = False) -> Tensor:
    """s_qd = sum over the ids v that both hold of w_qv w_dv.

    An id that only one of the two holds adds nothing, even if its weight is NaN. Differentiable in both
    weights; the gradient takes memory for every entry of the queries with every document.

    Source: FlagEmbedding's compute_lexical_matching_score.

    Args:
        queries: Csr of Nq rows, weights in float16, bfloat16, float32 or float64.
        documents: Csr of Nd rows, weights in the dtype of queries.
        aligned: score row i with row i alone, for as many queries as documents.

    Returns:
        (Nq, Nd), aligned (Nq,), fp32 (fp64 for fp64 weights).

    Raises:
        TypeError: where an argument is no Csr.
        ValueError: where dtypes, devices or, aligned, numbers of rows differ, and on the CPU for a Csr with
            impossible indptr or ids.
    """
    for name, side in (("queries", queries), ("documents", documents)):
        if not isinstance(side, Csr):
            raise TypeError(f"{name}: {type(side).__name__}; accepted is Csr")
    for name in ("dtype", "device"):
        got, wanted = getattr(documents.weights, name), getattr(queries.weights, name)
        if got != wanted:
            raise ValueError(
                f"documents: weights of {name} {got}; accepted is that of queries, {wanted}"
            )
    if queries.weights.dtype not in FLOATS:
        raise ValueError(
            f"queries: weights of dtype {queries.weights.dtype}; "
            "accepted are float16, bfloat16, float32 and float64"
        )
    if aligned and len(queries) != len(documents):
        raise ValueError(
            f"documents: {len(documents)} rows; accepted with aligned=True is that of queries, {len(queries)}"
        )
    args = (*_tensors(queries), *_tensors(documents), aligned)
    if needs_gradient(queries.weights, documents.weights):
        return _LexicalScores.apply(*args)
    return OP(*args)


def _tensors(csr: Csr) -> tuple[Tensor, Tensor, Tensor]:
    return csr.weights, csr.token_ids, csr.indptr


def _match(queries: Csr, documents: Csr, aligned: bool) -> tuple[Tensor, Tensor, Tensor]:
    """For each entry of the queries and each document, or the aligned one: the document's entry of that id.

    Returns the rows of the entries (entries,), then (entries, documents or 1) positions among the entries of
    the documents, and whether the id is there at all.
    """
    row = queries.rows()
    against = torch.arange(len(documents), device=row.device)[None]
    if aligned:
        against = row[:, None]
    wanted = (against << 32) + queries.token_ids[:, None]
    keys = (documents.rows() << 32) + documents.token_ids
    place = torch.searchsorted(keys, wanted)
    # After the last entry a key that nothing matches.
    return row, place, torch.nn.functional.pad(keys, (0, 1), value=-1)[place] == wanted


def _entries(weights: Tensor, place: Tensor, found: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(
        weights.to(torch.promote_types(weights.dtype, torch.float32)), (0, 1)
    )
    return torch.where(found, padded[place], 0)


@OP.reference
def _(*args):
    *args, aligned = args
    queries, documents = _csr(*args[:3]), _csr(*args[3:])
    row, place, found = _match(queries, documents, aligned)
    weights = _entries(documents.weights, place, found)
    # A product is dropped, not multiplied by zero: 0 * NaN would be NaN.
    products = torch.where(found, queries.weights.to(weights.dtype)[:, None] * weights, 0)
    scores = weights.new_zeros(len(queries), place.shape[1]).index_add(0, row, products)
    return scores[:, 0] if aligned else scores


def _csr(weights, token_ids, indptr) -> Csr:
    return Csr(indptr, token_ids, weights)


@OP.fake
def _(*args):
    weights, queries, documents = args[0], args[2].shape[0] - 1, args[5].shape[0] - 1
    shape = (queries,) if args[6] else (queries, documents)
    return weights.new_empty(shape, dtype=torch.promote_types(weights.dtype, torch.float32))


class _LexicalScores(torch.autograd.Function):
    """dL/dw_qv = sum over the documents d that hold v of g_qd w_dv; dL/dw_dv likewise."""

    @staticmethod
    def forward(ctx, *args):
        ctx.save_for_backward(*args[:6])
        ctx.aligned = args[6]
        return OP(*args)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        tensors = ctx.saved_tensors
        queries, documents = _csr(*tensors[:3]), _csr(*tensors[3:])
        row, place, found = _match(queries, documents, ctx.aligned)
        grad = torch.where(found, (grad[:, None] if ctx.aligned else grad)[row], 0)
        of_queries = of_documents = None
        if ctx.needs_input_grad[0]:
            products = grad * _entries(documents.weights, place, found)
            of_queries = products.sum(1).to(queries.weights.dtype)
        if ctx.needs_input_grad[3]:
            products = torch.where(found, grad * queries.weights[:, None], 0)
            of_documents = grad.new_zeros(len(documents.weights) + 1)
            of_documents.index_add_(0, place.flatten(), products.flatten())
            of_documents = of_documents[:-1].to(documents.weights.dtype)
        return of_queries, None, None, of_documents, None, None, None


def _load_cpp():
    kernel = native.cpu().lexical_scores

    def run(*args):
        *tensors, aligned = args
        tensors[0], tensors[3] = tensors[0].float(), tensors[3].float()
        tensors = [tensor.contiguous() for tensor in tensors]
        queries, documents = (len(tensors[i]) - 1 for i in (2, 5))
        shape = (queries,) if aligned else (queries, documents)
        out = tensors[0].new_empty(shape)
        addresses = [tensor.data_ptr() for tensor in tensors]
        kernel(
            *addresses[:3],
            queries,
            len(tensors[0]),
            *addresses[3:],
            documents,
            len(tensors[3]),
            aligned,
            out.data_ptr(),
        )
        return out

    return run


OP.impl("cpp", _load_cpp)
OP.impl("triton", triton_function("lexical:lexical_scores"))


@OP.samples
def _(device, dtype, size):
    generator = torch.Generator().manual_seed(0)

    def csr(lengths, vocabulary, step=1):
        rows = [torch.randperm(vocabulary, generator=generator)[:n].sort().values for n in lengths]
        ids = torch.cat([torch.zeros(0, dtype=torch.int64), *rows])
        weights = torch.rand(len(ids) * step, generator=generator).add(0.01).to(device, dtype)
        indptr = torch.tensor([0, *lengths]).cumsum(0)
        return weights[::step], ids.to(device), indptr.to(device)

    if size == "bench":
        queries, documents = csr([16] * 64, 30_000), csr([300] * 1000, 30_000)
        return [
            (*csr([16], 30_000), *documents, False),
            (*queries, *documents, False),
            (*documents, *documents, True),
        ]
    queries, documents = csr([3, 0, 8, 130], 200), csr([5, 0, 150, 9], 200)
    samples: list[tuple] = [
        (*queries, *documents, False),
        (*queries, *documents, True),
        (*csr([40], 50), *csr([1100, 1, 0], 2000), False),
        (*csr([1, 7, 30], 40, step=2), *csr([20, 30, 1], 40, step=3), True),
        (*csr([], 9), *documents, False),
        (*queries, *csr([], 9), False),
        (*csr([0, 0], 9), *csr([0, 0], 9), True),
        (*csr([4, 9], 10), *csr([3] * 5, 10), False),
    ]
    weights, *rest = documents
    samples.append((*queries, torch.where(weights > 0.8, float("nan"), weights), *rest, False))
    return samples


@OP.cost
def _(*args):
    queries, documents = args[:3], args[3:6]
    rows, entries = len(queries[2]) - 1, len(documents[0])
    pairs = entries if args[6] else rows * entries
    scores = rows if args[6] else rows * (len(documents[2]) - 1)
    return Cost(bytes=sum(t.nbytes for t in (*queries, *documents)) + 4 * scores, flops=2 * pairs)

"""Token weights to one vector over the vocabulary per text: the maximum over the tokens of equal id.

Formula: x_bv = max over the tokens t of text b with id v of max(w_t, 0), NaN largest.
Limits: ids below the vocabulary; on a GPU others end the process' use of it, as torch's own index_put does.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from embedfuse import native
from embedfuse.ops.cu_seqlens import sequence_of
from embedfuse.ops.lexical import kept
from embedfuse.registry import Cost, Op

OP = Op(
    "sparse_dense(Tensor token_weights, Tensor input_ids, Tensor cu_seqlens, int[] excluded, int vocabulary) "
    "-> Tensor",
    "token weights to one vector over the vocabulary per text",
    differentiable=True,
)


def of_kept(
    find_kept: Callable,
    token_weights: Tensor,
    input_ids: Tensor,
    cu_seqlens: Tensor,
    excluded: list[int],
    vocabulary: int,
) -> Tensor:
    """The op by torch, from the tokens that `find_kept`, a version of kept.OP, finds. Differentiable.

    Where `index` has no token zero is added to id 0 of the last row, so that no shape depends on values.
    """
    batch = len(cu_seqlens) - 1
    index, indptr, _ = find_kept(token_weights.detach(), input_ids, cu_seqlens, excluded)
    out = token_weights.new_zeros(batch, vocabulary)
    if not len(index) or not batch:
        return out
    is_entry, index = index >= 0, index.clamp_min(0)
    ids = torch.where(is_entry, input_ids.index_select(0, index), 0)
    if ids.is_cpu and (largest := int(ids.max())) >= vocabulary:
        raise ValueError(f"input_ids: {largest}; accepted are ids below vocabulary, {vocabulary}")
    weights = torch.where(is_entry, token_weights.index_select(0, index), 0)
    row = sequence_of(indptr, len(ids)).clamp_max(batch - 1)
    return out.index_put((row, ids), weights, accumulate=True)


OP.reference(functools.partial(of_kept, kept.by_torch))


@OP.fake
def _(token_weights, input_ids, cu_seqlens, excluded, vocabulary):
    return token_weights.new_empty(cu_seqlens.shape[0] - 1, vocabulary)


def _load_cuda():
    kernel = native.cuda().sparse_dense

    def run(token_weights, input_ids, cu_seqlens, excluded, vocabulary):
        token_weights, input_ids = token_weights.contiguous(), input_ids.contiguous()
        cu_seqlens, batch = cu_seqlens.contiguous(), len(cu_seqlens) - 1
        out = token_weights.new_zeros(batch, vocabulary)
        with torch.cuda.device(out.device):
            kernel(
                token_weights.data_ptr(),
                native.DTYPES[token_weights.dtype],
                input_ids.data_ptr(),
                cu_seqlens.data_ptr(),
                len(input_ids),
                batch,
                excluded,
                vocabulary,
                out.data_ptr(),
                torch.cuda.current_stream().cuda_stream,
            )
        return out

    return run


OP.impl("cpp", lambda: functools.partial(of_kept, kept.load_cpp()))
OP.impl("cuda", _load_cuda)


@OP.samples
def _(device, dtype, size):
    """Those of kept.OP, with ids that a matrix has room for."""
    vocabulary = 250_002 if size == "bench" else 401
    samples = kept.make_samples(device, dtype, size)
    return [
        (weights, ids % vocabulary, cu_seqlens, excluded, vocabulary)
        for weights, ids, cu_seqlens, excluded in samples
    ]


@OP.cost
def _(token_weights, input_ids, cu_seqlens, excluded, vocabulary):
    written = (len(cu_seqlens) - 1) * vocabulary * token_weights.element_size()
    inputs = (token_weights, input_ids, cu_seqlens)
    return Cost(bytes=written + sum(x.nbytes for x in inputs), flops=0)

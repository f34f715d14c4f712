"""Weighted sums of rows: a sparse matrix in compressed rows times a dense matrix.

Formula: out_r = sum over k in [indptr[r], indptr[r + 1]) of weights[k] x[index[k]]; none of index[k] < 0.
Limits: no gradient; the C++ kernel copies x where the columns of a row are not adjacent.
"""

import torch
from torch import Tensor

from embedfuse import native
from embedfuse.ops.checks import check_tensors
from embedfuse.registry import Cost, Op, triton_function

OP = Op(
    "segment_sum(Tensor x, Tensor weights, Tensor index, Tensor indptr) -> Tensor",
    "weighted sums of rows: CSR matrix times dense matrix (gradient of maxsim)",
)


def segment_sum(x: Tensor, weights: Tensor, index: Tensor, indptr: Tensor) -> Tensor:
    """out_r = sum over k in [indptr[r], indptr[r + 1]) of weights[k] x[index[k]].

    Always with the same bits. No gradient.

    Args:
        x: (rows, depth), float16, bfloat16, float32 or float64.
        weights: (entries,) fp32 (fp64 with fp64 x), on x's device, as all that follow.
        index: (entries,) int64, rows of x; an entry whose index is negative adds nothing.
        indptr: (segments + 1,) int64, 0 <= first <= ... <= entries.

    Returns:
        (segments, depth), in the dtype of weights.

    Raises:
        TypeError: where an argument is no tensor.
        ValueError: for shapes or dtypes that do not fit, and on the CPU for an index that is no row of x.
    """
    check_tensors(x=x, weights=weights, index=index, indptr=indptr)
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.dim() != 2:
        raise ValueError(f"x: shape {tuple(x.shape)}; accepted is (rows, depth)")
    for name, tensor, wanted in (
        ("weights", weights, dtype),
        ("index", index, torch.int64),
        ("indptr", indptr, torch.int64),
    ):
        if tensor.dim() != 1 or (tensor.dtype, tensor.device) != (wanted, x.device):
            raise ValueError(
                f"{name}: {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}; "
                f"accepted is {wanted} of one dimension on {x.device}"
            )
    if len(index) != len(weights):
        raise ValueError(
            f"index: {len(index)} entries; accepted is that of weights, {len(weights)}"
        )
    if len(indptr) == 0:
        raise ValueError("indptr: empty; accepted is (segments + 1,)")
    return OP(x, weights, index, indptr)


@OP.reference
def _(x, weights, index, indptr):
    out = weights.new_zeros(len(indptr) - 1, x.shape[1])
    bounds = indptr.tolist()
    for r in range(len(out)):
        entries = slice(*bounds[r : r + 2])
        kept = index[entries] >= 0
        out[r] = (weights[entries][kept, None] * x[index[entries][kept]]).sum(0)
    return out


@OP.fake
def _(x, weights, index, indptr):
    return weights.new_empty(indptr.shape[0] - 1, x.shape[1])


def _load_cpp():
    kernel = native.cpu().segment_sum

    def run(x, weights, index, indptr):
        if x.stride(-1) != 1:
            x = x.contiguous()
        weights, index, indptr = (t.contiguous() for t in (weights, index, indptr))
        out = weights.new_empty(len(indptr) - 1, x.shape[1])
        kernel(
            x.data_ptr(),
            native.DTYPES[x.dtype],
            x.stride(0),
            *x.shape,
            weights.data_ptr(),
            index.data_ptr(),
            len(index),
            indptr.data_ptr(),
            len(out),
            out.data_ptr(),
        )
        return out

    return run


OP.impl("cpp", _load_cpp)
OP.impl("triton", triton_function("segment_sum:segment_sum"))


@OP.samples
def _(device, dtype, size):
    generator = torch.Generator().manual_seed(0)

    def sample(rows, depth, lengths, columns=slice(None)):
        x = torch.randn(rows, depth, generator=generator)[:, columns].to(device, dtype)
        indptr = torch.tensor([0, *lengths]).cumsum(0)
        entries = int(indptr[-1])
        weights = torch.randn(entries, generator=generator).to(device)
        index = torch.randint(-(rows // 4), max(rows, 1), (entries,), generator=generator).to(
            device
        )
        return x, weights, index, indptr.to(device)

    if size == "bench":
        return [sample(128 * 300, 128, [128] * 4096)]
    return [
        sample(7, 37, [3, 0, 1, 9, 2]),
        sample(50, 100, [4, 70, 1, 0], slice(10, 74)),
        sample(20, 12, [5, 5], slice(None, None, 2)),
        sample(3, 1, [2]),
        sample(0, 8, [0, 0]),
        sample(9, 300, [1] * 400),
    ]


@OP.cost
def _(x, weights, index, indptr):
    read = min(len(index), len(x)) * x.shape[1] * x.element_size()
    out_bytes = (len(indptr) - 1) * x.shape[1] * 4
    return Cost(
        bytes=read + weights.nbytes + index.nbytes + indptr.nbytes + out_bytes,
        flops=2 * len(index) * x.shape[1],
    )

"""Softmax attention within each of many sequences that lie end to end.

Formula: out_i = sum_j softmax_j(q_i . k_j scale) v_j over the keys j of the query's sequence that it attends
to.
Limits: head_dim <= 256; no gradient, no dropout, no bias of scores.
"""

import torch
from torch import Tensor

from embedfuse import native
from embedfuse.ops.checks import (
    check_cu_seqlens,
    check_cu_seqlens_values,
    check_device,
    check_like,
    check_tensors,
    needs_gradient,
)
from embedfuse.registry import Cost, Op, triton_function

OP = Op(
    "varlen_attention(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, "
    "Tensor cu_seqlens_k, float scale, bool causal, int? window) -> Tensor"
)
MAX_HEAD_DIM = 256  # kMaxHeadDim in csrc/cpu/varlen_attention.h


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    causal: bool = False,
    window: int | None = None,
) -> Tensor:
    """out_i = sum_j softmax_j(q_i . k_j scale) v_j over the keys j of the query's sequence that it attends
    to.

    These are all keys; with `causal` those up to i, where the last query row of a sequence has the position
    of its last key; with `window` too those of i - window < j <= i. A sequence may have fewer query rows than
    keys (the last layer of a tower needs one row of each); query rows without any key give zeros. Scores and
    probabilities are fp32 whatever the inputs are (fp64 for fp64). No gradient: for inference.

    Source: online softmax, arXiv 1805.02867; grouped-query attention, arXiv 2305.13245; sliding
        window, arXiv 2310.06825; the argument layout is FlashAttention's varlen one.

    Args:
        query: (tokens_q, heads, head_dim), head_dim <= 256; float16, bfloat16, float32 or float64, of any
            strides: column slices of one QKV product are read where they lie.
        key, value: (tokens_k, kv_heads, head_dim), of query's dtype and device, of any strides; kv_heads a
            divisor of heads: head h reads key head h // (heads / kv_heads), as in grouped-query attention.
        cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32, 0 = first <= ... <= last = tokens: where the query
            rows and the keys of each sequence start, and the end.
        scale: factor of the scores, usually head_dim ** -0.5.
        causal: whether a query row attends to keys up to its position alone.
        window: number of keys, at least 1, needs `causal`; None for all up to i.

    Returns:
        (tokens_q, heads, head_dim), of query's dtype.

    Raises:
        TypeError: where an argument is no tensor.
        ValueError: for shapes, dtypes or devices that do not fit.
        RuntimeError: where query, key or value requires a gradient.
    """
    _check(query, key, value, cu_seqlens_q, cu_seqlens_k)
    if window is not None and not (causal and window >= 1):
        raise ValueError(
            f"window={window}, causal={causal}; accepted is a window of at least 1 with causal=True"
        )
    return OP(query, key, value, cu_seqlens_q, cu_seqlens_k, scale, causal, window)


def _check(query, key, value, cu_seqlens_q, cu_seqlens_k) -> None:
    check_tensors(query=query, key=key, value=value)
    if query.dim() != 3:
        raise ValueError(
            f"query: shape {tuple(query.shape)}; accepted is (tokens_q, heads, head_dim)"
        )
    if query.shape[2] > MAX_HEAD_DIM:
        raise ValueError(f"query: head_dim {query.shape[2]}; accepted are 1 to {MAX_HEAD_DIM}")
    heads, head_dim = query.shape[1:]
    for name, tensor in (("key", key), ("value", value)):
        fits = tensor.dim() == 3 and tensor.shape == key.shape and tensor.shape[2] == head_dim
        if not fits or tensor.shape[1] == 0 or heads % tensor.shape[1]:
            raise ValueError(
                f"{name}: shape {tuple(tensor.shape)}; accepted is (tokens_k, kv_heads, {head_dim}) "
                f"for key and value alike, kv_heads a divisor of {heads}"
            )
        check_like(name, tensor, "query", query)
    for name, tensor in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_cu_seqlens(name, tensor)
        check_device(name, tensor, "query", query)
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        raise ValueError(
            f"cu_seqlens_k: {len(cu_seqlens_k) - 1} sequences; "
            f"accepted is the number in cu_seqlens_q, {len(cu_seqlens_q) - 1}"
        )
    if needs_gradient(query, key, value):
        raise RuntimeError(
            "query, key, value: one requires a gradient, which varlen_attention has not; "
            "call it under torch.no_grad()"
        )


def visible(rows: int, keys: int, causal: bool, window: int | None, device) -> Tensor:
    """(rows, keys): which keys of a sequence each of its query rows attends to."""
    last = torch.arange(keys - rows, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)
    attended = key <= last if causal else (key >= 0).expand(rows, keys)
    return attended if window is None else attended & (key > last - window)


@OP.reference
def _(query, key, value, cu_seqlens_q, cu_seqlens_k, scale, causal, window):
    check_cu_seqlens_values("cu_seqlens_q", cu_seqlens_q, len(query))
    check_cu_seqlens_values("cu_seqlens_k", cu_seqlens_k, len(key))
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = query.new_empty(query.shape)
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    group = query.shape[1] // key.shape[1]
    for b in range(len(bounds_q) - 1):
        rows, keys = slice(*bounds_q[b : b + 2]), slice(*bounds_k[b : b + 2])
        q, k, v = (x.to(dtype).transpose(0, 1) for x in (query[rows], key[keys], value[keys]))
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        attended = visible(q.shape[1], k.shape[1], causal, window, query.device)
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(~attended, float("-inf"))
        probabilities = scores.softmax(-1).masked_fill(~attended.any(1)[:, None], 0)
        out[rows] = (probabilities @ v).transpose(0, 1).to(query.dtype)
    return out


@OP.fake
def _(query, key, value, cu_seqlens_q, cu_seqlens_k, scale, causal, window):
    return query.new_empty(query.shape)


def _load_cpp():
    kernel = native.cpu().varlen_attention

    def run(query, key, value, cu_seqlens_q, cu_seqlens_k, scale, causal, window):
        heads, head_dim = query.shape[1:]
        inputs = [x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value)]
        bounds = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
        out = query.new_empty(query.shape)
        kernel(
            *((x.data_ptr(), x.stride(0), x.stride(1)) for x in inputs),
            native.DTYPES[query.dtype],
            bounds[0].data_ptr(),
            len(query),
            bounds[1].data_ptr(),
            len(key),
            len(cu_seqlens_q) - 1,
            heads,
            key.shape[1],
            head_dim,
            scale,
            causal,
            window or 0,
            out.data_ptr(),
        )
        return out

    return run


OP.impl("cpp", _load_cpp)
OP.impl("triton", triton_function("varlen_attention:varlen_attention"))


@OP.samples
def _(device, dtype, size):
    generator = torch.Generator().manual_seed(0)

    def sample(lengths_q, lengths_k, heads, head_dim, group=1, causal=False, window=None):
        """The column slices of one fused product; query rows from one with as many rows as needed."""
        columns = [heads, heads // group, heads // group]
        fused = [
            torch.randn(sum(n), sum(columns), head_dim, generator=generator).to(device, dtype)
            for n in (lengths_q, lengths_k)
        ]
        query = fused[0][:, :heads]
        _, key, value = fused[1].split(columns, 1)
        bounds = (
            torch.tensor([0, *n]).cumsum(0).to(device, torch.int32) for n in (lengths_q, lengths_k)
        )
        return query, key, value, *bounds, head_dim**-0.5, causal, window

    if size == "bench":
        texts = [
            8,
            21,
            300,
            34,
            55,
            13,
            89,
            144,
            40,
            60,
            27,
            17,
            75,
            48,
            33,
            66,
            110,
            52,
            30,
            41,
            90,
            57,
        ]
        one_each = [1] * len(texts)
        return [
            sample(texts, texts, 16, 64),
            sample([512] * 4, [512] * 4, 16, 64),
            sample(one_each, texts, 16, 64),
            sample([512] * 4, [512] * 4, 16, 128, 4, causal=True),
        ]
    mixed = [5, 0, 1, 17, 64, 33]
    return [
        sample(mixed, mixed, 3, 64),
        sample([1, 1, 1], [70, 1, 128], 2, 32),
        sample([130, 3], [130, 3], 2, 128),
        sample(
            [2, 0, 4, 3], [65, 9, 0, 3], 2, 37
        ),  # query rows without keys, keys without query rows
        sample([257], [257], 1, 256),
        sample([9, 20], [9, 20], 2, 1),
        sample([16, 31], [63, 129], 1, 6),
        sample([], [], 2, 8),
        sample(mixed, mixed, 6, 40, 3, causal=True),
        sample([130, 70, 1], [130, 70, 1], 2, 16, causal=True, window=20),
        sample([1, 40, 5, 3], [90, 100, 2, 3], 4, 64, 4, causal=True, window=33),
        sample([1, 1, 7], [70, 1, 3], 2, 8, 2, causal=True),
    ]


@OP.cost
def _(query, key, value, cu_seqlens_q, cu_seqlens_k, scale, causal, window):
    lengths = zip(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist(), strict=True)
    pairs = sum(int(visible(*n, causal, window, "cpu").sum()) for n in lengths)
    elements = 2 * query.numel() + key.numel() + value.numel()
    return Cost(
        bytes=elements * query.element_size(), flops=4 * pairs * query.shape[1] * query.shape[2]
    )

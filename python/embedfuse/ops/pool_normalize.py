"""Pooling of token states to one vector per sequence, and its L2 normalisation, in one pass.

Formula: p_b = sum_t w_bt h_bt, out_b = p_b / max(|p_b|_2, 1e-12).
Limits: the kernels copy states where the columns of a token are not adjacent, and masks and cu_seqlens that
are not contiguous.
"""

import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from embedfuse import native
from embedfuse.ops.checks import (
    check_cu_seqlens_values,
    check_floating,
    check_tokens,
    needs_gradient,
)
from embedfuse.ops.cu_seqlens import sequence_of
from embedfuse.registry import Cost, Op, triton_function

# Order = codes of enum Pooling in csrc/include/embedfuse/args.h.
POOLINGS = ("cls", "last", "mean", "weighted_mean")
EPS = 1e-12
_MASK_DTYPES = (torch.int64, torch.int32, torch.bool)  # those that the kernels read

OP = Op(
    "pool_normalize(Tensor hidden_states, Tensor? cu_seqlens, Tensor? attention_mask, "
    "str pooling, bool normalize, ScalarType out_dtype) -> (Tensor, Tensor)",
    "pooling of hidden states to one vector per text, and L2 normalisation",
    differentiable=True,
)


def pool_normalize(
    hidden_states: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    attention_mask: Tensor | None = None,
    pooling: str = "mean",
    normalize: bool = True,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """One vector per sequence: p_b = sum_t w_bt h_bt, then p_b / max(|p_b|_2, 1e-12).

    The weights w over the n tokens of a sequence, t = 1..n:
      "cls"            1 for the first token, else 0
      "last"           1 for the last token, else 0 (EOS pooling of E5-mistral, arXiv 2401.00368)
      "mean"           1 / n
      "weighted_mean"  t / (1 + 2 + ... + n) (SGPT, arXiv 2202.08904)
    A sequence without tokens gives the zero vector. Sums are fp32 (fp64 for fp64 input). Differentiable in
    hidden_states.

    Args:
        hidden_states: (tokens, hidden) with `cu_seqlens`, sequences end to end; or (batch, length, hidden).
            float16, bfloat16, float32 or float64.
        cu_seqlens: (batch + 1,) int32, 0 = first <= ... <= last = tokens: where each sequence starts, and the
            end.
        attention_mask: (batch, length), nonzero marks tokens; padding may be on either side. What it leaves
            out is never read, even if it is NaN. For "weighted_mean", t counts from the first token on,
            tokens left out in the middle included (as in sentence-transformers).
        pooling: "cls", "last", "mean" or "weighted_mean".
        normalize: whether the vectors are divided by their norm.
        out_dtype: dtype of the result; None for that of hidden_states. float64 only from float64.

    Returns:
        (batch, hidden), of out_dtype.

    Raises:
        TypeError: for dtypes that are not accepted, and where cu_seqlens or attention_mask is no tensor.
        ValueError: for shapes, devices or names that do not fit.
    """
    out_dtype = out_dtype or hidden_states.dtype
    _check(hidden_states, cu_seqlens, attention_mask, pooling, out_dtype)
    if attention_mask is not None and attention_mask.dtype not in _MASK_DTYPES:
        attention_mask = attention_mask != 0
    if needs_gradient(hidden_states):
        return _PoolNormalize.apply(
            hidden_states, cu_seqlens, attention_mask, pooling, normalize, out_dtype
        )
    return OP(hidden_states, cu_seqlens, attention_mask, pooling, normalize, out_dtype)[0]


def _check(hidden_states, cu_seqlens, attention_mask, pooling, out_dtype) -> None:
    if pooling not in POOLINGS:
        raise ValueError(f"pooling={pooling!r}: accepted are {', '.join(POOLINGS)}")
    check_floating("hidden_states", hidden_states.dtype, TypeError)
    check_floating("out_dtype", out_dtype, TypeError)
    if out_dtype == torch.float64 != hidden_states.dtype:
        raise TypeError(
            f"out_dtype: float64; accepted only for float64 hidden_states, not {hidden_states.dtype}"
        )
    check_tokens("hidden_states", hidden_states, cu_seqlens, attention_mask, "hidden")


def _token_weights(
    like: Tensor, cu_seqlens, attention_mask, pooling: str
) -> tuple[Tensor, Tensor | None]:
    """Weights w in the accumulation dtype and, packed, the sequence of each token.

    Padded: (batch, length). Packed: (tokens,).
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if cu_seqlens is not None:
        row = torch.arange(like.shape[0], device=like.device)
        sequence = sequence_of(cu_seqlens, like.shape[0])
        start, end = cu_seqlens[sequence], cu_seqlens[sequence + 1]
        n = (end - start).to(dtype)
        weights = {
            "cls": lambda: (row == start).to(dtype),
            "last": lambda: (row == end - 1).to(dtype),
            "mean": lambda: 1 / n,
            "weighted_mean": lambda: (row - start + 1).to(dtype) * 2 / (n * (n + 1)),
        }
        return weights[pooling](), sequence
    if attention_mask is None:
        attention_mask = torch.ones(like.shape[:2], dtype=torch.bool, device=like.device)
    keep = attention_mask != 0
    length = keep.shape[1]
    row = torch.arange(length, device=like.device)
    first = torch.where(keep, row, length).amin(1, keepdim=True) if length else row[None]
    last = torch.where(keep, row, -1).amax(1, keepdim=True) if length else row[None]
    weights = {
        "cls": lambda: row == first,
        "last": lambda: row == last,
        "mean": lambda: keep,
        "weighted_mean": lambda: keep * (row - first + 1),
    }[pooling]().to(dtype)
    return weights / weights.sum(1, keepdim=True).clamp_min(1), None


@OP.reference
def _(hidden_states, cu_seqlens, attention_mask, pooling, normalize, out_dtype):
    if cu_seqlens is not None:
        check_cu_seqlens_values("cu_seqlens", cu_seqlens, len(hidden_states))
    weights, sequence = _token_weights(hidden_states, cu_seqlens, attention_mask, pooling)
    weights = weights[..., None]
    # A row of weight 0 is left out, not multiplied: 0 * NaN would be NaN.
    weighted = torch.where(weights != 0, hidden_states.to(weights.dtype) * weights, 0)
    if cu_seqlens is None or sequence is None:
        pooled = weighted.sum(1)
    else:
        pooled = weighted.new_zeros(len(cu_seqlens) - 1, hidden_states.shape[1])
        pooled.index_add_(0, sequence, weighted)
    # In fp64, because fp32 has no squares from 2^128 on.
    norm = torch.linalg.vector_norm(pooled, dim=-1, dtype=torch.float64)
    unit = pooled / norm[:, None].clamp_min(EPS) if normalize else pooled
    return unit.to(out_dtype), norm.to(pooled.dtype)


@OP.fake
def _(hidden_states, cu_seqlens, attention_mask, pooling, normalize, out_dtype):
    batch = hidden_states.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    norm_dtype = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
    return (
        hidden_states.new_empty(batch, hidden_states.shape[-1], dtype=out_dtype),
        hidden_states.new_empty(batch, dtype=norm_dtype),
    )


class _PoolNormalize(torch.autograd.Function):
    """dL/dh_t = w_t g, with g = (dL/dy - y (y . dL/dy)) / |p| where y = p / |p| was normalised."""

    @staticmethod
    def forward(ctx, hidden_states, cu_seqlens, attention_mask, pooling, normalize, out_dtype):
        out, norm = OP(hidden_states, cu_seqlens, attention_mask, pooling, normalize, out_dtype)
        ctx.save_for_backward(out, norm, cu_seqlens, attention_mask)
        ctx.pooling, ctx.normalize = pooling, normalize
        # Only shape, dtype and device are read; an expanded scalar keeps no memory.
        ctx.like = hidden_states.new_empty(()).expand(hidden_states.shape)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        out, norm, cu_seqlens, attention_mask = ctx.saved_tensors
        weights, sequence = _token_weights(ctx.like, cu_seqlens, attention_mask, ctx.pooling)
        grad = grad.to(weights.dtype)
        if ctx.normalize:
            y, norm = out.to(weights.dtype), norm[:, None]
            # Below EPS the division is by a constant, so nothing is projected out.
            along = (y * grad).sum(1, keepdim=True) * (norm >= EPS)
            grad = (grad - y * along) / norm.clamp_min(EPS)
        grad = grad[:, None] if sequence is None else grad[sequence]
        return (grad * weights[..., None]).to(ctx.like.dtype), None, None, None, None, None


def _run(launch, hidden_states, cu_seqlens, attention_mask, pooling, normalize, out_dtype):
    """Results of a compiled module. launch(out, *arguments): calls its kernel and adds the last argument."""
    if hidden_states.stride(-1) != 1:
        hidden_states = hidden_states.contiguous()
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
    if attention_mask is not None:
        attention_mask = attention_mask.contiguous()
    batch = hidden_states.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    hidden = hidden_states.shape[-1]
    out = hidden_states.new_empty(batch, hidden, dtype=out_dtype)
    norm = hidden_states.new_empty(batch, dtype=torch.float32)
    launch(
        out,
        hidden_states.data_ptr(),
        native.DTYPES[hidden_states.dtype],
        hidden_states.stride(-2),
        hidden_states.stride(0) if cu_seqlens is None else 0,
        0 if cu_seqlens is None else cu_seqlens.data_ptr(),
        0 if attention_mask is None else attention_mask.data_ptr(),
        0 if attention_mask is None else attention_mask.element_size(),
        batch,
        hidden_states.shape[-2],
        hidden,
        POOLINGS.index(pooling),
        normalize,
        out.data_ptr(),
        native.DTYPES[out_dtype],
        norm.data_ptr(),
    )
    return out, norm


def _load_cpp():
    kernel = native.cpu().pool_normalize

    def launch(out, *arguments):
        scratch = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
        kernel(*arguments, scratch.data_ptr())

    return functools.partial(_run, launch)


def _load_cuda():
    kernel = native.cuda().pool_normalize

    def launch(out, *arguments):
        with torch.cuda.device(out.device):
            kernel(*arguments, torch.cuda.current_stream().cuda_stream)

    return functools.partial(_run, launch)


OP.impl("cpp", _load_cpp)
# Before Triton: the same kernel, launched with less work on the CPU.
OP.impl("cuda", _load_cuda)
OP.impl("triton", triton_function("pool_normalize:pool_normalize"))


@OP.samples
def _(device, dtype, size):
    generator = torch.Generator().manual_seed(0)

    def states(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def packed(lengths):
        ends = torch.tensor([0, *lengths]).cumsum(0)
        return states(int(ends[-1]), hidden), ends.to(device, torch.int32)

    if size == "bench":
        shape = batch, length, hidden = 64, 512, {"cpu": 1024, "cuda": 4096}[device]
        mask = torch.ones(batch, length, dtype=torch.int64, device=device)
        x, cu_seqlens = packed([length] * batch)
        return [
            (x, cu_seqlens, None, "mean", True, dtype),
            (x.view(shape), None, mask, "mean", True, dtype),
            (x.view(shape), None, mask, "last", True, dtype),
        ]
    samples = []
    for hidden, lengths in ((37, [5, 0, 1, 9, 0]), (384, [3, 70, 1]), (129, [1]), (64, [])):
        x, cu_seqlens = packed(lengths)
        batch, length = len(lengths), max(lengths, default=0)
        row = torch.arange(length)
        left = row >= length - torch.tensor(lengths, dtype=torch.int64)[:, None]
        padded = states(batch, length, hidden)
        for pooling in POOLINGS:
            samples.append((x, cu_seqlens, None, pooling, True, dtype))
            samples.append(
                (padded, None, left.to(device, torch.int64), pooling, False, torch.float32)
            )
            samples.append((padded, None, left.flip(1).to(device), pooling, True, dtype))
    holes = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 1]], dtype=torch.int32, device=device)
    for pooling in POOLINGS:
        # Columns of a wider tensor: rows are not adjacent in memory.
        samples.append((states(2, 4, 100)[..., 10:60], None, holes, pooling, True, dtype))
        samples.append((states(2, 4, 48), None, None, pooling, True, torch.float32))
    return samples


@OP.cost
def _(hidden_states, cu_seqlens, attention_mask, pooling, normalize, out_dtype):
    hidden = hidden_states.shape[-1]
    batch = hidden_states.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    if pooling in ("cls", "last"):
        rows = batch
    elif attention_mask is None:
        rows = hidden_states.numel() // hidden
    else:
        rows = int((attention_mask != 0).sum())
    mask_bytes = 0 if attention_mask is None else attention_mask.nbytes
    out_bytes = batch * hidden * torch.empty((), dtype=out_dtype).element_size()
    return Cost(
        bytes=rows * hidden * hidden_states.element_size() + out_bytes + mask_bytes,
        flops=2 * rows * hidden + 4 * batch * hidden,
    )

"""Lexical weights of BGE-M3: a weight per token, and of the tokens of each id the largest.

Formula: w_t = relu(h_t . weight + bias).
Limits: the kernels copy states where the columns of a token are not adjacent.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from embedfuse import native
from embedfuse.ops.checks import (
    check_device,
    check_floating,
    check_shape,
    check_tensors,
    needs_gradient,
)
from embedfuse.ops.lexical.csr import Csr
from embedfuse.ops.lexical.sparse_scatter import sparse_scatter
from embedfuse.registry import Cost, Op, triton_function

OP = Op("token_weights(Tensor hidden_states, Tensor weight, Tensor? bias) -> Tensor")


def lexical_weights(
    hidden_states: Tensor,
    input_ids: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    cu_seqlens: Tensor,
    excluded: Sequence[int] = (),
) -> Csr:
    """Lexical weights of each text: w_t = relu(h_t . weight + bias), and per id the largest of its tokens.

    Ids in `excluded` and weights that are not positive give no entry. NaN is kept: an id with a NaN weight
    has the entry NaN. Sums and weights are fp32 (fp64 for fp64 input). Differentiable in hidden_states,
    weight and bias; the gradient of an entry goes to the token it was taken from. On a GPU this waits for the
    number of entries.

    Source: BGE-M3 (arXiv 2402.03216), `_sparse_embedding` of FlagEmbedding.

    Args:
        hidden_states: (tokens, hidden), sequences end to end; float16, bfloat16, float32 or float64.
        input_ids: (tokens,) int64.
        weight: (hidden,), of the dtype of hidden_states.
        bias: one element of the dtype of hidden_states, or None.
        cu_seqlens: (batch + 1,) int32, 0 = first <= ... <= last = tokens: where each sequence starts, and the
            end.
        excluded: ids without an entry (BGE-M3: cls, eos, pad, unk).

    Returns:
        A Csr of `batch` rows.

    Raises:
        TypeError: for dtypes that are not accepted.
        ValueError: for shapes, devices or ids that do not fit (ids and cu_seqlens are not read on a GPU).
    """
    weights = token_weights(hidden_states, weight, bias)
    return sparse_scatter(weights, input_ids, cu_seqlens=cu_seqlens, excluded=excluded)


def token_weights(hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(tokens,) w_t = relu(h_t . weight + bias): the first step of `lexical_weights`."""
    _check(hidden_states, weight, bias)
    tensors = (hidden_states, weight, bias)
    if needs_gradient(*tensors):
        return _TokenWeights.apply(*tensors)
    return OP(*tensors)


def _check(hidden_states, weight, bias) -> None:
    check_tensors(hidden_states=hidden_states, weight=weight, bias=bias)
    check_floating("hidden_states", hidden_states.dtype, TypeError)
    if hidden_states.dim() != 2:
        raise ValueError(
            f"hidden_states: shape {tuple(hidden_states.shape)}; accepted is (tokens, hidden)"
        )
    check_shape("weight", weight, hidden_states.shape[1:])
    if bias is not None and bias.numel() != 1:
        raise ValueError(f"bias: shape {tuple(bias.shape)}; accepted is one element")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden_states.dtype:
            raise TypeError(
                f"{name}: {tensor.dtype}; accepted is that of hidden_states, {hidden_states.dtype}"
            )
        check_device(name, tensor, "hidden_states", hidden_states)


@OP.reference
def _(hidden_states, weight, bias):
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    weights = hidden_states.to(dtype) @ weight.to(dtype)
    return (weights if bias is None else weights + bias.to(dtype).reshape(())).relu()


@OP.fake
def _(hidden_states, weight, bias):
    return hidden_states.new_empty(
        hidden_states.shape[0], dtype=torch.promote_types(hidden_states.dtype, torch.float32)
    )


class _TokenWeights(torch.autograd.Function):
    """dL/dh_t = g_t weight, dL/dweight = sum_t g_t h_t, dL/dbias = sum_t g_t; g = dL/dw, 0 where w is 0."""

    @staticmethod
    def forward(ctx, hidden_states, weight, bias):
        weights = OP(hidden_states, weight, bias)
        ctx.save_for_backward(hidden_states, weight, weights)
        ctx.bias_shape = None if bias is None else bias.shape
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden_states, weight, weights = ctx.saved_tensors
        grad = torch.where(weights <= 0, 0, grad)
        of_hidden = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_hidden = (grad[:, None] * weight).to(hidden_states.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = (grad @ hidden_states.to(grad.dtype)).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            of_bias = grad.sum().to(weight.dtype).reshape(ctx.bias_shape)
        return of_hidden, of_weight, of_bias


def _native(kernel, hidden_states, weight, bias, *stream) -> Tensor:
    if hidden_states.stride(-1) != 1:
        hidden_states = hidden_states.contiguous()
    weight = weight.contiguous()
    tokens, hidden = hidden_states.shape
    out = hidden_states.new_empty(tokens, dtype=torch.float32)
    kernel(
        hidden_states.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        native.DTYPES[hidden_states.dtype],
        tokens,
        hidden,
        hidden_states.stride(0),
        out.data_ptr(),
        *stream,
    )
    return out


def _load_cpp():
    kernel = native.cpu().token_weights
    return lambda *call: _native(kernel, *call)


def _load_cuda():
    kernel = native.cuda().token_weights

    def run(hidden_states, weight, bias):
        with torch.cuda.device(hidden_states.device):
            stream = torch.cuda.current_stream().cuda_stream
            return _native(kernel, hidden_states, weight, bias, stream)

    return run


OP.impl("cpp", _load_cpp)
# Before Triton: the same kernel, launched with less work on the CPU.
OP.impl("cuda", _load_cuda)
OP.impl("triton", triton_function("lexical:token_weights"))


@OP.samples
def _(device, dtype, size):
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    if size == "bench":
        return [(tensor(32 * 512, 1024), tensor(1024), tensor(1))]
    shapes = ((7, 37), (1, 1), (0, 16), (1030, 24), (66, 384), (5, 1024))
    samples = [(tensor(*shape), tensor(shape[1]), tensor(1)) for shape in shapes]
    wide = tensor(9, 100)
    samples += [
        (wide[:, 20:60], tensor(40), None),
        (wide[::2, ::3], tensor(68)[::2], tensor(1)[0]),
        (wide.abs(), -wide[0].abs(), None),
        (torch.where(wide > 2, float("nan"), wide), tensor(100), tensor(1)),
    ]
    return samples


@OP.cost
def _(hidden_states, weight, bias):
    bytes_ = hidden_states.nbytes + weight.nbytes + 4 * hidden_states.shape[0]
    return Cost(bytes=bytes_, flops=2 * hidden_states.numel())

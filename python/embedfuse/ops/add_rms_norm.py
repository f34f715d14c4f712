"""Residual addition and root-mean-square normalisation in one pass.

Formula: summed = x + residual, normed = weight round(summed / sqrt(mean(summed^2) + eps)), per row.
Limits: the C++ kernel copies x and residual where the columns of a row are not adjacent.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from embedfuse import native
from embedfuse.ops.checks import check_like, check_shape, needs_gradient
from embedfuse.ops.precision import widened
from embedfuse.registry import Cost, Op, triton_function

# summed is empty where there is no residual: an op may not return its input, the caller has x.
OP = Op(
    "add_rms_norm(Tensor x, Tensor? residual, Tensor weight, float eps) -> (Tensor normed, Tensor summed)",
    "residual addition and RMSNorm",
    differentiable=True,
)


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """summed = x + residual,  normed = weight round(summed / sqrt(mean(summed^2) + eps)), per row.

    Rounded as transformers' LlamaRMSNorm does it: summed is of x's dtype, mean and quotient are fp32
    (fp64 for fp64), the quotient is cast back and then multiplied by the weight. Differentiable in x,
    residual and weight.

    Source: root mean square layer normalization, arXiv 1910.07467; pre-norm residual as in LLaMA,
        arXiv 2302.13971.

    Args:
        x: (rows, hidden), or (tokens, heads, hidden) of any strides, normalised over hidden; float16,
            bfloat16, float32 or float64.
        residual: of x's shape, dtype and device; None for none: then summed is x itself.
        weight: (hidden,), of x's dtype and device.
        eps: added to the mean square.

    Returns:
        (normed, summed), each of x's shape and dtype.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit.
    """
    _check(x, residual, weight)
    if needs_gradient(x, residual, weight):
        return _AddRmsNorm.apply(x, residual, weight, eps)
    normed, summed = OP(x, residual, weight, eps)
    return normed, x if residual is None else summed


def _check(x, residual, weight) -> None:
    if x.dim() not in (2, 3) or x.shape[-1] == 0:
        raise ValueError(
            f"x: shape {tuple(x.shape)}; accepted are (rows, hidden) and (tokens, heads, hidden), "
            "hidden >= 1"
        )
    for name, tensor, shape in (("residual", residual, x.shape), ("weight", weight, x.shape[-1:])):
        check_shape(name, tensor, shape)
        check_like(name, tensor, "x", x)


def _quotient(summed: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """summed over its root mean square, and one over that; fp32 (fp64 for fp64)."""
    summed = widened(summed)
    rstd = (summed.square().mean(-1, keepdim=True) + eps).rsqrt()
    return summed * rstd, rstd


@OP.reference
def _(x, residual, weight, eps):
    summed = x if residual is None else x + residual
    normed = weight * _quotient(summed, eps)[0].to(x.dtype)
    return normed.contiguous(), x.new_empty(0) if residual is None else summed.contiguous()


@OP.fake
def _(x, residual, weight, eps):
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape)


class _AddRmsNorm(torch.autograd.Function):
    """With n = summed rstd and h = weight dL/dnormed:
    dL/dx = dL/dresidual = rstd (h - n mean(h n)) + dL/dsummed, dL/dweight = sum(n dL/dnormed).
    """

    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        normed, summed = OP(x, residual, weight, eps)
        # A view, since autograd lets no function return its input as another output.
        summed = x.view_as(x) if residual is None else summed
        ctx.save_for_backward(summed, weight)
        ctx.eps = eps
        return normed, summed

    @staticmethod
    @once_differentiable
    def backward(ctx, of_normed, of_summed):
        summed, weight = ctx.saved_tensors
        n, rstd = _quotient(summed, ctx.eps)
        of_normed = widened(of_normed)
        h = of_normed * widened(weight)
        of_x = rstd * (h - n * (h * n).mean(-1, keepdim=True)) + widened(of_summed)
        of_x = of_x.to(summed.dtype)
        of_weight = None
        if ctx.needs_input_grad[2]:
            of_weight = (n * of_normed).flatten(0, -2).sum(0).to(weight.dtype)
        return of_x, of_x if ctx.needs_input_grad[1] else None, of_weight, None


def _load_cpp():
    kernel = native.cpu().add_rms_norm

    def run(x, residual, weight, eps):
        x = x if x.stride(-1) == 1 else x.contiguous()
        if residual is not None and residual.stride(-1) != 1:
            residual = residual.contiguous()
        weight = weight.contiguous()
        normed = x.new_empty(x.shape)
        summed = x.new_empty(0 if residual is None else x.shape)
        kernel(
            _heads_arg(x),
            (0, 0, 0) if residual is None else _heads_arg(residual),
            weight.data_ptr(),
            native.DTYPES[x.dtype],
            x.shape[0],
            1 if x.dim() == 2 else x.shape[1],
            x.shape[-1],
            eps,
            normed.data_ptr(),
            0 if residual is None else summed.data_ptr(),
        )
        return normed, summed

    return run


def _heads_arg(x: Tensor) -> tuple[int, int, int]:
    """Address and strides of tokens and heads; rows are tokens of one head."""
    return x.data_ptr(), x.stride(0), x.stride(1) if x.dim() == 3 else 0


OP.impl("cpp", _load_cpp)
OP.impl("triton", triton_function("add_rms_norm:add_rms_norm"))


@OP.samples
def _(device, dtype, size):
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    if size == "bench":
        rows = {"cpu": 700, "cuda": 65536}[device]
        return [(tensor(rows, 4096), tensor(rows, 4096), tensor(4096), 1e-5)]
    samples: list[tuple] = [
        (tensor(rows, n), tensor(rows, n), tensor(n), 1e-6)
        for rows, n in ((7, 37), (3, 384), (70, 129), (1, 1024), (5, 1), (0, 16), (2, 8))
    ]
    samples.append((tensor(9, 200), None, tensor(200), 1e-6))
    samples.append((tensor(4, 50, scale=1e-4), tensor(4, 50, scale=1e-4), tensor(50), 1e-5))
    wide = tensor(6, 400)
    heads = wide[:, 40:160].unflatten(1, (3, 40))
    samples.append((heads, None, tensor(80)[::2], 1e-6))
    samples.append((heads, wide[:, 200:320].unflatten(1, (3, 40)), tensor(40), 1e-6))
    samples.append((tensor(40, 6).t(), tensor(40).expand(6, 40), tensor(40), 1.0))
    return samples


@OP.cost
def _(x, residual, weight, eps):
    passes = 2 if residual is None else 4
    return Cost(bytes=passes * x.numel() * x.element_size() + weight.nbytes, flops=5 * x.numel())

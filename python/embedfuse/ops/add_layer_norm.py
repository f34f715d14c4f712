"""Residual addition and layer normalisation in one pass.

Formula: out = (s - mean(s)) / sqrt(var(s) + eps) weight + bias, s = x + residual, per row.
Limits: the C++ kernel copies x and residual where the columns of a row are not adjacent.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from embedfuse import native
from embedfuse.ops.checks import check_like, check_shape, needs_gradient
from embedfuse.ops.precision import widened
from embedfuse.registry import Cost, Op, triton_function

OP = Op(
    "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps) -> Tensor",
    "residual addition and LayerNorm",
    differentiable=True,
)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """out = (s - mean(s)) / sqrt(var(s) + eps) weight + bias, s = x + residual, per row.

    mean and var (the biased one) are those of a row; s and both are fp32 whatever x is (fp64 for
    fp64), so in 16 bits the sum is not rounded before it is normalised. Differentiable in x, residual, weight
    and bias.

    Source: layer normalization, arXiv 1607.06450; post-norm residual of arXiv 1706.03762.

    Args:
        x: (rows, hidden), float16, bfloat16, float32 or float64.
        residual: (rows, hidden), of x's dtype and device, as all that follow.
        weight: (hidden,).
        bias: (hidden,), or None.
        eps: added to the variance.

    Returns:
        (rows, hidden), of x's dtype.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit.
    """
    _check(x, residual, weight, bias)
    if needs_gradient(x, residual, weight, bias):
        return _AddLayerNorm.apply(x, residual, weight, bias, eps)
    return OP(x, residual, weight, bias, eps)


def _check(x, residual, weight, bias) -> None:
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"x: shape {tuple(x.shape)}; accepted is (rows, hidden), hidden >= 1")
    for name, tensor in {"residual": residual, "weight": weight, "bias": bias}.items():
        check_shape(name, tensor, x.shape if name == "residual" else x.shape[1:])
        check_like(name, tensor, "x", x)


@OP.reference
def _(x, residual, weight, bias, eps):
    total = widened(x) + widened(residual)
    centered = total - total.mean(1, keepdim=True)
    rstd = (centered.square().mean(1, keepdim=True) + eps).rsqrt()
    out = centered * rstd * widened(weight)
    if bias is not None:
        out = out + widened(bias)
    return out.to(x.dtype)


@OP.fake
def _(x, residual, weight, bias, eps):
    return x.new_empty(x.shape)


class _AddLayerNorm(torch.autograd.Function):
    """With n = (s - mean) rstd and h = weight dL/dout:
    dL/ds = rstd (h - mean(h) - n mean(h n)), dL/dweight = sum(n dL/dout), dL/dbias = sum(dL/dout).
    """

    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps):
        ctx.save_for_backward(x, residual, weight, bias)
        ctx.eps = eps
        return OP(x, residual, weight, bias, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, residual, weight, bias = ctx.saved_tensors
        total = widened(x) + widened(residual)
        var, mean = torch.var_mean(total, 1, correction=0, keepdim=True)
        wanted = [any(ctx.needs_input_grad[:2]), *ctx.needs_input_grad[2:4]]
        grads = torch.ops.aten.native_layer_norm_backward(
            widened(grad),
            total,
            weight.shape,
            mean,
            (var + ctx.eps).rsqrt(),
            widened(weight),
            None if bias is None else widened(bias),
            wanted,
        )
        of_total, of_weight, of_bias = (g if g is None else g.to(x.dtype) for g in grads)
        return of_total, of_total, of_weight, of_bias, None


def _load_cpp():
    kernel = native.cpu().add_layer_norm

    def run(x, residual, weight, bias, eps):
        x, residual = (t if t.stride(1) == 1 else t.contiguous() for t in (x, residual))
        weight = weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        out = x.new_empty(x.shape)
        kernel(
            x.data_ptr(),
            residual.data_ptr(),
            weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            native.DTYPES[x.dtype],
            *x.shape,
            x.stride(0),
            residual.stride(0),
            eps,
            out.data_ptr(),
        )
        return out

    return run


OP.impl("cpp", _load_cpp)
OP.impl("triton", triton_function("add_layer_norm:add_layer_norm"))


@OP.samples
def _(device, dtype, size):
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape, mean=0.0):
        return (torch.randn(*shape, generator=generator) + mean).to(device, dtype)

    if size == "bench":
        rows = {"cpu": 1400, "cuda": 65536}[device]
        x, residual = tensor(rows, 1024), tensor(rows, 1024)
        return [(x, residual, tensor(1024), tensor(1024), 1e-5)]
    samples: list[tuple] = [
        (tensor(rows, n), tensor(rows, n), tensor(n), tensor(n), 1e-5)
        for rows, n in ((7, 37), (3, 384), (70, 129), (1, 1024), (5, 1), (0, 16), (2, 8))
    ]
    samples.append(
        (tensor(4, 200, mean=100.0), tensor(4, 200, mean=20.0), tensor(200), None, 1e-12)
    )
    wide = tensor(6, 100)
    samples.append((wide[:, 10:60], wide[:, 50:], tensor(100)[::2], tensor(50), 1.0))
    samples.append((tensor(40, 6).t(), tensor(40).expand(6, 40), tensor(40), tensor(40), 1e-5))
    return samples


@OP.cost
def _(x, residual, weight, bias, eps):
    return Cost(
        bytes=3 * x.numel() * x.element_size() + 2 * weight.nbytes,
        flops=8 * x.numel(),
    )

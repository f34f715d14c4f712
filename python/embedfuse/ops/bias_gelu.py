"""Bias and exact GELU in one pass."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from embedfuse.registry import Cost, Op, triton_function

# No C++ version: torch's gelu already runs at the speed of memory on the CPU, and the bias rides in
# the GEMM before it.
OP = Op(
    "bias_gelu(Tensor x, Tensor? bias) -> Tensor",
    "bias and exact GELU",
    differentiable=True,
)


def bias_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """out = z Phi(z), z = x + bias, Phi(z) = (1 + erf(z / sqrt(2))) / 2.

    x: (rows, columns). bias: (columns,) or None, of x's dtype. Triton adds and evaluates in fp32.
    Returns (rows, columns). Differentiable in x and bias.
    Raises ValueError for shapes, dtypes or devices that do not fit.
    Source: Gaussian error linear units, arXiv 1606.08415.
    """
    if x.dim() != 2:
        raise ValueError(f"x: shape {tuple(x.shape)}; accepted is (rows, columns)")
    if bias is not None and bias.shape != x.shape[1:]:
        raise ValueError(f"bias: shape {tuple(bias.shape)}; accepted is {tuple(x.shape[1:])}")
    if bias is not None and (bias.dtype, bias.device) != (x.dtype, x.device):
        raise ValueError(
            f"bias: {bias.dtype} on {bias.device}; accepted is that of x, {x.dtype} on {x.device}"
        )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias)):
        return _BiasGelu.apply(x, bias)
    return OP(x, bias)


@OP.reference
def _(x, bias):
    return F.gelu(x if bias is None else x + bias).contiguous()


@OP.fake
def _(x, bias):
    return x.new_empty(x.shape)


class _BiasGelu(torch.autograd.Function):
    """dL/dz = (Phi(z) + z phi(z)) dL/dout, phi the normal density; dL/dbias is its sum over rows."""

    @staticmethod
    def forward(ctx, x, bias):
        ctx.save_for_backward(x, bias)
        return OP(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, bias = ctx.saved_tensors
        of_x = torch.ops.aten.gelu_backward(grad, x if bias is None else x + bias)
        return of_x, of_x.sum(0) if ctx.needs_input_grad[1] else None


OP.impl("triton", triton_function("bias_gelu:bias_gelu"))


@OP.samples
def _(device, dtype, size):
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape):
        return (3 * torch.randn(*shape, generator=generator)).to(device, dtype)

    if size == "bench":
        x = tensor(65536, 4096)
        return [(x, tensor(4096)), (x, None)]
    shapes = ((7, 37), (2, 1024), (1, 5000), (3, 1), (0, 16))
    samples = [(tensor(rows, columns), tensor(columns)) for rows, columns in shapes]
    samples.append((tensor(4, 100)[:, 3:50], None))
    samples.append((tensor(20, 6).t(), tensor(40)[::2]))
    return samples


@OP.cost
def _(x, bias):
    bias_bytes = 0 if bias is None else bias.nbytes
    return Cost(bytes=2 * x.numel() * x.element_size() + bias_bytes, flops=10 * x.numel())

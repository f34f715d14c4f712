"""SiLU of the gate times the up projection, in one pass.

Formula: out = silu(gate) up, silu(g) = g / (1 + exp(-g)).
Limits: the C++ kernel copies gate and up where the columns of a row are not adjacent.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from embedfuse import native
from embedfuse.ops.checks import check_like, check_shape, needs_gradient
from embedfuse.ops.precision import widened
from embedfuse.registry import Cost, Op, triton_function

OP = Op("silu_mul(Tensor gate, Tensor up) -> Tensor")


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """out = silu(gate) up,  silu(g) = g / (1 + exp(-g)), in fp32 (fp64 for fp64), rounded once.

    Differentiable in both. Source: SwiGLU, arXiv 2002.05202.

    Args:
        gate: (rows, columns), float16, bfloat16, float32 or float64, of any strides: the halves of one
            product, as its `chunk` gives them, are read where they lie.
        up: of gate's shape, dtype and device, of any strides.

    Returns:
        (rows, columns), of gate's dtype.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit.
    """
    if gate.dim() != 2:
        raise ValueError(f"gate: shape {tuple(gate.shape)}; accepted is (rows, columns)")
    check_shape("up", up, gate.shape, of="gate")
    check_like("up", up, "gate", gate)
    if needs_gradient(gate, up):
        return _SiluMul.apply(gate, up)
    return OP(gate, up)


@OP.reference
def _(gate, up):
    return (F.silu(widened(gate)) * widened(up)).to(gate.dtype).contiguous()


@OP.fake
def _(gate, up):
    return gate.new_empty(gate.shape)


class _SiluMul(torch.autograd.Function):
    """With s = sigmoid(gate): dL/dgate = s (1 + gate (1 - s)) up dL/dout, dL/dup = gate s dL/dout."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return OP(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = map(widened, ctx.saved_tensors)
        grad = widened(grad)
        of_gate = torch.ops.aten.silu_backward(grad * up, gate)
        of_up = grad * F.silu(gate)
        dtype = ctx.saved_tensors[0].dtype
        return of_gate.to(dtype), of_up.to(dtype)


def _load_cpp():
    kernel = native.cpu().silu_mul

    def run(gate, up):
        gate, up = (t if t.stride(1) == 1 else t.contiguous() for t in (gate, up))
        out = gate.new_empty(gate.shape)
        kernel(
            gate.data_ptr(),
            up.data_ptr(),
            native.DTYPES[gate.dtype],
            *gate.shape,
            gate.stride(0),
            up.stride(0),
            out.data_ptr(),
        )
        return out

    return run


OP.impl("cpp", _load_cpp)
OP.impl("triton", triton_function("silu_mul:silu_mul"))


@OP.samples
def _(device, dtype, size):
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape):
        return (3 * torch.randn(*shape, generator=generator)).to(device, dtype)

    if size == "bench":
        return [tensor({"cpu": 300, "cuda": 16384}[device], 2 * 14336).chunk(2, 1)]
    shapes = ((7, 37), (2, 1024), (1, 5000), (3, 1), (0, 16), (40, 33))
    samples = [tuple(tensor(rows, 2 * columns).chunk(2, 1)) for rows, columns in shapes]
    samples.append((tensor(20, 6).t(), tensor(1, 20).expand(6, 20)))
    return samples


@OP.cost
def _(gate, up):
    return Cost(bytes=3 * gate.numel() * gate.element_size(), flops=6 * gate.numel())

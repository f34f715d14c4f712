"""Rotary position embedding, in place or as a function.

Formula: out_d = x_d cos_d - x_{d+half} sin_d, out_{d+half} = x_{d+half} cos_d + x_d sin_d, d < half.
Limits: in place has no gradient; the C++ kernel copies x where the columns of a head are not adjacent.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from embedfuse import native
from embedfuse.ops.checks import check_like, check_shape, needs_gradient
from embedfuse.registry import Cost, Op, triton_function

# In place: query and key are column slices of one GEMM's result, which nothing else reads before the
# attention that follows. `rope` works on a copy.
OP = Op("rope_(Tensor(a!) x, Tensor cos, Tensor sin) -> ()")


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """out_d = x_d cos_d - x_{d+half} sin_d,  out_{d+half} = x_{d+half} cos_d + x_d sin_d,  d < half.

    The two halves of a head are the two coordinates (transformers' rotate_half), not its even and odd
    entries. The kernels compute in fp32. Differentiable in x. `rope_` does the same in place, without
    gradient.

    Source: RoFormer, arXiv 2104.09864, in the half-split form of GPT-NeoX.

    Args:
        x: (tokens, heads, head_dim), head_dim even, of any strides; float16, bfloat16, float32 or float64.
        cos, sin: (tokens, head_dim / 2), of x's dtype and device: one row per token, of the angle
            position * inv_freq_d. transformers' rotary modules repeat it; this is the first half of theirs.

    Returns:
        (tokens, heads, head_dim), of x's dtype.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit.
    """
    _check(x, cos, sin)
    if needs_gradient(x):
        return _Rope.apply(x, cos, sin)
    return _rotated(x, cos, sin)


def rope_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rope` in place.

    Args:
        x, cos, sin: as in `rope`; x is written to.

    Returns:
        x.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit.
        RuntimeError: where x requires a gradient.
    """
    _check(x, cos, sin)
    if needs_gradient(x):
        raise RuntimeError("x: requires a gradient, which rope_ has not; use rope")
    OP(x, cos, sin)
    return x


def _check(x, cos, sin) -> None:
    if x.dim() != 3 or x.shape[2] % 2:
        raise ValueError(
            f"x: shape {tuple(x.shape)}; accepted is (tokens, heads, head_dim), head_dim even"
        )
    angles = (x.shape[0], x.shape[2] // 2)
    for name, tensor in (("cos", cos), ("sin", sin)):
        check_shape(name, tensor, angles)
        check_like(name, tensor, "x", x)
        if tensor.requires_grad:
            raise ValueError(f"{name}: requires a gradient; accepted are constants")


def _rotated(x, cos, sin) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    OP(out, cos, sin)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rope` in plain torch, differentiable in all three."""
    first, second = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


@OP.reference
def _(x, cos, sin):
    x.copy_(rotate(x, cos, sin))


@OP.fake
def _(x, cos, sin):
    pass


class _Rope(torch.autograd.Function):
    """dL/dx = dL/dout rotated by the negative angle."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _load_cpp():
    kernel = native.cpu().rope

    def run(x, cos, sin):
        if x.stride(-1) != 1:
            x.copy_(_rotated(x, cos, sin))
            return
        cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (cos, sin))
        kernel(
            (x.data_ptr(), x.stride(0), x.stride(1)),
            cos.data_ptr(),
            sin.data_ptr(),
            native.DTYPES[x.dtype],
            *x.shape,
            cos.stride(0),
            sin.stride(0),
        )

    return run


OP.impl("cpp", _load_cpp)
OP.impl("triton", triton_function("rope:rope_"))


@OP.samples
def _(device, dtype, size):
    generator = torch.Generator().manual_seed(0)

    def sample(tokens, heads, head_dim):
        """Column slices: of a fused product, and of angles that are repeated."""
        x = torch.randn(tokens, heads + 2, head_dim, generator=generator)[:, 1:-1]
        angle = torch.rand(tokens, head_dim // 2, generator=generator) * 7
        angles = torch.cat((angle, angle), -1)
        cos, sin = (t.to(device, dtype)[:, : head_dim // 2] for t in (angles.cos(), angles.sin()))
        return x.to(device, dtype), cos, sin

    if size == "bench":
        return [sample({"cpu": 700, "cuda": 65536}[device], 32, 128)]
    shapes = ((7, 3, 64), (30, 2, 128), (5, 1, 2), (3, 4, 34), (1, 2, 6), (0, 2, 8), (4, 2, 256))
    samples = [sample(*shape) for shape in shapes]
    x, cos, sin = sample(6, 4, 10)
    samples.append((x.transpose(1, 2).contiguous().transpose(1, 2), cos, sin[:1].expand(6, 5)))
    return samples


@OP.cost
def _(x, cos, sin):
    return Cost(
        bytes=(2 * x.numel() + cos.numel() + sin.numel()) * x.element_size(), flops=3 * x.numel()
    )

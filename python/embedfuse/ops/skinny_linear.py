"""Linear layer for few rows: one query, or a handful of short texts."""

import torch
from torch import Tensor

from embedfuse import native
from embedfuse.registry import Cost, Op

OP = Op("skinny_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")

# Up to this many rows the kernel beat torch's linear on 2 cores of an EPYC 9004 without AMX: in fp32
# and bf16 by `make bench`, fp16 taken like bf16. Above, torch's blocked GEMM wins; sooner in 16 bits,
# where it multiplies bf16 directly.
MAX_ROWS = {torch.float32: 32, torch.float16: 4, torch.bfloat16: 4}


def skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x weight^T + bias, like torch.nn.functional.linear, fast when x has few rows.

    x: (rows, depth). weight: (columns, depth). bias: (columns,) or None. All of one dtype; sums are fp32.
    Returns (rows, columns). No gradient: for inference.
    Raises ValueError for shapes, dtypes or devices that do not fit, RuntimeError where a gradient is due.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x: shape {tuple(x.shape)}, weight: shape {tuple(weight.shape)}; "
            "accepted are (rows, depth) and (columns, depth)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: shape {tuple(bias.shape)}; accepted is {tuple(weight.shape[:1])}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype, tensor.device) != (x.dtype, x.device):
            raise ValueError(
                f"{name}: {tensor.dtype} on {tensor.device}; accepted is that of x, {x.dtype} on {x.device}"
            )
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias)
    ):
        raise RuntimeError(
            "x, weight, bias: one requires a gradient, which skinny_linear has not; "
            "call it under torch.no_grad()"
        )
    return OP(x, weight, bias)


@OP.reference
def _(x, weight, bias):
    return torch.nn.functional.linear(x, weight, bias)


@OP.fake
def _(x, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[0])


def _load_cpp():
    kernel = native.cpu().skinny_linear

    def run(x, weight, bias):
        if x.stride(-1) != 1:
            x = x.contiguous()
        weight = weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        rows, depth = x.shape
        out = x.new_empty(rows, weight.shape[0])
        kernel(
            x.data_ptr(),
            weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            native.DTYPES[x.dtype],
            rows,
            weight.shape[0],
            depth,
            x.stride(0),
            out.data_ptr(),
        )
        return out

    return run


OP.impl("cpp", _load_cpp)


@OP.samples
def _(device, dtype, size):
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape):
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(device, dtype)

    if size == "bench":
        return [(tensor(rows, 1024), tensor(4096, 1024), tensor(4096)) for rows in (1, 4, 32)]
    shapes = ((1, 37, 5), (7, 64, 130), (16, 384, 33), (3, 8, 1), (0, 16, 4))
    samples = [
        (tensor(rows, depth), tensor(columns, depth), tensor(columns))
        for rows, depth, columns in shapes
    ]
    wide = tensor(5, 100)
    samples.append((wide[:, 20:60], tensor(6, 40), None))
    samples.append((tensor(4, 12), tensor(12, 9).t(), None))
    return samples


@OP.cost
def _(x, weight, bias):
    out_bytes = x.shape[0] * weight.shape[0] * x.element_size()
    bias_bytes = 0 if bias is None else bias.nbytes
    return Cost(
        bytes=x.nbytes + weight.nbytes + bias_bytes + out_bytes,
        flops=2 * x.shape[0] * weight.numel(),
    )

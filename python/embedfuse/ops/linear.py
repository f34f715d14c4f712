"""Linear layer on the CPU that reads the model's own weight: nothing is prepacked, nothing can be stale."""

import functools

import torch
from torch import Tensor

from embedfuse import native
from embedfuse.registry import Cost, Op

OP = Op("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")

# Up to this many rows the result is computed as dot products along the weight's rows, above in tiles
# (csrc/cpu/linear_few_rows.h and linear.h). They cross between 20 and 32 rows in fp32 and bf16, for
# 1024 x 3072 and 4096 x 1024 (EPYC 9004, one thread, `make bench ARGS="-k linear"` has the shapes).
FEW_ROWS = 24


@functools.cache
def most_rows(dtype: torch.dtype) -> float:
    """Rows up to which the C++ kernel is faster than torch's linear on this processor.

    On an EPYC 9004, against torch 2.13: fp32 1.1 to 2x, fp16 2 to 4x, with AVX2 and with AVX-512; bf16
    1.02 to 2x where the processor multiplies bf16 (avx512_bf16). Without that, and with AMX above a few
    rows, torch's bf16 is taken.
    """
    try:
        isa = native.cpu().selected_isa()
    except native.Unavailable:
        return 0
    if isa == "baseline" or dtype not in native.DTYPES:
        return 0
    if dtype == torch.bfloat16 and isa not in ("amx", "avx512_bf16"):
        return 0
    amx = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    return FEW_ROWS if dtype == torch.bfloat16 and amx else float("inf")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x weight^T + bias, like torch.nn.functional.linear.

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
            "x, weight, bias: one requires a gradient, which linear has not; "
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
    kernel = native.cpu().linear

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
            rows <= FEW_ROWS,
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
        return [(tensor(rows, 1024), tensor(4096, 1024), tensor(4096)) for rows in (1, 8, 64, 1024)]
    shapes = (
        *((1, 37, 5), (7, 64, 130), (16, 384, 33), (3, 8, 1), (0, 16, 4)),  # rows, depth, columns
        *((17, 64, 16), (48, 70, 50), (49, 33, 64), (130, 1030, 70), (600, 1024, 40)),
    )
    samples = [
        (tensor(rows, depth), tensor(columns, depth), tensor(columns))
        for rows, depth, columns in shapes
    ]
    wide = tensor(50, 100)
    samples.append((wide[:, 20:60], tensor(6, 40), None))
    samples.append((wide[:5, 20:60], tensor(6, 40), None))
    samples.append((tensor(4, 12), tensor(12, 9).t(), None))
    samples.append((tensor(20, 12).t(), tensor(9, 20), tensor(9)))
    return samples


@OP.cost
def _(x, weight, bias):
    out_bytes = x.shape[0] * weight.shape[0] * x.element_size()
    bias_bytes = 0 if bias is None else bias.nbytes
    return Cost(
        bytes=x.nbytes + weight.nbytes + bias_bytes + out_bytes,
        flops=2 * x.shape[0] * weight.numel(),
    )

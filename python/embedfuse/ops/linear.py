"""Linear layers on the CPU that read the model's weights where they are: no packed copy, nothing goes stale.

Formula: y = x weight^T + bias, or its GELU.
Limits: the kernel runs on the CPU alone; no gradient; faster than torch up to most_rows(dtype) rows.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from embedfuse import native
from embedfuse.ops.checks import check_like, check_shape, needs_gradient
from embedfuse.registry import Cost, Op

# Several weights in one call: x is rearranged once, and the threads start once.
OP = Op(
    "linear(Tensor x, Tensor[] weights, Tensor?[] biases, bool gelu=False) -> Tensor",
    "linear layers with a common input, for inference on few rows",
)

# Up to this many rows the result is computed as dot products along the weight's rows, above in tiles
# (csrc/cpu/linear_few_rows.h and linear.h). They cross between 20 and 32 rows in fp32 and bf16, for
# 1024 x 3072 and 4096 x 1024 (EPYC 9004, one thread, `make bench ARGS="-k linear"` has the shapes).
FEW_ROWS = 24


@functools.cache
def most_rows(dtype: torch.dtype) -> float:
    """Rows up to which the C++ kernel is faster than torch's linear on this processor; 0 for never.

    Against torch 2.13 on an EPYC 9004: fp32 1.1 to 2x, fp16 2 to 4x, with AVX2 and with AVX-512; bf16 1.02 to
    2x where the processor multiplies bf16 (avx512_bf16). Without that, on a Xeon of 2019 with AVX-512, bf16
    1.6 to 3x from 8 rows on. With AMX torch's bf16 is taken above a few rows.
    """
    try:
        isa = native.cpu().selected_isa()
    except native.Unavailable:
        return 0
    if isa == "baseline" or dtype not in native.DTYPES:
        return 0
    amx = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    return FEW_ROWS if dtype == torch.bfloat16 and amx else float("inf")


def linear(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | list[Tensor | None] | tuple[Tensor | None, ...] | None = None,
    *,
    gelu: bool = False,
) -> Tensor:
    """y = x weight^T + bias, like torch.nn.functional.linear; of several weights, the results side by side.

    Sums and their GELU are fp32. No gradient: for inference.

    Args:
        x: (rows, depth), float16, bfloat16, float32 or float64.
        weight: (columns, depth), of x's dtype and device; or several of them.
        bias: (columns,), of x's dtype and device, or None. With several weights one for each, or None for
            none.
        gelu: whether y becomes y Phi(y), where Phi is the normal distribution (GELU, arXiv 1606.08415).

    Returns:
        (rows, columns of all weights), of x's dtype.

    Raises:
        ValueError: for shapes, dtypes, devices or numbers that do not fit.
        RuntimeError: where an argument requires a gradient.
    """
    weights = [weight] if isinstance(weight, Tensor) else list(weight)
    if isinstance(bias, list | tuple):
        biases = list(bias)
    else:
        biases = [None] * len(weights) if bias is None else [bias]
    if not weights or len(biases) != len(weights):
        raise ValueError(
            f"weight: {len(weights)} of them, bias: {len(biases)}; accepted are as many of both, from 1 on"
        )
    for w, b in zip(weights, biases, strict=True):
        _check(x, w, b)
    if needs_gradient(x, *weights, *biases):
        raise RuntimeError(
            "x, weight, bias: one requires a gradient, which linear has not; "
            "call it under torch.no_grad()"
        )
    return OP(x, weights, biases, gelu)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x: shape {tuple(x.shape)}, weight: shape {tuple(weight.shape)}; "
            "accepted are (rows, depth) and (columns, depth)"
        )
    check_shape("bias", bias, weight.shape[:1])
    check_like("weight", weight, "x", x)
    check_like("bias", bias, "x", x)


@OP.reference
def _(x, weights, biases, gelu=False):
    parts = [torch.nn.functional.linear(x, *part) for part in zip(weights, biases, strict=True)]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return torch.nn.functional.gelu(y) if gelu else y


@OP.fake
def _(x, weights, biases, gelu=False):
    return x.new_empty(x.shape[0], sum(weight.shape[0] for weight in weights))


def _load_cpp():
    kernel = native.cpu().linear

    def run(x, weights, biases, gelu=False):
        if x.stride(-1) != 1:
            x = x.contiguous()
        rows, depth = x.shape
        alive, parts, columns = [], [], 0  # alive: copies, until the kernel has run
        for weight, bias in zip(weights, biases, strict=True):
            weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
            alive += (weight, bias)
            n = weight.shape[0]
            parts += (weight.data_ptr(), 0 if bias is None else bias.data_ptr(), n)
            columns += n
        out = x.new_empty(rows, columns)
        kernel(
            x.data_ptr(),
            parts,
            native.DTYPES[x.dtype],
            rows,
            depth,
            x.stride(0),
            gelu,
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

    def sample(rows, depth, *columns):
        return (
            tensor(rows, depth),
            [tensor(n, depth) for n in columns],
            [tensor(n) for n in columns],
        )

    if size == "bench":
        single = [sample(rows, 1024, 4096) for rows in (1, 8, 64, 1024)]
        return [*single, *(sample(rows, 1024, 1024, 1024, 1024) for rows in (8, 1024))]
    shapes = (  # rows, depth, columns of each weight
        *((1, 37, 5), (7, 64, 130), (16, 384, 33), (3, 8, 1), (0, 16, 4)),
        *((17, 64, 16), (48, 70, 50), (49, 33, 64), (130, 1030, 70), (600, 1024, 40)),
        *((3, 40, 70, 1, 33), (9, 64, 16, 16, 16), (30, 33, 5, 40, 17), (100, 70, 33, 0, 9)),
    )
    samples: list[tuple] = [sample(*shape) for shape in shapes]
    wide = tensor(50, 100)
    samples.append((wide[:, 20:60], [tensor(6, 40)], [None]))
    samples.append((wide[:5, 20:60], [tensor(6, 40), tensor(9, 40)], [None, tensor(9)]))
    samples.append((tensor(4, 12), [tensor(12, 9).t()], [None]))
    samples.append((tensor(20, 12).t(), [tensor(9, 20)], [tensor(9)]))
    samples.append((3 * tensor(9, 64), [9 * tensor(37, 64)], [tensor(37)], True))
    samples.append(
        (3 * tensor(50, 64), [9 * tensor(37, 64), 9 * tensor(5, 64)], [None, None], True)
    )
    return samples


@OP.cost
def _(x, weights, biases, gelu=False):
    read = [t for t in (x, *weights, *biases) if t is not None]
    columns = sum(len(weight) for weight in weights)
    return Cost(
        bytes=sum(t.nbytes for t in read) + x.shape[0] * columns * x.element_size(),
        flops=2 * x.shape[0] * sum(weight.numel() for weight in weights),
    )

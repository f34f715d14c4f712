"""The operators of info_nce/op.py at several widths of the embedding.

Formula: the score at a width is the dot product of the first `width` components, with `normalize` divided by
the norms of these.
Limits: no bias and no sigmoid; the backward pass reads both sides again.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize as unit_vectors

from embedfuse.ops.info_nce import op
from embedfuse.ops.info_nce.backends import cpp_kernels, on_tiles, triton_kernels
from embedfuse.ops.info_nce.matryoshka import tiles
from embedfuse.ops.info_nce.op import MASKS
from embedfuse.registry import Cost, Op

# As in op.py, but limit (widths, rows). widths: ascending, up to d.
_INPUTS = (
    "Tensor x, Tensor y, Tensor scale, Tensor? target, Tensor? limit, Tensor? x_keys, Tensor? y_keys, "
    "Tensor? guide_x, Tensor? guide_y, Tensor? guide_limit, int[] widths, bool normalize"
)

# Returns statistic, total, count, each (widths, rows).
FORWARD = Op(f"info_nce_matryoshka_forward({_INPUTS}) -> (Tensor, Tensor, Tensor)")

# statistic, g_statistic, g_total, g_target: (widths, rows). Returns the gradients of x (rows, d), (0, d)
# unless for_x, and y (columns, d), (0, d) unless for_y, in their dtype; and sum_j G_ij c_ij (widths, rows)
# fp32, G as in op.py, c the scores.
BACKWARD = Op(
    f"info_nce_matryoshka_backward({_INPUTS}, Tensor statistic, Tensor g_statistic, Tensor g_total, "
    "Tensor g_target, bool for_x, bool for_y) -> (Tensor, Tensor, Tensor)"
)


def _per_width(x: Tensor, y: Tensor, scale: Tensor, target, limit, *inputs):
    """(width, arguments of the ops of op.py up to `sigmoid`) of each width."""
    *masks, widths, normalize = inputs
    for k, width in enumerate(widths):
        sides = [side[:, :width] for side in (x, y)]
        if normalize:
            sides = [unit_vectors(side, dim=1) for side in sides]
        limit_k = None if limit is None else limit[k]
        yield width, (*sides, scale, None, target, limit_k, *masks, False)


@FORWARD.reference
def _(*inputs):
    found = [op.FORWARD._reference(*args, False)[:3] for _, args in _per_width(*inputs)]
    return tuple(map(torch.stack, zip(*found, strict=True)))


@BACKWARD.reference
def _(x, y, *inputs):
    *inputs, statistic, g_statistic, g_total, g_target, for_x, for_y = inputs
    grads = zip(statistic, g_statistic, g_total, g_target, strict=True)
    grad_x, grad_y = (torch.zeros_like(side, dtype=statistic.dtype) for side in (x, y))
    g_scores = []
    for (width, args), grads_k in zip(_per_width(x, y, *inputs), grads, strict=True):
        of_sides = op.BACKWARD._reference(*args, *grads_k, True, True)
        g_scores.append((of_sides[0] * args[0]).sum(1))
        for side, unit, grad, out in zip((x, y), args[:2], of_sides, (grad_x, grad_y), strict=True):
            if inputs[-1]:
                grad, unit = grad.to(out.dtype), unit.to(out.dtype)
                norm = side[:, :width].to(out.dtype).norm(dim=1, keepdim=True).clamp_min(1e-12)
                grad = (grad - (grad * unit).sum(1, keepdim=True) * unit) / norm
            out[:, :width] += grad
    grad_x, grad_y = grad_x.to(x.dtype), grad_y.to(y.dtype)
    return grad_x if for_x else grad_x[:0], grad_y if for_y else grad_y[:0], torch.stack(g_scores)


@FORWARD.fake
def _(x, y, scale, *inputs):
    shape = len(inputs[-2]), x.shape[0]
    count = scale.new_empty(shape, dtype=torch.int64)
    return scale.new_empty(shape), scale.new_empty(shape), count


@BACKWARD.fake
def _(x, y, scale, *inputs):
    for_x, for_y = inputs[-2:]
    return (
        x.new_empty(x.shape[0] if for_x else 0, x.shape[1]),
        y.new_empty(y.shape[0] if for_y else 0, x.shape[1]),
        torch.empty_like(inputs[-6]),
    )


FORWARD.impl("cpp", on_tiles(tiles.forward, cpp_kernels))
BACKWARD.impl("cpp", on_tiles(tiles.backward, cpp_kernels))
FORWARD.impl("triton", on_tiles(tiles.forward, triton_kernels))
BACKWARD.impl("triton", on_tiles(tiles.backward, triton_kernels))


def _inputs(device, dtype, shape, names, widths, normalize, scale=10.0):
    x, y, scale, _, target, limit, *masks = op.make_inputs(device, dtype, shape, names, scale)
    if limit is not None:
        sides = [(x[:, :w], y[:, :w]) for w in widths]
        if normalize:
            sides = [[unit_vectors(s.double(), dim=1) for s in pair] for pair in sides]
        limit = torch.stack([op.limit_between_scores(*pair) for pair in sides]).to(device)
    return x, y, scale, target, limit, *masks, list(widths), normalize


def _cases(device, dtype, size):
    low = (device, dtype)
    if size == "bench":
        widths = (64, 128, 256, 512, 1024)
        return [_inputs(*low, (512, 8192, 1024), ("target",), widths, True, 50.0)]
    return [
        _inputs(*low, (5, 7, 16), ("target",), (4, 16), True),
        _inputs(*low, (5, 7, 16), ("target",), (4, 9, 16), False),
        _inputs(*low, (33, 130, 40), MASKS, (8, 24, 40), True),
        _inputs(*low, (20, 40, 24), MASKS, (16, 20), False),
        _inputs(*low, (3, 2100, 8), ("target", "limit"), (3, 5), True),
        _inputs(*low, (1030, 17, 8), ("x_keys", "y_keys"), (8,), True),
        _inputs(*low, (4, 1, 5), ("x_keys", "y_keys"), (1, 5), True),
    ]


@FORWARD.samples
def _(device, dtype, size):
    return _cases(device, dtype, size)


@BACKWARD.samples
def _(device, dtype, size):
    samples = []
    for i, args in enumerate(_cases(device, dtype, size)):
        generator = torch.Generator().manual_seed(i)
        # The statistic in fp64: forward and backward share it, whatever computed it.
        wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        statistic = FORWARD._reference(*wide)[0].float()
        grads = torch.randn(3, *statistic.shape, generator=generator).to(device)
        samples.append((*args, statistic, *grads, i != 3, i != 4))
    return samples


@FORWARD.cost
def _(x, y, *args):
    return _cost(x, y, args[-2], products=1)


@BACKWARD.cost
def _(x, y, *args):
    return _cost(x, y, args[-8], products=1 + args[-2] + args[-1])


def _cost(x, y, widths, products):
    rows, columns, depth = len(x), len(y), widths[-1]
    read = (rows + columns) * depth * x.element_size()
    return Cost(bytes=products * read, flops=2 * products * rows * columns * depth)

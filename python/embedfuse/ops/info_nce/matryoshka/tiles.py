"""info_nce_matryoshka over tiles of the score matrix: the scores of all widths are sums of slices of one
GEMM.

Forward, a tile goes through the widths from the narrowest up: each adds the product of the components that it
has more, and a backend's kernel takes the statistics. Backward, the tile's scores at all widths are kept;
from the widest down the kernel adds their gradients, and each slice of the embeddings gets one product with
the sum over the widths that have it. These are the GEMMs of the largest width alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from embedfuse.ops.info_nce.tiles import (
    TILE,
    Tile,
    TileKernels,
    add_product,
    gemm_input,
    scaled_gradients,
    tiles,
)

EPS = 1e-12  # least norm, that of torch.nn.functional.normalize


def slices(widths: Sequence[int]) -> list[slice]:
    """The components that each width adds to the one before."""
    return [slice(*ends) for ends in zip([0, *widths], widths, strict=False)]


def inverse_norms(x: Tensor, widths: Sequence[int]) -> Tensor:
    """(len(widths), ...) of the first components of x (..., d), fp32 sums (fp64 for fp64 x).
    Differentiable."""
    parts = x[..., : widths[-1]].split([s.stop - s.start for s in slices(widths)], -1)
    wide = torch.promote_types(x.dtype, torch.float32)
    squares = torch.stack([part.to(wide).square().sum(-1) for part in parts])
    return squares.cumsum(0).clamp_min(EPS**2).rsqrt()


def _tiles_of_widths(multiply: Callable, x: Tensor, y: Tensor, inputs: tuple, keep: bool):
    """Yields (tile, an iterator over a tile per width, rows, columns, inverse norms of the columns).

    keep: the scores of a width stay when the next comes, and tile.scores are free; else all share memory.
    """
    scale, target, limit, *inputs, widths, normalize = inputs
    inputs = (scale, None, target, None, *inputs, False)
    n, d = len(widths), slices(widths)
    x_norms = inverse_norms(x, widths) if normalize else None
    height, breadth = (
        min(a, b) for a, b in zip(TILE[x.device.type], (len(x), len(y)), strict=True)
    )
    memory = torch.empty(n if keep else 0, height * breadth, device=x.device)

    def of_widths(tile: Tile, rows: slice) -> Iterator[Tile]:
        before = None
        for k in range(n):
            scores = tile.scores
            if keep:
                scores = memory[k, : scores.numel()].view_as(scores)
            if before is None:
                scores.zero_()
            elif keep:
                scores.copy_(before)
            add_product(scores, tile.x[:, d[k]], tile.y[:, d[k]].T)
            yield replace(
                tile,
                scores=scores,
                limit=None if limit is None else limit[k, rows],
                x_factor=None if x_norms is None else x_norms[k, rows],
                y_factor=None if y_norms is None else y_norms[k],
            )
            before = scores

    for tile, rows, columns, block in tiles(multiply, x, y, inputs, torch.float32):
        if rows.start == 0:
            y_norms = inverse_norms(block, widths) if normalize else None
        yield tile, of_widths(tile, rows), rows, columns, y_norms


def forward(kernels: TileKernels, x: Tensor, y: Tensor, *inputs):
    """The op info_nce_matryoshka_forward."""
    x, scale, widths = gemm_input(x), inputs[0], inputs[-2]
    maximum = scale.new_full((len(widths), len(x)), -torch.inf)
    sums, total = torch.zeros_like(maximum), torch.zeros_like(maximum)
    count = torch.zeros_like(maximum, dtype=torch.int64)
    for _, of_widths, rows, _, _ in _tiles_of_widths(kernels.multiply, x, y, inputs, keep=False):
        for k, tile in enumerate(of_widths):
            kernels.update(tile, *(state[k, rows] for state in (maximum, sums, total, count)), None)
    return maximum + sums.log(), total, count


def backward(kernels: TileKernels, x: Tensor, y: Tensor, *args):
    """The op info_nce_matryoshka_backward."""
    *inputs, statistic, g_statistic, g_total, g_target, for_x, for_y = args
    *_, widths, normalize = inputs
    grads, grad_scale = scaled_gradients(torch.stack((g_statistic, g_total, g_target)), x)
    given, x, d = x, gemm_input(x), slices(widths)
    grad_x = statistic.new_zeros(x.shape if for_x else (0, x.shape[1]))
    grad_y = y.new_zeros(y.shape if for_y else (0, y.shape[1]))
    g_scores = torch.zeros_like(statistic)
    for tile, of_widths, rows, columns, y_norms in _tiles_of_widths(
        kernels.multiply, x, y, inputs, keep=True
    ):
        if rows.start == 0:
            part = grad_x.new_zeros(tile.y.shape) if for_y else None
            g_columns = statistic.new_zeros(len(widths), len(tile.y))
        total = tile.scores.zero_()
        for k, of_width in reversed(list(enumerate(of_widths))):
            kernels.gradient(of_width, statistic[k, rows], *grads[:, k, rows], into=total)
            g_scores[k, rows] += of_width.scores.sum(1)
            low = total.to(x.dtype)
            if for_x:
                add_product(grad_x[rows, d[k]], low, tile.y[:, d[k]])
            if for_y:
                g_columns[k] += of_width.scores.sum(0)
                add_product(part[:, d[k]], low.T, tile.x[:, d[k]])
        if for_y and rows.stop == len(x):
            if normalize:
                _project(part, tile.y, g_columns, y_norms, d)
            grad_y[columns] = part if grad_scale is None else part * grad_scale
    if for_x and normalize:
        _project(grad_x, given, g_scores, inverse_norms(given, widths), d)
    if grad_scale is not None:
        grad_x, g_scores = grad_x * grad_scale, g_scores * grad_scale
    return grad_x.to(given.dtype), grad_y, g_scores


def _project(grad: Tensor, x: Tensor, g_scores: Tensor, norms: Tensor, d: list[slice]) -> None:
    """Adds the norms' part: -x times the sum over the widths that have a component of g_scores / |x|^2."""
    share = (g_scores * norms.square()).flip(0).cumsum(0).flip(0)
    for of_width, columns in zip(share, d, strict=True):
        grad[:, columns] -= of_width[:, None] * x[:, columns]

"""info_nce over tiles of the score matrix: torch's GEMM into a reused scratch, a backend's kernel over each
tile.

One tile of scores exists at a time. Columns pass in the outer loop, so that their gradient is complete and
written once; that of the rows is accumulated in fp32. Tiles come in the same order each time: same bits.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Rows and columns of a tile. CPU: 1024 x 1024 and 1024 x 2048 ran fastest, within 3 %, of 512 to 4096 columns
# at d = 1024 on two cores of an AMD EPYC (Zen 4; 32 MiB of L3 cache); larger scratch leaves the caches.
# CUDA: not measured; 32 MiB of fp32 scores lie within the L2 cache of an H100.
TILE = {"cpu": (1024, 1024), "cuda": (4096, 2048)}


@dataclass(frozen=True)
class Tile:
    """A tile of scores and what decides which of them count; tensors as in op.py, of this tile's
    rows and columns. `own` counts columns of the whole matrix, `first` is the tile's first. x_factor (rows,),
    y_factor (columns,): what `scores` are still to be multiplied by."""

    x: Tensor
    y: Tensor
    scores: Tensor
    guide: Tensor | None
    first: int
    scale: Tensor
    bias: Tensor | None
    own: Tensor | None
    limit: Tensor | None
    x_keys: Tensor | None
    y_keys: Tensor | None
    guide_limit: Tensor | None
    sigmoid: bool
    x_factor: Tensor | None = None
    y_factor: Tensor | None = None


class Scratch:
    """Memory for products of at most `rows` x `columns`, used again for each."""

    def __init__(self, multiply: Callable, like: Tensor, rows: int, columns: int, dtype=None):
        dtype = dtype or (like.dtype if multiply is nothing else torch.float32)
        self.multiply = multiply
        self.memory = torch.empty(rows * columns, dtype=dtype, device=like.device)

    def product(self, x: Tensor, y: Tensor) -> Tensor:
        """x y^T."""
        out = self.memory[: len(x) * len(y)].view(len(x), len(y))
        self.multiply(x, y, out)
        return out


def torch_multiply(x: Tensor, y: Tensor, out: Tensor) -> None:
    """out = x y^T."""
    if x.dtype == out.dtype:
        torch.mm(x, y.T, out=out)
    else:
        torch.mm(x, y.T, out_dtype=out.dtype, out=out)


def nothing(x: Tensor, y: Tensor, out: Tensor) -> None:
    """In place of torch_multiply, for kernels that compute the scores themselves."""


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a b, with fp32 `out`."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        out += torch.mm(a, b, out_dtype=out.dtype)


def _rows(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]


def multiplied(x: Tensor) -> Tensor:
    """As the GEMMs take it. Tensor cores add up 16-bit products in fp32; on the CPU torch's GEMM of 16-bit
    inputs rounds the sums to 16 bits as well."""
    return x.float() if x.is_cpu else x


def tiles(
    multiply: Callable, x: Tensor, y: Tensor, inputs: tuple, dtype: torch.dtype | None = None
) -> Iterator[tuple]:
    """Yields (Tile, its rows, its columns, the columns of y as they are multiplied).

    dtype: of scores that are left to the caller to compute."""
    *inputs, sigmoid = (i.contiguous() if isinstance(i, Tensor) else i for i in inputs)
    scale, bias, own, limit, x_keys, y_keys, guide_x, guide_y, guide_limit = inputs
    tile_rows, tile_columns = TILE[x.device.type]
    size = min(tile_rows, len(x)), min(tile_columns, len(y))
    scratch = Scratch(multiply if dtype is None else nothing, x, *size, dtype)
    guide = None
    if guide_x is not None:
        guide_x = multiplied(guide_x)
        guide_scratch = Scratch(multiply, guide_x, *size)
    for first in range(0, len(y), tile_columns):
        columns = slice(first, min(first + tile_columns, len(y)))
        block = multiplied(y[columns])
        guide_block = None if guide_x is None else multiplied(guide_y[columns])
        for start in range(0, len(x), tile_rows):
            rows = slice(start, min(start + tile_rows, len(x)))
            if guide_x is not None:
                guide = guide_scratch.product(guide_x[rows], guide_block)
            tile = Tile(
                x[rows],
                block,
                scratch.product(x[rows], block),
                guide,
                first,
                scale,
                bias,
                _rows(own, rows),
                _rows(limit, rows),
                _rows(x_keys, rows),
                _rows(y_keys, columns),
                _rows(guide_limit, rows),
                sigmoid,
            )
            yield tile, rows, columns, block


def forward(multiply: Callable, update: Callable, x: Tensor, y: Tensor, *args):
    """The op info_nce_forward. multiply(x, y, out) gives scores; update(tile, maximum, sum, total, count,
    factor) adds a tile to the rows' running statistics, sums relative to the running maximum; where factor
    is given, the tile becomes the weights relative to the new maximum, and factor what earlier weights are
    to be multiplied by."""
    *inputs, mean = args
    sigmoid, x = inputs[-1], multiplied(x)
    maximum = inputs[0].new_full((len(x),), -torch.inf)
    sums, total = torch.zeros_like(maximum), torch.zeros_like(maximum)
    count = maximum.new_zeros(len(x), dtype=torch.int64)
    factor = torch.ones_like(maximum) if mean else None
    rows_mean = maximum.new_zeros(len(x) if mean else 0, x.shape[1])
    for tile, rows, _, block in tiles(multiply, x, y, inputs):
        state = (s[rows] for s in (maximum, sums, total, count))
        update(tile, *state, _rows(factor, rows))
        if mean:
            rows_mean[rows] *= factor[rows, None]
            add_product(rows_mean[rows], tile.scores.to(x.dtype), block)
    if sigmoid:
        return sums, total, count, rows_mean
    if mean:
        # 1 for rows without columns, whose mean is 0.
        rows_mean /= sums.masked_fill(sums == 0, 1)[:, None]
    return maximum + sums.log(), total, count, rows_mean


def backward(multiply: Callable, gradient: Callable, x: Tensor, y: Tensor, *args):
    """The op info_nce_backward. gradient(tile, statistic, g_statistic, g_total, g_own) turns the tile into
    G."""
    *inputs, statistic, g_statistic, g_total, g_own, for_x, for_y = args
    grads, statistic = torch.stack((g_statistic, g_total, g_own)), statistic.contiguous()
    unit = None
    if x.dtype == torch.float16 and x.is_cuda:
        # G is of the order of 1 / rows, too small for fp16.
        unit = grads.abs().amax().clamp_min(1e-30)
        grads = grads / unit
    grad_y = y[:0]
    if for_y:  # written whole, unless there is no row
        grad_y = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        if not len(x):
            grad_y.zero_()
    x = multiplied(x)
    grad_x = statistic.new_zeros(len(x) if for_x else 0, x.shape[1])
    # One GEMM gives a column's whole gradient where all rows lie in one tile.
    whole = len(x) <= TILE[x.device.type][0] and unit is None and x.dtype == y.dtype
    for tile, rows, columns, block in tiles(multiply, x, y, inputs):
        gradient(tile, statistic[rows], *grads[:, rows])
        low = tile.scores.to(x.dtype)
        if for_x:
            add_product(grad_x[rows], low, block)
        if for_y and whole:
            torch.mm(low.T, x, out=grad_y[columns])
        elif for_y:
            if rows.start == 0:
                part = grad_x.new_zeros(len(block), x.shape[1])
            add_product(part, low.T, x[rows])
            if rows.stop == len(x):
                grad_y[columns] = part if unit is None else part * unit
    return grad_x if unit is None else grad_x * unit, grad_y

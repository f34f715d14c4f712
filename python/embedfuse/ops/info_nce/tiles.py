"""info_nce over tiles of the score matrix: a GEMM into a reused scratch, a backend's kernel over each tile.

One tile of scores exists at a time. Columns are the outer loop, so that their gradient is complete and
written once; that of the rows is accumulated in fp32. Tiles come in the same order each time: same bits.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Rows and columns of a tile. CPU: 1024 x 1024 and 1024 x 2048 ran fastest, within 3 %, of 512 to 4096 columns
# at d = 1024 on two cores of an AMD EPYC (Zen 4; 32 MiB of L3 cache); larger scratch leaves the caches.
# CUDA: not measured. 32 MiB of 16-bit scores lie within the L2 cache of an H100; at d = 1024 its 132
# processors take the gradient of 4,096 columns, 128 tiles of 128 x 256, at once.
TILE = {"cpu": (1024, 1024), "cuda": (4096, 4096)}


@dataclass(frozen=True)
class Tile:
    """A tile of scores and what decides which of them count.

    Tensors are as in op.py, of the rows and columns of this tile. `target` counts columns of the whole
    matrix, `first` is the tile's first column. x_factor (rows,), y_factor (columns,): what `scores` are still
    to be multiplied by.
    """

    x: Tensor
    y: Tensor
    scores: Tensor
    guide: Tensor | None
    first: int
    scale: Tensor
    bias: Tensor | None
    target: Tensor | None
    limit: Tensor | None
    x_keys: Tensor | None
    y_keys: Tensor | None
    guide_limit: Tensor | None
    sigmoid: bool
    x_factor: Tensor | None = None
    y_factor: Tensor | None = None


@dataclass(frozen=True)
class TileKernels:
    """What a backend brings.

    multiply(x, y, out): out = x y^T, the scores.
    update(tile, maximum, sum, total, count, factor) adds a tile to the running statistics of the rows; sums
        are relative to the running maximum. Where factor is given, the tile becomes the weights relative to
        the new maximum, and factor what earlier weights are to be multiplied by.
    gradient(tile, statistic, g_statistic, g_total, g_target, into=None): the tile becomes G. With into (rows,
        columns) it becomes G times the scores, and the gradient of the products is added to `into`.
    """

    multiply: Callable
    update: Callable
    gradient: Callable


class Scratch:
    """Memory for products of at most `rows` x `columns`, used again for each."""

    def __init__(self, multiply: Callable, like: Tensor, rows: int, columns: int, dtype=None):
        dtype = dtype or (like.dtype if multiply is no_product else torch.float32)
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


def no_product(x: Tensor, y: Tensor, out: Tensor) -> None:
    """In place of torch_multiply, for kernels that compute the scores themselves."""


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a b, with fp32 `out`."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    elif adds_inside(a.dtype, a.device):
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out += torch.mm(a, b, out_dtype=out.dtype)


@functools.cache
def adds_inside(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch adds 16-bit products to an fp32 matrix within the GEMM, without a pass over both. Older
    versions want that matrix in 16 bits too."""
    out, a = torch.ones(16, 16, device=device), torch.ones(16, 16, dtype=dtype, device=device)
    try:
        torch.addmm(out, a, a, out_dtype=out.dtype, out=out)
    except torch.OutOfMemoryError:
        raise  # says nothing about torch, and would be kept
    except (RuntimeError, TypeError):
        return False
    return bool((out == 17).all())


def gemm_input(x: Tensor) -> Tensor:
    """x in the dtype that the GEMMs take. Tensor cores add up 16-bit products in fp32; on the CPU torch's
    GEMM of 16-bit inputs rounds the sums to 16 bits as well."""
    return x.float() if x.is_cpu else x


def _slice(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]


def tiles(
    multiply: Callable, x: Tensor, y: Tensor, inputs: tuple, dtype: torch.dtype | None = None
) -> Iterator[tuple]:
    """Yields (Tile, its rows, its columns, the columns of y in the GEMM's dtype).

    dtype: of scores that are left to the caller to compute."""
    *inputs, sigmoid = (i.contiguous() if isinstance(i, Tensor) else i for i in inputs)
    scale, bias, target, limit, x_keys, y_keys, guide_x, guide_y, guide_limit = inputs
    tile_rows, tile_columns = TILE[x.device.type]
    size = min(tile_rows, len(x)), min(tile_columns, len(y))
    scratch = Scratch(multiply if dtype is None else no_product, x, *size, dtype)
    guide = None
    if guide_x is not None:
        guide_x = gemm_input(guide_x)
        guide_scratch = Scratch(multiply, guide_x, *size)
    for first in range(0, len(y), tile_columns):
        columns = slice(first, min(first + tile_columns, len(y)))
        block = gemm_input(y[columns])
        guide_block = None if guide_x is None else gemm_input(guide_y[columns])
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
                _slice(target, rows),
                _slice(limit, rows),
                _slice(x_keys, rows),
                _slice(y_keys, columns),
                _slice(guide_limit, rows),
                sigmoid,
            )
            yield tile, rows, columns, block


def forward(kernels: TileKernels, x: Tensor, y: Tensor, *args):
    """The op info_nce_forward."""
    *inputs, mean = args
    sigmoid, x = inputs[-1], gemm_input(x)
    maximum = inputs[0].new_full((len(x),), -torch.inf)
    sums, total = torch.zeros_like(maximum), torch.zeros_like(maximum)
    count = maximum.new_zeros(len(x), dtype=torch.int64)
    factor = torch.ones_like(maximum) if mean else None
    rows_mean = maximum.new_zeros(len(x) if mean else 0, x.shape[1])
    for tile, rows, _, block in tiles(kernels.multiply, x, y, inputs):
        state = (s[rows] for s in (maximum, sums, total, count))
        kernels.update(tile, *state, _slice(factor, rows))
        if mean:
            rows_mean[rows] *= factor[rows, None]
            add_product(rows_mean[rows], tile.scores.to(x.dtype), block)
    if sigmoid:
        return sums, total, count, rows_mean
    if mean:
        # 1 for rows without columns, whose mean is 0.
        rows_mean /= sums.masked_fill(sums == 0, 1)[:, None]
    return maximum + sums.log(), total, count, rows_mean


def backward(kernels: TileKernels, x: Tensor, y: Tensor, *args):
    """The op info_nce_backward."""
    *inputs, statistic, g_statistic, g_total, g_target, for_x, for_y = args
    grads, statistic = torch.stack((g_statistic, g_total, g_target)), statistic.contiguous()
    grads, grad_scale = scaled_gradients(grads, x)
    grad_y = y[:0]
    if for_y:  # written whole, unless there is no row
        grad_y = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        if not len(x):
            grad_y.zero_()
    x = gemm_input(x)
    grad_x = statistic.new_zeros(len(x) if for_x else 0, x.shape[1])
    # One GEMM gives the whole gradient of a column where all rows lie in one tile.
    whole = len(x) <= TILE[x.device.type][0] and grad_scale is None and x.dtype == y.dtype
    for tile, rows, columns, block in tiles(kernels.multiply, x, y, inputs):
        kernels.gradient(tile, statistic[rows], *grads[:, rows])
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
                grad_y[columns] = part if grad_scale is None else part * grad_scale
    return grad_x if grad_scale is None else grad_x * grad_scale, grad_y


def scaled_gradients(grads: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """grads over their largest, and that, for 16-bit G of fp16 inputs: G is of the order of 1 / rows, too
    small for fp16. grads and None for other dtypes."""
    if x.dtype != torch.float16 or not x.is_cuda:
        return grads, None
    scale = grads.abs().amax().clamp_min(1e-30)
    return grads / scale, scale

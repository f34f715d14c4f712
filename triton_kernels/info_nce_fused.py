"""info_nce with the scores in registers:

statistics: per row maximum m, sum of e^(z - m), sum of z, count | sigmoid: -, sums of softplus(z), sigmoid(z)
gradient:   G = w g_statistic + g_total for a tile of scores, which torch's GEMMs then multiply

A program takes a block of rows and a tile of columns. The statistics of each tile are merged
afterwards, in the tiles' order, so the bits are always the same. Limits: 16-bit inputs in rows that
start at multiples of 16 bytes, no guide.
"""

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from embedfuse.triton_kernels._info_nce_scores import (
    place,
    score_tile,
    sigmoid_parts,
    softmax_weight,
    tile_logits,
)
from embedfuse.triton_kernels.tuned import Tunable

LOWEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).min)
# What one launch of `statistics` leaves: rows times tiles, of 16 bytes each.
PARTS = 2**22


def block(b_n: int) -> dict:
    """128 rows and b_n columns; with 64, 128, 256 of them 43, 64, 85 operations per byte that is read.

    Defaults are the largest without spills on sm_80 and sm_90 by Triton 3.6 and 3.9, on sm_100 by 3.9; not
    measured.
    """
    return {"B_Q": 128, "B_N": b_n, "B_D": 64, "num_warps": 8, "num_stages": 3}


# masked: whether limits or keys leave columns out; these take registers, as sigmoids do.
def statistics_config(dtype, rows, depth, sigmoid, masked) -> dict:
    return block(64 if sigmoid else 128 if masked else 256)


def gradient_config(dtype, rows, depth, sigmoid, masked) -> dict:
    return block(128)


def candidates(dtype, rows, depth, sigmoid, masked) -> Iterator[dict]:
    """Sixteen to 128 scores per thread, copies in flight that fit into 160 KiB."""
    sizes = itertools.product((64, 128), (64, 128, 256), (64, 128), (4, 8), (2, 3, 4))
    for b_q, b_n, b_d, warps, stages in sizes:
        bytes_ = (b_q + b_n) * b_d * dtype.itemsize * stages
        if 512 * warps <= b_q * b_n <= 4096 * warps and 48 * 1024 <= bytes_ <= 160 * 1024:
            yield {"B_Q": b_q, "B_N": b_n, "B_D": b_d, "num_warps": warps, "num_stages": stages}


STATISTICS = Tunable("info_nce_statistics", statistics_config, candidates)
GRADIENT = Tunable("info_nce_fused_gradient", gradient_config, candidates)


@triton.jit
def store_statistics(b_z, b_keep, p_m, p_s, p_t, p_n, o_o, m_q, SIGMOID: tl.constexpr):
    if SIGMOID:
        b_weight, b_part = sigmoid_parts(b_z)
        b_n = tl.sum(b_keep.to(tl.int32), 1)
        b_s = tl.sum(tl.where(b_keep, b_part, 0), 1)
        b_t = tl.sum(tl.where(b_keep, b_weight, 0), 1)
    else:
        # What does not count is marked in place: a tile of masks next to that of logits would spill.
        b_z = tl.where(b_keep, b_z, LOWEST)
        b_n = tl.sum(tl.where(b_z == LOWEST, 0.0, 1.0), 1).to(tl.int32)
        b_t = tl.sum(tl.where(b_z == LOWEST, 0.0, b_z), 1)
        b_m = tl.max(b_z, 1)
        b_m = tl.where(b_m == LOWEST, float("-inf"), b_m)
        # A row without columns: no difference of infinities.
        b_s = tl.sum(tl.exp(b_z - tl.where(b_m == float("-inf"), 0.0, b_m)[:, None]), 1)
        tl.store(p_m + o_o, b_m, mask=m_q)
    tl.store(p_s + o_o, b_s, mask=m_q)
    tl.store(p_t + o_o, b_t, mask=m_q)
    tl.store(p_n + o_o, b_n, mask=m_q)


@triton.jit(do_not_specialize=["first"])
def statistics_kernel(
    p_x,  # (rows, depth)
    p_y,  # (columns, depth)
    p_scale,
    p_bias,  # or None
    p_target,  # (rows) or None, as all that follow
    p_lim,
    p_xk,
    p_yk,  # (columns)
    p_m,  # (tiles, rows), as all that follow
    p_s,
    p_t,
    p_n,
    s_x,
    s_y,
    rows,
    columns,
    depth,
    first,
    SIGMOID: tl.constexpr,
    B_Q: tl.constexpr,
    B_N: tl.constexpr,
    B_D: tl.constexpr,
):
    i_q, i_t = place(rows, columns, B_Q, B_N)
    o_q = i_q * B_Q + tl.arange(0, B_Q)
    o_r = tl.minimum(o_q, rows - 1).to(tl.int64)
    o_n = i_t * B_N + tl.arange(0, B_N)
    b_c = score_tile(p_x, s_x, o_r, p_y, s_y, o_n, columns, depth, B_Q, B_N, B_D)
    b_z, b_keep = tile_logits(
        b_c, o_r, o_n, columns, first, p_scale, p_bias, p_target, p_lim, p_xk, p_yk
    )
    o_o = i_t.to(tl.int64) * rows + o_q
    store_statistics(b_z, b_keep, p_m, p_s, p_t, p_n, o_o, o_q < rows, SIGMOID)


@triton.jit(do_not_specialize=["first"])
def fused_gradient_kernel(
    p_x,  # (rows, depth)
    p_y,  # (columns, depth)
    p_g,  # (rows, columns), becomes G
    p_scale,
    p_bias,
    p_target,
    p_lim,
    p_xk,
    p_yk,
    p_stat,
    p_gs,
    p_gt,
    p_go,
    s_x,
    s_y,
    rows,
    columns,
    depth,
    first,
    SIGMOID: tl.constexpr,
    B_Q: tl.constexpr,
    B_N: tl.constexpr,
    B_D: tl.constexpr,
):
    i_q, i_t = place(rows, columns, B_Q, B_N)
    o_q = i_q * B_Q + tl.arange(0, B_Q)
    o_r = tl.minimum(o_q, rows - 1).to(tl.int64)
    o_n = i_t * B_N + tl.arange(0, B_N)
    b_c = score_tile(p_x, s_x, o_r, p_y, s_y, o_n, columns, depth, B_Q, B_N, B_D)
    b_z, b_keep = tile_logits(
        b_c, o_r, o_n, columns, first, p_scale, p_bias, p_target, p_lim, p_xk, p_yk
    )
    if SIGMOID:
        b_weight, _ = sigmoid_parts(b_z)
    else:
        b_weight = softmax_weight(b_z, tl.load(p_stat + o_r)[:, None])
    b_grad = b_weight * tl.load(p_gs + o_r)[:, None] + tl.load(p_gt + o_r)[:, None]
    b_grad = tl.where(b_keep, b_grad, 0)
    if p_target is not None:
        is_target = o_n[None, :] == (tl.load(p_target + o_r) - first).to(tl.int32)[:, None]
        b_grad = tl.where(is_target, tl.load(p_go + o_r)[:, None], b_grad)
    p_o = p_g + o_r[:, None] * columns + o_n[None, :]
    m_o = (o_q < rows)[:, None] & (o_n < columns)[None, :]
    tl.store(p_o, b_grad.to(p_g.dtype.element_ty), mask=m_o)


def takes(x, y, guide_x) -> bool:
    """Scores of 16-bit inputs are worth their GEMM in Triton: tensor cores take them, and a tile of scores in
    memory costs about as much as its GEMM at d = 1024 (8 bytes against 2048 operations on an H100; not
    measured). A guide's second product would not fit into registers, nor would addresses of rows that are not
    aligned."""
    aligned = all(t.stride() == (t.stride(0), 1) and t.stride(0) % 8 == 0 for t in (x, y))
    return x.dtype != torch.float32 and aligned and x.shape[1] % 8 == 0 and guide_x is None


def _config(tunable: Tunable, x, sigmoid: bool, *masks) -> dict:
    # Not by columns: tiles even them out.
    rows, depth = x.shape
    masked = any(mask is not None for mask in masks)
    shape = {"rows": triton.next_power_of_2(rows), "depth": depth}
    return tunable.config(x, **shape, sigmoid=sigmoid, masked=masked)


def forward(x, y, *inputs):
    """Launcher; arguments and results are those of the op without `mean`
    (python/embedfuse/ops/info_nce/op.py)."""
    scale, bias, target, limit, x_keys, y_keys, _, _, _, sigmoid, _ = (
        i.contiguous() if hasattr(i, "contiguous") else i for i in inputs
    )
    rows = len(x)
    config = _config(STATISTICS, x, sigmoid, limit, x_keys)
    step = config["B_N"] * max(1, PARTS // max(rows, 1))
    found = []
    for first in range(0, len(y), step):
        columns = slice(first, first + step)
        keys = None if y_keys is None else y_keys[columns]
        masks = target, limit, x_keys, keys
        parts = statistics(x, y[columns], scale, bias, *masks, first, sigmoid, config)
        found.append(merge(*parts))
    maximum, sums, total, count = merge(*map(torch.stack, zip(*found, strict=True)))
    statistic = sums if sigmoid else maximum + sums.log()
    return statistic, total, count, x.new_empty(0, x.shape[1], dtype=torch.float32)


def statistics(x, y, scale, bias, target, limit, x_keys, y_keys, first, sigmoid, config):
    """(tiles, rows): maximum (sigmoid: 0), sums relative to it, total, count. first: number of column 0."""
    rows, columns = len(x), len(y)
    tiles = triton.cdiv(columns, config["B_N"])
    # Not slices of one: these are unaligned for most numbers of rows, which is another program to compile.
    maximum = x.new_zeros(tiles, rows, dtype=torch.float32)
    sums, total = (torch.empty_like(maximum) for _ in range(2))
    count = torch.empty_like(maximum, dtype=torch.int32)
    if rows:
        with torch.cuda.device_of(x):
            statistics_kernel[(triton.cdiv(rows, config["B_Q"]) * tiles,)](
                x,
                y,
                scale,
                bias,
                *(target, limit, x_keys, y_keys),
                *(maximum, sums, total, count),
                x.stride(0),
                y.stride(0),
                rows,
                columns,
                x.shape[1],
                first,
                SIGMOID=sigmoid,
                **config,
            )
    return maximum, sums, total, count


def merge(maximum, sums, total, count):
    """(rows,) of (parts, rows)."""
    top = maximum.amax(0)
    base = top.masked_fill(top == -torch.inf, 0)  # no difference of infinities
    return top, (sums * (maximum - base).exp()).sum(0), total.sum(0), count.sum(0)


def gradient(
    x, y, scores, scale, bias, target, limit, x_keys, y_keys, first, sigmoid, *grads
) -> None:
    """Launcher over a tile: scores (rows, columns) become G. grads: statistic, g_statistic, g_total,
    g_target."""
    rows, columns = scores.shape
    config = _config(GRADIENT, x, sigmoid, limit, x_keys)
    grid = (triton.cdiv(rows, config["B_Q"]) * triton.cdiv(columns, config["B_N"]),)
    with torch.cuda.device_of(x):
        fused_gradient_kernel[grid](
            x,
            y,
            scores,
            scale,
            bias,
            *(target, limit, x_keys, y_keys),
            *grads,
            x.stride(0),
            y.stride(0),
            rows,
            columns,
            x.shape[1],
            first,
            SIGMOID=sigmoid,
            **config,
        )


def aot_calls() -> Iterator[tuple]:
    """(launcher, its arguments on the meta device): the depths of usual models, with and without masks."""

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    one, row, key, keys = empty(1), empty(100), *(empty(n, dtype=torch.int64) for n in (100, 999))
    for dtype in (torch.float16, torch.bfloat16):
        for depth in (384, 768, 1024, 2048, 4096):
            shapes = (100, depth), (999, depth), (100, 999)
            x, y, scores = (empty(*shape, dtype=dtype) for shape in shapes)
            usual, all_masks = (key, None, None, None), (key, row, key, keys)
            for bias, masks in ((None, usual), (None, all_masks), (one, usual), (one, all_masks)):
                inputs = (one, bias, *masks, None, None, None, bias is not None)
                yield forward, (x, y, *inputs, False)
                tile = x, y, scores, one, bias, *masks, 0, bias is not None
                yield gradient, (*tile, row, row, row, row)
    x, y, scores, row, key = x[:1], y[:1], scores[:1, :1], row[:1], key[:1]
    yield forward, (x, y, one, None, key, *[None] * 6, False, False)
    yield gradient, (x, y, scores, one, None, key, *[None] * 3, 0, False, row, row, row, row)


def tuning_calls(device, dtype) -> Iterator[tuple]:
    """(op, its arguments), GEMMs included: the depths of usual models against 16,384 columns."""
    if dtype != torch.float32:
        depths = (384, 768, 1024, 2048, 4096)
        sizes = itertools.product((1024, 4096), (16384,), depths)
        yield from op_calls(device, dtype, sizes)


def op_calls(device, dtype, sizes) -> Iterator[tuple]:
    one = torch.ones(1, device=device)
    for rows, columns, depth in sizes:
        x, y = (
            torch.randn(n, depth, device=device).to(dtype) / depth**0.5 for n in (rows, columns)
        )
        target, grad = torch.arange(rows, device=device), torch.ones(rows, device=device) / rows
        statistic = (x.float() @ y.float().T).logsumexp(1)
        for bias in (None, one):
            inputs = (x, y, one, bias, target, *[None] * 6, bias is not None)
            yield "info_nce_forward", (*inputs, False)
            yield "info_nce_backward", (*inputs, statistic, grad, grad, grad, True, True)

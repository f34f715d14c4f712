"""info_nce with the scores in registers:

statistics: per row maximum m, sum of e^(z - m), sum of z, count | sigmoid: -, sums of softplus(z), sigmoid(z)
gradient:   G = w g_statistic + g_total for a tile of scores, which torch's GEMMs then multiply

A program of `statistics` takes a block of rows past a share of the columns; the shares are put together
afterwards, in their order, so the bits are always the same. Limits: 16-bit inputs in rows that
start at multiples of 16 bytes, no guide.
"""

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from embedfuse.triton_kernels._info_nce_scores import counting_columns, sigmoid_parts
from embedfuse.triton_kernels.tuned import Tunable

from embedfuse.ops import info_nce_chunks
from embedfuse.ops.info_nce_chunks import Tile

# Programs to be had at least: some waves on a large GPU, of 132 processors. Not measured.
PROGRAMS = 512


# Both defaults are the largest tiles without spills on sm_80, sm_90 and sm_100. Not measured.
def statistics_config(dtype, rows, depth, sigmoid) -> dict:
    return {"B_Q": 128, "B_N": 64, "B_D": 64, "num_warps": 8, "num_stages": 3}


def gradient_config(dtype, rows, depth, sigmoid) -> dict:
    return {"B_Q": 128, "B_N": 128, "B_D": 64, "num_warps": 8, "num_stages": 3}


def candidates(dtype, rows, depth, sigmoid) -> Iterator[dict]:
    """Sixteen to 128 scores per thread, copies in flight that fit into 160 KiB."""
    sizes = itertools.product((64, 128), (64, 128, 256), (64, 128), (4, 8), (2, 3, 4))
    for b_q, b_n, b_d, warps, stages in sizes:
        bytes_ = (b_q + b_n) * b_d * dtype.itemsize * stages
        if 512 * warps <= b_q * b_n <= 4096 * warps and 48 * 1024 <= bytes_ <= 160 * 1024:
            yield {"B_Q": b_q, "B_N": b_n, "B_D": b_d, "num_warps": warps, "num_stages": stages}


STATISTICS = Tunable("info_nce_statistics", statistics_config, candidates)
GRADIENT = Tunable("info_nce_fused_gradient", gradient_config, candidates)


@triton.jit
def score_tile(
    p_x,
    s_x,
    o_r,
    p_y,
    s_y,
    o_n,
    columns,
    depth,
    B_Q: tl.constexpr,
    B_N: tl.constexpr,
    B_D: tl.constexpr,
):
    b_c = tl.zeros([B_Q, B_N], tl.float32)
    p_r = p_x + o_r[:, None] * s_x
    p_c = p_y + tl.minimum(o_n, columns - 1).to(tl.int64)[None, :] * s_y
    for k in range(0, depth, B_D):
        o_k = k + tl.arange(0, B_D)
        b_x = tl.load(p_r + o_k[None, :], mask=(o_k < depth)[None, :], other=0)
        b_y = tl.load(p_c + o_k[:, None], mask=(o_k < depth)[:, None], other=0)
        b_c = tl.dot(b_x, b_y, b_c, input_precision="ieee")
    return b_c


@triton.jit(do_not_specialize=["share"])
def statistics_kernel(
    p_x,  # (rows, depth)
    p_y,  # (columns, depth)
    p_scale,
    p_bias,  # or None
    p_own,  # (rows) or None, as all that follow
    p_lim,
    p_xk,
    p_yk,  # (columns)
    p_m,  # (shares, rows), as all that follow
    p_s,
    p_t,
    p_n,
    s_x,
    s_y,
    rows,
    columns,
    depth,
    share,
    SIGMOID: tl.constexpr,
    B_Q: tl.constexpr,
    B_N: tl.constexpr,
    B_D: tl.constexpr,
):
    o_q = tl.program_id(0) * B_Q + tl.arange(0, B_Q)
    o_r = tl.minimum(o_q, rows - 1).to(tl.int64)
    start = tl.program_id(1) * share
    end = tl.minimum(start + share, columns)
    b_m = tl.full([B_Q], float("-inf"), tl.float32)
    b_s = tl.zeros([B_Q], tl.float32)
    b_t = tl.zeros([B_Q], tl.float32)
    b_n = tl.zeros([B_Q], tl.int32)
    for n in range(start, end, B_N):
        o_n = n + tl.arange(0, B_N)
        b_c = score_tile(p_x, s_x, o_r, p_y, s_y, o_n, columns, depth, B_Q, B_N, B_D)
        m_n = (o_n < end)[None, :]
        b_keep = counting_columns(
            b_c, None, None, m_n, o_r[:, None], o_n[None, :], 0, p_own, p_lim, p_xk, p_yk, None
        )
        b_z = b_c * tl.load(p_scale)
        if p_bias is not None:
            b_z += tl.load(p_bias)
        b_n += tl.sum(b_keep.to(tl.int32), 1)
        if SIGMOID:
            b_weight, b_part = sigmoid_parts(b_z)
            b_s += tl.sum(tl.where(b_keep, b_part, 0), 1)
            b_t += tl.sum(tl.where(b_keep, b_weight, 0), 1)
        else:
            b_t += tl.sum(tl.where(b_keep, b_z, 0), 1)
            b_now = tl.maximum(b_m, tl.max(tl.where(b_keep, b_z, float("-inf")), 1))
            # A row without columns so far: no difference of infinities.
            b_base = tl.where(b_now == float("-inf"), 0.0, b_now)
            b_weight = tl.where(b_keep, tl.exp(b_z - b_base[:, None]), 0)
            b_s = b_s * tl.exp(b_m - b_base) + tl.sum(b_weight, 1)
            b_m = b_now
    o_o = tl.program_id(1).to(tl.int64) * rows + o_q
    tl.store(p_m + o_o, b_m, mask=o_q < rows)
    tl.store(p_s + o_o, b_s, mask=o_q < rows)
    tl.store(p_t + o_o, b_t, mask=o_q < rows)
    tl.store(p_n + o_o, b_n, mask=o_q < rows)


@triton.jit(do_not_specialize=["first"])
def fused_gradient_kernel(
    p_x,  # (rows, depth)
    p_y,  # (columns, depth)
    p_g,  # (rows, columns), becomes G
    p_scale,
    p_bias,
    p_own,
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
    o_q = tl.program_id(0) * B_Q + tl.arange(0, B_Q)
    o_n = tl.program_id(1) * B_N + tl.arange(0, B_N)
    o_r = tl.minimum(o_q, rows - 1).to(tl.int64)
    b_c = score_tile(p_x, s_x, o_r, p_y, s_y, o_n, columns, depth, B_Q, B_N, B_D)
    m_n = (o_n < columns)[None, :]
    b_keep = counting_columns(
        b_c, None, None, m_n, o_r[:, None], o_n[None, :], first, p_own, p_lim, p_xk, p_yk, None
    )
    b_z = b_c * tl.load(p_scale)
    if p_bias is not None:
        b_z += tl.load(p_bias)
    if SIGMOID:
        b_weight, _ = sigmoid_parts(b_z)
    else:
        b_stat = tl.load(p_stat + o_r)
        b_weight = tl.exp(b_z - tl.where(b_stat == float("-inf"), 0.0, b_stat)[:, None])
    b_grad = b_weight * tl.load(p_gs + o_r)[:, None] + tl.load(p_gt + o_r)[:, None]
    b_grad = tl.where(b_keep, b_grad, 0)
    if p_own is not None:
        is_own = first + o_n[None, :] == tl.load(p_own + o_r)[:, None]
        b_grad = tl.where(is_own, tl.load(p_go + o_r)[:, None], b_grad)
    p_o = p_g + o_r[:, None] * columns + o_n[None, :]
    tl.store(p_o, b_grad.to(p_g.dtype.element_ty), mask=(o_q < rows)[:, None] & m_n)


def _config(tunable: Tunable, x, sigmoid: bool) -> dict:
    # Not by columns: shares and tiles even them out.
    rows, depth = x.shape
    return tunable.config(x, rows=triton.next_power_of_2(rows), depth=depth, sigmoid=sigmoid)


def forward(x, y, *inputs):
    """The op info_nce_forward without `mean` (python/embedfuse/ops/info_nce_op.py)."""
    x, y = info_nce_chunks.multiplied(x), info_nce_chunks.multiplied(y)
    *inputs, _, _, _, sigmoid, _ = (
        i.contiguous() if hasattr(i, "contiguous") else i for i in inputs
    )
    rows, columns = len(x), len(y)
    config = _config(STATISTICS, x, sigmoid)
    blocks = triton.cdiv(rows, config["B_Q"])
    tiles = triton.cdiv(columns, config["B_N"])
    shares = min(tiles, triton.cdiv(PROGRAMS, max(blocks, 1)))
    share = triton.cdiv(tiles, shares) * config["B_N"]
    shares = triton.cdiv(columns, share)
    parts = [x.new_empty(shares, rows, dtype=torch.float32) for _ in range(3)]
    count = x.new_empty(shares, rows, dtype=torch.int32)
    if rows:
        with torch.cuda.device_of(x):
            statistics_kernel[(blocks, shares)](
                x,
                y,
                *inputs,
                *parts,
                count,
                x.stride(0),
                y.stride(0),
                rows,
                columns,
                x.shape[1],
                share,
                SIGMOID=sigmoid,
                **config,
            )
    maximum, sums, total = parts
    statistic = sums.sum(0)
    if not sigmoid:
        top = maximum.amax(0)
        base = top.masked_fill(top == -torch.inf, 0)
        statistic = top + (sums * (maximum - base).exp()).sum(0).log()
    return statistic, total.sum(0), count.sum(0), x.new_empty(0, x.shape[1], dtype=torch.float32)


def fused_gradient(tile: Tile, *grads):
    x, y, (rows, columns) = tile.x, tile.y, tile.scores.shape
    config = _config(GRADIENT, x, tile.sigmoid)
    grid = triton.cdiv(rows, config["B_Q"]), triton.cdiv(columns, config["B_N"])
    with torch.cuda.device_of(x):
        fused_gradient_kernel[grid](
            x,
            y,
            tile.scores,
            tile.scale,
            tile.bias,
            *(tile.own, tile.limit, tile.x_keys, tile.y_keys),
            *grads,
            x.stride(0),
            y.stride(0),
            rows,
            columns,
            x.shape[1],
            tile.first,
            SIGMOID=tile.sigmoid,
            **config,
        )


def backward(x, y, *inputs):
    """The op info_nce_backward (python/embedfuse/ops/info_nce_op.py)."""
    return info_nce_chunks.backward(info_nce_chunks.nothing, fused_gradient, x, y, *inputs)


def aot_calls() -> Iterator[tuple]:
    """(launcher, its arguments on the meta device): the depths of usual models, with and without masks."""

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    one, row, key, keys = empty(1), empty(100), *(empty(n, dtype=torch.int64) for n in (100, 999))
    for dtype in (torch.float16, torch.bfloat16):
        for depth in (384, 768, 1024, 2048, 4096):
            shapes = (100, depth), (999, depth), (100, 999)
            x, y, scores = (empty(*shape, dtype=dtype) for shape in shapes)
            for bias, masks in ((None, (key, None, None, None)), (one, (key, row, key, keys))):
                inputs = (one, bias, *masks, None, None, None, bias is not None)
                yield forward, (x, y, *inputs, False)
                tile = Tile(x, y, scores, None, 0, one, bias, *masks, None, bias is not None)
                yield fused_gradient, (tile, row, row, row, row)


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
        own, grad = torch.arange(rows, device=device), torch.ones(rows, device=device) / rows
        statistic = (x.float() @ y.float().T).logsumexp(1)
        for bias in (None, one):
            inputs = (x, y, one, bias, own, *[None] * 6, bias is not None)
            yield "info_nce_forward", (*inputs, False)
            yield "info_nce_backward", (*inputs, statistic, grad, grad, grad, True, True)

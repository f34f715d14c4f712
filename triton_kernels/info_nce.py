"""Per row of a tile of scores c, over the columns j that count, z_j = scale c_j + bias:

update:   maximum m, sum of e^(z_j - m), sum of z_j | sigmoid: -, sum of softplus(z_j), sum of sigmoid(z_j)
gradient: c_j = w_j g_statistic + g_total, w_j = e^(z_j - statistic) | sigmoid: sigmoid(z_j); own column:
g_own

One program per row; a tile's row fits into registers, is read once and written at most once. The GEMMs around
it are torch's (python/embedfuse/ops/tiles.py).
"""

import functools
from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl
from embedfuse.triton_kernels import info_nce_fused
from embedfuse.triton_kernels._info_nce_scores import (
    counting_columns,
    sigmoid_parts,
    softmax_weight,
)
from embedfuse.triton_kernels.info_nce_fused import op_calls
from embedfuse.triton_kernels.tuned import Tunable

from embedfuse.ops.info_nce import tiles
from embedfuse.ops.info_nce.matryoshka import tiles as info_nce_prefix_chunks
from embedfuse.ops.info_nce.tiles import Tile, torch_multiply


@triton.jit
def load_factors(p_xf, p_yf, i_r, o_c, columns):
    factors = 1.0
    if p_xf is not None:
        factors = tl.load(p_xf + i_r) * tl.load(p_yf + o_c, mask=o_c < columns, other=0)
    return factors


@triton.jit
def load_logits(
    p_c,
    p_g,
    i_r,
    columns,
    o_c,
    first,
    p_xf,
    p_yf,
    p_scale,
    p_bias,
    p_own,
    p_lim,
    p_xk,
    p_yk,
    p_glim,
):
    """Logits of a row, which of them count, and its scores."""
    o_g = i_r * columns + o_c
    b_c = tl.load(p_c + o_g, mask=o_c < columns, other=0).to(tl.float32)
    b_c *= load_factors(p_xf, p_yf, i_r, o_c, columns)
    b_keep = counting_columns(
        b_c, p_g, o_g, o_c < columns, i_r, o_c, first, p_own, p_lim, p_xk, p_yk, p_glim
    )
    b_z = b_c * tl.load(p_scale)
    if p_bias is not None:
        b_z += tl.load(p_bias)
    return b_z, b_keep, b_c


@triton.jit(do_not_specialize=["first"])
def update_kernel(
    p_c,  # (rows, columns), becomes the weights where p_f is given
    p_g,  # (rows, columns) or None
    p_xf,  # (rows) or None
    p_yf,  # (columns) or None
    p_scale,
    p_bias,  # or None
    p_own,  # (rows) or None, as all that follow
    p_lim,
    p_xk,
    p_yk,  # (columns)
    p_glim,
    p_m,
    p_s,
    p_t,
    p_n,
    p_f,  # (rows) or None
    columns,
    first,
    SIGMOID: tl.constexpr,
    B_C: tl.constexpr,
):
    i_r = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, B_C)
    b_z, b_keep, _ = load_logits(
        p_c,
        p_g,
        i_r,
        columns,
        o_c,
        first,
        p_xf,
        p_yf,
        p_scale,
        p_bias,
        p_own,
        p_lim,
        p_xk,
        p_yk,
        p_glim,
    )
    factor = 1.0
    if SIGMOID:
        b_weight, b_part = sigmoid_parts(b_z)
        b_part, b_weight = tl.where(b_keep, b_part, 0), tl.where(b_keep, b_weight, 0)
        b_total = b_weight
    else:
        before = tl.load(p_m + i_r)
        now = tl.maximum(before, tl.max(tl.where(b_keep, b_z, float("-inf")), 0))
        # A row without columns so far: no difference of infinities.
        base = tl.where(now == float("-inf"), 0.0, now)
        b_weight = tl.where(b_keep, tl.exp(b_z - base), 0)
        b_part, b_total = b_weight, tl.where(b_keep, b_z, 0)
        factor = tl.exp(tl.where(before == float("-inf"), float("-inf"), before - base))
        tl.store(p_m + i_r, now)
    tl.store(p_s + i_r, tl.load(p_s + i_r) * factor + tl.sum(b_part, 0))
    tl.store(p_t + i_r, tl.load(p_t + i_r) + tl.sum(b_total, 0))
    tl.store(p_n + i_r, tl.load(p_n + i_r) + tl.sum(b_keep.to(tl.int32), 0))
    if p_f is not None:
        tl.store(p_f + i_r, factor)
        tl.store(p_c + i_r * columns + o_c, b_weight.to(p_c.dtype.element_ty), mask=o_c < columns)


@triton.jit(do_not_specialize=["first"])
def gradient_kernel(
    p_c,  # (rows, columns), becomes G
    p_g,
    p_xf,
    p_yf,
    p_scale,
    p_bias,
    p_own,
    p_lim,
    p_xk,
    p_yk,
    p_glim,
    p_stat,
    p_gs,
    p_gt,
    p_go,
    p_sum,  # (rows, columns) or None
    columns,
    first,
    SIGMOID: tl.constexpr,
    B_C: tl.constexpr,
):
    i_r = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, B_C)
    b_z, b_keep, b_c = load_logits(
        p_c,
        p_g,
        i_r,
        columns,
        o_c,
        first,
        p_xf,
        p_yf,
        p_scale,
        p_bias,
        p_own,
        p_lim,
        p_xk,
        p_yk,
        p_glim,
    )
    if SIGMOID:
        b_weight, _ = sigmoid_parts(b_z)
    else:
        b_weight = softmax_weight(b_z, tl.load(p_stat + i_r))
    b_grad = tl.where(b_keep, b_weight * tl.load(p_gs + i_r) + tl.load(p_gt + i_r), 0)
    if p_own is not None:
        is_own = o_c == (tl.load(p_own + i_r) - first).to(tl.int32)
        b_grad = tl.where(is_own, tl.load(p_go + i_r), b_grad)
    if p_sum is not None:
        p_o = p_sum + i_r * columns + o_c
        b_sum = tl.load(p_o, mask=o_c < columns, other=0)
        b_sum += b_grad * load_factors(p_xf, p_yf, i_r, o_c, columns)
        tl.store(p_o, b_sum, mask=o_c < columns)
        b_grad *= b_c
    tl.store(p_c + i_r * columns + o_c, b_grad.to(p_c.dtype.element_ty), mask=o_c < columns)


def default_config(dtype, block) -> dict:
    # Sixteen columns per thread at most, so that a row and its masks stay in registers.
    return {"num_warps": max(1, min(8, block // 512))}


def candidates(dtype, block) -> Iterator[dict]:
    for warps in (1, 2, 4, 8, 16):
        if 64 * warps <= block <= 1024 * warps:
            yield {"num_warps": warps}


UPDATE = Tunable("info_nce_update", default_config, candidates)
GRADIENT = Tunable("info_nce_gradient", default_config, candidates)


def _launch(kernel, tunable: Tunable, tile: Tile, *state):
    rows, columns = tile.scores.shape
    block = max(16, triton.next_power_of_2(columns))
    masks = (tile.own, tile.limit, tile.x_keys, tile.y_keys, tile.guide_limit)
    if rows:
        with torch.cuda.device_of(tile.scores):
            kernel[(rows,)](
                tile.scores,
                tile.guide,
                tile.x_factor,
                tile.y_factor,
                tile.scale,
                tile.bias,
                *masks,
                *state,
                columns,
                tile.first,
                SIGMOID=tile.sigmoid,
                B_C=block,
                **tunable.config(tile.scores, block=block),
            )


def update(*args):
    _launch(update_kernel, UPDATE, *args)


def gradient(*args, into=None):
    _launch(gradient_kernel, GRADIENT, *args, into)


_chunked_forward = functools.partial(tiles.forward, torch_multiply, update)
_chunked_backward = functools.partial(tiles.backward, torch_multiply, gradient)


def _fuses(x, y, guide_x) -> bool:
    """Scores of 16-bit inputs are worth their GEMM in Triton: tensor cores take them, and a tile of scores in
    memory costs about as much as its GEMM at d = 1024 (8 bytes against 2048 operations on an H100; not
    measured). A guide's second product would not fit into registers, nor would addresses of rows that are not
    aligned."""
    aligned = all(t.stride() == (t.stride(0), 1) and t.stride(0) % 8 == 0 for t in (x, y))
    return x.dtype != torch.float32 and aligned and x.shape[1] % 8 == 0 and guide_x is None


def forward(x, y, *inputs):
    """Arguments and results are those of the op (python/embedfuse/ops/op.py)."""
    *_, guide_x, _, _, _, mean = inputs
    if mean or not _fuses(x, y, guide_x):
        return _chunked_forward(x, y, *inputs)
    return info_nce_fused.forward(x, y, *inputs)


def backward(x, y, *inputs):
    """Arguments and results are those of the op (python/embedfuse/ops/op.py)."""
    run = info_nce_fused.backward if _fuses(x, y, inputs[6]) else _chunked_backward
    return run(x, y, *inputs)


def prefix_forward(x, y, *inputs):
    """Arguments and results are those of the op (python/embedfuse/ops/info_nce_prefix_op.py)."""
    return info_nce_prefix_chunks.forward(torch_multiply, update, x, y, *inputs)


def prefix_backward(x, y, *inputs):
    """Arguments and results are those of the op (python/embedfuse/ops/info_nce_prefix_op.py)."""
    return info_nce_prefix_chunks.backward(torch_multiply, gradient, x, y, *inputs)


def aot_calls() -> Iterator[tuple]:
    """(launcher, its arguments on the meta device): every block size and dtype of a tile, with and without
    masks."""

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    one, row, key = empty(1), empty(100), empty(100, dtype=torch.int64)
    for columns in (16, 1000, 2048, 4096):
        for sigmoid in (False, True):
            scores, keys = empty(100, columns), empty(columns, dtype=torch.int64)
            plain = Tile(scores, scores, scores, None, 0, one, None, key, *[None] * 4, sigmoid)
            masks = (key, row, key, keys, row)
            masked = Tile(scores, scores, scores, scores, columns, one, one, *masks, sigmoid)
            factors = {"x_factor": row, "y_factor": empty(columns)}
            for tile in (plain, masked):
                yield update, (tile, row, row, row, key, None)
                yield update, (tile, row, row, row, key, row)
                yield gradient, (tile, row, row, row, row)
            if not sigmoid:
                for tile in (plain, masked, *(replace(t, **factors) for t in (plain, masked))):
                    yield update, (tile, row, row, row, key, None)
                    yield functools.partial(gradient, into=scores), (tile, row, row, row, row)


def tuning_calls(device, dtype) -> Iterator[tuple]:
    """(op, its arguments), GEMMs included: in fp32, of a kind that is not fused, full tiles."""
    if dtype == torch.float32:
        yield from op_calls(device, dtype, [(4096, 1024, 256), (4096, 4096, 256)])

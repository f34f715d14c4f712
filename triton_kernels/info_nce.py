"""Per row of a tile of scores c, over the columns j that count, z_j = scale c_j + bias:

update:   maximum m, sum of e^(z_j - m), sum of z_j | sigmoid: -, sum of softplus(z_j), sum of sigmoid(z_j)
gradient: c_j = w_j g_statistic + g_total, w_j = e^(z_j - statistic) | sigmoid: sigmoid(z_j); target column:
g_target

One program per row; a tile's row fits into registers, is read once and written at most once. The GEMMs around
it are torch's (python/embedfuse/ops/info_nce/tiles.py).
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from embedfuse.triton_kernels._info_nce_scores import (
    counting_columns,
    sigmoid_parts,
    softmax_weight,
)
from embedfuse.triton_kernels.info_nce_fused import op_calls
from embedfuse.triton_kernels.tuned import Tunable


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
    p_target,
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
        b_c, p_g, o_g, o_c < columns, i_r, o_c, first, p_target, p_lim, p_xk, p_yk, p_glim
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
    p_target,  # (rows) or None, as the four that follow
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
        p_target,
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
    p_target,
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
        p_target,
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
    if p_target is not None:
        is_target = o_c == (tl.load(p_target + i_r) - first).to(tl.int32)
        b_grad = tl.where(is_target, tl.load(p_go + i_r), b_grad)
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


def _launch(kernel, tunable: Tunable, inputs: tuple, first: int, sigmoid: bool, *state):
    """inputs: scores (rows, columns) to p_glim, in the order of the kernel's parameters."""
    scores = inputs[0]
    rows, columns = scores.shape
    block = max(16, triton.next_power_of_2(columns))
    if rows:
        with torch.cuda.device_of(scores):
            kernel[(rows,)](
                *inputs,
                *state,
                columns,
                first,
                SIGMOID=sigmoid,
                B_C=block,
                **tunable.config(scores, block=block),
            )


def update(inputs, first, sigmoid, maximum, sums, total, count, factor):
    """Launcher over a tile of scores, whose first column has the number `first`.

    inputs: scores to guide_limit, in the order of the kernel's parameters. maximum, sums, total, count:
    running statistics (rows,), which are updated. factor: (rows,) or None.
    """
    _launch(update_kernel, UPDATE, inputs, first, sigmoid, maximum, sums, total, count, factor)


def gradient(inputs, first, sigmoid, statistic, g_statistic, g_total, g_target, into):
    """Launcher over a tile of scores, which becomes G; inputs as in `update`; into: (rows, columns) or
    None."""
    grads = g_statistic, g_total, g_target
    _launch(gradient_kernel, GRADIENT, inputs, first, sigmoid, statistic, *grads, into)


def aot_calls() -> Iterator[tuple]:
    """(launcher, its arguments on the meta device): every block size and dtype of a tile, with and without
    masks."""

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    one, row, key = empty(1), empty(100), empty(100, dtype=torch.int64)
    for columns in (16, 1000, 2048, 4096):
        scores, keys = empty(100, columns), empty(columns, dtype=torch.int64)
        factors = row, empty(columns)
        plain = (scores, None, None, None, one, None, key, *[None] * 4)
        masked = (scores, scores, None, None, one, one, key, row, key, keys, row)
        for sigmoid in (False, True):
            for inputs, first in ((plain, 0), (masked, columns)):
                tile = inputs, first, sigmoid
                yield update, (*tile, row, row, row, key, None)
                yield update, (*tile, row, row, row, key, row)
                yield gradient, (*tile, row, row, row, row, None)
        for inputs, first in ((plain, 0), (masked, columns)):
            scaled = (*inputs[:2], *factors, *inputs[4:])
            yield update, (scaled, first, False, row, row, row, key, None)
            for tile in ((inputs, first, False), (scaled, first, False)):
                yield gradient, (*tile, row, row, row, row, scores)
    scores, row, key = scores[:1, :1], row[:1], key[:1]
    tile = (scores, None, None, None, one, None, key, *[None] * 4), 0, False
    yield update, (*tile, row, row, row, key, None)
    yield gradient, (*tile, row, row, row, row, None)


def tuning_calls(device, dtype) -> Iterator[tuple]:
    """(op, its arguments), GEMMs included: in fp32, which is not fused, full tiles."""
    if dtype == torch.float32:
        yield from op_calls(device, dtype, [(4096, 1024, 256), (4096, 4096, 256)])

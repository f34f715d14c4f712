"""Tiles of scores, which of them count, and their sigmoid and softplus."""

import triton
import triton.language as tl

# Blocks of rows that go through all columns together, so that these come from the L2 cache: 2048 rows of d =
# 1024 take 4 MiB. Not measured.
GROUP: tl.constexpr = tl.constexpr(16)


@triton.jit
def counting_columns(b_c, p_g, o_g, m_c, i_r, o_c, first, p_target, p_lim, p_xk, p_yk, p_glim):
    """Which columns of a row count."""
    b_keep = m_c
    if p_target is not None:
        b_keep &= o_c != (tl.load(p_target + i_r) - first).to(tl.int32)
    # "not above" and not "at most": a NaN score stays, and shows.
    if p_lim is not None:
        b_keep &= (b_c > tl.load(p_lim + i_r)) == 0
    if p_xk is not None:
        b_keep &= tl.load(p_yk + o_c, mask=m_c, other=0) != tl.load(p_xk + i_r)
    if p_g is not None:
        b_g = tl.load(p_g + o_g, mask=m_c, other=0).to(tl.float32)
        b_keep &= (b_g > tl.load(p_glim + i_r)) == 0
    return b_keep


@triton.jit
def log1p(b_u):
    """log(1 + u) for 0 <= u <= 1, small u exactly: 2 artanh(u / (2 + u))."""
    b_t = b_u / (2 + b_u)
    b_s = b_t * b_t
    b_p = 2.0 / 15
    for k in tl.static_range(13, 0, -2):
        b_p = b_p * b_s + 2.0 / k
    return b_p * b_t


@triton.jit
def sigmoid_parts(b_z):
    """sigmoid(z) and softplus(z)."""
    b_e = tl.exp(-tl.abs(b_z))
    b_weight = tl.where(b_z < 0, b_e, 1.0) / (1 + b_e)
    return b_weight, tl.where(b_z < 0, 0.0, b_z) + log1p(b_e)


@triton.jit
def softmax_weight(b_z, b_stat):
    """e^(z - statistic) of a row, whose statistic without columns is -inf."""
    b_d = b_z - tl.where(b_stat == float("-inf"), 0.0, b_stat)
    # No weight is above 1; of large logits the statistic's rounding would make it so. NaN stays.
    return tl.exp(tl.where(b_d > 0, 0.0, b_d))


@triton.jit
def place(rows, columns, B_Q: tl.constexpr, B_N: tl.constexpr):
    """The block of rows and the tile of columns of a program. Programs that run together share what they
    read."""
    blocks, tiles = tl.cdiv(rows, B_Q), tl.cdiv(columns, B_N)
    i_p = tl.program_id(0)
    first = i_p // (GROUP * tiles) * GROUP
    group = tl.minimum(blocks - first, GROUP)
    i_p %= GROUP * tiles
    return first + i_p % group, i_p // group


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


@triton.jit
def tile_logits(b_c, o_r, o_n, columns, first, p_scale, p_bias, p_target, p_lim, p_xk, p_yk):
    m_n = (o_n < columns)[None, :]
    b_keep = counting_columns(
        b_c, None, None, m_n, o_r[:, None], o_n[None, :], first, p_target, p_lim, p_xk, p_yk, None
    )
    b_z = b_c * tl.load(p_scale)
    if p_bias is not None:
        b_z += tl.load(p_bias)
    return b_z, b_keep

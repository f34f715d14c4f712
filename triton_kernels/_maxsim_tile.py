"""A tile of query rows against one document: the parts of the kernel in maxsim.py.

The running maximum is kept per column of a block of document rows, so that the maximum of a row is reduced
once per document; b_q is the tile itself where a row is one slice of the depth, else None.
"""

import triton
import triton.language as tl

EPS = tl.constexpr(1e-12)


@triton.jit
def load_slice(p_r, m_r, k, depth, B_D: tl.constexpr):
    """Columns k to k + B_D of the rows at p_r; of rows left out, and past the depth, 0."""
    o_k = k + tl.arange(0, B_D)
    m_x = (o_k < depth)[None, :]
    if m_r is not None:
        m_x &= m_r[:, None]
    return tl.load(p_r[:, None] + o_k[None, :], mask=m_x, other=0)


@triton.jit
def normalizers(b_squares, b_scale):
    norm = tl.sqrt(b_squares) * tl.abs(b_scale)
    # tl.maximum would drop a NaN norm.
    return b_scale / tl.where(norm < EPS, EPS, norm)


@triton.jit
def row_normalizers(p_r, m_r, depth, B_Q: tl.constexpr, B_D: tl.constexpr):
    b_squares = tl.zeros([B_Q], tl.float32)
    for k in range(0, depth, B_D):
        b_x = load_slice(p_r, m_r, k, depth, B_D).to(tl.float32)
        b_squares += tl.sum(b_x * b_x, 1)
    return normalizers(b_squares, 1.0)


@triton.jit
def products(
    b_q,
    p_q,
    m_q,
    p_t,
    depth,
    SQUARES: tl.constexpr,
    WIDEN: tl.constexpr,
    B_Q: tl.constexpr,
    B_T: tl.constexpr,
    B_D: tl.constexpr,
):
    """Of the tile, b_q if it is one slice, with a block of document rows; and the squares of these."""
    b_s = tl.zeros([B_Q, B_T], tl.float32)
    b_squares = tl.zeros([B_T], tl.float32)
    if b_q is not None:
        b_d = load_slice(p_t, None, 0, depth, B_D).to(b_q.dtype)
        b_s = tl.dot(b_q, tl.trans(b_d), input_precision="ieee")
        if SQUARES:
            b_squares = tl.sum(b_d.to(tl.float32) * b_d.to(tl.float32), 1)
    else:
        for k in range(0, depth, B_D):
            b_x = load_slice(p_q, m_q, k, depth, B_D)
            if WIDEN:
                b_x = b_x.to(tl.float32)
            b_d = load_slice(p_t, None, k, depth, B_D).to(b_x.dtype)
            b_s = tl.dot(b_x, tl.trans(b_d), b_s, input_precision="ieee")
            if SQUARES:
                b_squares += tl.sum(b_d.to(tl.float32) * b_d.to(tl.float32), 1)
    return b_s, b_squares


@triton.jit
def best_products(
    b_q,
    p_q,
    m_q,
    i_d,
    p_d,
    p_ds,
    p_s,
    p_z,
    s_d,
    s_ds,
    depth,
    PLACES: tl.constexpr,
    NORMALIZE: tl.constexpr,
    WIDEN: tl.constexpr,
    B_Q: tl.constexpr,
    B_T: tl.constexpr,
    B_D: tl.constexpr,
):
    """Per row of the tile: the maximum over a document, and the first row of the document that gives it."""
    d_start, d_rows = tl.load(p_ds + i_d * s_ds), tl.load(p_ds + i_d * s_ds + 1)
    d_rows = (d_rows - d_start).to(tl.int32)
    lowest, nowhere = float("-inf"), 0
    if p_z is not None:
        zero = tl.load(p_z + i_d) != 0
        lowest = tl.where(zero, 0.0, float("-inf"))
        nowhere = tl.where(zero, -1, 0)
    o_c = tl.arange(0, B_T)
    b_best = tl.zeros([B_Q, B_T], tl.float32) + lowest
    b_block = tl.zeros([B_Q, B_T], tl.int32) + nowhere
    for u in range(0, d_rows, B_T):
        # After the end the last row again, which changes no maximum.
        o_t = d_start + tl.minimum(u + o_c, d_rows - 1)
        b_s, b_squares = products(
            b_q, p_q, m_q, p_d + o_t * s_d, depth, NORMALIZE, WIDEN, B_Q, B_T, B_D
        )
        b_scale = tl.full([B_T], 1.0, tl.float32)
        if p_s is not None:
            b_scale = tl.load(p_s + o_t)
        if NORMALIZE:
            b_scale = normalizers(b_squares, b_scale)
        if NORMALIZE or p_s is not None:
            b_s *= b_scale[None, :]
        # NaN counts as above all numbers; the first one is kept.
        if PLACES:
            b_take = (b_best == b_best) & ((b_s <= b_best) == 0)
            b_best = tl.where(b_take, b_s, b_best)
            b_block = tl.where(b_take, u, b_block)
        else:
            b_best = tl.maximum(b_best, b_s, tl.PropagateNan.ALL)
    b_nan = b_best != b_best
    b_any = tl.max(b_nan.to(tl.int32), 1) > 0
    b_top = tl.where(b_any, float("nan"), tl.max(b_best, 1))
    b_place = tl.zeros([B_Q], tl.int32)
    if PLACES:
        b_is = b_nan | (b_best == b_top[:, None])
        # A repeated last row counts as that row, even where the repeated product rounds differently.
        b_row = tl.minimum(b_block + o_c[None, :], d_rows - 1)
        b_at = tl.where(b_block < 0, -1, b_row)
        b_place = tl.min(tl.where(b_is, b_at, 2147483647), 1)
        b_place = tl.where(d_rows > 0, b_place, -1)
    return tl.where(d_rows > 0, b_top, 0), b_place


@triton.jit
def tile_scores(
    b_q,
    b_norm,
    p_q,
    o_r,
    q_rows,
    i_d,
    o_o,
    p_d,
    p_ds,
    p_s,
    p_z,
    p_a,
    s_d,
    s_ds,
    depth,
    width,
    NORMALIZE: tl.constexpr,
    WIDEN: tl.constexpr,
    B_Q: tl.constexpr,
    B_T: tl.constexpr,
    B_D: tl.constexpr,
):
    """What each row of the tile adds to the score of its pair; stores the argmax."""
    m_q = o_r < q_rows
    b_best, b_place = best_products(
        b_q,
        p_q,
        m_q,
        i_d,
        p_d,
        p_ds,
        p_s,
        p_z,
        s_d,
        s_ds,
        depth,
        p_a is not None,
        NORMALIZE,
        WIDEN,
        B_Q,
        B_T,
        B_D,
    )
    if NORMALIZE:
        b_best *= b_norm
    if p_a is not None:
        tl.store(
            p_a + o_o * width + o_r, tl.where(m_q, b_place, -1), mask=(o_o >= 0) & (o_r < width)
        )
    return tl.where(m_q, b_best, 0).to(tl.float64)


@triton.jit
def text_of(p_spans, s_spans, i, texts):
    """First row and number of rows of texts by number; no rows for a number past the last."""
    p = p_spans + i * s_spans
    first = tl.load(p, mask=i < texts, other=0)
    return first, (tl.load(p + 1, mask=i < texts, other=0) - first).to(tl.int32)


@triton.jit
def rows_to_visit(q_rows, p_a, width):
    longest = tl.max(q_rows, 0)
    if p_a is not None:
        longest = tl.maximum(longest, width)
    return longest


@triton.jit
def store_scores(p_o, o_o, b_score, B_Q: tl.constexpr, SLOT: tl.constexpr):
    b_sum = tl.sum(tl.reshape(b_score, [B_Q // SLOT, SLOT]), 1)
    o_o = tl.max(tl.reshape(o_o, [B_Q // SLOT, SLOT]), 1)
    tl.store(p_o + o_o, b_sum.to(tl.float32), mask=o_o >= 0)

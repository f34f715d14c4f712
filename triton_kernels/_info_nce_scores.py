"""Which scores count, and what a sigmoid makes of them."""

import triton
import triton.language as tl


@triton.jit
def counting_columns(b_c, p_g, o_g, m_c, i_r, o_c, first, p_own, p_lim, p_xk, p_yk, p_glim):
    """Which columns of a row count: the one place that knows."""
    b_keep = m_c
    if p_own is not None:
        b_keep &= first + o_c != tl.load(p_own + i_r)
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

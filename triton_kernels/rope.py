"""(x_d, x_{d + half}) = (x_d cos_d - x_{d + half} sin_d, x_{d + half} cos_d + x_d sin_d), in place

One program per token and group of adjacent heads, which share cos and sin of the token.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from embedfuse.triton_kernels.launch import Launch, prepared


@triton.jit
def rope_kernel(
    p_x,  # (tokens, heads, 2 half), in and out
    p_c,  # (tokens, half)
    p_s,  # (tokens, half)
    s_x,
    s_xh,
    s_c,
    s_s,
    heads,
    half: tl.constexpr,  # constant, so that Triton knows where the second half is aligned
    B_H: tl.constexpr,
    B_D: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * B_H + tl.arange(0, B_H)
    o_d = tl.arange(0, B_D)
    m_d = o_d < half
    m_x = (o_h < heads)[:, None] & m_d[None, :]
    p_a = p_x + i_t * s_x + o_h[:, None] * s_xh + o_d[None, :]
    # Once per head, from the L1 cache: as one row they would be loads of single elements.
    o_cd = o_h[:, None] * 0 + o_d[None, :]
    b_c = tl.load(p_c + i_t * s_c + o_cd, mask=m_x, other=0).to(tl.float32)
    b_s = tl.load(p_s + i_t * s_s + o_cd, mask=m_x, other=0).to(tl.float32)
    b_a = tl.load(p_a, mask=m_x, other=0).to(tl.float32)
    b_b = tl.load(p_a + half, mask=m_x, other=0).to(tl.float32)
    dtype = p_x.dtype.element_ty
    tl.store(p_a, (b_a * b_c - b_b * b_s).to(dtype), mask=m_x)
    tl.store(p_a + half, (b_b * b_c + b_a * b_s).to(dtype), mask=m_x)


@prepared
def prepare(device, dtype, heads, half, s_x, s_xh, s_c, s_s) -> Launch:
    """Called with the tokens, then x, cos and sin."""
    b_d = triton.next_power_of_2(half)
    b_h = min(triton.next_power_of_2(heads), max(1, 1024 // b_d))
    warps = max(1, b_h * b_d // 256)  # eight elements per thread and half
    options = {"half": half, "B_H": b_h, "B_D": b_d, "num_warps": warps}
    groups = triton.cdiv(heads, b_h)
    return Launch(rope_kernel, groups, s_x, s_xh, s_c, s_s, heads, **options)


def rope_(x, cos, sin):
    """Launcher; arguments are those of the op (python/embedfuse/ops/rope.py)."""
    if x.stride(-1) != 1:
        dense = x.contiguous()
        rope_(dense, cos, sin)
        x.copy_(dense)
        return
    cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (cos, sin))
    tokens, heads, head_dim = x.shape
    half = head_dim // 2
    if not x.numel():
        return
    strides = x.stride(0), x.stride(1), cos.stride(0), sin.stride(0)
    launch = prepare(x.device, x.dtype, heads, half, *strides)
    with torch.cuda.device_of(x):
        launch(tokens, x, cos, sin)


def aot_calls() -> Iterator[tuple]:
    """(launcher, its arguments on the meta device): block sizes and dtypes, slices of a QKV product."""
    for heads, head_dim in ((32, 128), (8, 64), (1, 2), (3, 34), (16, 256), (5, 80)):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            x = torch.empty(100, heads + 2, head_dim, dtype=dtype, device="meta")[:, :heads]
            cos = torch.empty(100, head_dim, dtype=dtype, device="meta")[:, : head_dim // 2]
            yield rope_, (x, cos, cos)
    yield rope_, (x[:1], cos[:1], cos[:1])
    yield rope_, (x[:1, :1], cos[:1], cos[:1])

"""out = (s - mean(s)) rstd weight + bias,  rstd = 1 / sqrt(var(s) + eps),  s = x + residual

One program per row, which stays in registers: x and residual are read once, the result written once.
Limits: the row is padded to a power of two; above 8192 columns registers may spill.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from embedfuse.triton_kernels.launch import Launch, prepared
from embedfuse.triton_kernels.tuned import Tunable


@triton.jit
def add_layer_norm_kernel(
    p_x,  # (rows, hidden)
    p_r,  # (rows, hidden)
    p_w,  # (hidden)
    p_b,  # (hidden) or None
    p_o,  # (rows, hidden)
    s_x,
    s_r,
    hidden,
    eps,
    B_D: tl.constexpr,
):
    i_r = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, B_D)
    m_d = o_d < hidden
    b_s = tl.load(p_x + i_r * s_x + o_d, mask=m_d, other=0).to(tl.float32)
    b_s += tl.load(p_r + i_r * s_r + o_d, mask=m_d, other=0).to(tl.float32)
    b_s = tl.where(m_d, b_s - tl.sum(b_s, 0) / hidden, 0)
    rstd = 1 / tl.sqrt(tl.sum(b_s * b_s, 0) / hidden + eps)
    b_o = b_s * rstd * tl.load(p_w + o_d, mask=m_d, other=0).to(tl.float32)
    if p_b is not None:
        b_o += tl.load(p_b + o_d, mask=m_d, other=0).to(tl.float32)
    tl.store(p_o + i_r * hidden + o_d, b_o.to(p_o.dtype.element_ty), mask=m_d)


def default_config(dtype, hidden) -> dict:
    # Eight elements per thread: 16 bytes of a 16-bit row in one load.
    return {"num_warps": max(1, min(16, triton.next_power_of_2(hidden) // 256))}


def candidates(dtype, hidden) -> Iterator[dict]:
    """Two to sixty-four elements per thread."""
    for warps in (1, 2, 4, 8, 16):
        if 64 * warps <= triton.next_power_of_2(hidden) <= 2048 * warps:
            yield {"num_warps": warps}


TUNABLE = Tunable("add_layer_norm", default_config, candidates)


@prepared
def prepare(device, dtype, hidden, s_x, s_r, eps) -> Launch:
    """Called with the rows, then x, residual, weight, bias and out."""
    config = TUNABLE.config_on(device, dtype, hidden=hidden)
    block = triton.next_power_of_2(hidden)
    return Launch(add_layer_norm_kernel, 1, s_x, s_r, hidden, eps, B_D=block, **config)


def add_layer_norm(x, residual, weight, bias, eps):
    """Launcher; arguments and results are those of the op (python/embedfuse/ops/add_layer_norm.py)."""
    x, residual = (t if t.stride(1) == 1 else t.contiguous() for t in (x, residual))
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    rows, hidden = x.shape
    out = x.new_empty(rows, hidden)
    if rows:
        launch = prepare(x.device, x.dtype, hidden, x.stride(0), residual.stride(0), eps)
        with torch.cuda.device_of(x):
            launch(rows, x, residual, weight, bias, out)
    return out


def aot_calls() -> Iterator[tuple]:
    """(launcher, its arguments on the meta device): every block size, each dtype, with and without bias."""

    def empty(*shape, dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    for hidden in (1, 37, 201, 384, 768, 1024, 2560, 4096, 8192):
        for dtype in (torch.float32, torch.bfloat16):
            x, weight = empty(100, hidden, dtype=dtype), empty(hidden, dtype=dtype)
            yield add_layer_norm, (x, x, weight, weight, 1e-5)
    x, weight = empty(100, 768, dtype=torch.float16), empty(768, dtype=torch.float16)
    yield add_layer_norm, (x, x, weight, None, 1e-12)
    yield add_layer_norm, (x[:1], x[:1], weight, weight, 1e-12)


def tuning_calls(device, dtype) -> Iterator[tuple]:
    """(op, its arguments): the widths of BERT-like models, 65,536 tokens."""
    for hidden in (384, 768, 1024, 2048, 4096):
        x, residual, (weight, bias) = (
            torch.randn(rows, hidden, device=device).to(dtype) for rows in (65536, 65536, 2)
        )
        yield "add_layer_norm", (x, residual, weight, bias, 1e-5)

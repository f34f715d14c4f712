"""normed = round(s rstd) weight,  rstd = 1 / sqrt(mean(s^2) + eps),  s = round(x + residual)

One program per row, which stays in registers: x and residual are read once, both results written once.
Limits: the row is padded to a power of two; above 8192 columns registers may spill.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from embedfuse.triton_kernels.add_layer_norm import candidates, default_config
from embedfuse.triton_kernels.launch import Launch, prepared
from embedfuse.triton_kernels.tuned import Tunable

TUNABLE = Tunable("add_rms_norm", default_config, candidates)


@triton.jit
def add_rms_norm_kernel(
    p_x,  # (tokens, heads, hidden)
    p_r,  # (tokens, heads, hidden) or None
    p_w,  # (hidden)
    p_n,  # (tokens, heads, hidden)
    p_s,  # (tokens, heads, hidden) or None; may be p_r: a thread reads and writes the same elements
    s_x,
    s_xh,
    s_r,
    s_rh,
    heads,
    hidden,
    eps,
    B_D: tl.constexpr,
):
    i_r = tl.program_id(0).to(tl.int64)
    i_t, i_h = i_r // heads, i_r % heads
    o_d = tl.arange(0, B_D)
    m_d = o_d < hidden
    dtype = p_n.dtype.element_ty
    b_s = tl.load(p_x + i_t * s_x + i_h * s_xh + o_d, mask=m_d, other=0).to(tl.float32)
    if p_r is not None:
        b_s += tl.load(p_r + i_t * s_r + i_h * s_rh + o_d, mask=m_d, other=0).to(tl.float32)
        tl.store(p_s + i_r * hidden + o_d, b_s.to(dtype), mask=m_d)
        b_s = b_s.to(dtype).to(tl.float32)
    rstd = 1 / tl.sqrt(tl.sum(b_s * b_s, 0) / hidden + eps)
    b_n = (b_s * rstd).to(dtype).to(tl.float32)
    b_n *= tl.load(p_w + o_d, mask=m_d, other=0).to(tl.float32)
    tl.store(p_n + i_r * hidden + o_d, b_n.to(dtype), mask=m_d)


@prepared
def prepare(device, dtype, heads, hidden, s_x, s_xh, s_r, s_rh, eps) -> Launch:
    """Called with tokens times heads, then x, residual, weight, normed and summed."""
    config = TUNABLE.config_on(device, dtype, hidden=hidden)
    block = triton.next_power_of_2(hidden)
    numbers = s_x, s_xh, s_r, s_rh, heads, hidden, eps
    return Launch(add_rms_norm_kernel, 1, *numbers, B_D=block, **config)


def add_rms_norm(x, residual, weight, eps):
    """Launcher; arguments and results are those of the op (python/embedfuse/ops/add_rms_norm.py)."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    if residual is not None and residual.stride(-1) != 1:
        residual = residual.contiguous()
    weight = weight.contiguous()
    normed = x.new_empty(x.shape)
    summed = x.new_empty(0 if residual is None else x.shape)
    hidden, heads = x.shape[-1], 1 if x.dim() == 2 else x.shape[1]
    if x.numel():
        strides = *_strides(x), *((0, 0) if residual is None else _strides(residual))
        launch = prepare(x.device, x.dtype, heads, hidden, *strides, eps)
        sums = None if residual is None else summed
        with torch.cuda.device_of(x):
            launch(x.numel() // hidden, x, residual, weight, normed, sums)
    return normed, summed


def _strides(x) -> tuple[int, int]:
    """Of tokens and heads; rows are tokens of one head."""
    return x.stride(0), x.stride(1) if x.dim() == 3 else 0


def aot_calls() -> Iterator[tuple]:
    """(launcher, its arguments on the meta device): block sizes, dtypes, with and without residual."""

    def empty(*shape, dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    for hidden in (1, 37, 384, 1024, 2560, 4096, 8192):
        for dtype in (torch.float32, torch.bfloat16):
            x, weight = empty(100, hidden, dtype=dtype), empty(hidden, dtype=dtype)
            yield add_rms_norm, (x, x, weight, 1e-5)
            yield add_rms_norm, (x, None, weight, 1e-5)
    yield add_rms_norm, (x[:1], x[:1], weight, 1e-5)
    x = empty(100, 48, 128, dtype=torch.float16)
    yield add_rms_norm, (x[:, :32], None, empty(128, dtype=torch.float16), 1e-6)


def tuning_calls(device, dtype) -> Iterator[tuple]:
    """(op, its arguments): 65,536 tokens of decoders; heads of a query, as Qwen3 normalises them."""
    for hidden in (1024, 2560, 4096):
        x, residual = (torch.randn(65536, hidden, device=device).to(dtype) for _ in range(2))
        yield "add_rms_norm", (x, residual, x[0], 1e-5)
    for head_dim in (64, 128, 256):
        x = torch.randn(8192, 32, head_dim, device=device).to(dtype)
        yield "add_rms_norm", (x, None, x[0, 0], 1e-6)

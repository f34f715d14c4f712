"""out = gate sigmoid(gate) up

One program per row and up to 2048 adjacent columns; reads gate and up once, writes once.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from embedfuse.triton_kernels.launch import Launch, prepared


@triton.jit
def silu_mul_kernel(
    p_g,  # (rows, columns)
    p_u,  # (rows, columns)
    p_o,  # (rows, columns)
    s_g,
    s_u,
    columns,
    B_D: tl.constexpr,
):
    i_r = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * B_D + tl.arange(0, B_D)
    m_d = o_d < columns
    b_g = tl.load(p_g + i_r * s_g + o_d, mask=m_d, other=0).to(tl.float32)
    b_u = tl.load(p_u + i_r * s_u + o_d, mask=m_d, other=0).to(tl.float32)
    b_o = b_g / (1 + tl.exp(-b_g)) * b_u
    tl.store(p_o + i_r * columns + o_d, b_o.to(p_o.dtype.element_ty), mask=m_d)


@prepared
def prepare(device, dtype, columns, s_g, s_u) -> Launch:
    """Called with the rows, then gate, up and out."""
    block = min(2048, triton.next_power_of_2(columns))
    # Eight elements per thread: 16 bytes of a 16-bit row in one load.
    options = {"B_D": block, "num_warps": max(1, block // 256)}
    return Launch(silu_mul_kernel, triton.cdiv(columns, block), s_g, s_u, columns, **options)


def silu_mul(gate, up):
    """Launcher; arguments and result are those of the op (python/embedfuse/ops/silu_mul.py)."""
    gate, up = (t if t.stride(1) == 1 else t.contiguous() for t in (gate, up))
    rows, columns = gate.shape
    out = gate.new_empty(rows, columns)
    if gate.numel():
        launch = prepare(gate.device, gate.dtype, columns, gate.stride(0), up.stride(0))
        with torch.cuda.device_of(gate):
            launch(rows, gate, up, out)
    return out


def aot_calls() -> Iterator[tuple]:
    """(launcher, its arguments on the meta device): every block size, each dtype, halves of a product."""
    for columns in (1, 37, 80, 384, 1024, 14336):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            product = torch.empty(100, 2 * columns, dtype=dtype, device="meta")
            yield silu_mul, tuple(product.chunk(2, 1))
    yield silu_mul, tuple(product[:1].chunk(2, 1))

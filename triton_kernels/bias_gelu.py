"""out = z (1 + erf(z / sqrt(2))) / 2,  z = x + bias

One program per row and run of up to 2048 columns; reads x once, writes once.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl


@triton.jit
def bias_gelu_kernel(
    p_x,  # (rows, columns)
    p_b,  # (columns) or None
    p_o,  # (rows, columns)
    s_x,
    columns,
    B_D: tl.constexpr,
):
    i_r = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * B_D + tl.arange(0, B_D)
    m_d = o_d < columns
    b_z = tl.load(p_x + i_r * s_x + o_d, mask=m_d, other=0).to(tl.float32)
    if p_b is not None:
        b_z += tl.load(p_b + o_d, mask=m_d, other=0).to(tl.float32)
    b_o = b_z * 0.5 * (1 + tl.erf(b_z * 0.7071067811865476))
    tl.store(p_o + i_r * columns + o_d, b_o.to(p_o.dtype.element_ty), mask=m_d)


def bias_gelu(x, bias):
    """Launcher; arguments and result are those of the op (python/embedfuse/ops/bias_gelu.py)."""
    x = x if x.stride(1) == 1 else x.contiguous()
    bias = None if bias is None else bias.contiguous()
    rows, columns = x.shape
    out = x.new_empty(rows, columns)
    block = min(2048, triton.next_power_of_2(max(columns, 1)))
    if x.numel():
        with torch.cuda.device_of(x):
            bias_gelu_kernel[(rows, triton.cdiv(columns, block))](
                x,
                bias,
                out,
                x.stride(0),
                columns,
                B_D=block,
                # Eight elements per thread: 16 bytes of a 16-bit row in one load.
                num_warps=max(1, block // 256),
            )
    return out


def aot_calls() -> Iterator[tuple]:
    """(launcher, its arguments on the meta device): every block size, each dtype, with and without bias."""
    for columns in (1, 37, 80, 384, 1024, 1536, 4096):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            x = torch.empty(100, columns, dtype=dtype, device="meta")
            yield bias_gelu, (x, x[0])
            yield bias_gelu, (x, None)

"""out_r = sum over the entries k of segment r with i_k >= 0 of w_k x_{i_k}

One program per row of the result and slice of its columns; no atomics, so the bits are always the same.
Limits: a long segment is one program.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl


@triton.jit
def segment_sum_kernel(
    p_x,  # (rows, depth)
    p_w,  # (entries)
    p_i,  # (entries)
    p_ptr,  # (segments + 1)
    p_o,  # (segments, depth)
    s_x,
    depth,
    B_K: tl.constexpr,
    B_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * B_D + tl.arange(0, B_D)
    m_d = o_d < depth
    end = tl.load(p_ptr + row + 1)
    b_acc = tl.zeros([B_K, B_D], tl.float32)
    for k in range(tl.load(p_ptr + row), end, B_K):
        o_k = k + tl.arange(0, B_K)
        b_i = tl.load(p_i + o_k, mask=o_k < end, other=-1)
        m_k = b_i >= 0
        b_w = tl.load(p_w + o_k, mask=m_k, other=0)
        p_r = p_x + b_i[:, None] * s_x + o_d[None, :]
        b_x = tl.load(p_r, mask=m_k[:, None] & m_d[None, :], other=0).to(tl.float32)
        b_acc += b_w[:, None] * b_x
    tl.store(p_o + row * depth + o_d, tl.sum(b_acc, 0), mask=m_d)


def segment_sum(x, weights, index, indptr):
    """Launcher; arguments and results are those of the op (python/embedfuse/ops/segment_sum.py)."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    rows, depth = len(indptr) - 1, x.shape[1]
    out = weights.new_empty(rows, depth)
    block = min(256, max(16, triton.next_power_of_2(max(depth, 1))))
    if out.numel():
        with torch.cuda.device_of(x):
            segment_sum_kernel[(rows, triton.cdiv(depth, block))](
                x,
                weights.contiguous(),
                index.contiguous(),
                indptr.contiguous(),
                out,
                x.stride(0),
                depth,
                # Elements enough that a thread loads 16 bytes at once.
                B_K=max(8, 1024 // block),
                B_D=block,
            )
    return out


def aot_calls() -> Iterator[tuple]:
    """(launcher, its arguments on the meta device): every block of columns."""

    def empty(*shape, dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    entries = empty(50, dtype=torch.float32), empty(50, dtype=torch.int64)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for depth in (16, 37, 64, 128, 256, 1024):
            yield (
                segment_sum,
                (empty(100, depth, dtype=dtype), *entries, empty(11, dtype=torch.int64)),
            )
    entries = [part[:1] for part in entries]
    yield segment_sum, (empty(1, depth, dtype=dtype), *entries, empty(2, dtype=torch.int64))

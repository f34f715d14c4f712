"""p_b = sum_t w_bt h_bt / sum_t w_bt ;  out_b = p_b / max(|p_b|, 1e-12) ;  norm_b = |p_b|

One launch, one program per sequence: it finds the first and the last token in the mask row, sums the rows
between them with the hidden row spread over its warps, and normalises what it holds in registers.
Limits: with fewer sequences than the GPU has SMs, the rest stand idle, however long the sequences are.
The hidden row is padded to a power of two; above 8192 columns registers may spill.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

EPS = tl.constexpr(1e-12)


# length changes from call to call: no recompilation when it is 1 or a multiple of 16.
@triton.jit(do_not_specialize=["length"])
def pool_normalize_kernel(
    p_h,  # (tokens, hidden) or (batch, length, hidden)
    p_cu,  # (batch + 1) or None
    p_m,  # (batch, length) or None
    p_o,  # (batch, hidden)
    p_n,  # (batch)
    s_hb,
    s_ht,
    s_mb,
    s_mt,
    length,
    hidden,
    POOLING: tl.constexpr,
    NORMALIZE: tl.constexpr,
    B_M: tl.constexpr,
    B_T: tl.constexpr,
    B_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    if p_cu is not None:
        start = tl.load(p_cu + i_b)
        first = start * 0
        last = tl.load(p_cu + i_b + 1) - start - 1
        p_h += start.to(tl.int64) * s_ht
    else:
        first = length * 0
        last = length - 1
        p_h += i_b * s_hb
    if p_m is not None:
        p_m += i_b * s_mb
        b_first = tl.full([B_M], 2147483647, tl.int32)
        b_last = tl.full([B_M], -1, tl.int32)
        for t in range(0, length, B_M):
            o_t = t + tl.arange(0, B_M)
            keep = tl.load(p_m + o_t.to(tl.int64) * s_mt, mask=o_t < length, other=0) != 0
            b_first = tl.minimum(b_first, tl.where(keep, o_t, 2147483647))
            b_last = tl.maximum(b_last, tl.where(keep, o_t, -1))
        first = tl.min(b_first, 0)
        last = tl.max(b_last, 0)

    o_d = tl.arange(0, B_D)
    m_d = o_d < hidden
    if POOLING == "cls" or POOLING == "last":
        row = first if POOLING == "cls" else last
        p_x = p_h + row.to(tl.int64) * s_ht + o_d
        # Nothing is read for a sequence without tokens.
        b_p = tl.load(p_x, mask=o_d < tl.where(first <= last, hidden, 0), other=0).to(tl.float32)
    else:
        b_acc = tl.zeros([B_T, B_D], tl.float32)
        b_total = tl.zeros([B_T], tl.float32)
        for t in tl.range(first, last + 1, B_T, num_stages=STAGES):
            o_t = t + tl.arange(0, B_T)
            m_t = o_t <= last
            # Holes between first and last are read and dropped, so that no row waits for its mask.
            p_x = p_h + o_t.to(tl.int64)[:, None] * s_ht + o_d[None, :]
            b_x = tl.load(p_x, mask=m_t[:, None] & m_d[None, :], other=0).to(tl.float32)
            keep = m_t
            if p_m is not None:
                keep &= tl.load(p_m + o_t.to(tl.int64) * s_mt, mask=m_t, other=0) != 0
            if POOLING == "mean":
                b_w = keep.to(tl.float32)
            else:
                b_w = tl.where(keep, o_t - first + 1, 0).to(tl.float32)
            # A dropped row is replaced, not multiplied: 0 * NaN would be NaN.
            b_acc += tl.where(keep[:, None], b_x, 0) * b_w[:, None]
            b_total += b_w
        total = tl.sum(b_total, 0)
        b_p = tl.sum(b_acc, 0) / tl.where(total == 0, 1.0, total)

    norm = tl.sqrt(tl.sum(b_p * b_p, 0))
    tl.store(p_n + i_b, norm)
    if NORMALIZE:
        # tl.maximum would drop a NaN norm.
        b_p = b_p / tl.where(norm < EPS, EPS, norm)
    tl.store(p_o + i_b * hidden + o_d, b_p.to(p_o.dtype.element_ty), mask=m_d)


def _blocks(hidden: int, pooling: str, element_size: int) -> dict:
    """Tile and warps for a hidden size."""
    block_hidden = triton.next_power_of_2(hidden)
    if pooling in ("cls", "last"):
        block_rows, num_warps = 1, max(4, min(16, block_hidden // 512))
    else:
        # 32 sums a thread, so that three tiles in flight and the sums leave registers free.
        block_rows, num_warps = max(1, 8192 // block_hidden), max(8, min(16, block_hidden // 1024))
    return {
        "B_M": 1024,
        "B_T": block_rows,
        "B_D": block_hidden,
        "STAGES": 4 if element_size == 2 else 3,
        "num_warps": num_warps,
    }


def pool_normalize(hidden_states, cu_seqlens, attention_mask, pooling, normalize, out_dtype):
    """Launcher; arguments and results are those of the op (python/embedfuse/ops/pool_normalize.py)."""
    if hidden_states.stride(-1) != 1:
        hidden_states = hidden_states.contiguous()
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        attention_mask = attention_mask.view(torch.uint8)
    packed = cu_seqlens is not None
    batch = len(cu_seqlens) - 1 if packed else hidden_states.shape[0]
    length, hidden = hidden_states.shape[-2:]
    out = hidden_states.new_empty(batch, hidden, dtype=out_dtype)
    norm = hidden_states.new_empty(batch, dtype=torch.float32)
    if batch:
        with torch.cuda.device_of(hidden_states):
            pool_normalize_kernel[(batch,)](
                hidden_states,
                cu_seqlens,
                attention_mask,
                out,
                norm,
                0 if packed else hidden_states.stride(0),
                hidden_states.stride(-2),
                *((0, 0) if attention_mask is None else attention_mask.stride()),
                length,
                hidden,
                POOLING=pooling,
                NORMALIZE=normalize,
                **_blocks(hidden, pooling, hidden_states.element_size()),
            )
    return out, norm


def aot_calls() -> Iterator[tuple]:
    """(launcher, arguments on the meta device) that between them give every kind of compiled kernel."""
    batch, length = 4, 100
    cu_seqlens = torch.empty(batch + 1, dtype=torch.int32, device="meta")
    masks = [
        torch.empty(batch, length, dtype=dtype, device="meta")
        for dtype in (torch.int64, torch.int32, torch.bool)
    ]
    for hidden in (1, 37, 384, 768, 1024, 4096, 8192):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            padded = torch.empty(batch, length, hidden, dtype=dtype, device="meta")
            for pooling in ("cls", "last", "mean", "weighted_mean"):
                yield pool_normalize, (padded, None, masks[0], pooling, True, dtype)

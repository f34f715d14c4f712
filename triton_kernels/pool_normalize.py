"""p_b = sum_t w_bt h_bt / sum_t w_bt ;  out_b = p_b / max(|p_b|, 1e-12) ;  norm_b = |p_b|

One launch, one program per sequence: it finds the first and the last token in the mask row, sums the rows
between them with the hidden row spread over its warps, and normalises what it holds in registers.
Limits: with fewer sequences than the GPU has SMs, the other SMs are idle, however long the sequences are.
The hidden row is padded to a power of two; above 8192 columns registers may spill.
"""

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from embedfuse.triton_kernels.tuned import Tunable

EPS = tl.constexpr(1e-12)
UNIT = tl.constexpr(2.0**-96)


# The padded length changes from call to call: no recompilation when it is 1 or a multiple of 16.
@triton.jit(do_not_specialize=["length", "s_mb"])
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
        rows = tl.load(p_cu + i_b + 1) - start
        p_h += start.to(tl.int64) * s_ht
    else:
        rows = length
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
        # From here on row 0 is the first token. Without any, rows is negative.
        rows = tl.max(b_last, 0) - first + 1
        p_h += first.to(tl.int64) * s_ht
        p_m += first.to(tl.int64) * s_mt

    o_d = tl.arange(0, B_D)
    if POOLING == "cls" or POOLING == "last":
        if POOLING == "last":
            p_h += (rows - 1).to(tl.int64) * s_ht
        m_d = o_d < tl.where(rows > 0, hidden, 0)
        b_p = tl.load(p_h + o_d, mask=m_d, other=0).to(tl.float32)
    else:
        b_acc = tl.zeros([B_T, B_D], tl.float32)
        b_total = tl.zeros([B_T], tl.float32)
        # The loop starts at a constant: from `first` on, Triton 3.9 no longer sees that rows are aligned.
        for t in tl.range(0, rows, B_T, num_stages=STAGES):
            o_t = t + tl.arange(0, B_T)
            m_t = o_t < rows
            # Holes between the tokens are read and dropped, so that no row waits for its mask.
            p_x = p_h + o_t.to(tl.int64)[:, None] * s_ht + o_d[None, :]
            b_x = tl.load(p_x, mask=m_t[:, None] & (o_d < hidden)[None, :], other=0).to(tl.float32)
            b_w = tl.full([B_T], 1, tl.float32)
            if POOLING == "weighted_mean":
                b_w = (o_t + 1).to(tl.float32)
            if p_m is not None:
                m_t &= tl.load(p_m + o_t.to(tl.int64) * s_mt, mask=m_t, other=0) != 0
            # A dropped row is replaced, not multiplied: 0 * NaN would be NaN.
            b_acc += tl.where(m_t[:, None], b_x * b_w[:, None], 0)
            b_total += tl.where(m_t, b_w, 0)
        b_p = tl.sum(b_acc, 0) / tl.where(rows > 0, tl.sum(b_total, 0), 1)

    norm, unit = tl.sqrt(tl.sum(b_p * b_p, 0)), 1.0
    if norm == float("inf"):  # fp32 has no squares from 2^128 on
        unit = UNIT
        norm = tl.sqrt(tl.sum(b_p * UNIT * (b_p * UNIT), 0))
    tl.store(p_n + i_b, norm / unit)
    if NORMALIZE:
        # tl.maximum would drop a NaN norm.
        b_p = b_p * unit / tl.where(norm < EPS, EPS, norm)
    tl.store(p_o + i_b * hidden + o_d, b_p.to(p_o.dtype.element_ty), mask=o_d < hidden)


def default_config(dtype, hidden, pooling, aligned) -> dict:
    """Rows of a tile, warps and copies in flight."""
    block_hidden, one = triton.next_power_of_2(max(hidden, 1)), pooling in ("cls", "last")
    # 16 rows at most: unaligned rows keep a 64-bit address for each element.
    block_rows = 1 if one else max(1, min(16, 8192 // block_hidden))
    return {
        "B_T": block_rows,
        # Rows that are not aligned are copied element by element, so not ahead.
        "STAGES": 4 if aligned and not one else 1,
        "num_warps": max(4, min(16, block_rows * block_hidden // 512)),
        # What 16 warps may have at most. By default ptxas spills a few registers to fit one more program.
        "maxnreg": 128,
    }


def candidates(dtype, hidden, pooling, aligned) -> Iterator[dict]:
    """Tiles of one to thirty-two elements per thread, copies ahead that fit into 160 KiB."""
    block_hidden, one = triton.next_power_of_2(max(hidden, 1)), pooling in ("cls", "last")
    for rows, stages, warps in itertools.product((1, 2, 4, 8, 16), (1, 2, 3, 4, 6), (4, 8, 16)):
        tile = rows * block_hidden
        if (
            32 * warps <= tile <= 1024 * warps
            and (rows == 1 or not one)
            and (stages == 1 or (aligned and not one))
            and stages * tile * dtype.itemsize <= 160 * 1024
        ):
            yield {"B_T": rows, "STAGES": stages, "num_warps": warps, "maxnreg": 128}


TUNABLE = Tunable("pool_normalize", default_config, candidates)


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
    # Triton itself looks for multiples of 16.
    aligned = hidden % 16 == 0 and hidden_states.stride(-2) % 16 == 0
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
                B_M=1024,
                B_D=triton.next_power_of_2(max(hidden, 1)),
                **TUNABLE.config(hidden_states, hidden=hidden, pooling=pooling, aligned=aligned),
            )
    return out, norm


def aot_calls() -> Iterator[tuple]:
    """(launcher, its arguments on the meta device): every tile, and every branch at one hidden size."""

    def empty(*shape, dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    batch, length = 4, 100
    mask = empty(batch, length, dtype=torch.int64)
    for hidden in (1, 37, 201, 500, 384, 1024, 2560, 4096, 8192):
        for dtype in (torch.float32, torch.bfloat16):
            x = empty(batch, length, hidden, dtype=dtype)
            for pooling in ("last", "weighted_mean"):
                yield pool_normalize, (x, None, mask, pooling, True, dtype)
    x = empty(batch, length, 768, dtype=torch.float16)
    packed = empty(batch * length, 768, dtype=torch.float16)
    cu_seqlens = empty(batch + 1, dtype=torch.int32)
    for pooling in ("cls", "last", "mean", "weighted_mean"):
        for dtype in (torch.int32, torch.bool):
            mask = empty(batch, length, dtype=dtype)
            yield pool_normalize, (x, None, mask, pooling, True, torch.float16)
        yield pool_normalize, (x, None, None, pooling, False, torch.float32)
        yield pool_normalize, (packed, cu_seqlens, None, pooling, True, torch.bfloat16)
        yield pool_normalize, (packed[:1], cu_seqlens[:2], None, pooling, True, torch.float16)
        yield pool_normalize, (x[:1, :1], None, mask[:1, :1], pooling, True, torch.float16)


def tuning_calls(device, dtype) -> Iterator[tuple]:
    """(op, its arguments): 64 texts of 512 tokens, packed for means, padded for the last token."""
    batch, length = 64, 512
    cu_seqlens = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)
    mask = torch.ones(batch, length, dtype=torch.int64, device=device)
    for hidden in (384, 768, 1024, 2560, 4096):
        x = torch.randn(batch, length, hidden, device=device).to(dtype)
        yield "pool_normalize", (x.view(-1, hidden), cu_seqlens, None, "mean", True, dtype)
        yield "pool_normalize", (x, None, mask, "last", True, dtype)

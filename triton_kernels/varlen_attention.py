"""out_i = sum_j softmax_j(q_i . k_j scale) v_j over the keys j of i's sequence that i attends to

A program takes a tile of one sequence's query rows under one key head: B_M pairs of row and head, a group's
heads next to each other, so that keys and values are read once for all of them. Keys are read B_N at a time,
without those that no row of the tile attends to; the online softmax keeps maximum and sum in fp32. The tiles
of sequence b are numbered from (first row) // B_M + b, which leaves a number for the partial tile of each
sequence: so the grid needs no lengths on the host, and programs past the end of a sequence return at once.
Limits: fp32, and all dtypes before sm_80, are multiplied without tensor cores; a single query row, however
long the text, is one program per key head.
"""

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from embedfuse.registry import triton_interprets
from embedfuse.triton_kernels.launch import Launch, prepared
from embedfuse.triton_kernels.tuned import Tunable


def default_config(dtype: torch.dtype, head_dim: int, rows: int) -> dict:
    """Blocks, warps and stages. rows: of an average sequence, times the heads that share its keys.

    The largest blocks without spills on sm_80, sm_90 and sm_100. Not measured.
    """
    depth = max(16, triton.next_power_of_2(head_dim))
    wide = depth > 128
    odd = head_dim % 16 != 0  # loaded one element at a time, which needs registers
    few = rows <= 32 or (wide and odd)
    if dtype == torch.float32:
        # Without tensor cores a thread holds all that it multiplies: a slice of the depth at a time.
        many, keys, slice_ = 32 if wide or odd else 64, 32, 16
        warps = 4 if few or depth <= 64 else 8
    else:
        many, slice_ = 128 if depth <= 64 and not odd else 64, depth
        keys = 32 if wide or odd else 64
        keys = 16 if wide and odd else keys
        warps = 4 if few else 8
    blocks = {"B_M": 16 if few else many, "B_N": keys, "B_D": depth, "B_K": slice_}
    stages = 2 if wide or odd else 3
    # By default ptxas spills a few registers to fit one more program.
    return {**blocks, "num_warps": warps, "num_stages": stages, "maxnreg": 255}


def candidates(dtype: torch.dtype, head_dim: int, rows: int) -> Iterator[dict]:
    """At most 64 sums per thread, keys and values that fit into 160 KiB."""
    default = default_config(dtype, head_dim, rows)
    depth = default["B_D"]
    sizes = itertools.product((16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (2, 3, 4))
    for many, keys, warps, stages in sizes:
        bytes_ = (many + 2 * keys * stages) * depth * dtype.itemsize
        if many * depth <= 2048 * warps and bytes_ <= 160 * 1024:
            blocks = {"B_M": many, "B_N": keys, "num_warps": warps, "num_stages": stages}
            yield {**default, **blocks}


TUNABLE = Tunable("varlen_attention", default_config, candidates)


@triton.jit
def load_rows(p_x, m_t, o_d, DEPTH: tl.constexpr, WIDEN: tl.constexpr):
    """p_x: (rows, 1), where each row starts."""
    b_x = tl.load(p_x + o_d[None, :], mask=m_t[:, None] & (o_d < DEPTH)[None, :], other=0)
    if WIDEN:
        b_x = b_x.to(tl.float32)
    return b_x


@triton.jit
def find_sequence(p_cu, tile, batch, GROUP: tl.constexpr, B_M: tl.constexpr):
    """The last sequence whose tiles begin at `tile` or before it, and where they begin."""
    low, high = 0, batch - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(p_cu + middle).to(tl.int64) * GROUP // B_M + middle <= tile:
            low = middle
        else:
            high = middle - 1
    return low, tl.load(p_cu + low).to(tl.int64) * GROUP // B_M + low


@triton.jit(do_not_specialize=["batch"])
def varlen_attention_kernel(
    p_q,  # (tokens_q, heads, DEPTH)
    p_k,  # (tokens_k, heads / GROUP, DEPTH)
    p_v,  # (tokens_k, heads / GROUP, DEPTH)
    p_o,  # (tokens_q, heads, DEPTH)
    p_cuq,  # (batch + 1)
    p_cuk,  # (batch + 1)
    batch,
    scale,
    window,  # or None
    s_q,
    s_qh,
    s_k,
    s_kh,
    s_v,
    s_vh,
    s_o,
    CAUSAL: tl.constexpr,
    GROUP: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDEN: tl.constexpr,
    B_M: tl.constexpr,
    B_N: tl.constexpr,
    B_D: tl.constexpr,
    B_K: tl.constexpr,
):
    i_b, tile = find_sequence(p_cuq, tl.program_id(0), batch, GROUP, B_M)
    q_start, k_start = tl.load(p_cuq + i_b).to(tl.int64), tl.load(p_cuk + i_b).to(tl.int64)
    rows = (tl.load(p_cuq + i_b + 1) - q_start).to(tl.int32)
    keys = (tl.load(p_cuk + i_b + 1) - k_start).to(tl.int32)
    first = (tl.program_id(0) - tile) * B_M
    if first >= rows.to(tl.int64) * GROUP:
        return
    o_m = (first % GROUP).to(tl.int32) + tl.arange(0, B_M)
    first = (first // GROUP).to(tl.int32)
    o_i = first + o_m // GROUP
    m_i = o_i < rows
    i_h = tl.program_id(1).to(tl.int64)
    o_h = i_h * GROUP + o_m % GROUP
    o_d = tl.arange(0, B_D)
    p_q += (q_start + o_i)[:, None] * s_q + o_h[:, None] * s_qh
    p_k += k_start * s_k + i_h * s_kh
    p_v += k_start * s_v + i_h * s_vh

    # The position of a row among the keys: the last row has that of the last key.
    o_own = o_i + (keys - rows)
    start, end = 0, keys
    if CAUSAL:
        last = tl.minimum(first + (B_M + GROUP - 2) // GROUP, rows - 1)
        end = last + keys - rows + 1
    if window is not None:
        # From a multiple of B_N, so that the sums of a row do not depend on its tile.
        start = tl.maximum(first + keys - rows - window + 1, 0) // B_N * B_N

    if B_K == B_D:
        b_q = load_rows(p_q, m_i, o_d, DEPTH, WIDEN)
    b_top = tl.full([B_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([B_M], tl.float32)
    b_acc = tl.zeros([B_M, B_D], tl.float32)
    for n in range(start, end, B_N):
        o_n = n + tl.arange(0, B_N)
        m_n = o_n < keys
        p_n = p_k + o_n.to(tl.int64)[:, None] * s_k
        b_s = tl.zeros([B_M, B_N], tl.float32)
        if B_K == B_D:
            b_k = load_rows(p_n, m_n, o_d, DEPTH, WIDEN)
            b_s = tl.dot(b_q, tl.trans(b_k), b_s, input_precision="ieee")
        else:
            for d in range(0, B_D, B_K):
                o_k = d + tl.arange(0, B_K)
                b_x = load_rows(p_q, m_i, o_k, DEPTH, WIDEN)
                b_k = load_rows(p_n, m_n, o_k, DEPTH, WIDEN)
                b_s = tl.dot(b_x, tl.trans(b_k), b_s, input_precision="ieee")
        m_s = m_n[None, :]
        if CAUSAL:
            m_s &= o_n[None, :] <= o_own[:, None]
        if window is not None:
            m_s &= o_n[None, :] > o_own[:, None] - window
        b_s = tl.where(m_s, b_s * scale, float("-inf"))
        b_now = tl.maximum(b_top, tl.max(b_s, 1))
        # A row without a score so far: no difference of infinities.
        b_base = tl.where(b_now == float("-inf"), 0.0, b_now)
        b_p = tl.exp(b_s - b_base[:, None])
        b_old = tl.exp(b_top - b_base)
        b_sum = b_sum * b_old + tl.sum(b_p, 1)
        b_v = load_rows(p_v + o_n.to(tl.int64)[:, None] * s_v, m_n, o_d, DEPTH, WIDEN)
        b_acc *= b_old[:, None]
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")
        b_top = b_now

    m_see = (o_own >= 0) if CAUSAL else (o_own < keys)
    b_o = tl.where(m_see[:, None] & (keys > 0), b_acc / b_sum[:, None], 0)
    p_o += (q_start + o_i)[:, None] * s_o + o_h[:, None] * DEPTH + o_d[None, :]
    tl.store(p_o, b_o.to(p_o.dtype.element_ty), mask=m_i[:, None] & (o_d < DEPTH)[None, :])


@prepared
def prepare(
    device, dtype, heads, kv_heads, head_dim, rows, scale, causal, window, *strides
) -> Launch:
    """rows: average_rows. strides: of query, key and value, each of tokens and heads.

    Called with the tiles, then query, key, value, out, both cu_seqlens, and numbers=(batch,).
    """
    # Triton multiplies 16 bits badly before sm_80, and in its interpreter (3.9) the bit patterns of bf16.
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    widen = old or (triton_interprets() and dtype == torch.bfloat16)
    if widen:
        config = default_config(torch.float32, head_dim, rows)
    else:
        config = TUNABLE.config_on(device, dtype, head_dim=head_dim, rows=rows)
    shape = {"CAUSAL": causal, "GROUP": heads // kv_heads, "DEPTH": head_dim, "WIDEN": widen}
    numbers = float(scale), window, *strides, heads * head_dim
    return Launch(varlen_attention_kernel, kv_heads, *numbers, **shape, **config)


def average_rows(tokens, group, batch) -> int:
    """Rows of an average sequence, times the heads that share its keys, as a config depends on them."""
    rows = -(-tokens * group // batch)
    # triton.next_power_of_2 takes longer than a launch.
    return min(64, 1 << (rows - 1).bit_length())


def varlen_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, scale, causal, window):
    """Launcher; arguments and results are those of the op (python/embedfuse/ops/varlen_attention.py)."""
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    tokens, heads, head_dim = query.shape
    kv_heads, batch = key.shape[1], len(cu_seqlens_q) - 1
    group = heads // kv_heads
    out = query.new_empty(query.shape)
    if not out.numel():
        return out
    shape = heads, kv_heads, head_dim, average_rows(tokens, group, batch)
    strides = (stride for x in (query, key, value) for stride in x.stride()[:2])
    launch = prepare(query.device, query.dtype, *shape, scale, causal, window, *strides)
    bounds = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    with torch.cuda.device_of(query):
        launch(tiles(launch, tokens, batch), query, key, value, out, *bounds, numbers=(batch,))
    return out


def tiles(launch: Launch, tokens: int, batch: int) -> int:
    return tokens * launch.options["GROUP"] // launch.options["B_M"] + batch


def aot_calls() -> Iterator[tuple]:
    """(launcher, its arguments on the meta device): many rows and all masks, few rows and none, slices of one
    QKV product."""
    bounds = torch.empty(9, dtype=torch.int32, device="meta")
    depths = {torch.float32: (37, 64, 128, 256), torch.float16: (64,)}
    depths[torch.bfloat16] = depths[torch.float32]
    for dtype, head_dim in ((key, depth) for key in depths for depth in depths[key]):
        for tokens, group, causal, window in ((800, 1, True, 300), (8, 2, False, None)):
            qkv = torch.empty(tokens, 4 * group + 8, head_dim, dtype=dtype, device="meta")
            parts = qkv.split([4 * group, 4, 4], 1)
            yield varlen_attention, (*parts, bounds, bounds, 0.1, causal, window)
    one = [part[:1] for part in parts]
    yield varlen_attention, (*one, bounds[:2], bounds[:2], 0.1, True, 1)


def tuning_calls(device, dtype) -> Iterator[tuple]:
    """(op, its arguments): whole texts, and one row of each, for BERT, BGE-M3 and E5-mistral."""
    bounds = torch.arange(0, 17 * 512, 512, dtype=torch.int32, device=device)
    one_each = torch.arange(17, dtype=torch.int32, device=device)
    for heads, kv_heads, head_dim, causal in ((16, 16, 64, False), (32, 8, 128, True)):
        qkv = torch.randn(16 * 512, heads + 2 * kv_heads, head_dim, device=device).to(dtype)
        query, *keys = qkv.split([heads, kv_heads, kv_heads], 1)
        for rows, starts in ((query, bounds), (query[511::512], one_each)):
            yield "varlen_attention", (rows, *keys, starts, bounds, head_dim**-0.5, causal, None)

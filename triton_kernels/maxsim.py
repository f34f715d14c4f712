"""maxsim:      s_p = sum over rows i of q of max over rows j of d of q_i d_j ;  a_pi = that j
segment_sum: out_r = sum over the entries k of segment r of w_k x_{i_k}

maxsim takes one program per pair: a block of query rows meets the document's rows a block at a time on the
tensor cores, in slices of the depth, with a running maximum in registers; int8 documents become the query's
dtype, which holds them exactly, and their scales multiply the products. segment_sum takes one program
per row of the result and slice of its columns; neither uses atomics, so the bits are always the same.
Limits: each query reads its documents anew, from L2 where they fit; a pair of a long query is one program.
"""

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from embedfuse.triton_kernels.tuned import Tunable

from embedfuse.registry import triton_interprets

EPS = tl.constexpr(1e-12)


@triton.jit
def load_rows(p_x, stride, o_t, rows, o_k, depth):
    m_x = (o_t < rows)[:, None] & (o_k < depth)[None, :]
    return tl.load(p_x + o_t.to(tl.int64)[:, None] * stride + o_k[None, :], mask=m_x, other=0)


@triton.jit
def normalizers(b_squares, b_scale):
    norm = tl.sqrt(b_squares) * tl.abs(b_scale)
    # tl.maximum would drop a NaN norm.
    return b_scale / tl.where(norm < EPS, EPS, norm)


@triton.jit(do_not_specialize=["documents", "width"])
def maxsim_kernel(
    p_q,  # (rows, depth)
    p_qs,  # (queries, 2)
    p_d,  # (rows, depth)
    p_ds,  # (documents, 2)
    p_s,  # (rows of p_d) or None
    p_z,  # (documents) or None
    p_p,  # (pairs, 2) or None
    p_o,  # (pairs)
    p_a,  # (pairs, width) or None
    s_q,
    s_d,
    documents,
    depth,
    width,
    NORMALIZE: tl.constexpr,
    WIDEN: tl.constexpr,
    B_Q: tl.constexpr,
    B_T: tl.constexpr,
    B_D: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    if p_p is not None:
        i_q, i_d = tl.load(p_p + 2 * pair), tl.load(p_p + 2 * pair + 1)
    else:
        i_q, i_d = pair // documents, pair % documents
    q_start, d_start = tl.load(p_qs + 2 * i_q), tl.load(p_ds + 2 * i_d)
    q_rows = (tl.load(p_qs + 2 * i_q + 1) - q_start).to(tl.int32)
    d_rows = (tl.load(p_ds + 2 * i_d + 1) - d_start).to(tl.int32)
    p_q += q_start * s_q
    p_d += d_start * s_d
    lowest, nowhere = float("-inf"), 0
    if p_z is not None:
        zero = tl.load(p_z + i_d) != 0
        lowest = tl.where(zero, 0.0, float("-inf"))
        nowhere = tl.where(zero, -1, 0)

    end = q_rows
    if p_a is not None:
        end = tl.maximum(q_rows, width)
    score = tl.zeros([B_Q], tl.float32)
    for t in range(0, end, B_Q):
        o_q = t + tl.arange(0, B_Q)
        b_best = tl.zeros([B_Q], tl.float32) + lowest
        b_place = tl.zeros([B_Q], tl.int32) + nowhere
        for u in range(0, d_rows, B_T):
            o_t = u + tl.arange(0, B_T)
            b_s = tl.zeros([B_Q, B_T], tl.float32)
            b_squares = tl.zeros([B_T], tl.float32)
            for k in range(0, depth, B_D):
                o_k = k + tl.arange(0, B_D)
                b_q = load_rows(p_q, s_q, o_q, q_rows, o_k, depth)
                b_d = load_rows(p_d, s_d, o_t, d_rows, o_k, depth)
                if WIDEN:
                    b_q, b_d = b_q.to(tl.float32), b_d.to(tl.float32)
                b_d = b_d.to(b_q.dtype)
                b_s = tl.dot(b_q, tl.trans(b_d), b_s, input_precision="ieee")
                if NORMALIZE:
                    b_squares += tl.sum(b_d.to(tl.float32) * b_d.to(tl.float32), 1)
            b_scale = tl.full([B_T], 1.0, tl.float32)
            if p_s is not None:
                b_scale = tl.load(p_s + d_start + o_t, mask=o_t < d_rows, other=0)
            if NORMALIZE:
                b_scale = normalizers(b_squares, b_scale)
            if NORMALIZE or p_s is not None:
                b_s *= b_scale[None, :]
            b_s = tl.where((o_t < d_rows)[None, :], b_s, float("-inf"))
            # A NaN goes before all numbers, and the first one stays.
            b_nan = tl.max((b_s != b_s).to(tl.int32), 1) > 0
            b_top, b_at = tl.max(tl.where(b_s != b_s, float("inf"), b_s), 1, return_indices=True)
            take = (b_best == b_best) & (b_nan | (b_top > b_best))
            b_best = tl.where(take, tl.where(b_nan, float("nan"), b_top), b_best)
            b_place = tl.where(take, u + b_at, b_place)
        if NORMALIZE:
            b_squares = tl.zeros([B_Q], tl.float32)
            for k in range(0, depth, B_D):
                b_q = load_rows(p_q, s_q, o_q, q_rows, k + tl.arange(0, B_D), depth).to(tl.float32)
                b_squares += tl.sum(b_q * b_q, 1)
            b_best *= normalizers(b_squares, 1.0)
        found = (o_q < q_rows) & (d_rows > 0)
        score += tl.where(found, b_best, 0)
        if p_a is not None:
            b_place = tl.where(found, b_place, -1)
            tl.store(p_a + pair * width + o_q, b_place, mask=o_q < width)
    tl.store(p_o + pair, tl.sum(score, 0))


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
        m_k = o_k < end
        b_w = tl.load(p_w + o_k, mask=m_k, other=0)
        b_i = tl.load(p_i + o_k, mask=m_k, other=0)
        p_r = p_x + b_i[:, None] * s_x + o_d[None, :]
        b_x = tl.load(p_r, mask=m_k[:, None] & m_d[None, :], other=0).to(tl.float32)
        b_acc += b_w[:, None] * b_x
    tl.store(p_o + row * depth + o_d, tl.sum(b_acc, 0), mask=m_d)


def default_config(dtype, depth, int8) -> dict:
    # More columns at a time spill registers.
    most = 16 if dtype == torch.float32 else 64 if int8 else 128
    if int8 and depth % 16:  # bytes are loaded one at a time
        most = min(most, 32)
    return {
        "B_Q": 32,
        "B_T": 64,
        "B_D": min(most, max(16, triton.next_power_of_2(max(depth, 1)))),
        "num_warps": 4,
        "num_stages": 2,
        # What 4 warps may have. Told nothing, ptxas spills a few to fit one more program.
        "maxnreg": 255,
    }


def candidates(dtype, depth, int8) -> Iterator[dict]:
    """At most 32 products per thread, slices no wider than the default's, copies that fit into 160 KiB."""
    default = default_config(dtype, depth, int8)
    sizes = itertools.product((16, 32, 64), (32, 64, 128), (16, 32, 64, 128), (4, 8), (2, 3, 4))
    for b_q, b_t, b_d, warps, stages in sizes:
        bytes_ = (b_q + b_t) * b_d * dtype.itemsize * stages
        if b_d <= default["B_D"] and b_q * b_t <= 1024 * warps and bytes_ <= 160 * 1024:
            tile = {"B_Q": b_q, "B_T": b_t, "B_D": b_d, "num_warps": warps, "num_stages": stages}
            yield {**default, **tile}


TUNABLE = Tunable("maxsim", default_config, candidates)


def maxsim(query, query_spans, documents, document_spans, scale, zero, pairs, normalize, width):
    """Launcher; arguments and results are those of the op (python/embedfuse/ops/maxsim_op.py)."""
    document = documents[0] if len(documents) == 1 else torch.cat(documents)
    query, document = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, document))
    count = len(query_spans) * len(document_spans) if pairs is None else len(pairs)
    scores = query.new_empty(count, dtype=torch.float32)
    argmax = query.new_empty((count if width else 0, width), dtype=torch.int32)
    depth = query.shape[1]
    if count:
        with torch.cuda.device_of(query):
            maxsim_kernel[(count,)](
                query,
                query_spans.contiguous(),
                document,
                document_spans.contiguous(),
                None if scale is None else scale.contiguous(),
                None if zero is None else zero.contiguous().view(torch.uint8),
                None if pairs is None else pairs.contiguous(),
                scores,
                argmax if width else None,
                query.stride(0),
                document.stride(0),
                len(document_spans),
                depth,
                width,
                NORMALIZE=normalize,
                # Triton's interpreter (3.9) multiplies the bit patterns of bf16.
                WIDEN=triton_interprets() and query.dtype == torch.bfloat16,
                **TUNABLE.config(query, depth=depth, int8=scale is not None),
            )
    return scores, argmax


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
    """(launcher, its arguments on the meta device): every slice, and every branch."""

    def empty(*shape, dtype=torch.int64):
        return torch.empty(shape, dtype=dtype, device="meta")

    spans, zero, pairs = empty(4, 2), empty(4, dtype=torch.bool), empty(9, 2)
    scale = empty(100, dtype=torch.float32)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for depth in (16, 37, 64, 128, 256, 1024):
            x = empty(100, depth, dtype=dtype)
            yield maxsim, (x, spans, [x], spans, None, None, None, False, 0)
            yield maxsim, (x, spans, [x.to(torch.int8)], spans, scale, None, None, False, 0)
            yield segment_sum, (x, empty(50, dtype=torch.float32), empty(50), empty(11))
        yield maxsim, (x, spans, [x], spans, None, zero, pairs, True, 32)
        yield maxsim, (x, spans, [x], spans, None, None, pairs, False, 32)
        yield maxsim, (x, spans, [x], spans, None, zero, None, True, 0)
        yield maxsim, (x, spans, [x.to(torch.int8)], spans, scale, zero, pairs, True, 32)


def tuning_calls(device, dtype) -> Iterator[tuple]:
    """(op, its arguments): a query of 32 tokens against 1,000 documents of 300."""

    def side(count, length, depth):
        starts = torch.arange(0, count * length, length, device=device)
        x = torch.randn(count * length, depth, device=device) / depth**0.5
        return x.to(dtype), torch.stack((starts, starts + length), 1)

    for depth in (96, 128, 768, 1024):
        query, document = side(1, 32, depth), side(1000, 300, depth)
        yield "maxsim", (*query, [document[0]], document[1], None, None, None, False, 0)
        scale = torch.ones(len(document[0]), device=device) / 127
        bytes_ = [(document[0] * 127).round().clamp(-127, 127).to(torch.int8)]
        yield "maxsim", (*query, bytes_, document[1], scale, None, None, False, 0)

"""token_weights:  w_t = relu(h_t . weight + bias)
lexical_scores: s_qd = sum over the ids that both hold of w_q w_d

token_weights takes a block of rows per program. lexical_scores looks up a query's ids in one document by
binary search.
Limits: lexical_scores launches a program per pair, which short rows do not fill.
"""

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from embedfuse.triton_kernels.tuned import Tunable


@triton.jit
def token_weights_kernel(
    p_h,  # (tokens, hidden)
    p_w,  # (hidden)
    p_b,  # one fp32 element or None
    p_o,  # (tokens)
    s_ht,
    tokens,
    hidden,
    B_T: tl.constexpr,
    B_D: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * B_T + tl.arange(0, B_T)
    m_t = o_t < tokens
    b_acc = tl.zeros([B_T, B_D], tl.float32)
    for d in range(0, hidden, B_D):
        o_d = d + tl.arange(0, B_D)
        m_d = o_d < hidden
        p_x = p_h + o_t[:, None] * s_ht + o_d[None, :]
        b_x = tl.load(p_x, mask=m_t[:, None] & m_d[None, :], other=0).to(tl.float32)
        b_acc += b_x * tl.load(p_w + o_d, mask=m_d, other=0).to(tl.float32)[None, :]
    b_o = tl.sum(b_acc, 1)
    if p_b is not None:
        b_o += tl.load(p_b)
    # tl.maximum would drop a NaN.
    tl.store(p_o + o_t, tl.where(b_o <= 0, 0.0, b_o), mask=m_t)


@triton.jit(do_not_specialize=["documents"])
def lexical_scores_kernel(
    p_qw,  # (query entries)
    p_qid,
    p_qptr,  # (queries + 1)
    p_dw,  # (document entries)
    p_did,
    p_dptr,  # (documents + 1)
    p_o,  # (queries, documents), or (queries) if ALIGNED
    documents,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0)
    i_q = pair
    i_d = pair
    if not ALIGNED:
        i_q = pair // documents
        i_d = pair % documents
    q_end = tl.load(p_qptr + i_q + 1)
    d_start, d_end = tl.load(p_dptr + i_d), tl.load(p_dptr + i_d + 1)
    b_acc = tl.zeros([BLOCK], tl.float32)
    for t in range(tl.load(p_qptr + i_q), q_end, BLOCK):
        o_q = t + tl.arange(0, BLOCK)
        m_q = o_q < q_end
        b_id = tl.load(p_qid + o_q, mask=m_q, other=-1)
        # The first entry whose id is not below: each round halves what is left to search.
        b_low = tl.zeros([BLOCK], tl.int64) + d_start
        b_high = tl.zeros([BLOCK], tl.int64) + d_end
        left = d_end - d_start
        while left > 0:
            b_middle = (b_low + b_high) // 2
            m = b_low < b_high
            below = m & (tl.load(p_did + b_middle, mask=m, other=0) < b_id)
            b_low = tl.where(below, b_middle + 1, b_low)
            b_high = tl.where(m & (below == 0), b_middle, b_high)
            left = left // 2
        m_q &= b_low < d_end
        m_q &= tl.load(p_did + b_low, mask=m_q, other=-1) == b_id
        b_w = tl.load(p_qw + o_q, mask=m_q, other=0)
        b_acc += b_w * tl.load(p_dw + b_low, mask=m_q, other=0)
    tl.store(p_o + pair, tl.sum(b_acc, 0))


def weights_config(dtype, hidden) -> dict:
    block_hidden = min(1024, triton.next_power_of_2(max(hidden, 1)))
    return {"B_T": max(4, min(64, 4096 // block_hidden)), "B_D": block_hidden, "num_warps": 4}


def weights_candidates(dtype, hidden) -> Iterator[dict]:
    """Tiles of eight to thirty-two elements per thread."""
    most = triton.next_power_of_2(max(hidden, 1))
    sizes = itertools.product(
        (1, 2, 4, 8, 16, 32, 64), (64, 128, 256, 512, 1024, 2048), (1, 2, 4, 8)
    )
    for rows, columns, warps in sizes:
        if columns <= most and 256 * warps <= rows * columns <= 1024 * warps:
            yield {"B_T": rows, "B_D": columns, "num_warps": warps}


def scores_config(dtype, entries) -> dict:
    return {"BLOCK": 64, "num_warps": 4}


def scores_candidates(dtype, entries) -> Iterator[dict]:
    for block, warps in itertools.product((16, 32, 64, 128, 256), (1, 2, 4)):
        if block <= 128 * warps:
            yield {"BLOCK": block, "num_warps": warps}


WEIGHTS = Tunable("token_weights", weights_config, weights_candidates)
SCORES = Tunable("lexical_scores", scores_config, scores_candidates)


def token_weights(hidden_states, weight, bias):
    """Launcher; arguments and results are those of the op (python/embedfuse/ops/lexical/weights.py)."""
    if hidden_states.stride(-1) != 1:
        hidden_states = hidden_states.contiguous()
    tokens, hidden = hidden_states.shape
    out = hidden_states.new_empty(tokens, dtype=torch.float32)
    config = WEIGHTS.config(hidden_states, hidden=hidden)
    if tokens:
        with torch.cuda.device_of(hidden_states):
            token_weights_kernel[(triton.cdiv(tokens, config["B_T"]),)](
                hidden_states,
                weight.contiguous(),
                None if bias is None else bias.float(),
                out,
                hidden_states.stride(0),
                tokens,
                hidden,
                **config,
            )
    return out


def lexical_scores(
    query_weights,
    query_ids,
    query_indptr,
    document_weights,
    document_ids,
    document_indptr,
    aligned,
):
    """Launcher; arguments and results are those of the op (python/embedfuse/ops/lexical/scores.py)."""
    queries, documents = len(query_indptr) - 1, len(document_indptr) - 1
    out = query_weights.new_empty(
        (queries,) if aligned else (queries, documents), dtype=torch.float32
    )
    if out.numel():
        query_weights = query_weights.float().contiguous()
        entries = triton.next_power_of_2(triton.cdiv(len(query_ids), queries))
        with torch.cuda.device_of(query_weights):
            lexical_scores_kernel[(out.numel(),)](
                query_weights,
                query_ids.contiguous(),
                query_indptr.contiguous(),
                document_weights.float().contiguous(),
                document_ids.contiguous(),
                document_indptr.contiguous(),
                out,
                documents,
                ALIGNED=aligned,
                **SCORES.config(query_weights, entries=entries),
            )
    return out


def aot_calls() -> Iterator[tuple]:
    """(launcher, its arguments on the meta device): every tile and every branch."""

    def empty(*shape, dtype=torch.int64):
        return torch.empty(shape, dtype=dtype, device="meta")

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for hidden in (1, 37, 64, 384, 1024, 2560):
            x, weight = empty(100, hidden, dtype=dtype), empty(hidden, dtype=dtype)
            yield token_weights, (x, weight, empty(1, dtype=dtype))
        yield token_weights, (x, weight, None)
        csr = (empty(100, dtype=dtype), empty(100), empty(5))
        yield lexical_scores, (*csr, *csr, True)
        yield lexical_scores, (*csr, *csr, False)


def tuning_calls(device, dtype) -> Iterator[tuple]:
    """(op, its arguments): BGE-M3's texts of 512 tokens; queries of 16 and 64 ids against 1,000 documents
    of 300."""
    for hidden in (384, 768, 1024):
        x = torch.randn(32 * 512, hidden, device=device).to(dtype)
        yield "token_weights", (x, x[0], x[0, :1])

    def csr(rows, length):
        ids = torch.arange(rows * length, device=device) % length * 97
        starts = torch.arange(0, (rows + 1) * length, length, device=device)
        return torch.rand(rows * length, device=device), ids, starts

    for entries in (16, 64):
        yield "lexical_scores", (*csr(64, entries), *csr(1000, 300), False)
    yield "lexical_scores", (*csr(1000, 300), *csr(1000, 300), True)

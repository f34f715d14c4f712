"""s_p = sum over rows i of q of max over rows j of d of q_i d_j ;  a_pi = that j

A tile holds the rows of one query, or of several short ones, each at the start of a slot, and is multiplied
with a document a block of rows at a time on the tensor cores. The running maximum is kept per column of a
block, so the maximum of a row is reduced once per document. A program takes one tile through every n-th
document; where the queries fit their slots and a row is one slice of the depth, the tile is read once.
int8 documents are converted to the query's dtype, which holds them exactly, and their scales multiply the
products. A query's maxima are added in fp64, without atomics: the bits are always the same.
Limits: a query longer than a slot reads its documents once per slot; listed pairs read a query once per pair.
"""

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from embedfuse.registry import triton_interprets
from embedfuse.triton_kernels._maxsim_tile import (
    load_slice,
    row_normalizers,
    rows_to_visit,
    store_scores,
    text_of,
    tile_scores,
)
from embedfuse.triton_kernels.tuned import Tunable


def default_config(dtype, depth: int, rows: int, queries: int, int8: bool, more: bool) -> dict:
    """Block sizes and launch options. rows: of a query, on average. queries: that are scored with the same
    documents.
    more: places or squares are kept, which takes registers.

    Not measured: the largest without spills on sm_80, sm_90 and sm_100.
    """
    wide = max(16, triton.next_power_of_2(depth))
    slot = min(128, max(16, triton.next_power_of_2(rows)))
    if dtype == torch.float32:
        tile = {"B_Q": 32, "B_T": 32, "B_D": 16, "num_warps": 4, "num_stages": 2, "programs": 2}
        return {"SLOT": min(slot, 32), **tile}
    most = 64 if wide == 256 else 128
    slot, block = min(most, slot), min(most, slot * triton.next_power_of_2(queries))
    tile = {"SLOT": slot, "B_Q": block, "B_T": 64, "B_D": wide if wide <= 256 else 64}
    if block <= 32:
        # Reading the documents limits the speed: many bytes in flight.
        tile |= {"num_warps": 8, "num_stages": 3, "programs": 1}
        if wide != 256:
            tile |= {"num_warps": 4, "num_stages": 4, "programs": 3 if wide < 256 else 2}
    else:
        tile |= {"num_warps": block // 16, "num_stages": 3, "programs": 1}
        if wide == 256:
            tile |= {"num_warps": 8, "num_stages": 2}
        elif wide > 256:
            tile |= {"num_warps": 8, "B_D": 32}
        if more and wide >= 256:
            tile["B_T"] = 32
    return tile


def candidates(
    dtype, depth: int, rows: int, queries: int, int8: bool, more: bool
) -> Iterator[dict]:
    """The default's slots; at most 32 products per thread, tiles that fit into 160 KiB."""
    slot = default_config(dtype, depth, rows, queries, int8, more)["SLOT"]
    wide = max(16, triton.next_power_of_2(depth))
    blocks, columns = [slot * n for n in (1, 2, 4, 8) if slot * n <= 128], (32, 64, 128)
    slices = [wide] if wide <= 256 else [32, 64, 128]
    others = itertools.product(blocks, columns, slices, (4, 8), (2, 3, 4), (1, 2, 3))
    for b_q, b_t, b_d, warps, stages, programs in others:
        bytes_ = (b_q + b_t * stages) * b_d * dtype.itemsize
        if b_q * b_t <= 1024 * warps and bytes_ <= 160 * 1024:
            tile = {"SLOT": slot, "B_Q": b_q, "B_T": b_t, "B_D": b_d}
            yield {**tile, "num_warps": warps, "num_stages": stages, "programs": programs}


TUNABLE = Tunable("maxsim", default_config, candidates)


@triton.jit(do_not_specialize=["queries", "count", "step", "width"])
def maxsim_kernel(
    p_q,  # (rows, depth)
    p_qs,  # (queries, 2), columns adjacent
    p_d,  # (rows, depth)
    p_ds,  # (documents, 2), likewise
    p_s,  # (rows of p_d) or None
    p_z,  # (documents) or None
    p_p,  # (pairs, 2) or None
    p_o,  # (pairs)
    p_a,  # (pairs, width) or None
    s_q,
    s_d,
    s_qs,
    s_ds,
    queries,
    count,  # pairs listed, or documents
    step,  # programs that share them
    depth,
    width,
    NORMALIZE: tl.constexpr,
    WIDEN: tl.constexpr,
    ONE_SLICE: tl.constexpr,
    SLOT: tl.constexpr,
    B_Q: tl.constexpr,
    B_T: tl.constexpr,
    B_D: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) % step
    o_r = tl.arange(0, B_Q) % SLOT
    i_q = tl.program_id(0).to(tl.int64) // step * (B_Q // SLOT) + tl.arange(0, B_Q) // SLOT
    if ONE_SLICE and p_p is None:
        q_start, q_rows = text_of(p_qs, s_qs, i_q, queries)
        # A tile that fits is loaded once for all documents, and the loop below loads none.
        fits = rows_to_visit(q_rows, p_a, width) <= SLOT
        p_r, m_r = p_q + (q_start + o_r) * s_q, o_r < q_rows
        b_q = load_slice(p_r, m_r, 0, depth, B_D)
        if WIDEN:
            b_q = b_q.to(tl.float32)
        b_norm = None
        if NORMALIZE:
            b_norm = row_normalizers(p_r, m_r, depth, B_Q, B_D)
        for n in range(start, tl.where(fits, count, 0), step):
            o_o = tl.where(i_q < queries, i_q * count + n, -1)
            b_score = tile_scores(
                b_q,
                b_norm,
                p_r,
                o_r,
                q_rows,
                n,
                o_o,
                p_d,
                p_ds,
                p_s,
                p_z,
                p_a,
                s_d,
                s_ds,
                depth,
                width,
                NORMALIZE,
                WIDEN,
                B_Q,
                B_T,
                B_D,
            )
            store_scores(p_o, o_o, b_score, B_Q, SLOT)
        start = tl.where(fits, count, start)
    for n in range(start, count, step):
        if p_p is None:
            i_t, i_d = i_q, n
            o_o = tl.where(i_q < queries, i_q * count + n, -1)
        else:
            o_o = tl.zeros([B_Q], tl.int64) + n
            i_t, i_d = tl.load(p_p + 2 * o_o), tl.load(p_p + 2 * n + 1)
        q_start, q_rows = text_of(p_qs, s_qs, i_t, queries)
        b_score = tl.zeros([B_Q], tl.float64)
        for t in range(0, rows_to_visit(q_rows, p_a, width), SLOT):
            p_r, m_r = p_q + (q_start + t + o_r) * s_q, t + o_r < q_rows
            b_x, b_unit = None, None
            if ONE_SLICE:
                b_x = load_slice(p_r, m_r, 0, depth, B_D)
                if WIDEN:
                    b_x = b_x.to(tl.float32)
            if NORMALIZE:
                b_unit = row_normalizers(p_r, m_r, depth, B_Q, B_D)
            b_score += tile_scores(
                b_x,
                b_unit,
                p_r,
                t + o_r,
                q_rows,
                i_d,
                o_o,
                p_d,
                p_ds,
                p_s,
                p_z,
                p_a,
                s_d,
                s_ds,
                depth,
                width,
                NORMALIZE,
                WIDEN,
                B_Q,
                B_T,
                B_D,
            )
        store_scores(p_o, o_o, b_score, B_Q, SLOT)


def programs_of(device: torch.device, per_processor: int, tiles: int, count: int) -> int:
    """How many programs share the documents of a tile, or the pairs: all at once where there is one tile,
    else in some waves, so that the idle processors of the last wave matter little."""
    processors = 1
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    waves = 1 if tiles == 1 else 8
    share = triton.cdiv(count * tiles, processors * per_processor * waves)
    return triton.cdiv(count, share)


def maxsim(query, query_spans, documents, document_spans, scale, zero, pairs, normalize, width):
    """Launcher; arguments and results are those of the op (python/embedfuse/ops/maxsim/op.py)."""
    document = documents[0] if len(documents) == 1 else torch.cat(documents)
    sides = query, query_spans, document, document_spans
    query, query_spans, document, document_spans = (
        x if x.stride(-1) == 1 else x.contiguous() for x in sides
    )
    queries, depth = len(query_spans), query.shape[1]
    results = queries * len(document_spans) if pairs is None else len(pairs)
    scores = query.new_empty(results, dtype=torch.float32)
    argmax = query.new_empty((results if width else 0, width), dtype=torch.int32)
    if results == 0:
        return scores, argmax
    together = queries if pairs is None else 1
    shape = {
        "depth": depth,
        "rows": min(128, triton.next_power_of_2(triton.cdiv(len(query), queries))),
        "queries": min(8, triton.next_power_of_2(together)),
        "int8": scale is not None,
        "more": bool(width or normalize),
    }
    config = dict(TUNABLE.config(query, **shape))
    per_processor = config.pop("programs")
    if shape["more"]:
        per_processor = 1
    registers = 65536 // (32 * config["num_warps"] * per_processor)
    tiles = triton.cdiv(together, config["B_Q"] // config["SLOT"])
    count = results // together
    step = programs_of(query.device, per_processor, tiles, count)
    with torch.cuda.device_of(query):
        maxsim_kernel[(step * tiles,)](
            query,
            query_spans,
            document,
            document_spans,
            None if scale is None else scale.contiguous(),
            None if zero is None else zero.contiguous().view(torch.uint8),
            None if pairs is None else pairs.contiguous(),
            scores,
            argmax if width else None,
            *(x.stride(0) for x in (query, document, query_spans, document_spans)),
            queries,
            count,
            step,
            depth,
            width,
            NORMALIZE=normalize,
            # Triton's interpreter (3.9) multiplies the bit patterns of bf16.
            WIDEN=triton_interprets() and query.dtype == torch.bfloat16,
            ONE_SLICE=depth <= config["B_D"],
            # By default ptxas spills a few registers to fit one more program.
            maxnreg=min(255, registers // 8 * 8),
            **config,
        )
    return scores, argmax


def aot_calls() -> Iterator[tuple]:
    """(launcher, its arguments on the meta device): every slice, every branch, and what takes most."""

    def empty(*shape, dtype=torch.int64):
        return torch.empty(shape, dtype=dtype, device="meta")

    documents, zero, pairs = empty(4, 2), empty(4, dtype=torch.bool), empty(9, 2)
    d_scale = empty(100, dtype=torch.float32)

    def calls(dtype, rows, queries, depth):
        q, d = empty(rows * queries, depth, dtype=dtype), empty(100, depth, dtype=dtype)
        plain = q, empty(queries, 2), [d], documents, None
        int8 = *plain[:2], [d.to(torch.int8)], documents, d_scale
        yield *plain, None, None, False, 0
        if depth > 64:
            yield *int8, None, None, False, 0
            yield *plain, None, None, False, 32
        yield *int8, zero, None, True, 32
        if depth == 37:
            yield *int8, zero, pairs, True, 32

    # Tiles of one short query, of several in slots of two sizes, and of a long one.
    tiles = [(32, 1), (16, 4), (32, 4)]
    for dtype, depths in (
        (torch.float32, (37, 128)),
        (torch.float16, (64,)),
        (torch.bfloat16, (37, 128, 256, 1024)),
    ):
        for depth in depths:
            for rows, queries in tiles if depth > 128 else tiles[::2] if depth > 64 else tiles[:1]:
                for call in calls(dtype, rows, queries, depth):
                    yield maxsim, call
    one = empty(1, 128, dtype=torch.bfloat16)
    yield maxsim, (one, empty(1, 2), [one], empty(1, 2), None, None, None, False, 0)
    yield maxsim, (one, empty(1, 2), [one], empty(1, 2), None, None, None, False, 1)
    ends = empty(5).as_strided((4, 2), (1, 1))
    for depth in (128, 1024):
        x = empty(100, depth, dtype=torch.bfloat16)
        yield maxsim, (x, ends[:1], [x], ends, None, None, None, False, 0)


def tuning_calls(device, dtype) -> Iterator[tuple]:
    """(op, its arguments): the depths of usual models, against 1,000 and 128 documents."""
    yield from op_calls(device, dtype, (96, 128, 768, 1024), 1000, 128)


def op_calls(device, dtype, depths, documents: int, pairs: int) -> Iterator[tuple]:
    """A query of 32 tokens against documents of 300, and as many queries as documents."""

    def side(count, length, depth):
        starts = torch.arange(0, count * length, length, device=device)
        x = torch.randn(count * length, depth, device=device) / depth**0.5
        return x.to(dtype), torch.stack((starts, starts + length), 1)

    for depth in depths:
        query, document = side(1, 32, depth), side(documents, 300, depth)
        many, fewer = side(pairs, 32, depth), side(pairs, 300, depth)
        yield "maxsim", (*many, [fewer[0]], fewer[1], None, None, None, False, 0)
        yield "maxsim", (*query, [document[0]], document[1], None, None, None, False, 0)
        scale = torch.ones(len(document[0]), device=device) / 127
        bytes_ = [(document[0] * 127).round().clamp(-127, 127).to(torch.int8)]
        yield "maxsim", (*query, bytes_, document[1], scale, None, None, False, 0)

"""Attention within each sequence of a packed batch."""

import functools
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from embedfuse.nn.linear import is_plain
from embedfuse.ops.varlen_attention import MAX_HEAD_DIM, visible
from embedfuse.ops.varlen_attention import OP as VARLEN
from embedfuse.packing import Packed


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: Packed,
    *,
    scale: float,
    dropout: float,
    queries: Packed | None = None,
    causal: bool = False,
    window: int | None = None,
) -> Tensor:
    """softmax(q k^T scale) v, every query row over the tokens of its own sequence that it sees.

    query: (rows, heads, head_dim). key, value: (tokens, kv_heads, head_dim). queries: the query rows
    of each sequence, where they are not its tokens; causal ones are its last. causal, window:
    as in ops.varlen_attention. Returns (rows, heads * head_dim).
    """
    queries = packed if queries is None else queries
    if query.is_cuda and dropout == 0 and flash_takes(query):
        return flash(query, key, value, queries, packed, scale, causal, window).flatten(1)
    if query.is_cpu and dropout == 0 and kernel_takes(query, key, value):
        bounds = queries.cu_seqlens, packed.cu_seqlens
        return VARLEN(query, key, value, *bounds, scale, causal, window).flatten(1)
    group = query.shape[1] // key.shape[1]
    parts = []
    first_q = first_k = 0
    for sequences, rows, tokens in runs(queries, packed):
        last_q, last_k = first_q + sequences * rows, first_k + sequences * tokens
        q, k, v = (
            x.unflatten(0, (sequences, -1)).transpose(1, 2)
            for x in (query[first_q:last_q], key[first_k:last_k], value[first_k:last_k])
        )
        first_q, first_k = last_q, last_k
        if group > 1:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        masked = sight(rows, tokens, causal, window, query.device)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale, **masked)
        parts.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else query.flatten(1)


def sight(rows: int, tokens: int, causal: bool, window: int | None, device) -> dict:
    """SDPA's arguments for what each of the last `rows` tokens of a sequence sees."""
    narrow = window is not None and window < tokens
    if not causal or (rows == 1 and not narrow):
        return {}
    if rows == tokens and not narrow:
        return {"is_causal": True}
    return {"attn_mask": visible(rows, tokens, causal, window, device)}


def flash(query, key, value, queries: Packed, packed: Packed, scale, causal, window) -> Tensor:
    bounds = queries.cu_seqlens, packed.cu_seqlens, queries.max_seqlen, packed.max_seqlen
    options = {"enable_gqa": True} if key.shape[1] != query.shape[1] else {}
    if causal:  # tokens seen before and after a row's own; -1 is all
        options["window_size"] = (-1 if window is None else window - 1, 0)
    return torch_varlen()(query, key, value, *bounds, scale=scale, **options)


def runs(queries: Packed, keys: Packed) -> list[tuple[int, int, int]]:
    """(sequences, query rows, keys) for each run of neighbours that agree in both."""
    pairs = zip(queries.lengths, keys.lengths, strict=True)
    return [(len(list(run)), *pair) for pair, run in groupby(pairs)]


def kernel_takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Inference on the CPU.

    No length is left to SDPA: on 2 cores of an EPYC 9004 without AMX the kernel was 1.0 to 1.7 times as
    fast in fp32 and 1.3 to 2.5 times in bf16, for 16 heads of 64 and equal lengths from 16 to 8,192, and
    3 to 4 times at length 8 (this function, in turn with itself under `use_backend("reference")`).
    """
    return (
        is_plain(query)
        and all(type(x) is Tensor and x.dtype == query.dtype for x in (query, key, value))
        and query.shape[-1] <= MAX_HEAD_DIM
        and VARLEN.accelerates(query)
    )


def flash_takes(query: Tensor) -> bool:
    """FlashAttention: 16 bits, head_dim a multiple of 8 up to 256, sm_80 on. SDPA takes the rest."""
    head_dim = query.shape[-1]
    return (
        query.dtype in (torch.float16, torch.bfloat16)
        and head_dim % 8 == 0
        and head_dim <= 256
        and query.shape[0] > 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and torch_varlen() is not None
    )


@functools.cache
def torch_varlen():
    """torch's varlen FlashAttention; None where torch has none that takes a scale (before 2.11)."""
    import inspect

    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "scale" in inspect.signature(varlen_attn).parameters else None

"""Attention within each sequence of a packed batch."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from embedfuse.packing import Packed


def attention(
    query: Tensor, key: Tensor, value: Tensor, packed: Packed, *, scale: float, dropout: float
) -> Tensor:
    """softmax(q k^T scale) v, every token over all tokens of its own sequence.

    query, key, value: (tokens, heads, head_dim). Returns (tokens, heads * head_dim).
    """
    if query.is_cuda and dropout == 0 and flash_takes(query):
        length = packed.max_seqlen
        out = varlen_attention()(
            query, key, value, packed.cu_seqlens, packed.cu_seqlens, length, length, scale=scale
        )
        return out.flatten(1)
    parts = []
    start = 0
    for sequences, length in packed.runs:
        rows = slice(start, start + sequences * length)
        start = rows.stop
        q, k, v = (
            x[rows].unflatten(0, (sequences, length)).transpose(1, 2) for x in (query, key, value)
        )
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
        parts.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else query.flatten(1)


def flash_takes(query: Tensor) -> bool:
    """FlashAttention: 16 bits, head_dim a multiple of 8 up to 256, sm_80 on. SDPA takes the rest."""
    head_dim = query.shape[-1]
    return (
        query.dtype in (torch.float16, torch.bfloat16)
        and head_dim % 8 == 0
        and head_dim <= 256
        and query.shape[0] > 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and varlen_attention() is not None
    )


@functools.cache
def varlen_attention():
    """torch's varlen FlashAttention; None where torch has none that takes a scale (before 2.11)."""
    import inspect

    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "scale" in inspect.signature(varlen_attn).parameters else None

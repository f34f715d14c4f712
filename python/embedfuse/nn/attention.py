"""Attention within each sequence of a packed batch."""

import functools
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from embedfuse import native
from embedfuse.nn.flash import FLASH_ATTENTION_3, TORCH_VARLEN, Flash
from embedfuse.nn.linear import is_inference
from embedfuse.ops.checks import kernel_takes
from embedfuse.ops.varlen_attention import MAX_HEAD_DIM, visible
from embedfuse.ops.varlen_attention import OP as VARLEN
from embedfuse.packing import Packed
from embedfuse.registry import Op, forced_backend

KERNEL, SDPA = "varlen_attention in Triton", "SDPA, one call per group of equally long texts"


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
    """softmax(q k^T scale) v within each sequence.

    Args:
        query: (rows, heads, head_dim).
        key: (tokens, kv_heads, head_dim).
        value: as key.
        packed: the sequences of key and value.
        scale: factor of the scores.
        dropout: rate on the attention weights.
        queries: the query rows of each sequence, if they are not all its tokens. With causal they are
            the last ones.
        causal: as in ops.varlen_attention.
        window: as in ops.varlen_attention.

    Returns:
        (rows, heads * head_dim).
    """
    if not len(query):
        return query.flatten(1)
    queries = packed if queries is None else queries
    chosen = choose(query, key, value, dropout)
    if isinstance(chosen, Flash):
        return chosen(query, key, value, queries, packed, scale, causal, window).flatten(1)
    if chosen is VARLEN:
        bounds = queries.cu_seqlens, packed.cu_seqlens
        return VARLEN(query, key, value, *bounds, scale, causal, window).flatten(1)
    return sdpa(query, key, value, queries, packed, scale, dropout, causal, window)


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Packed,
    packed: Packed,
    scale: float,
    dropout: float,
    causal: bool,
    window: int | None,
) -> Tensor:
    """attention() by torch's scaled_dot_product_attention, one call per group of equal lengths."""
    group_size = query.shape[1] // key.shape[1]  # query heads per head of key and value
    parts = []
    first_q = first_k = 0
    for sequences, rows, tokens in equal_length_groups(queries, packed):
        last_q, last_k = first_q + sequences * rows, first_k + sequences * tokens
        q, k, v = (
            x.unflatten(0, (sequences, -1)).transpose(1, 2)
            for x in (query[first_q:last_q], key[first_k:last_k], value[first_k:last_k])
        )
        first_q, first_k = last_q, last_k
        if group_size > 1:
            k, v = k.repeat_interleave(group_size, 1), v.repeat_interleave(group_size, 1)
        mask = sdpa_mask(rows, tokens, causal, window, query.device)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale, **mask)
        parts.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def sdpa_mask(rows: int, tokens: int, causal: bool, window: int | None, device) -> dict:
    """SDPA's mask arguments for the last `rows` tokens of a sequence as queries."""
    narrow = window is not None and window < tokens
    if not causal or (rows == 1 and not narrow):
        return {}
    if rows == tokens and not narrow:
        return {"is_causal": True}
    return {"attn_mask": visible(rows, tokens, causal, window, device)}


def equal_length_groups(queries: Packed, keys: Packed) -> list[tuple[int, int, int]]:
    """(sequences, query rows of each, keys of each) of consecutive sequences with equal lengths."""
    lengths = zip(queries.lengths_on_host(), keys.lengths_on_host(), strict=True)
    return [(len(list(group)), *pair) for pair, group in groupby(lengths)]


def choose(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Flash | Op | None:
    """What computes attention: FlashAttention, our op, or None for SDPA, which alone supports dropout.

    On a GPU FlashAttention is preferred to the op, unless a backend is forced by name. If the forced
    backend cannot run the op, torch's own attention runs.
    """
    if dropout:
        return None
    forced = forced_backend()
    if query.is_cuda and (forced is None or not varlen_takes(query, key, value)):
        flash = choose_flash(query.device, query.dtype, query.shape[-1], forced)
        if flash is not None:
            return flash
    return VARLEN if varlen_takes(query, key, value) else None


@functools.cache
def choose_flash(device: torch.device, dtype: torch.dtype, head_dim: int, forced: str | None):
    capability = torch.cuda.get_device_capability(device)
    for flash in (TORCH_VARLEN,) if forced else (FLASH_ATTENTION_3, TORCH_VARLEN):
        if flash.refusal(capability, dtype, head_dim) is None:
            return flash
    return None


def varlen_takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether ops.varlen_attention runs these faster than SDPA. It has no gradient, so only in inference.

    On the CPU it is used for every length: on 2 cores of an EPYC 9004 without AMX the kernel was 1.0 to 1.7
    times as fast as SDPA in fp32 and 1.3 to 2.5 times in bf16, for 16 heads of 64 and equal lengths from 16
    to 8,192, and 3 to 4 times at length 8 (`attention`, alternating with and without
    `use_backend("reference")`).
    """
    return (
        is_inference(query)
        and query.shape[-1] <= MAX_HEAD_DIM
        and kernel_takes(VARLEN, query, key, value)
    )


def cuda_refusals(dtype: torch.dtype, head_dim: int, device=None) -> dict[str, str | None]:
    """What may compute attention in inference on a GPU, in order of preference, and why it cannot.

    Name -> reason; None for what can run.
    """
    names = FLASH_ATTENTION_3.name, TORCH_VARLEN.name, KERNEL, SDPA
    try:
        native.require_gpu()
    except native.Unavailable as error:
        return dict.fromkeys(names, str(error))
    capability = torch.cuda.get_device_capability(device)
    reasons = [f.refusal(capability, dtype, head_dim) for f in (FLASH_ATTENTION_3, TORCH_VARLEN)]
    too_deep = f"takes a head_dim up to {MAX_HEAD_DIM}, not {head_dim}"
    reasons.append(too_deep if head_dim > MAX_HEAD_DIM else VARLEN.refusal("triton", "cuda", dtype))
    reasons.append(None)
    refusals = dict(zip(names, reasons, strict=True))
    if forced := forced_backend():
        refusals[FLASH_ATTENTION_3.name] = other = f"backend {forced!r} was asked for"
        if forced == "triton":
            return {KERNEL: refusals.pop(KERNEL)} | refusals
        refusals[KERNEL] = other
    return refusals

"""Attention within each sequence of a packed batch."""

import functools
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from embedfuse import native
from embedfuse.nn.flash import FLASH_ATTENTION_3, TORCH_VARLEN, Flash
from embedfuse.nn.linear import is_plain
from embedfuse.ops.varlen_attention import MAX_HEAD_DIM, visible
from embedfuse.ops.varlen_attention import OP as VARLEN
from embedfuse.packing import Packed
from embedfuse.registry import Op, forced_backend

KERNEL, SDPA = "varlen_attention in Triton", "SDPA per run of equally long texts"


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
    if not len(query):
        return query.flatten(1)
    queries = packed if queries is None else queries
    chosen = choose(query, key, value, dropout)
    if isinstance(chosen, Flash):
        return chosen(query, key, value, queries, packed, scale, causal, window).flatten(1)
    if chosen is VARLEN:
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
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def sight(rows: int, tokens: int, causal: bool, window: int | None, device) -> dict:
    """SDPA's arguments for what each of the last `rows` tokens of a sequence sees."""
    narrow = window is not None and window < tokens
    if not causal or (rows == 1 and not narrow):
        return {}
    if rows == tokens and not narrow:
        return {"is_causal": True}
    return {"attn_mask": visible(rows, tokens, causal, window, device)}


def runs(queries: Packed, keys: Packed) -> list[tuple[int, int, int]]:
    """(sequences, query rows, keys) for each run of neighbours that agree in both."""
    pairs = zip(queries.lengths_on_host(), keys.lengths_on_host(), strict=True)
    return [(len(list(run)), *pair) for pair, run in groupby(pairs)]


def choose(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Flash | Op | None:
    """FlashAttention, the op, or None: SDPA, which alone has dropout.

    On a GPU FlashAttention goes before the op, unless a backend was asked for by name; what that has no
    version for is torch's own.
    """
    if dropout:
        return None
    forced = forced_backend()
    if query.is_cuda and (forced is None or not kernel_takes(query, key, value)):
        flash = choose_flash(query.device, query.dtype, query.shape[-1], forced)
        if flash is not None:
            return flash
    return VARLEN if kernel_takes(query, key, value) else None


@functools.cache
def choose_flash(device: torch.device, dtype: torch.dtype, head_dim: int, forced: str | None):
    capability = torch.cuda.get_device_capability(device)
    for flash in (TORCH_VARLEN,) if forced else (FLASH_ATTENTION_3, TORCH_VARLEN):
        if flash.refusal(capability, dtype, head_dim) is None:
            return flash
    return None


def kernel_takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Inference.

    No length is left to SDPA on the CPU: on 2 cores of an EPYC 9004 without AMX the kernel was 1.0 to 1.7
    times as fast in fp32 and 1.3 to 2.5 times in bf16, for 16 heads of 64 and equal lengths from 16 to 8,192,
    and 3 to 4 times at length 8 (this function, in turn with itself under `use_backend("reference")`).
    """
    return (
        is_plain(query)
        and all(type(x) is Tensor and x.dtype == query.dtype for x in (query, key, value))
        and query.shape[-1] <= MAX_HEAD_DIM
        and VARLEN.accelerates(query)
    )


def cuda_answers(dtype: torch.dtype, head_dim: int, device=None) -> dict[str, str | None]:
    """What may run attention in inference on a GPU, in order of preference, and why it cannot."""
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
    answers = dict(zip(names, reasons, strict=True))
    if forced := forced_backend():
        answers[FLASH_ATTENTION_3.name] = asked = f"backend {forced!r} was asked for"
        if forced == "triton":
            return {KERNEL: answers.pop(KERNEL)} | answers
        answers[KERNEL] = asked
    return answers

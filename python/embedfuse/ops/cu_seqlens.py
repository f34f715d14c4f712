"""cu_seqlens, (batch + 1,) int32: where each packed sequence starts, and where the last ends."""

import torch
from torch import Tensor

from embedfuse.ops.checks import check_tensors, is_readable


def check_layout(name: str, cu_seqlens: Tensor) -> None:
    check_tensors(**{name: cu_seqlens})
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        raise ValueError(
            f"{name}: {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}; "
            "accepted is int32 (batch + 1,)"
        )


def check_values(name: str, cu_seqlens: Tensor, tokens: int) -> None:
    if not is_readable(cu_seqlens):
        return
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens or _falls(cu_seqlens):
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        raise ValueError(
            f"{name}: must start at 0, never fall, and end at the number of tokens, {tokens}; "
            f"starts at {first}, ends at {last}" + (", falls" if _falls(cu_seqlens) else "")
        )


def _falls(cu_seqlens: Tensor) -> bool:
    return bool((cu_seqlens.diff() < 0).any())


def sequence_of(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """(tokens,) the sequence that each token belongs to."""
    row = torch.arange(tokens, device=cu_seqlens.device)
    return torch.bucketize(row, cu_seqlens[1:], right=True)

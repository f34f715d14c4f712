"""cu_seqlens, (batch + 1,) int32: where each packed sequence starts, and where the last ends."""

import torch
from torch import Tensor


def sequence_of(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """(tokens,) the number of the sequence that each token belongs to."""
    row = torch.arange(tokens, device=cu_seqlens.device)
    return torch.bucketize(row, cu_seqlens[1:], right=True)

"""The dtype in which 16-bit inputs are computed with."""

import torch
from torch import Tensor


def widened(x: Tensor) -> Tensor:
    """x in fp32, fp64 where it is fp64."""
    return x if x.dtype == torch.float64 else x.float()

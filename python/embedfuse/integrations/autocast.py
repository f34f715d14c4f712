"""Autocast for code that takes the place of a matmul."""

import torch
from torch import Tensor


def as_matmul_input(x: Tensor) -> Tensor:
    """x as torch.matmul takes it here: in autocast's dtype where that is on; float64 stays."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x

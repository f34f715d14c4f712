"""What callers hand over as an array, as a tensor."""

import numpy as np
import torch
from torch import Tensor


def as_tensor(x) -> Tensor:
    """torch.as_tensor, and a copy of an array with negative strides, whose memory torch cannot share."""
    if isinstance(x, np.ndarray) and min(x.strides, default=0) < 0:
        x = x.copy()
    return torch.as_tensor(x)

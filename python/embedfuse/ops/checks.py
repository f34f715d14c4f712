"""What callers hand over: arrays as tensors, and whether it may be read."""

import numpy as np
import torch
from torch import Tensor


def as_tensor(x) -> Tensor:
    """torch.as_tensor, and a copy of an array with negative strides, whose memory torch cannot share."""
    if isinstance(x, np.ndarray) and min(x.strides, default=0) < 0:
        x = x.copy()
    return torch.as_tensor(x)


def check_tensors(**arguments) -> None:
    """Of arguments that may be None."""
    for name, x in arguments.items():
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(f"{name}: {type(x).__name__}; accepted are tensors")


def is_readable(x: Tensor) -> bool:
    """Whether checks may read values: a GPU would be waited for, and torch.compile has none yet."""
    return x.is_cpu and not torch.compiler.is_compiling()

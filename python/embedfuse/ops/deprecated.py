"""Names of version 0.1 that work until version 0.3, with a DeprecationWarning."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from embedfuse.ops.info_nce.matryoshka.widths import Matryoshka


def bias_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """gelu(x + bias), the exact GELU, by torch.

    Args:
        x: (rows, columns).
        bias: (columns,), or None.

    Returns:
        (rows, columns).
    """
    return F.gelu(x if bias is None else x + bias)


# name: (what it is now, what to write instead)
DEPRECATED: dict[str, tuple[Callable, str]] = {
    "Prefixes": (Matryoshka, "ops.Matryoshka"),
    "bias_gelu": (bias_gelu, "torch.nn.functional.gelu(x + bias)"),
}

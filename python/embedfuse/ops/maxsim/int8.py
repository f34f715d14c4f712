"""Vectors as bytes: whole numbers up to 127 in absolute value, and the step between them.

Formula: x ~ scale * values, scale = max|x| / 127 over a token or a document.
Limits: no gradient.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from embedfuse.ops.checks import as_tensor, check_device

GRANULARITIES = ("token", "document")


@dataclass(frozen=True, eq=False)
class Int8:
    """x ~ scale * values, as quantize_int8 gives it: documents for maxsim, maxsim_packed and maxsim_rerank.

    Attributes:
        values: (..., tokens, dim) int8.
        scale: (..., tokens) fp32, or (..., 1) for one scale per text; on the device of values.

    Raises:
        ValueError: for other dtypes, shapes or devices.
    """

    values: Tensor
    scale: Tensor

    def __post_init__(self):
        values, scale = self.values, self.scale
        if values.dtype != torch.int8 or values.dim() < 2:
            raise ValueError(
                f"values: {values.dtype} of shape {tuple(values.shape)}; "
                "accepted is int8 (..., tokens, dim)"
            )
        per_token, per_text = values.shape[:-1], (*values.shape[:-2], 1)
        if scale.dtype != torch.float32 or scale.shape not in (per_token, per_text):
            raise ValueError(
                f"scale: {scale.dtype} of shape {tuple(scale.shape)}; "
                f"accepted is float32 {tuple(per_token)} or {per_text}"
            )
        check_device("scale", scale, "values", values)


def quantize_int8(x: Tensor, per: str = "token") -> Int8:
    """scale = max|x| / 127 over each token or document, values = x / scale rounded to nearest, ties to even.

    Zeros stay zeros: where all are, scale is 1. Where one is infinite or NaN, scale is NaN. No gradient.

    Args:
        x: (..., tokens, dim), floating, a tensor or an array.
        per: "token", a scale for each token, so that each value is off by at most scale / 2; "document", one
            for each (tokens, dim), which is less exact where tokens differ in length.

    Returns:
        Int8 of x's shape.

    Raises:
        ValueError: for another dtype, shape or `per`.
    """
    if per not in GRANULARITIES:
        raise ValueError(f"per={per!r}: accepted are {', '.join(GRANULARITIES)}")
    x = as_tensor(x)
    if not x.is_floating_point() or x.dim() < 2:
        raise ValueError(
            f"x: {x.dtype} of shape {tuple(x.shape)}; accepted is floating (..., tokens, dim)"
        )
    x = x.detach().float()
    dims = (-1,) if per == "token" else (-2, -1)
    if x.numel():
        largest = x.abs().amax(dims, keepdim=True)
    else:
        largest = x.new_zeros(*x.shape[:-2], x.shape[-2] if per == "token" else 1, 1)
    scale = largest / 127
    scale = torch.where(scale == 0, 1, torch.where(scale.isfinite(), scale, torch.nan))
    values = (x / scale).round_().nan_to_num_(0).clamp_(-127, 127)
    return Int8(values.to(torch.int8), scale[..., 0])

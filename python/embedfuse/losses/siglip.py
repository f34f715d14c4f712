"""Pairwise sigmoid loss."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from embedfuse.losses.base import ContrastiveLoss, diagonal
from embedfuse.ops.info_nce.candidates import (
    FalseNegatives,
    NegativeFilter,
    Rows,
    inverse_temperature,
)
from embedfuse.ops.info_nce.loss import candidate_statistics


class SigLIPLoss(ContrastiveLoss):
    """Per row sum_j softplus(-z_ij (t cos(q_i, d_j) + b)), z = 1 for the positive, else -1.

    t = e^logit_scale and b = logit_bias are learned. Hard negatives belong to one row.
    Source: arXiv 2303.15343.

    Args:
        temperature: the initial 1 / t, a number.
        bias: the initial b.
        **settings: normalize, queue, reduction and across, as in ContrastiveLoss.

    Raises:
        ValueError: for a temperature that is not positive.
    """

    def __init__(self, temperature: float = 0.1, bias: float = -10.0, **settings):
        inverse_temperature(temperature, torch.empty(0))
        super().__init__(temperature, **settings)
        del self.temperature
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.logit_bias = nn.Parameter(torch.tensor(float(bias)))

    def per_row(self, q: Rows, d: Rows, hard: Rows | None, bank: Rows | None) -> Tensor:
        """Losses (B,)."""
        dtype = torch.promote_types(q.vectors.dtype, torch.float32)
        scale, bias = (
            p.to(q.vectors.device, dtype) for p in (self.logit_scale.exp(), self.logit_bias)
        )
        sides, negatives = (q, d, hard, bank), NegativeFilter(q, d, diagonal(q), FalseNegatives())
        parts = candidate_statistics(
            self.strategy, sides, scale, negatives, bias=bias, sigmoid=True
        )
        return softplus(-parts[0].target) + sum(part.logsumexp for part in parts)

"""Pairwise sigmoid loss."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from embedfuse.losses.base import ContrastiveLoss, diagonal
from embedfuse.ops.info_nce.candidates import Choice, FalseNegatives, Rows, inverse_temperature
from embedfuse.ops.info_nce.loss import candidate_statistics


class SigLIPLoss(ContrastiveLoss):
    """Per row sum_j softplus(-z_ij (t cos(q_i, d_j) + b)), z = 1 for the positive, else -1 (arXiv
    2303.15343).

    t = e^logit_scale and b = logit_bias are learned, from 1 / temperature and bias on. Hard negatives are
    the row's own. Other arguments as in ContrastiveLoss.
    """

    def __init__(self, temperature: float = 0.1, bias: float = -10.0, **settings):
        inverse_temperature(temperature, torch.empty(0))
        super().__init__(temperature, **settings)
        del self.temperature
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.logit_bias = nn.Parameter(torch.tensor(float(bias)))

    def per_row(self, q: Rows, d: Rows, hard: Rows | None, bank: Rows | None) -> Tensor:
        dtype = torch.promote_types(q.vectors.dtype, torch.float32)
        scale, bias = (
            p.to(q.vectors.device, dtype) for p in (self.logit_scale.exp(), self.logit_bias)
        )
        choose = Choice(q, d, diagonal(q), FalseNegatives())
        settings = {"bias": bias, "sigmoid": True}
        parts = candidate_statistics(q, d, hard, bank, scale, choose, self.statistics, **settings)
        return softplus(-parts[0].own) + sum(part.logsumexp for part in parts)

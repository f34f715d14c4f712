"""InfoNCE, its symmetric form (CLIP) and its debiased form."""

import math

import torch
from torch import Tensor, nn

from embedfuse.losses.base import ContrastiveLoss, diagonal
from embedfuse.ops.info_nce.candidates import (
    FalseNegatives,
    NegativeFilter,
    Rows,
    inverse_temperature,
)
from embedfuse.ops.info_nce.loss import candidate_statistics, info_nce_of_rows
from embedfuse.ops.info_nce.matryoshka.widths import Matryoshka
from embedfuse.ops.info_nce.statistics import lowest


class InfoNCE(ContrastiveLoss):
    """-log(e^s_ii / (e^s_ii + sum over the negatives of e^s_ij)), s = cos / temperature.

    Negatives are the other documents of the batch, the hard negatives of the row and the queue.
    Source: E5, arXiv 2212.03533.

    Args:
        temperature: a number, or an nn.Parameter of one element, which is then learned.
        false_negatives, hardness, hard_hardness, label_smoothing: as in ops.info_nce.
        **settings: normalize, queue, reduction and across, as in ContrastiveLoss.
    """

    def __init__(
        self,
        temperature: float | nn.Parameter = 0.01,
        *,
        false_negatives: FalseNegatives | None = None,
        hardness: float = 0.0,
        hard_hardness: float = 0.0,
        label_smoothing: float = 0.0,
        **settings,
    ):
        super().__init__(temperature, **settings)
        self.options = {
            "false_negatives": false_negatives,
            "hardness": hardness,
            "hard_hardness": hard_hardness,
            "label_smoothing": label_smoothing,
        }

    def per_row(
        self,
        q: Rows,
        d: Rows,
        hard: Rows | None,
        bank: Rows | None,
        matryoshka: Matryoshka | None = None,
    ) -> Tensor:
        """Losses (B,), with `matryoshka` (widths, B)."""
        if bank is not None and (self.options["label_smoothing"] or matryoshka):
            # The backward pass reads it again, after the queue was written to.
            bank = bank._replace(vectors=bank.vectors.clone())
        settings = {"temperature": self.temperature, "across": self.across, **self.options}
        return info_nce_of_rows(q, d, None, hard, bank, matryoshka=matryoshka, **settings).loss


class SymmetricInfoNCE(ContrastiveLoss):
    """Mean of InfoNCE from queries to documents and back.

    The inverse temperature is learned as e^logit_scale. Hard negatives and the queue are negatives of the
    queries.
    Source: CLIP, arXiv 2103.00020.

    Args:
        temperature: the initial temperature, a number.
        max_scale: the largest inverse temperature.
        **settings: normalize, queue, reduction and across, as in ContrastiveLoss.

    Raises:
        ValueError: for a temperature that is not positive.
    """

    def __init__(self, temperature: float = 0.07, *, max_scale: float = 100.0, **settings):
        inverse_temperature(temperature, torch.empty(0))
        super().__init__(temperature, **settings)
        del self.temperature
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.max_scale = max_scale

    def per_row(self, q: Rows, d: Rows, hard: Rows | None, bank: Rows | None) -> Tensor:
        """Losses (B,)."""
        temperature = 1 / self.logit_scale.exp().clamp_max(self.max_scale)
        settings = {"temperature": temperature, "across": self.across}
        forth = info_nce_of_rows(q, d, None, hard, bank, **settings)
        # Documents with one id are one another's false positives in both directions.
        back = info_nce_of_rows(
            d._replace(ids=None), q._replace(ids=d.ids), None, None, None, **settings
        )
        return (forth.loss + back.loss) / 2


class DebiasedInfoNCE(ContrastiveLoss):
    """-log(e^p / (e^p + N g)), g = max((mean of e^n - tau_plus e^p) / (1 - tau_plus), e^(-1 / temperature)),
    with the logit p of the positive and those n of the N negatives.

    Source: arXiv 2007.00224.

    Args:
        temperature: a number, or an nn.Parameter of one element, which is then learned.
        tau_plus: probability that a negative is of the positive's class, 0 to below 1.
        **settings: normalize, queue, reduction and across, as in ContrastiveLoss.

    Raises:
        ValueError: for another tau_plus.
    """

    def __init__(
        self, temperature: float | nn.Parameter = 0.5, *, tau_plus: float = 0.1, **settings
    ):
        super().__init__(temperature, **settings)
        if not 0 <= tau_plus < 1:
            raise ValueError(f"tau_plus={tau_plus}: accepted are 0 to below 1")
        self.tau_plus = tau_plus

    def per_row(self, q: Rows, d: Rows, hard: Rows | None, bank: Rows | None) -> Tensor:
        """Losses (B,)."""
        scale = inverse_temperature(self.temperature, q.vectors)
        negatives = NegativeFilter(q, d, diagonal(q), FalseNegatives())
        parts = candidate_statistics(self.strategy, (q, d, hard, bank), scale, negatives)
        positive, count = parts[0].target, torch.stack([part.count for part in parts]).sum(0)
        log_count = count.clamp_min(1).log()
        mean = torch.stack([part.logsumexp for part in parts]).logsumexp(0) - log_count
        estimate = self._log_estimate(positive, mean, -scale)
        loss = torch.logaddexp(torch.zeros_like(positive), log_count + estimate - positive)
        return torch.where(count == 0, 0, loss)

    def _log_estimate(self, positive: Tensor, mean: Tensor, floor: Tensor) -> Tensor:
        """log g from the logarithm of the mean of e^n."""
        if self.tau_plus == 0:
            return torch.maximum(mean, floor)
        share = positive + math.log(self.tau_plus) - mean
        above = share < 0
        # log(1 - e^share). Where nothing is left it is kept away from its pole: its gradient would be NaN
        # times 0. log1p would reach the pole before, where e^share rounds to 1.
        rest = torch.log(-torch.expm1(share.masked_fill(~above, -1.0)))
        estimate = mean + rest - math.log(1 - self.tau_plus)
        return torch.maximum(estimate.masked_fill(~above, lowest(mean.dtype)), floor)

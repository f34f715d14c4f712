"""Losses with further similarities in the denominator: between queries, between documents."""

import torch
from torch import Tensor, nn

from embedfuse.losses.base import ContrastiveLoss, diagonal
from embedfuse.ops.info_nce.candidates import (
    FalseNegatives,
    NegativeFilter,
    Rows,
    inverse_temperature,
)
from embedfuse.ops.info_nce.distributed import errors_on_all_ranks
from embedfuse.ops.info_nce.loss import candidate_statistics, combine
from embedfuse.ops.info_nce.statistics import Excluded, Statistics


class GTELoss(ContrastiveLoss):
    """-log(e^s(q_i, d_i) / Z_i), Z_i = sum_j e^s(q_i, d_j) + sum_{j != i} e^s(q_i, q_j) + sum_j e^s(q_j, d_i)
    + sum_{j != i} e^s(d_j, d_i), s = cos / temperature.

    Hard negatives of all rows are documents in the first sum, those of other rows in the fourth. The queue
    is in the first and the fourth. Source: GTE's improved contrastive loss, arXiv 2308.03281.

    Args:
        temperature: a number, or an nn.Parameter of one element, which is then learned.
        positive_twice: e^s(q_i, d_i) is in the first and in the third sum, as in the implementations of
            sentence-transformers and contrastors; False counts it once.
        **settings: normalize, queue, reduction and across, as in ContrastiveLoss.
    """

    def __init__(
        self,
        temperature: float | nn.Parameter = 0.01,
        *,
        positive_twice: bool = True,
        **settings,
    ):
        super().__init__(temperature, **settings)
        self.positive_twice = positive_twice

    def per_row(self, q: Rows, d: Rows, hard: Rows | None, bank: Rows | None) -> Tensor:
        """Losses (B,); ValueError for sides with ids or a guide."""
        with errors_on_all_ranks(self.across, q.vectors.device):
            if any(s is not None and (s.ids, s.guide) != (None, None) for s in (q, d, hard)):
                raise ValueError("documents: with ids or a guide; GTELoss knows no false negatives")
        scale = inverse_temperature(self.temperature, q.vectors)
        strategy, target = self.strategy, diagonal(q)
        x, y = q.vectors, d.vectors
        parts = [
            strategy.pool_statistics(*sides, scale, Excluded(target))
            for sides in ((x, y), (x, x), (y, x), (y, y))
        ]
        if hard is not None:
            rows = hard.vectors.flatten(0, 1)
            first = 0 if self.across is None else self.across.rank * len(x)
            numbers = target + first  # in the whole batch
            of_query = numbers.repeat_interleave(hard.vectors.shape[1])
            same_row = Excluded(x_keys=numbers, y_keys=of_query)
            parts.append(strategy.pool_statistics(x, rows, scale))
            parts.append(strategy.pool_statistics(y, rows, scale, same_row))
        if bank is not None:
            parts += [strategy.bank_statistics(side, bank.vectors, scale) for side in (x, y)]
        positive = parts[0].target
        if self.positive_twice:
            parts.append(Statistics(positive, positive, positive, torch.ones_like(target)))
        return combine(positive, parts).loss


class Qwen3Loss(ContrastiveLoss):
    """-log(e^s(q_i, d_i) / Z_i), Z_i = e^s(q_i, d_i) + sum_k m_ik e^s(q_i, h_ik)
    + sum_{j != i} m_ij (e^s(q_i, q_j) + e^s(d_i, d_j) + e^s(q_i, d_j)), s = cos / temperature, with the hard
    negatives h of the row.

    m = 0 where the cosine is above that of (q_i, d_i) by more than margin, or the document is d_i by its id.
    The cosine is that of the pair itself, but for (d_i, d_j) it is that of (q_i, d_j). The documents of the
    queue are negatives as the d_j of (q_i, d_j). The report names no temperature.
    Source: Qwen3-Embedding, arXiv 2506.05176.

    Args:
        temperature: a number, or an nn.Parameter of one element, which is then learned.
        margin: see above.
        **settings: normalize, queue, reduction and across, as in ContrastiveLoss.
    """

    def __init__(
        self, temperature: float | nn.Parameter = 0.02, *, margin: float = 0.1, **settings
    ):
        super().__init__(temperature, **settings)
        self.margin = margin

    def per_row(self, q: Rows, d: Rows, hard: Rows | None, bank: Rows | None) -> Tensor:
        """Losses (B,)."""
        scale, target = inverse_temperature(self.temperature, q.vectors), diagonal(q)
        q = q._replace(guide=None)
        negatives = NegativeFilter(q, d, target, FalseNegatives(margin=self.margin))
        excluded = negatives.excluded(d, target)
        by_query = excluded._replace(
            limit=None, guide_x=q.vectors, guide_y=d.vectors, guide_limit=negatives.limit
        )
        strategy = self.strategy
        parts = [
            *candidate_statistics(strategy, (q, d, hard, bank), scale, negatives),
            strategy.pool_statistics(q.vectors, q.vectors, scale, excluded),
            strategy.pool_statistics(d.vectors, d.vectors, scale, by_query),
        ]
        return combine(parts[0].target, parts).loss


class GISTLoss(ContrastiveLoss):
    """InfoNCE whose false negatives are found by a guide model: a candidate leaves where its guide score is
    above the positive's minus margin, with relative=True minus margin times its absolute value.

    queries and documents, and hard negatives and the queue where there are, are ops.Rows with a guide. Hard
    negatives belong to one row. Source: GISTEmbed, arXiv 2402.16829.

    Args:
        temperature: a number, or an nn.Parameter of one element, which is then learned.
        margin: see above.
        relative: see above.
        between_queries: whether (q_i, q_j) are negatives too, filtered by guide scores between queries.
        between_documents: whether (d_i, d_j) are negatives too, filtered by guide scores between documents.
        **settings: normalize, queue, reduction and across, as in ContrastiveLoss.
    """

    def __init__(
        self,
        temperature: float | nn.Parameter = 0.01,
        *,
        margin: float = 0.0,
        relative: bool = False,
        between_queries: bool = True,
        between_documents: bool = True,
        **settings,
    ):
        super().__init__(temperature, **settings)
        self.rule = FalseNegatives(**{f"guide_{'relative' if relative else 'margin'}": -margin})
        self.between_queries, self.between_documents = between_queries, between_documents

    def per_row(self, q: Rows, d: Rows, hard: Rows | None, bank: Rows | None) -> Tensor:
        """Losses (B,); ValueError for sides without a guide."""
        sides = {"queries": q, "documents": d, "hard_negatives": hard, "queue": bank}
        with errors_on_all_ranks(self.across, q.vectors.device):
            for name, side in sides.items():
                if side is not None and side.guide is None:
                    raise ValueError(
                        f"{name}: no guide; accepted are ops.Rows with the guide's embeddings"
                    )
        scale, target = inverse_temperature(self.temperature, q.vectors), diagonal(q)
        strategy, negatives = self.strategy, NegativeFilter(q, d, target, self.rule)
        excluded = negatives.excluded(d, target)
        parts = candidate_statistics(strategy, (q, d, hard, bank), scale, negatives)
        if self.between_queries:
            by_guide = excluded._replace(guide_y=q.guide)
            parts.append(strategy.pool_statistics(q.vectors, q.vectors, scale, by_guide))
        if self.between_documents:
            by_guide = excluded._replace(guide_x=d.guide)
            parts.append(strategy.pool_statistics(d.vectors, d.vectors, scale, by_guide))
        return combine(parts[0].target, parts).loss

"""Losses with further similarities in the denominator: between queries, between documents."""

import torch
from torch import Tensor, nn

from embedfuse.losses.base import ContrastiveLoss, diagonal
from embedfuse.ops.info_nce.candidates import Choice, FalseNegatives, Rows, inverse_temperature
from embedfuse.ops.info_nce.distributed import agreed
from embedfuse.ops.info_nce.loss import candidate_statistics, combine
from embedfuse.ops.info_nce.statistics import Columns, Statistics, statistics


class GTELoss(ContrastiveLoss):
    """-log(e^s(q_i, d_i) / Z_i), Z_i = sum_j e^s(q_i, d_j) + sum_{j != i} e^s(q_i, q_j) + sum_j e^s(q_j, d_i)
    + sum_{j != i} e^s(d_j, d_i), s = cos / temperature (GTE's improved contrastive loss, arXiv 2308.03281).

    positive_twice: e^s(q_i, d_i) is in the first and in the third sum, as in the implementations of
        sentence-transformers and contrastors; False counts it once.

    Hard negatives of all rows are documents in the first sum, those of other rows in the fourth. The queue
    is in the first and the fourth. Other arguments as in ContrastiveLoss.
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
        told = any(s is not None and (s.ids, s.guide) != (None, None) for s in (q, d, hard))
        with agreed(self.across, q.vectors.device):
            if told:
                raise ValueError("documents: with ids or a guide; GTELoss knows no false negatives")
        scale = inverse_temperature(self.temperature, q.vectors)
        own = Columns(diagonal(q))
        q, d = q.vectors, d.vectors
        parts = [self.statistics(x, y, scale, own) for x, y in ((q, d), (q, q), (d, q), (d, d))]
        if hard is not None:
            rows = hard.vectors.flatten(0, 1)
            first = 0 if self.across is None else self.across.rank * len(q)
            numbers = own.own + first  # in the whole batch
            of_query = numbers.repeat_interleave(hard.vectors.shape[1])
            others = Columns(x_keys=numbers, y_keys=of_query)
            parts += [self.statistics(q, rows, scale), self.statistics(d, rows, scale, others)]
        if bank is not None:
            parts += [statistics(x, bank.vectors, scale) for x in (q, d)]
        positive = parts[0].own
        if self.positive_twice:
            parts.append(Statistics(positive, positive, positive, torch.ones_like(own.own)))
        return combine(positive, parts).loss


class Qwen3Loss(ContrastiveLoss):
    """-log(e^s(q_i, d_i) / Z_i), Z_i = e^s(q_i, d_i) + sum_k m_ik e^s(q_i, h_ik)
    + sum_{j != i} m_ij (e^s(q_i, q_j) + e^s(d_i, d_j) + e^s(q_i, d_j)), s = cos / temperature
    (Qwen3-Embedding, arXiv 2506.05176), with the row's own hard negatives h.

    m_ij = 0 where the score is above that of (q_i, d_i) by more than margin, or d_j is d_i by their ids. The
    score of the first and third sum is their own, that of (d_i, d_j) is the one of (q_i, d_j). The queue's
    documents are in the third sum. The report names no temperature. Other arguments as in ContrastiveLoss.
    """

    def __init__(
        self, temperature: float | nn.Parameter = 0.02, *, margin: float = 0.1, **settings
    ):
        super().__init__(temperature, **settings)
        self.margin = margin

    def per_row(self, q: Rows, d: Rows, hard: Rows | None, bank: Rows | None) -> Tensor:
        scale, own = inverse_temperature(self.temperature, q.vectors), diagonal(q)
        q = q._replace(guide=None)
        choose = Choice(q, d, own, FalseNegatives(margin=self.margin))
        columns = choose.columns(d, own)
        by_query = columns._replace(
            limit=None, guide_x=q.vectors, guide_y=d.vectors, guide_limit=choose.limit
        )
        parts = [
            *candidate_statistics(q, d, hard, bank, scale, choose, self.statistics),
            self.statistics(q.vectors, q.vectors, scale, columns),
            self.statistics(d.vectors, d.vectors, scale, by_query),
        ]
        return combine(parts[0].own, parts).loss


class GISTLoss(ContrastiveLoss):
    """InfoNCE whose false negatives a guide model tells (GISTEmbed, arXiv 2402.16829): a candidate leaves
    where its guide score is above the positive's minus margin, with relative=True minus margin times its
    absolute value.

    queries and documents, and hard negatives and the queue where there are, are ops.Rows with a guide.
    between_queries, between_documents: (q_i, q_j) and (d_i, d_j) are negatives too, judged by their own guide
        scores. Hard negatives are the row's own. Other arguments as in ContrastiveLoss.
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
        sides = {"queries": q, "documents": d, "hard_negatives": hard, "queue": bank}
        with agreed(self.across, q.vectors.device):
            for name, side in sides.items():
                if side is not None and side.guide is None:
                    raise ValueError(
                        f"{name}: no guide; accepted are ops.Rows with the guide's embeddings"
                    )
        scale, own = inverse_temperature(self.temperature, q.vectors), diagonal(q)
        choose = Choice(q, d, own, self.rule)
        of_documents = choose.columns(d, own)
        parts = candidate_statistics(q, d, hard, bank, scale, choose, self.statistics)
        if self.between_queries:
            columns = of_documents._replace(guide_y=q.guide)
            parts.append(self.statistics(q.vectors, q.vectors, scale, columns))
        if self.between_documents:
            columns = of_documents._replace(guide_x=d.guide)
            parts.append(self.statistics(d.vectors, d.vectors, scale, columns))
        return combine(parts[0].own, parts).loss

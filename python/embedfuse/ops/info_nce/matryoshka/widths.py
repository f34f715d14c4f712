"""Statistics at several widths of the embedding (Matryoshka), from one pass over the scores of the widest."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from embedfuse.ops.info_nce.matryoshka.op import BACKWARD, FORWARD
from embedfuse.ops.info_nce.matryoshka.tiles import inverse_norms, slices
from embedfuse.ops.info_nce.statistics import (
    ELEMENTS,
    NOTHING,
    Columns,
    Statistics,
    lowest,
    row_products,
    statistics_of_scores,
)


@dataclass(frozen=True)
class Prefixes:
    """The first components of the embeddings, as many as each of `widths`, which ascend.

    normalize: divided by their norms, for cosine similarity.

    Raises ValueError for other widths.
    """

    widths: tuple[int, ...]
    normalize: bool = True

    def __post_init__(self):
        widths = self.widths
        if not widths or min(widths) < 1 or list(widths) != sorted(set(widths)):
            raise ValueError(f"widths={widths}: accepted are ascending numbers from 1")

    def statistics(
        self,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        columns: Columns = NOTHING,
        *,
        hardness: float = 0.0,
        total: bool = False,
    ) -> Statistics:
        """As statistics.statistics, where columns.limit and what is returned are (widths, rows)."""
        return Statistics(*_Statistics.apply(x, y, scale, self, hardness, total, *columns))

    def statistics_of_each(
        self,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        columns: Columns = NOTHING,
        *,
        hardness: float = 0.0,
    ) -> Statistics:
        """As statistics.statistics_of_each, of each width."""
        scores = self.row_products(x, y)
        return statistics_of_scores(scores, scale, columns, hardness=hardness)

    def row_products(self, x: Tensor, y: Tensor) -> Tensor:
        """Scores (widths, rows, K) of x (rows, d) and y (rows, K, d). Differentiable."""
        sizes = [s.stop - s.start for s in slices(self.widths)]
        sides = (side[..., : self.widths[-1]].split(sizes, -1) for side in (x, y))
        products = torch.stack([row_products(*parts) for parts in zip(*sides, strict=True)])
        scores = products.cumsum(0)
        if not self.normalize:
            return scores
        return scores * inverse_norms(x, self.widths)[..., None] * inverse_norms(y, self.widths)

    def own_scores(self, x: Tensor, y: Tensor, own: Tensor) -> Tensor:
        """As statistics.own_scores: (widths, rows)."""
        with torch.no_grad():
            step = max(ELEMENTS // x.shape[1], 1)
            parts = zip(x.split(step), own.clamp_min(0).split(step), strict=True)
            scores = [self.row_products(a, y[i][:, None])[..., 0] for a, i in parts]
            return torch.where(own < 0, 0, torch.cat(scores, 1))


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, scale, prefixes, hardness, total, *columns):
        own, shape = columns[0], (len(prefixes.widths), len(x))
        scores = scale.new_zeros(shape) if own is None else prefixes.own_scores(x, y, own)
        settings = prefixes.widths, prefixes.normalize
        statistic, sums, count = FORWARD(x, y, scale + hardness, *columns, *settings)
        ctx.save_for_backward(x, y, scale, statistic, *columns)
        ctx.hardness, ctx.settings = hardness, settings
        ctx.mark_non_differentiable(count, *(() if total else (sums,)))
        return scores * scale, statistic.clamp_min(lowest(statistic.dtype)), sums, count

    @staticmethod
    @once_differentiable
    def backward(ctx, g_own, g_statistic, g_total, _):
        x, y, scale, statistic, *columns = ctx.saved_tensors
        grads = [scale * g for g in (g_statistic, g_total, g_own)]
        inputs = (x, y, scale + ctx.hardness, *columns, *ctx.settings, statistic, *grads)
        for_x, for_y, for_scale = ctx.needs_input_grad[:3]
        grad_x, grad_y, g_scores = BACKWARD(*inputs, for_x, for_y)
        return (
            grad_x if for_x else None,
            grad_y if for_y else None,
            g_scores.sum() / scale if for_scale else None,
            *[None] * (3 + len(columns)),
        )

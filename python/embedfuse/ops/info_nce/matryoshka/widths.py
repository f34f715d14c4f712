"""Statistics at several widths of the embedding (Matryoshka), from one pass over the scores of the widest."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from embedfuse.ops.info_nce.matryoshka.op import BACKWARD, FORWARD
from embedfuse.ops.info_nce.matryoshka.tiles import inverse_norms, slices
from embedfuse.ops.info_nce.statistics import (
    ELEMENTS,
    NONE_EXCLUDED,
    Excluded,
    Statistics,
    lowest,
    row_products,
    statistics_from_scores,
)


@dataclass(frozen=True)
class Matryoshka:
    """Widths at which info_nce computes losses: the first components of the embeddings (arXiv 2205.13147).

    Also the strategy of these losses: the methods are those of strategy.Strategy, where excluded.limit and
    the statistics are (widths, rows).

    Args:
        widths: ascending numbers from 1.
        normalize: whether the components of each width are divided by their norm, for cosine similarity.

    Raises:
        ValueError: for other widths.
    """

    widths: tuple[int, ...]
    normalize: bool = True

    def __post_init__(self):
        widths = self.widths
        if not widths or min(widths) < 1 or list(widths) != sorted(set(widths)):
            raise ValueError(f"widths={widths}: accepted are ascending numbers from 1")

    def pool_statistics(
        self,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        excluded: Excluded = NONE_EXCLUDED,
        *,
        hardness: float = 0.0,
        total: bool = False,
    ) -> Statistics:
        """Against columns that all rows share; arguments as in statistics.statistics."""
        return Statistics(*_Statistics.apply(x, y, scale, self, hardness, total, *excluded))

    bank_statistics = pool_statistics

    def hard_negative_statistics(
        self,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        excluded: Excluded = NONE_EXCLUDED,
        *,
        hardness: float = 0.0,
    ) -> Statistics:
        """Against the columns of each row; arguments as in statistics.hard_negative_statistics."""
        scores = self.row_products(x, y)
        return statistics_from_scores(scores, scale, excluded, hardness=hardness)

    def row_products(self, x: Tensor, y: Tensor) -> Tensor:
        """Scores (widths, rows, K) of x (rows, d) and y (rows, K, d). Differentiable."""
        sizes = [s.stop - s.start for s in slices(self.widths)]
        sides = (side[..., : self.widths[-1]].split(sizes, -1) for side in (x, y))
        products = torch.stack([row_products(*parts) for parts in zip(*sides, strict=True)])
        scores = products.cumsum(0)
        if not self.normalize:
            return scores
        return scores * inverse_norms(x, self.widths)[..., None] * inverse_norms(y, self.widths)

    def target_scores(self, x: Tensor, y: Tensor, target: Tensor) -> Tensor:
        """(widths, rows), as statistics.target_scores."""
        with torch.no_grad():
            step = max(ELEMENTS // x.shape[1], 1)
            parts = zip(x.split(step), target.clamp_min(0).split(step), strict=True)
            scores = [self.row_products(a, y[i][:, None])[..., 0] for a, i in parts]
            return torch.where(target < 0, 0, torch.cat(scores, 1))


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, scale, matryoshka, hardness, total, *excluded):
        target, shape = excluded[0], (len(matryoshka.widths), len(x))
        scores = (
            scale.new_zeros(shape) if target is None else matryoshka.target_scores(x, y, target)
        )
        settings = matryoshka.widths, matryoshka.normalize
        statistic, sums, count = FORWARD(x, y, scale + hardness, *excluded, *settings)
        ctx.save_for_backward(x, y, scale, statistic, *excluded)
        ctx.hardness, ctx.settings = hardness, settings
        ctx.mark_non_differentiable(count, *(() if total else (sums,)))
        return scores * scale, statistic.clamp_min(lowest(statistic.dtype)), sums, count

    @staticmethod
    @once_differentiable
    def backward(ctx, g_target, g_statistic, g_total, _):
        x, y, scale, statistic, *excluded = ctx.saved_tensors
        grads = [scale * g for g in (g_statistic, g_total, g_target)]
        inputs = (x, y, scale + ctx.hardness, *excluded, *ctx.settings, statistic, *grads)
        for_x, for_y, for_scale = ctx.needs_input_grad[:3]
        grad_x, grad_y, g_scores = BACKWARD(*inputs, for_x, for_y)
        return (
            grad_x if for_x else None,
            grad_y if for_y else None,
            g_scores.sum() / scale if for_scale else None,
            *[None] * (3 + len(excluded)),
        )

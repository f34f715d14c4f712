"""Statistics of rows against columns, differentiable: the parts of every contrastive loss here.

A loss whose denominator has several parts (documents, queries, a bank) computes the statistics of each part
and combines the logsumexps; autograd then weighs the gradient of each part by its share.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from embedfuse.ops.info_nce.op import BACKWARD, FORWARD

# Elements of a product of rows that exist at once.
ELEMENTS = 2**22


class Statistics(NamedTuple):
    """Per row, over the columns that count; the first three fp32 (fp64 for fp64 input).

    Attributes:
        target: (rows,), the logit of the row's target, 0 without one.
        logsumexp: (rows,), of the logits; with sigmoid=True the sum of their softplus. `lowest` for a row
            where no column counts: -inf would make NaN of the gradients of further logsumexps.
        total: (rows,), the sum of the logits; with sigmoid=True the sum of their sigmoid.
        count: (rows,) int64, the number of columns.
    """

    target: Tensor
    logsumexp: Tensor
    total: Tensor
    count: Tensor


def lowest(dtype: torch.dtype) -> float:
    """The logsumexp of a row where no column counts."""
    return torch.finfo(dtype).min / 4


class Excluded(NamedTuple):
    """Which columns do not count for a row. No gradient goes through the selection.

    Attributes:
        target: (rows,) int64: this column, the row's positive or the row itself; -1 for none.
        limit: (rows,): columns that score above it.
        x_keys, y_keys: (rows,) and (columns,) int64: columns of an equal key.
        guide_x, guide_y, guide_limit: (rows, d), (columns, d) and (rows,): columns whose guide score
            guide_x . guide_y is above guide_limit.
    """

    target: Tensor | None = None
    limit: Tensor | None = None
    x_keys: Tensor | None = None
    y_keys: Tensor | None = None
    guide_x: Tensor | None = None
    guide_y: Tensor | None = None
    guide_limit: Tensor | None = None


NONE_EXCLUDED = Excluded()


def statistics(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    excluded: Excluded = NONE_EXCLUDED,
    *,
    bias: Tensor | None = None,
    hardness: float = 0.0,
    sigmoid: bool = False,
    total: bool = False,
    passes: tuple[Callable, Callable] = (FORWARD, BACKWARD),
) -> Statistics:
    """Of the logits scale x_i . y_j + bias + hardness stopgrad(x_i . y_j), the target's without hardness.

    Differentiable in x, y, scale and bias. Where y needs no gradient, that of x is prepared in the same pass,
    else the logits are computed again. Memory: a tile of logits, one row of x's shape in fp32.

    Args:
        x: (rows, d).
        y: (columns, d), of x's dtype.
        scale: one element, fp32 (fp64 for fp64 x).
        excluded: which columns do not count.
        bias: like scale; needs sigmoid=True.
        hardness: the weight of the score's copy without gradient.
        sigmoid: whether each logit is a binary decision (SigLIP) instead of a class of a softmax.
        total: whether `total` is to be differentiable.
        passes: the forward and the backward op, or functions that run them over more columns than y.

    Returns:
        Statistics of each row.
    """
    return Statistics(
        *_Statistics.apply(x, y, scale, bias, hardness, sigmoid, total, passes, *excluded)
    )


def averages_columns(for_x: bool, for_y: bool, for_scale: bool, total: bool) -> bool:
    """Whether the first pass prepares the gradient of x: of a frozen y, such as a bank, that is a weighted
    mean of y's rows."""
    return (for_x or for_scale) and not (for_y or total)


def needs_second_pass(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None = None, total: bool = False, **_
) -> bool:
    """Whether the backward pass of `statistics` will read y."""
    inputs = [x, y, scale, *([] if bias is None else [bias])]
    needs = [t.requires_grad and torch.is_grad_enabled() for t in inputs]
    return any(needs) and not averages_columns(*needs[:3], total)


def hard_negative_statistics(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    excluded: Excluded = NONE_EXCLUDED,
    *,
    bias: Tensor | None = None,
    hardness: float = 0.0,
    sigmoid: bool = False,
) -> Statistics:
    """`statistics` where every row has other columns, in plain torch on (rows, K) logits.

    Args:
        x: (rows, d).
        y: (rows, K, d).
        scale, bias, hardness, sigmoid: as in `statistics`.
        excluded: with y_keys (rows, K) and guide_y (rows, K, d); without target.

    Returns:
        Statistics of each row, target = 0.
    """
    return statistics_from_scores(
        row_products(x, y), scale, excluded, bias=bias, hardness=hardness, sigmoid=sigmoid
    )


def statistics_from_scores(
    scores: Tensor,
    scale: Tensor,
    excluded: Excluded,
    *,
    bias: Tensor | None = None,
    hardness: float = 0.0,
    sigmoid: bool = False,
) -> Statistics:
    """`hard_negative_statistics` of scores (..., rows, K), with excluded.limit (..., rows)."""
    drop = torch.zeros_like(scores, dtype=torch.bool)
    if excluded.limit is not None:
        drop = drop | (scores > excluded.limit[..., None])
    if excluded.x_keys is not None:
        drop = drop | (excluded.x_keys[:, None] == excluded.y_keys)
    if excluded.guide_x is not None:
        guide_scores = row_products(excluded.guide_x, excluded.guide_y)
        drop = drop | (guide_scores > excluded.guide_limit[:, None])
    logits = scale * scores + hardness * scores.detach() + (0 if bias is None else bias)
    target, count = torch.zeros_like(scores[..., 0]), (~drop).sum(-1)
    if sigmoid:
        parts = torch.nn.functional.softplus(logits).masked_fill(drop, 0), logits.sigmoid()
        return Statistics(target, parts[0].sum(-1), parts[1].masked_fill(drop, 0).sum(-1), count)
    logsumexp = logits.masked_fill(drop, lowest(logits.dtype)).logsumexp(-1)
    return Statistics(target, logsumexp, logits.masked_fill(drop, 0).sum(-1), count)


def target_scores(x: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """x_i . y_target(i) (rows,), 0 where target is -1; fp32 sums (fp64 for fp64 x); no gradient."""
    with torch.no_grad():
        step = max(ELEMENTS // max(x.shape[1], 1), 1)
        index = target.clamp_min(0)
        parts = zip(x.split(step), index.split(step), strict=True)
        scores = torch.cat([_products(a, y[i][:, None])[:, 0] for a, i in parts])
        return torch.where(target < 0, 0, scores)


def row_products(x: Tensor, y: Tensor) -> Tensor:
    """x_i . y_ik (rows, K), in fp32 (fp64 for fp64 x). x: (rows, d). y: (rows, K, d). Differentiable."""
    return _RowProducts.apply(x, y)


def _products(x: Tensor, y: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (y.to(dtype) * x.to(dtype)[:, None]).sum(-1)


class _RowProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        step = max(ELEMENTS // max(y[0].numel(), 1), 1) if len(y) else 1
        parts = zip(x.split(step), y.split(step), strict=True)
        return torch.cat([_products(a, b) for a, b in parts])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        grad_x = grad_y = None
        if ctx.needs_input_grad[0]:
            wide = grad.new_zeros(x.shape)
            for k in range(y.shape[1]):
                wide += grad[:, k, None] * y[:, k]
            grad_x = wide.to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_y = torch.empty_like(y)
            for k in range(y.shape[1]):
                grad_y[:, k] = grad[:, k, None] * x
        return grad_x, grad_y


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, scale, bias, hardness, sigmoid, total, passes, *excluded):
        target = excluded[0]
        scores = scale.new_zeros(len(x)) if target is None else target_scores(x, y, target)
        inputs = (x, y, scale + hardness, bias, *excluded, sigmoid)
        mean = averages_columns(*ctx.needs_input_grad[:3], total)
        statistic, sums, count, rows = passes[0](*inputs, mean)
        # A bank that is not read again may be written to before the backward pass.
        saved = (None, target, *[None] * 6) if mean else (y, *excluded)
        target_rows = y[target.clamp_min(0)] if mean and target is not None else None
        ctx.save_for_backward(x, scale, bias, statistic, sums, rows, target_rows, *saved)
        ctx.hardness, ctx.sigmoid, ctx.mean, ctx.backward_pass = hardness, sigmoid, mean, passes[1]
        ctx.mark_non_differentiable(count, *(() if total else (sums,)))
        statistic = statistic.clamp_min(lowest(statistic.dtype))
        return scores * scale + (0 if bias is None else bias), statistic, sums, count

    @staticmethod
    @once_differentiable
    def backward(ctx, g_target, g_statistic, g_total, _):
        x, scale, bias, statistic, sums, rows, target_rows, y, *excluded = ctx.saved_tensors
        for_x = ctx.needs_input_grad[0] or ctx.needs_input_grad[2]
        grads = [scale * g for g in (g_statistic, g_total, g_target)]
        if ctx.mean:
            grad_x, grad_y = grads[0][:, None] * rows, None
            if target_rows is not None:
                grad_x += torch.where(excluded[0] < 0, 0, grads[2])[:, None] * target_rows
        else:
            inputs = (x, y, scale + ctx.hardness, bias, *excluded, ctx.sigmoid)
            needs = for_x, ctx.needs_input_grad[1]
            grad_x, grad_y = ctx.backward_pass(*inputs, statistic, *grads, *needs)
        grad_scale = grad_bias = None
        if ctx.needs_input_grad[2]:  # scores are linear in x
            grad_scale = (grad_x * x).sum() / scale
        if ctx.needs_input_grad[3]:
            grad_bias = g_target.sum() + (g_statistic * sums).sum()
        grad_x = grad_x.to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_y = grad_y if ctx.needs_input_grad[1] else None
        return grad_x, grad_y, grad_scale, grad_bias, *[None] * (4 + len(excluded))

"""Statistics of rows against columns, differentiable: what every contrastive loss here is made of.

Losses whose denominator has several parts (documents, queries, a bank) take one call per part and combine the
logsumexps; autograd then weighs each part's gradient by its share.
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
    """Per row (rows,): own, the logit of the row's own column, 0 without one; logsumexp of the logits that
    count, with sigmoid=True the sum of their softplus; total, their sum, with sigmoid=True that of their
    sigmoid; count, how many (int64). A row where none counts has the logsumexp `lowest`: -inf would make NaN
    of the gradients of further logsumexps."""

    own: Tensor
    logsumexp: Tensor
    total: Tensor
    count: Tensor


def lowest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).min / 4


class Columns(NamedTuple):
    """Which columns do not count for a row. own (rows,) int64: this one, -1 for none; limit (rows,): those
    that score above it; x_keys (rows,), y_keys (columns,) int64: those of an equal key; guide_x, guide_y:
    those whose guide score guide_x . guide_y is above guide_limit (rows,). No gradient goes through the
    choice."""

    own: Tensor | None = None
    limit: Tensor | None = None
    x_keys: Tensor | None = None
    y_keys: Tensor | None = None
    guide_x: Tensor | None = None
    guide_y: Tensor | None = None
    guide_limit: Tensor | None = None


NOTHING = Columns()


def statistics(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    columns: Columns = NOTHING,
    *,
    bias: Tensor | None = None,
    hardness: float = 0.0,
    sigmoid: bool = False,
    total: bool = False,
    passes: tuple[Callable, Callable] = (FORWARD, BACKWARD),
) -> Statistics:
    """Of the logits scale x_i . y_j + bias + hardness stopgrad(x_i . y_j), the own one without hardness.

    x: (rows, d). y: (columns, d), of x's dtype. scale, bias: one element, fp32 (fp64 for fp64 x); a bias
    needs sigmoid=True. total: whether `total` is to be differentiable. passes: the two ops, or what runs
    them over more columns than y.

    Differentiable in x, y, scale and bias. Where y needs no gradient, that of x is prepared in the same pass,
    else the logits are computed again. Memory: a tile of logits, one row of x's shape in fp32.
    """
    return Statistics(
        *_Statistics.apply(x, y, scale, bias, hardness, sigmoid, total, passes, *columns)
    )


def takes_mean(for_x: bool, for_y: bool, for_scale: bool, total: bool) -> bool:
    """Whether the first pass prepares the gradient of x: of a frozen y, such as a bank, that is a weighted
    mean of y's rows."""
    return (for_x or for_scale) and not (for_y or total)


def reads_again(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None = None, total: bool = False, **_
) -> bool:
    """Whether the backward pass of `statistics` will go through y."""
    inputs = [x, y, scale, *([] if bias is None else [bias])]
    needs = [t.requires_grad and torch.is_grad_enabled() for t in inputs]
    return any(needs) and not takes_mean(*needs[:3], total)


def statistics_of_each(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    columns: Columns = NOTHING,
    *,
    bias: Tensor | None = None,
    hardness: float = 0.0,
    sigmoid: bool = False,
) -> Statistics:
    """`statistics` where each row has columns of its own: y (rows, K, d), y_keys (rows, K), guide_y (rows,
    K, .).

    Plain torch on (rows, K) logits. Returns own = 0.
    """
    return statistics_of_scores(
        row_products(x, y), scale, columns, bias=bias, hardness=hardness, sigmoid=sigmoid
    )


def statistics_of_scores(
    scores: Tensor,
    scale: Tensor,
    columns: Columns,
    *,
    bias: Tensor | None = None,
    hardness: float = 0.0,
    sigmoid: bool = False,
) -> Statistics:
    """`statistics_of_each` of scores (..., rows, K), with columns.limit (..., rows)."""
    drop = torch.zeros_like(scores, dtype=torch.bool)
    if columns.limit is not None:
        drop = drop | (scores > columns.limit[..., None])
    if columns.x_keys is not None:
        drop = drop | (columns.x_keys[:, None] == columns.y_keys)
    if columns.guide_x is not None:
        drop = drop | (
            row_products(columns.guide_x, columns.guide_y) > columns.guide_limit[:, None]
        )
    logits = scale * scores + hardness * scores.detach() + (0 if bias is None else bias)
    own, count = torch.zeros_like(scores[..., 0]), (~drop).sum(-1)
    if sigmoid:
        parts = torch.nn.functional.softplus(logits).masked_fill(drop, 0), logits.sigmoid()
        return Statistics(own, parts[0].sum(-1), parts[1].masked_fill(drop, 0).sum(-1), count)
    logsumexp = logits.masked_fill(drop, lowest(logits.dtype)).logsumexp(-1)
    return Statistics(own, logsumexp, logits.masked_fill(drop, 0).sum(-1), count)


def own_scores(x: Tensor, y: Tensor, own: Tensor) -> Tensor:
    """x_i . y_own(i) (rows,), 0 where own is -1; fp32 sums (fp64 for fp64 x); no gradient."""
    with torch.no_grad():
        step = max(ELEMENTS // max(x.shape[1], 1), 1)
        index = own.clamp_min(0)
        parts = zip(x.split(step), index.split(step), strict=True)
        scores = torch.cat([_products(a, y[i][:, None])[:, 0] for a, i in parts])
        return torch.where(own < 0, 0, scores)


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
    def forward(ctx, x, y, scale, bias, hardness, sigmoid, total, passes, *columns):
        own = columns[0]
        scores = scale.new_zeros(len(x)) if own is None else own_scores(x, y, own)
        inputs = (x, y, scale + hardness, bias, *columns, sigmoid)
        mean = takes_mean(*ctx.needs_input_grad[:3], total)
        statistic, sums, count, rows = passes[0](*inputs, mean)
        # A bank that is not read again may be written to before the backward pass.
        kept = (None, own, *[None] * 6) if mean else (y, *columns)
        own_rows = y[own.clamp_min(0)] if mean and own is not None else None
        ctx.save_for_backward(x, scale, bias, statistic, sums, rows, own_rows, *kept)
        ctx.hardness, ctx.sigmoid, ctx.mean, ctx.backward_pass = hardness, sigmoid, mean, passes[1]
        ctx.mark_non_differentiable(count, *(() if total else (sums,)))
        statistic = statistic.clamp_min(lowest(statistic.dtype))
        return scores * scale + (0 if bias is None else bias), statistic, sums, count

    @staticmethod
    @once_differentiable
    def backward(ctx, g_own, g_statistic, g_total, _):
        x, scale, bias, statistic, sums, rows, own_rows, y, *columns = ctx.saved_tensors
        for_x = ctx.needs_input_grad[0] or ctx.needs_input_grad[2]
        grads = [scale * g for g in (g_statistic, g_total, g_own)]
        if ctx.mean:
            grad_x, grad_y = grads[0][:, None] * rows, None
            if own_rows is not None:
                grad_x += torch.where(columns[0] < 0, 0, grads[2])[:, None] * own_rows
        else:
            inputs = (x, y, scale + ctx.hardness, bias, *columns, ctx.sigmoid)
            needs = for_x, ctx.needs_input_grad[1]
            grad_x, grad_y = ctx.backward_pass(*inputs, statistic, *grads, *needs)
        grad_scale = grad_bias = None
        if ctx.needs_input_grad[2]:  # scores are linear in x
            grad_scale = (grad_x * x).sum() / scale
        if ctx.needs_input_grad[3]:
            grad_bias = g_own.sum() + (g_statistic * sums).sum()
        grad_x = grad_x.to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_y = grad_y if ctx.needs_input_grad[1] else None
        return grad_x, grad_y, grad_scale, grad_bias, *[None] * (4 + len(columns))

"""InfoNCE over a pool of any size: softmax cross-entropy against in-batch negatives, logits never stored."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from embedfuse.ops.info_nce import statistics as full_width
from embedfuse.ops.info_nce.candidates import (
    Choice,
    FalseNegatives,
    Rows,
    as_rows,
    check_labels,
    check_sides,
    inverse_temperature,
)
from embedfuse.ops.info_nce.distributed import AllGather, Ring, agreed
from embedfuse.ops.info_nce.matryoshka.widths import Prefixes
from embedfuse.ops.info_nce.statistics import Statistics, statistics


class InfoNCEOutput(NamedTuple):
    """loss (B,) and logsumexp (B,), of positive and negatives, in fp32; negatives (B,) int64, how many
    counted. With prefixes (widths, B)."""

    loss: Tensor
    logsumexp: Tensor
    negatives: Tensor


def info_nce(
    q: Tensor | Rows,
    pool: Tensor | Rows,
    labels: Tensor | None = None,
    *,
    hard_negatives: Tensor | Rows | None = None,
    bank: Tensor | Rows | None = None,
    temperature: float | Tensor = 0.05,
    false_negatives: FalseNegatives | None = None,
    hardness: float = 0.0,
    hard_hardness: float = 0.0,
    label_smoothing: float = 0.0,
    across: AllGather | Ring | None = None,
    prefixes: Prefixes | None = None,
) -> InfoNCEOutput:
    """loss_i = -log(e^z_ip / (e^z_ip + sum over the negatives j of e^z_ij)), z = q . d / temperature (arXiv
    1807.03748).

    q: (B, d). pool: (N, d): row labels[i] is the positive of q_i, all others are negatives. labels: (B,)
        int64, default arange(B). hard_negatives: (B, K, d), of each row alone. bank: (M, d), negatives of
        all rows that get no gradient. All of one dtype and on one device; Rows where ids or a guide are to
        tell false negatives.
    temperature: a number, or a tensor of one element, which gets its gradient.
    false_negatives: see FalseNegatives; None with Rows that carry ids or a guide means its defaults.
    hardness, hard_hardness: h adds h stopgrad(q . d) to the logits of pool and bank, and of hard_negatives
        (arXiv 2503.04812: 9, arXiv 2509.20354: 5 on hard negatives).
    label_smoothing: e gives each of the candidates that count, the positive among them, e / count of the
    target.
    across: negatives from the pools of all ranks, labels being those into this rank's; hard_negatives and
        bank stay this rank's. Gradients of q, pool and temperature are those of the sum of all ranks' losses
        as far as they pass through this rank's tensors.
    prefixes: the losses at several widths (arXiv 2205.13147), each as of its own call with the first
        components alone; guides and ids are those of all widths. The arithmetic is that of the widest.

    Vectors are taken as they are: normalise them for cosine similarity. Scores, sums and the loss are fp32
    (fp64 for fp64 input), also under autocast; where 16-bit vectors are on a GPU, the gradient of the scores
    is rounded to 16 bits before it meets them. A row without negatives loses 0. NaN spreads. Memory beyond
    inputs and gradients: a tile of logits and a few rows of statistics, and on the CPU an fp32 copy of a
    16-bit guide's queries; where `pool` needs no gradient, all is done in one pass; with prefixes a tile for
    each width, and `bank` is read again in the backward pass.
    Deterministic.

    Raises ValueError for shapes, dtypes, devices or numbers that do not fit, for Ring with prefixes, and on
    the CPU for labels out of range and a temperature tensor that is not positive; on all ranks where one
    raises, and for pools of different shapes.
    """
    q, pool = as_rows(q=q, pool=pool)
    bank, hard = as_rows(optional=True, bank=bank, hard_negatives=hard_negatives)
    with agreed(across, q.vectors.device):
        check_sides(q, pool=pool, bank=bank, hard_negatives=hard)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing}: accepted are 0 to below 1")
        labels = check_labels(labels, q, pool)
        scale = inverse_temperature(temperature, q.vectors)
        if prefixes is not None:
            check_prefixes(prefixes, q, across)
    kind = full_width if prefixes is None else prefixes
    over = kind.statistics if across is None else across.statistics
    if prefixes is not None and across is not None:
        over = functools.partial(across.statistics, of_columns=kind.statistics)
    choose = Choice(q, pool, labels, false_negatives or FalseNegatives(), kind.own_scores)
    settings = {"hardness": hardness, "hard_hardness": hard_hardness, "total": label_smoothing > 0}
    parts = candidate_statistics(q, pool, hard, bank, scale, choose, over, kind, **settings)
    return combine(parts[0].own, parts, label_smoothing)


def check_prefixes(prefixes: Prefixes, q: Rows, across: AllGather | Ring | None) -> None:
    if isinstance(across, Ring):
        raise ValueError("across: Ring; accepted with prefixes is AllGather")
    if prefixes.widths[-1] > q.vectors.shape[1]:
        raise ValueError(
            f"prefixes: width {prefixes.widths[-1]}; accepted are up to that of q, {q.vectors.shape[1]}"
        )


def candidate_statistics(
    q: Rows,
    pool: Rows,
    hard: Rows | None,
    bank: Rows | None,
    scale: Tensor,
    choose: Choice,
    over: Callable = statistics,
    kind=full_width,
    *,
    hardness: float = 0.0,
    hard_hardness: float = 0.0,
    total: bool = False,
    **settings,
) -> list[Statistics]:
    """Of q against the pool, whose own columns are the positives, then against hard negatives and bank.

    over: statistics, or that of ranks, for the pool. kind: what has the other functions of statistics."""
    settings_of_all = {"hardness": hardness, "total": total, **settings}
    x, own = q.vectors, choose.labels
    parts = [over(x, pool.vectors, scale, choose.columns(pool, own), **settings_of_all)]
    if hard is not None and hard.vectors.shape[1]:
        columns = choose.columns(hard)
        settings["hardness"] = hard_hardness
        parts.append(kind.statistics_of_each(x, hard.vectors, scale, columns, **settings))
    if bank is not None and len(bank.vectors):
        columns = choose.columns(bank)
        parts.append(kind.statistics(x, bank.vectors.detach(), scale, columns, **settings_of_all))
    return parts


def combine(
    positive: Tensor, parts: list[Statistics], label_smoothing: float = 0.0
) -> InfoNCEOutput:
    """The loss of rows with the positives' logits and all negatives' statistics."""
    negatives = torch.stack([part.logsumexp for part in parts]).logsumexp(0)
    count = torch.stack([part.count for part in parts]).sum(0)
    logsumexp = torch.logaddexp(positive, negatives)
    # Not logsumexp - positive, whose rounding is that of the logits.
    loss = torch.logaddexp(torch.zeros_like(positive), negatives - positive)
    if label_smoothing:
        mean = (positive + torch.stack([part.total for part in parts]).sum(0)) / (count + 1)
        loss = (1 - label_smoothing) * loss + label_smoothing * (logsumexp - mean)
    return InfoNCEOutput(loss, logsumexp, count)

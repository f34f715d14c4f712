"""InfoNCE over a pool of any size: softmax cross-entropy against in-batch negatives, logits never stored.

Formula: loss_i = log(1 + sum over the negatives j of e^(z_ij - z_ip)), z the logits, p the positive.
Limits: memory holds a tile of logits; the backward pass computes the logits again where the pool needs a
gradient.
"""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from embedfuse.ops.info_nce.candidates import (
    FalseNegatives,
    NegativeFilter,
    Rows,
    as_rows,
    check_labels,
    check_sides,
    inverse_temperature,
)
from embedfuse.ops.info_nce.distributed import AllGather, Ring, errors_on_all_ranks
from embedfuse.ops.info_nce.matryoshka.widths import Matryoshka
from embedfuse.ops.info_nce.statistics import Statistics
from embedfuse.ops.info_nce.strategy import Strategy, strategy_of


class InfoNCEOutput(NamedTuple):
    """What info_nce returns; with `matryoshka` each is (widths, B).

    Attributes:
        loss: (B,) fp32 (fp64 for fp64 input).
        logsumexp: (B,) of loss's dtype, over the logits of the positive and the negatives.
        negatives: (B,) int64, how many negatives counted.
    """

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
    matryoshka: Matryoshka | None = None,
    prefixes: Matryoshka | None = None,
) -> InfoNCEOutput:
    """loss_i = -log(e^z_ip / (e^z_ip + sum over the negatives j of e^z_ij)), z = q . d / temperature.

    Vectors are taken as they are: normalise them for cosine similarity. Scores, sums and the loss are fp32
    (fp64 for fp64 input), also under autocast; where 16-bit vectors are on a GPU, the gradient of the scores
    is rounded to 16 bits before it is multiplied by them. A row without negatives loses 0. NaN spreads.
    Deterministic.

    Memory beyond inputs and gradients: a tile of logits and a few rows of statistics, and on the CPU an fp32
    copy of a 16-bit guide's queries. Where `pool` needs no gradient, all is done in one pass. With
    `matryoshka` a tile for each width, and `bank` is read again in the backward pass.

    Source: arXiv 1807.03748.

    Args:
        q: (B, d), queries. Rows, as the other sides, where ids or a guide mark false negatives.
        pool: (N, d). Row labels[i] is the positive of q_i, all others are negatives. All sides have one
            dtype, float16, bfloat16, float32 or float64, and one device.
        labels: (B,) int64; None for arange(B).
        hard_negatives: (B, K, d), negatives of each row alone.
        bank: (M, d), negatives of all rows, without gradient.
        temperature: a number, or a tensor of one element, which gets a gradient.
        false_negatives: which candidates leave; None with Rows that carry ids or a guide means the defaults
            of FalseNegatives.
        hardness: h adds h stopgrad(q . d) to the logits of pool and bank (9 in arXiv 2503.04812).
        hard_hardness: the same for hard_negatives (5 in arXiv 2509.20354).
        label_smoothing: e gives each candidate that counts, the positive among them, e / count of the target.
        across: negatives from the pools of all ranks; labels are those into this rank's pool, hard_negatives
            and bank stay this rank's. Gradients of q, pool and temperature are those of the sum of all ranks'
            losses as far as they pass through this rank's tensors.
        matryoshka: the losses at several widths (arXiv 2205.13147), each equal to a call of its first
            components alone; guides and ids are the same at all widths. The arithmetic is that of the widest.
        prefixes: deprecated name of `matryoshka`, to be removed in version 0.3.

    Returns:
        InfoNCEOutput of (B,) tensors, with `matryoshka` (widths, B).

    Raises:
        TypeError: where an argument is no tensor, or the temperature no number.
        ValueError: for shapes, dtypes, devices or numbers that do not fit; for Ring with matryoshka; on the
            CPU for labels out of range and a temperature tensor that is not positive; on all ranks where one
            raises, and for pools of different shapes.
    """
    if prefixes is not None:
        warnings.warn(
            "prefixes is deprecated and will be removed in version 0.3; use matryoshka",
            DeprecationWarning,
            stacklevel=2,
        )
        if matryoshka is not None:
            raise ValueError("prefixes: given with matryoshka; accepted is matryoshka alone")
        matryoshka = prefixes
    q, pool = as_rows(q=q, pool=pool)
    bank, hard = as_rows(optional=True, bank=bank, hard_negatives=hard_negatives)
    with errors_on_all_ranks(across, q.vectors.device):
        check_sides(q, pool=pool, bank=bank, hard_negatives=hard)
    return info_nce_of_rows(
        q,
        pool,
        labels,
        hard,
        bank,
        temperature=temperature,
        false_negatives=false_negatives,
        hardness=hardness,
        hard_hardness=hard_hardness,
        label_smoothing=label_smoothing,
        across=across,
        matryoshka=matryoshka,
    )


def info_nce_of_rows(
    q: Rows,
    pool: Rows,
    labels: Tensor | None,
    hard: Rows | None,
    bank: Rows | None,
    *,
    temperature: float | Tensor,
    false_negatives: FalseNegatives | None = None,
    hardness: float = 0.0,
    hard_hardness: float = 0.0,
    label_smoothing: float = 0.0,
    across: AllGather | Ring | None = None,
    matryoshka: Matryoshka | None = None,
) -> InfoNCEOutput:
    """info_nce of sides that were checked."""
    with errors_on_all_ranks(across, q.vectors.device):
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing}: accepted are 0 to below 1")
        labels = check_labels(labels, q, pool)
        scale = inverse_temperature(temperature, q.vectors)
        if matryoshka is not None:
            _check_matryoshka(matryoshka, q, across)
    strategy = strategy_of(across, matryoshka)
    negatives = NegativeFilter(q, pool, labels, false_negatives or FalseNegatives(), strategy)
    parts = candidate_statistics(
        strategy,
        (q, pool, hard, bank),
        scale,
        negatives,
        hardness=hardness,
        hard_hardness=hard_hardness,
        total=label_smoothing > 0,
    )
    return combine(parts[0].target, parts, label_smoothing)


def _check_matryoshka(matryoshka: Matryoshka, q: Rows, across: AllGather | Ring | None) -> None:
    if isinstance(across, Ring):
        raise ValueError("across: Ring; accepted with matryoshka is AllGather")
    if matryoshka.widths[-1] > q.vectors.shape[1]:
        raise ValueError(
            f"matryoshka: width {matryoshka.widths[-1]}; accepted are up to that of q, {q.vectors.shape[1]}"
        )


def candidate_statistics(
    strategy: Strategy,
    sides: tuple[Rows, Rows, Rows | None, Rows | None],
    scale: Tensor,
    negatives: NegativeFilter,
    *,
    hardness: float = 0.0,
    hard_hardness: float = 0.0,
    total: bool = False,
    **settings,
) -> list[Statistics]:
    """Of q against the pool, whose targets are the positives, then against hard negatives and bank.

    sides: q, pool, hard negatives and bank. settings: of all parts, as in statistics.py.
    """
    q, pool, hard, bank = sides
    x, in_batch = q.vectors, {"hardness": hardness, "total": total, **settings}
    excluded = negatives.excluded(pool, negatives.labels)
    parts = [strategy.pool_statistics(x, pool.vectors, scale, excluded, **in_batch)]
    if hard is not None and hard.vectors.shape[1]:
        of_row = {"hardness": hard_hardness, **settings}
        excluded = negatives.excluded(hard)
        parts.append(strategy.hard_negative_statistics(x, hard.vectors, scale, excluded, **of_row))
    if bank is not None and len(bank.vectors):
        frozen, excluded = bank.vectors.detach(), negatives.excluded(bank)
        parts.append(strategy.bank_statistics(x, frozen, scale, excluded, **in_batch))
    return parts


def combine(
    positive: Tensor, parts: list[Statistics], label_smoothing: float = 0.0
) -> InfoNCEOutput:
    """The loss of rows from the logits of the positives and the statistics of all negatives."""
    negatives = torch.stack([part.logsumexp for part in parts]).logsumexp(0)
    count = torch.stack([part.count for part in parts]).sum(0)
    logsumexp = torch.logaddexp(positive, negatives)
    # Not logsumexp - positive, whose rounding is that of the logits.
    loss = torch.logaddexp(torch.zeros_like(positive), negatives - positive)
    if label_smoothing:
        mean = (positive + torch.stack([part.total for part in parts]).sum(0)) / (count + 1)
        loss = (1 - label_smoothing) * loss + label_smoothing * (logsumexp - mean)
    return InfoNCEOutput(loss, logsumexp, count)

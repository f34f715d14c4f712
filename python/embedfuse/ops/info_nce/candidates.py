"""Arguments of the contrastive losses: embeddings with ids and guides, the rule for false negatives,
checks."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from embedfuse import native
from embedfuse.ops.checks import check_device, check_floating, check_tensors, is_readable
from embedfuse.ops.info_nce.statistics import Excluded, target_scores
from embedfuse.ops.info_nce.strategy import FullWidth, Strategy


class Rows(NamedTuple):
    """Embeddings with what marks false negatives among them.

    Attributes:
        vectors: (..., d) embeddings.
        ids: (...) int64, the id of each document or a hash of its text.
        guide: (..., width) embeddings of the same texts by a guide model; one dtype and width for all sides.
    """

    vectors: Tensor
    ids: Tensor | None = None
    guide: Tensor | None = None


@dataclass(frozen=True)
class FalseNegatives:
    """Which candidates leave the denominator, by their score s against the positive's p; s is the dot
    product.

    A candidate leaves where s is above any limit that is given. Candidates whose Rows.ids equals the
    positive's leave in any case. No gradient goes through the selection.

    Attributes:
        margin: the limit p + margin.
        relative: the limit p + relative |p| (-0.05: the 95 % of NV-Retriever, arXiv 2407.15831).
        guide_margin: as margin, of scores by the guide's embeddings (GISTEmbed, arXiv 2402.16829); 0 where
            Rows carry a guide and neither guide_margin nor guide_relative is given.
        guide_relative: as relative, of scores by the guide's embeddings.
    """

    margin: float | None = None
    relative: float | None = None
    guide_margin: float | None = None
    guide_relative: float | None = None

    def limit(self, positive: Tensor) -> Tensor | None:
        """The largest score that a candidate may have, from the positives' scores; None for no limit."""
        return _limit(positive, self.margin, self.relative)

    def guide_limit(self, positive: Tensor) -> Tensor:
        """The largest guide score that a candidate may have, from the positives' guide scores."""
        limit = _limit(positive, self.guide_margin, self.guide_relative)
        return positive if limit is None else limit


def _limit(positive: Tensor, margin: float | None, relative: float | None) -> Tensor | None:
    limits = [] if margin is None else [positive + margin]
    if relative is not None:
        limits.append(positive + relative * positive.abs())
    return torch.stack(limits).amin(0) if limits else None


class NegativeFilter:
    """Applies FalseNegatives: which candidates count as negatives of each row of q, by the row's positive."""

    def __init__(
        self,
        q: Rows,
        pool: Rows,
        labels: Tensor,
        false_negatives: FalseNegatives,
        strategy: Strategy | None = None,
    ):
        self.labels = labels
        self.ids = None if pool.ids is None else pool.ids[labels]
        self.limit = self.guide = self.guide_limit = None
        if (false_negatives.margin, false_negatives.relative) != (None, None):
            strategy = strategy or FullWidth()
            positive = strategy.target_scores(q.vectors, pool.vectors, labels)
            self.limit = false_negatives.limit(positive)
        if q.guide is not None and pool.guide is not None:
            self.guide = q.guide
            positive = target_scores(q.guide, pool.guide, labels)
            self.guide_limit = false_negatives.guide_limit(positive)

    def excluded(self, candidates: Rows, target: Tensor | None = None) -> Excluded:
        """The candidates that do not count; target: the positive, where it is among them."""
        keyed = self.ids is not None and candidates.ids is not None
        guided = self.guide is not None and candidates.guide is not None
        return Excluded(
            target,
            self.limit,
            self.ids if keyed else None,
            candidates.ids if keyed else None,
            self.guide if guided else None,
            candidates.guide if guided else None,
            self.guide_limit if guided else None,
        )


@overload
def as_rows(optional: Literal[False] = False, **sides: Tensor | Rows) -> list[Rows]: ...
@overload
def as_rows(optional: Literal[True], **sides: Tensor | Rows | None) -> list[Rows | None]: ...
def as_rows(optional=False, **sides):
    """The sides as Rows; TypeError for others than tensors and Rows, and than None where that is optional."""
    for name, side in sides.items():
        if not isinstance(side, Tensor | Rows) and not (optional and side is None):
            raise TypeError(f"{name}: {type(side).__name__}; accepted are tensors and ops.Rows")
    return [Rows(side) if isinstance(side, Tensor) else side for side in sides.values()]


def check_sides(q: Rows, **sides: Rows | None) -> None:
    """Errors of q, and of sides that do not go with it; `hard_negatives` has one dimension more."""
    x = q.vectors
    _check_types("q", q)
    check_floating("q", x.dtype)
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"q: shape {tuple(x.shape)}; accepted is (B, d), d from 1")
    if q.guide is not None and q.guide.dtype not in native.DTYPES and x.dtype != torch.float64:
        raise ValueError(f"q.guide: {q.guide.dtype}; accepted are float16, bfloat16 and float32")
    for name, side in {"q": q, **sides}.items():
        check_side(name, side, q)
    if q.ids is not None:
        raise ValueError("q.ids: accepted are ids of candidates; a query has its positive's")


def check_side(name: str, side: Rows | None, q: Rows) -> None:
    """Errors of one side that does not go with q."""
    if side is None:
        return
    _check_types(name, side)
    x = q.vectors
    lead = (len(x), None) if name == "hard_negatives" else (None,)
    _check_part(name, side.vectors, (*lead, x.shape[1]), x.dtype, x)
    shape = side.vectors.shape[:-1]
    if side.ids is not None:
        _check_part(f"{name}.ids", side.ids, shape, torch.int64, x)
    if side.guide is not None:
        if q.guide is None:
            raise ValueError(f"{name}.guide: q has none; accepted is a guide on both")
        guide_shape = (*shape, q.guide.shape[-1])
        _check_part(f"{name}.guide", side.guide, guide_shape, q.guide.dtype, x)


def _check_types(name: str, side: Rows) -> None:
    for part, tensor in side._asdict().items():
        check_tensors(**{name if part == "vectors" else f"{name}.{part}": tensor})


def _check_part(name: str, x: Tensor, shape: tuple, dtype: torch.dtype, q: Tensor) -> None:
    """Errors of dtype, of shape, where None accepts any number, and of device."""
    fits = x.dim() == len(shape) and all(
        wanted in (None, n) for n, wanted in zip(x.shape, shape, strict=True)
    )
    if x.dtype != dtype or not fits:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(
            f"{name}: {x.dtype} of shape {tuple(x.shape)}; accepted is {dtype} of ({wanted})"
        )
    check_device(name, x, "q", q)


def check_labels(labels: Tensor | None, q: Rows, pool: Rows) -> Tensor:
    """labels, by default arange(B)."""
    rows, columns = len(q.vectors), len(pool.vectors)
    if columns == 0:
        raise ValueError("pool: empty; accepted is one row and more")
    if labels is None:
        if rows > columns:
            raise ValueError(f"pool: {columns} rows; accepted without labels are {rows} and more")
        return torch.arange(rows, device=q.vectors.device)
    check_tensors(labels=labels)
    _check_part("labels", labels, (rows,), torch.int64, q.vectors)
    if is_readable(labels) and rows and (labels.amin() < 0 or labels.amax() >= columns):
        raise ValueError(f"labels: accepted are 0 to {columns - 1}")
    return labels


def inverse_temperature(temperature: float | Tensor, q: Tensor) -> Tensor:
    """1 / temperature as an element of the dtype in which logits are summed."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1 or not temperature.is_floating_point():
            raise ValueError(
                f"temperature: {temperature.dtype} of shape {tuple(temperature.shape)}; "
                "accepted is one floating-point element"
            )
        scale = 1 / temperature.reshape(()).to(q.device, dtype)
        if is_readable(temperature):
            _inverse(temperature.item(), dtype)
        return scale
    try:
        temperature = float(temperature)
    except (TypeError, ValueError):
        raise TypeError(
            f"temperature: {type(temperature).__name__}; accepted are numbers and tensors"
        ) from None
    # Filled there: a copy of the number would wait for the GPU.
    return torch.full((), _inverse(temperature, dtype), dtype=dtype, device=q.device)


def _inverse(temperature: float, dtype: torch.dtype) -> float:
    scale = 1 / temperature if temperature > 0 else 0.0
    if not 0 < scale <= torch.finfo(dtype).max:
        raise ValueError(
            f"temperature={temperature}: accepted are numbers above 0 whose inverse is finite in {dtype}"
        )
    return scale

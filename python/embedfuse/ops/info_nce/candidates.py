"""What the contrastive losses take: embeddings with their ids, the rule for false negatives, checks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from embedfuse import native
from embedfuse.ops.checks import check_tensors, is_readable
from embedfuse.ops.info_nce.statistics import Columns, own_scores


class Rows(NamedTuple):
    """Embeddings with what tells false negatives among them; leading dimensions as those of `vectors`.

    ids: int64, the document's id or a hash of its text. guide: its embedding by a guide model, of one dtype
    for all sides and with a width of its own.
    """

    vectors: Tensor
    ids: Tensor | None = None
    guide: Tensor | None = None


@dataclass(frozen=True)
class FalseNegatives:
    """Which candidates leave the denominator, by their score s against the positive's p, s the dot product:

    margin: s > p + margin. relative: s > p + relative |p| (-0.05: NV-Retriever's 95 %, arXiv 2407.15831).
    guide_margin, guide_relative: the same of the scores by the guide's embeddings (GISTEmbed, arXiv
        2402.16829); 0 is taken for guide_margin where Rows carry a guide and both are None.

    Candidates whose Rows.ids equals the positive's leave in any case. No gradient goes through the choice.
    """

    margin: float | None = None
    relative: float | None = None
    guide_margin: float | None = None
    guide_relative: float | None = None

    def limit(self, positive: Tensor) -> Tensor | None:
        return _limit(positive, self.margin, self.relative)

    def guide_limit(self, positive: Tensor) -> Tensor:
        limit = _limit(positive, self.guide_margin, self.guide_relative)
        return positive if limit is None else limit


def _limit(positive: Tensor, margin: float | None, relative: float | None) -> Tensor | None:
    limits = [] if margin is None else [positive + margin]
    if relative is not None:
        limits.append(positive + relative * positive.abs())
    return torch.stack(limits).amin(0) if limits else None


class Choice:
    """Which candidates count, by the positive of each row."""

    def __init__(
        self,
        q: Rows,
        pool: Rows,
        labels: Tensor,
        false_negatives: FalseNegatives,
        positive_scores: Callable = own_scores,
    ):
        self.labels = labels
        self.ids = None if pool.ids is None else pool.ids[labels]
        self.limit = self.guide = self.guide_limit = None
        if (false_negatives.margin, false_negatives.relative) != (None, None):
            self.limit = false_negatives.limit(positive_scores(q.vectors, pool.vectors, labels))
        if q.guide is not None and pool.guide is not None:
            self.guide = q.guide
            positive = own_scores(q.guide, pool.guide, labels)
            self.guide_limit = false_negatives.guide_limit(positive)

    def columns(self, candidates: Rows, own: Tensor | None = None) -> Columns:
        keyed = self.ids is not None and candidates.ids is not None
        guided = self.guide is not None and candidates.guide is not None
        return Columns(
            own,
            self.limit,
            self.ids if keyed else None,
            candidates.ids if keyed else None,
            self.guide if guided else None,
            candidates.guide if guided else None,
            self.guide_limit if guided else None,
        )


def as_rows(optional: bool = False, **sides: Tensor | Rows | None) -> list[Rows | None]:
    for name, side in sides.items():
        if not isinstance(side, Tensor | Rows) and not (optional and side is None):
            raise TypeError(f"{name}: {type(side).__name__}; accepted are tensors and ops.Rows")
    return [Rows(side) if isinstance(side, Tensor) else side for side in sides.values()]


def check_sides(q: Rows, **sides: Rows | None) -> None:
    """`hard_negatives` has one dimension more; `pool` may not be empty."""
    x = q.vectors
    for name, side in {"q": q, **sides}.items():
        for part, tensor in ({} if side is None else side._asdict()).items():
            check_tensors(**{name if part == "vectors" else f"{name}.{part}": tensor})
    if x.dtype not in (*native.DTYPES, torch.float64):
        raise ValueError(f"q: {x.dtype}; accepted are float16, bfloat16, float32 and float64")
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"q: shape {tuple(x.shape)}; accepted is (B, d), d from 1")
    if q.guide is not None and q.guide.dtype not in native.DTYPES and x.dtype != torch.float64:
        raise ValueError(f"q.guide: {q.guide.dtype}; accepted are float16, bfloat16 and float32")
    for name, side in {"q": q, **sides}.items():
        if side is None:
            continue
        lead = (len(x), None) if name == "hard_negatives" else (None,)
        _check_like(name, side.vectors, (*lead, x.shape[1]), x.dtype, x)
        shape = side.vectors.shape[:-1]
        if side.ids is not None:
            _check_like(f"{name}.ids", side.ids, shape, torch.int64, x)
        if side.guide is not None:
            if q.guide is None:
                raise ValueError(f"{name}.guide: q has none; accepted is a guide on both")
            _check_like(f"{name}.guide", side.guide, (*shape, q.guide.shape[-1]), q.guide.dtype, x)
    if q.ids is not None:
        raise ValueError("q.ids: accepted are ids of candidates; a query has its positive's")
    if "pool" in sides and len(sides["pool"].vectors) == 0:
        raise ValueError("pool: empty; accepted is one row and more")


def _check_like(name: str, x: Tensor, shape: tuple, dtype: torch.dtype, q: Tensor) -> None:
    fits = x.dim() == len(shape) and all(
        w in (None, n) for n, w in zip(x.shape, shape, strict=True)
    )
    if x.dtype != dtype or not fits:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(
            f"{name}: {x.dtype} of shape {tuple(x.shape)}; accepted is {dtype} of ({wanted})"
        )
    if x.device != q.device:
        raise ValueError(f"{name}: on {x.device}; accepted is the device of q, {q.device}")


def check_labels(labels: Tensor | None, q: Rows, pool: Rows) -> Tensor:
    """labels, by default arange(B)."""
    rows, columns = len(q.vectors), len(pool.vectors)
    if labels is None:
        if rows > columns:
            raise ValueError(f"pool: {columns} rows; accepted without labels are {rows} and more")
        return torch.arange(rows, device=q.vectors.device)
    check_tensors(labels=labels)
    _check_like("labels", labels, (rows,), torch.int64, q.vectors)
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
    return torch.tensor(_inverse(temperature, dtype), dtype=dtype, device=q.device)


def _inverse(temperature: float, dtype: torch.dtype) -> float:
    scale = 1 / temperature if temperature > 0 else 0.0
    if not 0 < scale <= torch.finfo(dtype).max:
        raise ValueError(
            f"temperature={temperature}: accepted are numbers above 0 whose inverse is finite in {dtype}"
        )
    return scale

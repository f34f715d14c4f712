"""What all contrastive losses share: cosine similarity, the queue of past documents, the reduction."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from embedfuse.losses.negative_queue import NegativeQueue
from embedfuse.ops.info_nce_inputs import Rows, as_rows, check_sides

REDUCTIONS = ("mean", "sum", "none")


class ContrastiveLoss(nn.Module):
    """loss(queries, documents, hard_negatives=None): row i of documents is the positive of row i of queries.

    queries, documents: (B, d). hard_negatives: (B, K, d). Tensors, or ops.Rows with ids or a guide's
    embeddings. temperature: a number, or an nn.Parameter of one element, which is then learned.
    normalize: cosine similarity, for the guide too; else the dot product.
    queue: documents of past steps as further negatives without gradient. In training mode each call adds its
        documents to it.
    reduction: "mean" or "sum" over the rows, or "none": (B,) fp32.

    Raises ValueError for shapes, dtypes, devices or numbers that do not fit.
    """

    def __init__(
        self,
        temperature: float | nn.Parameter,
        *,
        normalize: bool = True,
        queue: NegativeQueue | None = None,
        reduction: str = "mean",
    ):
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction={reduction!r}: accepted are {', '.join(REDUCTIONS)}")
        self.temperature = temperature
        self.normalize = normalize
        self.queue = queue
        self.reduction = reduction

    def forward(
        self,
        queries: Tensor | Rows,
        documents: Tensor | Rows,
        hard_negatives: Tensor | Rows | None = None,
    ) -> Tensor:
        sides = [as_rows(side) for side in (queries, documents, hard_negatives)]
        check_sides(sides[0], documents=sides[1], hard_negatives=sides[2])
        if len(sides[0].vectors) != len(sides[1].vectors):
            raise ValueError(
                f"documents: {len(sides[1].vectors)} rows; accepted are as many as queries, "
                f"{len(sides[0].vectors)}"
            )
        if self.normalize:
            sides = [normalized(side) for side in sides]
        bank = None if self.queue is None else self.queue.rows()
        loss = self.per_row(*sides, bank)
        if self.queue is not None and self.training:
            self.queue.enqueue(sides[1])
        return loss if self.reduction == "none" else getattr(loss, self.reduction)()

    def per_row(self, q: Rows, d: Rows, hard: Rows | None, bank: Rows | None) -> Tensor:
        """Losses (B,) of sides that are normalised."""
        raise NotImplementedError


def normalized(side: Rows | None) -> Rows | None:
    if side is None:
        return None
    guide = None if side.guide is None else functional.normalize(side.guide, dim=-1)
    return side._replace(vectors=functional.normalize(side.vectors, dim=-1), guide=guide)


def diagonal(q: Rows) -> Tensor:
    """Own columns of the sides of one batch."""
    return torch.arange(len(q.vectors), device=q.vectors.device)

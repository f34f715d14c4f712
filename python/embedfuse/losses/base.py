"""What all contrastive losses share: cosine similarity, the queue of past documents, the reduction."""

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional

from embedfuse.losses.negative_queue import NegativeQueue
from embedfuse.ops.info_nce.candidates import Rows, as_rows, check_sides
from embedfuse.ops.info_nce.distributed import AllGather, Ring, agreed
from embedfuse.ops.info_nce.statistics import Statistics, statistics

REDUCTIONS = ("mean", "sum", "none")


class ContrastiveLoss(nn.Module):
    """loss(queries, documents, hard_negatives=None): row i of documents is the positive of row i of queries.

    queries, documents: (B, d). hard_negatives: (B, K, d). Tensors, or ops.Rows with ids or a guide's
    embeddings. temperature: a number, or an nn.Parameter of one element, which is then learned.
    normalize: cosine similarity, for the guide too; else the dot product. Unit vectors are fp32 (fp64 of fp64
        embeddings), so that of 16-bit embeddings only their gradients are rounded, once.
    queue: documents of past steps as further negatives without gradient. In training mode each call adds its
        documents to it.
    reduction: "mean" or "sum" over the rows, or "none": (B,) fp32.
    across: ops.AllGather() or ops.Ring() where several processes each hold a part of the batch: all that are
        negatives in one process with the whole batch are here; queues get the documents of all ranks.

    Across ranks, the mean over the ranks of "mean" (the sum of "sum") is the loss of one process with the
    whole batch. DistributedDataParallel averages gradients over the ranks: those of "mean" are then that
    process's. A learned temperature is to be averaged too (wrap the loss, or a module that holds it).

    Raises ValueError for shapes, dtypes, devices or numbers that do not fit; on all ranks where one raises,
    and where batches differ in their number of rows.
    """

    def __init__(
        self,
        temperature: float | nn.Parameter,
        *,
        normalize: bool = True,
        queue: NegativeQueue | None = None,
        reduction: str = "mean",
        across: AllGather | Ring | None = None,
    ):
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction={reduction!r}: accepted are {', '.join(REDUCTIONS)}")
        self.temperature = temperature
        self.normalize = normalize
        self.queue = queue
        self.reduction = reduction
        self.across = across

    def forward(
        self,
        queries: Tensor | Rows,
        documents: Tensor | Rows,
        hard_negatives: Tensor | Rows | None = None,
    ) -> Tensor:
        sides = as_rows(queries=queries, documents=documents)
        sides += as_rows(optional=True, hard_negatives=hard_negatives)
        with agreed(self.across, sides[0].vectors.device):
            check_sides(sides[0], documents=sides[1], hard_negatives=sides[2])
            if len(sides[0].vectors) != len(sides[1].vectors):
                raise ValueError(
                    f"documents: {len(sides[1].vectors)} rows; accepted are as many as queries, "
                    f"{len(sides[0].vectors)}"
                )
        if self.normalize:
            sides = [normalized(side) for side in sides]
        bank = None if self.queue is None else self.queue.rows(sides[1].vectors.dtype)
        loss = self.per_row(*sides, bank)
        if self.queue is not None and self.training:
            self.queue.enqueue(sides[1] if self.across is None else self._of_all_ranks(sides[1]))
        return loss if self.reduction == "none" else getattr(loss, self.reduction)()

    @abstractmethod
    def per_row(self, q: Rows, d: Rows, hard: Rows | None, bank: Rows | None) -> Tensor:
        """Losses (B,) of sides that are normalised."""

    def statistics(self, *args, **settings) -> Statistics:
        """Of this rank's rows against the columns of all ranks that take part."""
        over = statistics if self.across is None else self.across.statistics
        return over(*args, **settings)

    def _of_all_ranks(self, side: Rows) -> Rows:
        return Rows(*(self.across.gather(part) for part in side))


def normalized(side: Rows | None) -> Rows | None:
    if side is None:
        return None
    guide = None if side.guide is None else _unit_vectors(side.guide)
    return side._replace(vectors=_unit_vectors(side.vectors), guide=guide)


def _unit_vectors(x: Tensor) -> Tensor:
    """In fp32 or wider: a temperature of 0.01 makes much of what 16 bits round off."""
    return functional.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def diagonal(q: Rows) -> Tensor:
    """Own columns of the sides of one batch."""
    return torch.arange(len(q.vectors), device=q.vectors.device)

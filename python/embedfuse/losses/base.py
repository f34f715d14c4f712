"""What all contrastive losses share: cosine similarity, the queue of past documents, the reduction."""

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional

from embedfuse.losses.negative_queue import NegativeQueue
from embedfuse.ops.info_nce.candidates import Rows, as_rows, check_side, check_sides
from embedfuse.ops.info_nce.distributed import AllGather, Ring, errors_on_all_ranks
from embedfuse.ops.info_nce.strategy import Strategy, strategy_of

REDUCTIONS = ("mean", "sum", "none")


class ContrastiveLoss(nn.Module):
    """loss(queries, documents, hard_negatives=None): row i of documents is the positive of row i of queries.

    Across ranks, the mean over the ranks of "mean" (the sum of "sum") is the loss of one process with the
    whole batch. DistributedDataParallel averages gradients over the ranks: those of "mean" are then the
    gradients of that process. A learned temperature is to be averaged too (wrap the loss, or a module that
    holds it).

    Args:
        temperature: a number, or an nn.Parameter of one element, which is then learned.
        normalize: cosine similarity, for the guide too; else the dot product. Unit vectors are fp32 (fp64 of
            fp64 embeddings), so that of 16-bit embeddings only the gradients are rounded, once.
        queue: documents of past steps as further negatives without gradient. In training mode each call adds
            its documents to the queue.
        reduction: "mean" or "sum" over the rows, or "none": (B,) fp32.
        across: ops.AllGather() or ops.Ring() where several processes each hold a part of the batch: what is a
            negative in one process with the whole batch is one here; queues get the documents of all ranks.

    Raises:
        ValueError: for another reduction.
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
        """The loss of a batch.

        Args:
            queries: (B, d), float16, bfloat16, float32 or float64; ops.Rows where there is a guide.
            documents: (B, d), of queries' dtype; ops.Rows where there are ids or a guide.
            hard_negatives: (B, K, d), or None; ops.Rows as documents.

        Returns:
            One element, with reduction="none" (B,); fp32 (fp64 for fp64 embeddings).

        Raises:
            TypeError: where a side is neither a tensor nor ops.Rows.
            ValueError: for shapes, dtypes, devices or numbers that do not fit; on all ranks where one raises,
                and where batches differ in their number of rows.
        """
        q, d = as_rows(queries=queries, documents=documents)
        (hard,) = as_rows(optional=True, hard_negatives=hard_negatives)
        with errors_on_all_ranks(self.across, q.vectors.device):
            check_sides(q, documents=d, hard_negatives=hard)
            if len(q.vectors) != len(d.vectors):
                raise ValueError(
                    f"documents: {len(d.vectors)} rows; accepted are as many as queries, {len(q.vectors)}"
                )
        if self.normalize:
            q, d, hard = normalized(q), normalized(d), hard and normalized(hard)
        bank = None if self.queue is None else self.queue.rows(d.vectors.dtype)
        if bank is not None and bank.guide is not None and d.guide is not None:
            bank = bank._replace(guide=bank.guide.to(d.guide.dtype))
        with errors_on_all_ranks(self.across, q.vectors.device):
            check_side("bank", bank, q)
        loss = self.per_row(q, d, hard, bank)
        if self.queue is not None and self.training:
            self.queue.enqueue(d if self.across is None else rows_of_all_ranks(d, self.across))
        return loss if self.reduction == "none" else getattr(loss, self.reduction)()

    @abstractmethod
    def per_row(self, q: Rows, d: Rows, hard: Rows | None, bank: Rows | None) -> Tensor:
        """Losses (B,) of sides that are checked and normalised."""

    @property
    def strategy(self) -> Strategy:
        """Statistics against the columns of all ranks that take part."""
        return strategy_of(self.across)


def normalized(side: Rows) -> Rows:
    """The side with unit vectors, for the guide too."""
    guide = None if side.guide is None else _unit_vectors(side.guide)
    return side._replace(vectors=_unit_vectors(side.vectors), guide=guide)


def rows_of_all_ranks(side: Rows, ranks: AllGather | Ring) -> Rows:
    """The rows of all ranks, in the order of ranks; without gradient."""
    parts = {name: part for name, part in side._asdict().items() if part is not None}
    return side._replace(**{name: ranks.gather(part) for name, part in parts.items()})


def _unit_vectors(x: Tensor) -> Tensor:
    """In fp32 or wider: a temperature of 0.01 magnifies what 16 bits round off."""
    return functional.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def diagonal(q: Rows) -> Tensor:
    """(B,) the positive of each row, or the row itself: column i for row i."""
    return torch.arange(len(q.vectors), device=q.vectors.device)

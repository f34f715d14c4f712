"""A loss at several widths of the embedding."""

from collections.abc import Sequence

from torch import Tensor

from embedfuse.losses.base import ContrastiveLoss, normalized
from embedfuse.losses.info_nce import InfoNCE
from embedfuse.losses.negative_queue import NegativeQueue
from embedfuse.ops.info_nce.candidates import Rows
from embedfuse.ops.info_nce.distributed import Ring, agreed
from embedfuse.ops.info_nce.matryoshka.widths import Prefixes


class MatryoshkaLoss(ContrastiveLoss):
    """sum_k weights_k loss(first dims_k components, normalised anew where the loss normalises) (arXiv
    2205.13147).

    loss: any loss of this package without a queue; its reduction and `across` are used. dims: widths, each
    once; weights: default all 1. queue: documents of past steps at full width.

    InfoNCE, unless across a Ring, takes all widths in one pass, with the arithmetic of the widest; what else
    takes one pass per width.
    """

    def __init__(
        self,
        loss: ContrastiveLoss,
        dims: Sequence[int],
        weights: Sequence[float] | None = None,
        *,
        queue: NegativeQueue | None = None,
    ):
        if loss.queue is not None:
            raise ValueError(
                "loss: has a queue; accepted is one without, the queue is MatryoshkaLoss's"
            )
        if not dims or len(set(dims)) < len(dims) or min(dims) < 1:
            raise ValueError(f"dims={list(dims)}: accepted are different widths from 1")
        weights = [1.0] * len(dims) if weights is None else list(weights)
        if len(weights) != len(dims):
            raise ValueError(f"weights: {len(weights)} numbers; accepted is one for each of dims")
        settings = {"reduction": loss.reduction, "across": loss.across}
        super().__init__(1.0, normalize=loss.normalize, queue=queue, **settings)
        del self.temperature
        self.loss, self.dims, self.weights = loss, list(dims), weights

    def per_row(self, q: Rows, d: Rows, hard: Rows | None, bank: Rows | None) -> Tensor:
        with agreed(self.across, q.vectors.device):
            if max(self.dims) > q.vectors.shape[1]:
                raise ValueError(
                    f"queries: width {q.vectors.shape[1]}; accepted is {max(self.dims)} and more"
                )
        weight_of = dict(zip(self.dims, self.weights, strict=True))
        if type(self.loss) is InfoNCE and not isinstance(self.across, Ring):
            widths = tuple(sorted(self.dims))
            losses = self.loss.per_row(q, d, hard, bank, Prefixes(widths, self.normalize))
            # Not a product of matrices: autocast would round it to 16 bits.
            return sum(weight_of[width] * its for width, its in zip(widths, losses, strict=True))
        return sum(
            weight * self.loss.per_row(*(self._prefix(side, dim) for side in (q, d, hard, bank)))
            for dim, weight in weight_of.items()
        )

    def _prefix(self, side: Rows | None, dim: int) -> Rows | None:
        if side is None:
            return None
        side = side._replace(vectors=side.vectors[..., :dim])
        return normalized(side) if self.normalize else side

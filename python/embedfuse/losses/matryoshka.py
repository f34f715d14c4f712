"""A loss at several widths of the embedding."""

import functools
import operator
from collections.abc import Sequence

from torch import Tensor

from embedfuse.losses.base import ContrastiveLoss, normalized
from embedfuse.losses.info_nce import InfoNCE
from embedfuse.losses.negative_queue import NegativeQueue
from embedfuse.ops.info_nce.candidates import Rows
from embedfuse.ops.info_nce.distributed import Ring, errors_on_all_ranks
from embedfuse.ops.info_nce.matryoshka.widths import Matryoshka


class MatryoshkaLoss(ContrastiveLoss):
    """sum_k weights_k loss(first dims_k components), normalised at each width where the loss normalises.

    InfoNCE, unless across a Ring, computes all widths in one pass, with the arithmetic of the widest; other
    losses take one pass per width. Source: arXiv 2205.13147.

    Args:
        loss: any loss of this package without a queue; its reduction and `across` are used.
        dims: widths, each once.
        weights: of each width; None for 1.
        queue: documents of past steps, at full width.

    Raises:
        ValueError: for a loss with a queue, for other widths and another number of weights.
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
        """Losses (B,); ValueError for embeddings that are narrower than a width."""
        with errors_on_all_ranks(self.across, q.vectors.device):
            if max(self.dims) > q.vectors.shape[1]:
                raise ValueError(
                    f"queries: width {q.vectors.shape[1]}; accepted is {max(self.dims)} and more"
                )
        weight_of = dict(zip(self.dims, self.weights, strict=True))
        if type(self.loss) is InfoNCE and not isinstance(self.across, Ring):
            widths = tuple(sorted(self.dims))
            losses = self.loss.per_row(q, d, hard, bank, Matryoshka(widths, self.normalize))
            # Not a product of matrices: autocast would round it to 16 bits.
            terms = [weight_of[width] * loss for width, loss in zip(widths, losses, strict=True)]
        else:
            terms = [
                weight
                * self.loss.per_row(
                    self._at_width(q, dim),
                    self._at_width(d, dim),
                    hard and self._at_width(hard, dim),
                    bank and self._at_width(bank, dim),
                )
                for dim, weight in weight_of.items()
            ]
        return functools.reduce(operator.add, terms)

    def _at_width(self, side: Rows, dim: int) -> Rows:
        side = side._replace(vectors=side.vectors[..., :dim])
        return normalized(side) if self.normalize else side

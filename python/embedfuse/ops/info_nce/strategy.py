"""How InfoNCE scores queries against candidates: at full width, at several widths, across ranks."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from embedfuse.ops.info_nce.statistics import (
    Statistics,
    hard_negative_statistics,
    statistics,
    target_scores,
)

if TYPE_CHECKING:
    from embedfuse.ops.info_nce.distributed import AllGather, Ring
    from embedfuse.ops.info_nce.matryoshka.widths import Matryoshka


class Strategy(Protocol):
    """Statistics of queries against each kind of candidate; arguments as in statistics.py."""

    def pool_statistics(self, *args, **settings) -> Statistics:
        """Against columns that all queries share, those of all ranks where several take part."""
        ...

    def bank_statistics(self, *args, **settings) -> Statistics:
        """Against columns that all queries of this rank share."""
        ...

    def hard_negative_statistics(self, *args, **settings) -> Statistics:
        """Against the columns that belong to each query."""
        ...

    def target_scores(self, x: Tensor, y: Tensor, target: Tensor) -> Tensor:
        """Of each query with its target."""
        ...


class FullWidth:
    """Scores are the dot products of whole vectors."""

    pool_statistics = bank_statistics = staticmethod(statistics)
    hard_negative_statistics = staticmethod(hard_negative_statistics)
    target_scores = staticmethod(target_scores)


@dataclass(frozen=True)
class AcrossRanks:
    """Another strategy, with the pools of all ranks; the bank and hard negatives are this rank's."""

    local: Strategy
    ranks: "AllGather | Ring"

    def pool_statistics(self, *args, **settings) -> Statistics:
        return self.ranks.statistics(self.local, *args, **settings)

    def bank_statistics(self, *args, **settings) -> Statistics:
        return self.local.bank_statistics(*args, **settings)

    def hard_negative_statistics(self, *args, **settings) -> Statistics:
        return self.local.hard_negative_statistics(*args, **settings)

    def target_scores(self, x: Tensor, y: Tensor, target: Tensor) -> Tensor:
        return self.local.target_scores(x, y, target)


def strategy_of(
    across: "AllGather | Ring | None" = None, matryoshka: "Matryoshka | None" = None
) -> Strategy:
    """The strategy that the arguments of info_nce ask for."""
    local = FullWidth() if matryoshka is None else matryoshka
    return local if across is None else AcrossRanks(local, across)

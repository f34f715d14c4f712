"""What the pipeline gives back: dense, sparse and multi-vector embeddings of some texts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from embedfuse.ops import Csr

OUTPUTS = ("dense", "sparse", "multi")


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of texts, in their order; what was not asked for is None.

    dense: (texts, hidden). sparse: one row of lexical weights per text, on the CPU; `sparse.dicts()`
    gives them as FlagEmbedding does. multi: one (tokens, columns) array per text, each with memory of
    its own.
    """

    dense: np.ndarray | None
    sparse: Csr | None
    multi: list[np.ndarray] | None

    def __len__(self) -> int:
        return len(next(x for x in (self.dense, self.sparse, self.multi) if x is not None))

    @classmethod
    def cat(cls, parts: Sequence["Embeddings"]) -> "Embeddings":
        dense, sparse, multi = zip(*((p.dense, p.sparse, p.multi) for p in parts), strict=True)
        return cls(
            None if dense[0] is None else np.concatenate(dense),
            None if sparse[0] is None else Csr.cat(sparse),
            None if multi[0] is None else [array for part in multi for array in part],
        )


@dataclass(frozen=True)
class Vectors:
    """The same as tensors on the model's device; multi holds one tensor per text."""

    dense: Tensor | None = None
    sparse: Csr | None = None
    multi: list[Tensor] | None = None

    @classmethod
    def collect(cls, parts: Iterable[tuple[list[int], "Vectors"]]) -> "Vectors":
        """Join batches, each with the indices of its texts, in the order of the texts."""
        batches, vectors = zip(*parts, strict=True)
        order = torch.tensor([i for batch in batches for i in batch]).argsort()
        dense = sparse = multi = None
        if vectors[0].dense is not None:
            joined = torch.cat([v.dense for v in vectors])
            dense = joined[order.to(joined.device)]
        if vectors[0].sparse is not None:
            sparse = Csr.cat([v.sparse for v in vectors])[order]
        if vectors[0].multi is not None:
            every = [x for v in vectors for x in v.multi]
            multi = [every[i] for i in order.tolist()]
        return cls(dense, sparse, multi)

    def host(self) -> Embeddings:
        # copy(): a view would keep the whole batch in memory for as long as one text's array lives.
        return Embeddings(
            None if self.dense is None else self.dense.cpu().numpy(),
            None if self.sparse is None else self.sparse.to("cpu"),
            None if self.multi is None else [x.cpu().numpy().copy() for x in self.multi],
        )

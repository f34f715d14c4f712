"""What the pipeline gives back: dense, sparse and multi-vector embeddings of some texts."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from embedfuse.ops import Csr
from embedfuse.ops.lexical.sparse_scatter import KeptTokens
from embedfuse.packing import Packed
from embedfuse.transfers import ToHost, to_device

OUTPUTS = ("dense", "sparse", "multi")


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of texts, in their order; what was not asked for is None.

    dense: (texts, hidden). sparse: one row of lexical weights per text, on the CPU; `sparse.dicts()`
    gives them as FlagEmbedding does. multi: one (tokens, columns) array per text, each with memory of
    its own. tokens: how many the model read for them, prompts and special tokens included.
    """

    dense: np.ndarray | None
    sparse: Csr | None
    multi: list[np.ndarray] | None
    tokens: int = 0

    def __len__(self) -> int:
        return len(next(x for x in (self.dense, self.sparse, self.multi) if x is not None))

    @classmethod
    def cat(cls, parts: Sequence["Embeddings"]) -> "Embeddings":
        dense, sparse, multi = zip(*((p.dense, p.sparse, p.multi) for p in parts), strict=True)
        return cls(
            None if dense[0] is None else np.concatenate(dense),
            None if sparse[0] is None else Csr.cat(sparse),
            None if multi[0] is None else [array for part in multi for array in part],
            sum(part.tokens for part in parts),
        )


@dataclass(frozen=True)
class Vectors:
    """The same as tensors, of one device; multi holds one tensor per text."""

    dense: Tensor | None = None
    sparse: Csr | None = None
    multi: list[Tensor] | None = None
    tokens: int = 0

    @classmethod
    def collect(cls, parts: Iterable[tuple[list[int], "Vectors"]]) -> "Vectors":
        """Join batches, each with the indices of its texts, in the order of the texts."""
        batches, vectors = zip(*parts, strict=True)
        order = torch.tensor([i for batch in batches for i in batch]).argsort()
        dense = sparse = multi = None
        if vectors[0].dense is not None:
            joined = torch.cat([v.dense for v in vectors])
            dense = joined[_beside(joined, order)]
        if vectors[0].sparse is not None:
            joined = Csr.cat([v.sparse for v in vectors])
            sparse = joined[_beside(joined.weights, order)]
        if vectors[0].multi is not None:
            every = [x for v in vectors for x in v.multi]
            multi = [every[i] for i in order.tolist()]
        return cls(dense, sparse, multi, sum(v.tokens for v in vectors))

    def host(self) -> Embeddings:
        # copy(): a view would keep the whole batch in memory for as long as one text's array lives.
        return Embeddings(
            None if self.dense is None else self.dense.cpu().numpy(),
            None if self.sparse is None else self.sparse.to("cpu"),
            None if self.multi is None else [x.cpu().numpy().copy() for x in self.multi],
            self.tokens,
        )


@dataclass(frozen=True)
class BatchVectors:
    """Vectors of one batch as the forward leaves them: nothing was read from the device for them.

    dense: (texts, hidden). kept: the tokens with lexical weights. multi: (tokens, columns). packed: of the
    batch, with the ids on the host.
    """

    packed: Packed
    dense: Tensor | None
    kept: KeptTokens | None
    multi: Tensor | None

    def vectors(self) -> Vectors:
        """One by one; on a GPU this waits for the number of lexical weights."""
        return Vectors(
            self.dense,
            None if self.kept is None else self.kept.csr(),
            # Without the first token, whose state is the dense vector.
            None if self.multi is None else [x[1:] for x in self.multi.split(self.packed.lengths)],
            self.packed.tokens,
        )

    def send(self, to_host: ToHost) -> Callable[[], Vectors]:
        """Starts for the host; what comes back waits for the arrival."""
        packed, kept = self.packed, self.kept
        of_kept = () if kept is None else (kept.index, kept.counts, kept.order, kept.weights)
        arrive = to_host(self.dense, self.multi, *of_kept)

        def vectors() -> Vectors:
            dense, multi, *found = arrive()
            kept = None
            if found:
                *places, weights = found
                kept = KeptTokens(*places, packed.ids, weights)
            return BatchVectors(packed, dense, kept, multi).vectors()

        return vectors


def _beside(tensor: Tensor, rows: Tensor) -> Tensor:
    return to_device(tensor.device, rows)[0]

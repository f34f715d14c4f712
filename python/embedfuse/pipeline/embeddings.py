"""Results of the pipeline: dense, sparse and multi-vector embeddings of several texts."""

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
    """Embeddings of several texts, in the order of the texts. Outputs that were not requested are None.

    Attributes:
        dense: (texts, hidden), float32 or float16.
        sparse: lexical weights, one row per text, on the CPU. `sparse.dicts()` gives them in
            FlagEmbedding's format.
        multi: one (tokens, columns) array per text, float32 or float16. No array shares memory with
            another.
        tokens: how many tokens the model processed, prompts and special tokens included.
    """

    dense: np.ndarray | None
    sparse: Csr | None
    multi: list[np.ndarray] | None
    tokens: int = 0

    def __len__(self) -> int:
        """The number of texts."""
        return len(next(x for x in (self.dense, self.sparse, self.multi) if x is not None))

    @classmethod
    def cat(cls, parts: Sequence["Embeddings"]) -> "Embeddings":
        """Concatenate embeddings that have the same outputs. One part is returned as it is.

        Args:
            parts: one or more, in order.

        Returns:
            The embeddings of all texts.
        """
        if len(parts) == 1:
            return parts[0]
        dense, sparse, multi = zip(*((p.dense, p.sparse, p.multi) for p in parts), strict=True)
        return cls(
            None if dense[0] is None else np.concatenate(dense),
            None if sparse[0] is None else Csr.cat(sparse),
            None if multi[0] is None else [array for part in multi for array in part],
            sum(part.tokens for part in parts),
        )


@dataclass(frozen=True)
class Vectors:
    """Embeddings as tensors on one device; multi has one tensor per text."""

    dense: Tensor | None = None
    sparse: Csr | None = None
    multi: list[Tensor] | None = None
    tokens: int = 0

    @classmethod
    def collect(cls, parts: Iterable[tuple[list[int], "Vectors"]]) -> "Vectors":
        """Join batches, each given with the indices of its texts, and sort by these indices."""
        batches, vectors = zip(*parts, strict=True)
        places = [i for batch in batches for i in batch]
        if len(vectors) == 1 and places == sorted(places):
            return vectors[0]
        order = torch.tensor(places).argsort()
        dense = sparse = multi = None
        if vectors[0].dense is not None:
            joined = torch.cat([v.dense for v in vectors])
            dense = joined[_on_device_of(joined, order)]
        if vectors[0].sparse is not None:
            joined = Csr.cat([v.sparse for v in vectors])
            sparse = joined[_on_device_of(joined.weights, order)]
        if vectors[0].multi is not None:
            joined = [x for v in vectors for x in v.multi]
            multi = [joined[i] for i in order.tolist()]
        return cls(dense, sparse, multi, sum(v.tokens for v in vectors))

    def numpy(self) -> Embeddings:
        # copy(): a GPU's results lie in pinned memory, and a view of one text would keep its whole batch.
        return Embeddings(
            None if self.dense is None else self.dense.cpu().numpy().copy(),
            None if self.sparse is None else self.sparse.to("cpu"),
            None if self.multi is None else [x.cpu().numpy().copy() for x in self.multi],
            self.tokens,
        )


@dataclass(frozen=True)
class BatchVectors:
    """Output of one forward, still on the device; nothing was read from there to compute it.

    Attributes:
        packed: the batch, with the token ids on the host.
        dense: (texts, hidden).
        kept: the tokens that have lexical weights.
        multi: (tokens, columns).
    """

    packed: Packed
    dense: Tensor | None
    kept: KeptTokens | None
    multi: Tensor | None

    def vectors(self) -> Vectors:
        """The same per text. On a GPU this waits for the number of lexical weights."""
        return Vectors(
            self.dense,
            None if self.kept is None else self.kept.csr(),
            # Without the first token, whose state gives the dense vector.
            None if self.multi is None else [x[1:] for x in self.multi.split(self.packed.lengths)],
            self.packed.tokens,
        )

    def send(self, to_host: ToHost) -> Callable[[], Vectors]:
        """Start the copy to the host and return a function that waits for it."""
        packed, kept = self.packed, self.kept
        sparse = () if kept is None else (kept.index, kept.indptr, kept.order, kept.weights)
        wait = to_host(self.dense, self.multi, *sparse)

        def vectors() -> Vectors:
            dense, multi, *sparse = wait()
            kept = None
            if sparse:
                *places, weights = sparse
                kept = KeptTokens(*places, packed.ids, weights)
            return BatchVectors(packed, dense, kept, multi).vectors()

        return vectors


def _on_device_of(tensor: Tensor, rows: Tensor) -> Tensor:
    return to_device(tensor.device, rows)[0]

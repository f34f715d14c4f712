"""Documents of past steps as negatives (MoCo, arXiv 1911.05722)."""

import torch
from torch import Tensor, nn

from embedfuse.ops.info_nce.candidates import Rows


class NegativeQueue(nn.Module):
    """The last `size` documents, first in, first out. Part of the checkpoint.

    Args:
        size: how many documents, 1 and more.
        dim: the width of the documents.
        dtype: what the documents are kept in, and rounded to.
        ids: whether the documents carry ids.
        guide_dim: the width of the guide's embeddings; None without a guide.

    Raises:
        ValueError: for a size below 1.
    """

    vectors: Tensor
    ids: Tensor | None
    guide: Tensor | None

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        ids: bool = False,
        guide_dim: int | None = None,
    ):
        super().__init__()
        if size < 1:
            raise ValueError(f"size={size}: accepted are 1 and more")
        self.size, self.filled, self.next = size, 0, 0
        self.register_buffer("vectors", torch.zeros(size, dim, dtype=dtype))
        self.register_buffer("ids", torch.zeros(size, dtype=torch.int64) if ids else None)
        guide = None if guide_dim is None else torch.zeros(size, guide_dim, dtype=dtype)
        self.register_buffer("guide", guide)

    def rows(self, dtype: torch.dtype | None = None) -> Rows:
        """The documents: views, which the next enqueue changes, unless another dtype is asked for.

        Args:
            dtype: of vectors and guide; None for that of the queue.

        Returns:
            Rows of at most `size` documents.
        """
        dtype = dtype or self.vectors.dtype
        return Rows(
            self.vectors[: self.filled].to(dtype),
            None if self.ids is None else self.ids[: self.filled],
            None if self.guide is None else self.guide[: self.filled].to(dtype),
        )

    @torch.no_grad()
    def enqueue(self, documents: Rows) -> None:
        """Adds documents, the last `size` of them, in place of the oldest.

        Args:
            documents: (rows, dim), with ids and a guide where the queue has them.

        Raises:
            TypeError: for integers where the queue holds floats, and the other way round.
            ValueError: for another width, and for missing ids or guide.
        """
        count = min(len(documents.vectors), self.size)
        places = (torch.arange(count) + self.next) % self.size
        for name in ("vectors", "ids", "guide"):
            self._write(name, getattr(documents, name), places)
        self.next = (self.next + count) % self.size
        self.filled = min(self.filled + count, self.size)

    def _write(self, name: str, rows: Tensor | None, places: Tensor) -> None:
        kept = getattr(self, name)
        if kept is None:
            return
        if rows is None or rows.shape[1:] != kept.shape[1:]:
            came = "none" if rows is None else f"width {tuple(rows.shape[1:])}"
            raise ValueError(
                f"documents.{name}: {came}; this queue holds width {tuple(kept.shape[1:])}"
            )
        if rows.is_floating_point() != kept.is_floating_point():
            raise TypeError(f"documents.{name}: {rows.dtype}; this queue holds {kept.dtype}")
        kept[places.to(kept.device)] = rows[len(rows) - len(places) :].to(kept)

    def get_extra_state(self) -> dict[str, int]:
        return {"filled": self.filled, "next": self.next}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.filled, self.next = state["filled"], state["next"]

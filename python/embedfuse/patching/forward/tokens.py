"""What goes into a packed forward, and what comes out of it."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from embedfuse.ops import pool_normalize
from embedfuse.packing import Packed
from embedfuse.patching.layout import Layout


@dataclass(frozen=True)
class Tokens:
    """What the embedding layer reads, (tokens,) each; None where the model fills it in."""

    input_ids: Tensor
    token_type_ids: Tensor | None = None
    position_ids: Tensor | None = None

    @classmethod
    def of(cls, call: dict, packed: Packed) -> "Tokens":
        """Of the arguments of a forward call, without padding."""
        input_ids = call["input_ids"]
        others = (call.get("token_type_ids"), call.get("position_ids"))
        return cls(
            packed.pack(input_ids),
            *(None if t is None else packed.pack(t.expand_as(input_ids)) for t in others),
        )

    @property
    def given(self) -> dict[str, Tensor]:
        return {name: t for name, t in vars(self).items() if t is not None}


@dataclass(frozen=True)
class Batch:
    """A call that was admitted: the layers to run, where each sequence is, and the tokens."""

    layout: Layout
    packed: Packed
    tokens: Tokens


class PackedStates(NamedTuple):
    """States after the last layer, (tokens, hidden), or one row of each sequence as a sequence of its own."""

    states: Tensor
    packed: Packed

    def pool(
        self,
        pooling: str,
        normalize: bool,
        dimensions: int | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """(sequences, hidden), or the first `dimensions` columns; otherwise as ops.pool_normalize."""
        states = self.states if dimensions is None else self.states[:, :dimensions]
        return pool_normalize(
            states,
            cu_seqlens=self.packed.cu_seqlens,
            pooling=pooling,
            normalize=normalize,
            out_dtype=out_dtype,
        )


def pooled_rows(packed: Packed, pooling: str | None) -> Tensor | None:
    """(sequences,) the row of each that "cls" or "last" pools; None for no pooling."""
    if pooling is None:
        return None
    ends = packed.cu_seqlens
    return ends[:-1] if pooling == "cls" else ends[1:] - 1


def table_size(table: nn.Module) -> int | None:
    """Rows of a plain embedding table; None for one that computes (LoRA, max_norm)."""
    plain = type(table) is nn.Embedding and table.max_norm is None
    return len(table.weight) if plain else None


def check_ids(batch: Batch, vocabulary: int | None) -> None:
    """Raise IndexError for a token id outside of the embedding table. vocabulary: its size, if known."""
    ids = batch.tokens.input_ids if batch.packed.ids is None else batch.packed.ids
    if vocabulary and ids.is_cpu and ids.numel():  # reading them from a GPU would wait for it
        # Of a query the list is there sooner than torch's two ends.
        ends = ids.tolist() if ids.numel() <= 64 else [int(end) for end in ids.aminmax()]
        low, high = min(ends), max(ends)
        if low < 0 or high >= vocabulary:
            bad = low if low < 0 else high
            raise IndexError(f"input_ids: token {bad}; accepted are 0 to {vocabulary - 1}")

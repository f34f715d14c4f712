"""Tokens: what the embedding layer of a packed forward reads."""

from dataclasses import dataclass

from torch import Tensor

from embedfuse.packing import Packed


@dataclass(frozen=True)
class Tokens:
    """What the embedding layer reads, each (tokens,); None where the model fills it in."""

    input_ids: Tensor
    token_type_ids: Tensor | None = None
    position_ids: Tensor | None = None

    @classmethod
    def of(cls, call: dict, packed: Packed) -> "Tokens":
        input_ids = call["input_ids"]
        others = (call.get("token_type_ids"), call.get("position_ids"))
        return cls(
            packed.pack(input_ids),
            *(None if t is None else packed.pack(t.expand_as(input_ids)) for t in others),
        )

    @property
    def given(self) -> dict[str, Tensor]:
        return {name: t for name, t in vars(self).items() if t is not None}


def rows_of(packed: Packed, pooling: str | None) -> Tensor | None:
    """(sequences,) the row of each that "cls" or "last" pools; None for no pooling."""
    if pooling is None:
        return None
    ends = packed.cu_seqlens
    return ends[:-1] if pooling == "cls" else ends[1:] - 1

"""Packed: the sequences of a padded batch, end to end, and the way back."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor

from embedfuse.transfers import to_device


@dataclass(frozen=True)
class Packed:
    """Where the tokens of a padded (batch, length) batch lie once the padding is gone.

    lengths: tokens of each sequence. cu_seqlens: (batch + 1,) int32, their running sum from 0.
    shape: (batch, length) of the padded batch. index: (tokens,) place of each token in the padded
    batch read row by row; None when nothing was padded. starts_padded: whether some row begins with
    padding. ids: (tokens,) token ids on the CPU, where the host made them; None where only the device
    has them.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    shape: tuple[int, int]
    index: Tensor | None
    starts_padded: bool = False
    ids: Tensor | None = None

    @property
    def sequences(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths, default=0)

    @cached_property
    def sequence(self) -> Tensor:
        """(tokens,) which sequence each token belongs to."""
        lengths = self.cu_seqlens.diff().long()
        which = torch.arange(self.sequences, device=lengths.device)
        return which.repeat_interleave(lengths, output_size=self.tokens)

    @cached_property
    def columns(self) -> Tensor:
        """(tokens,) column of each token in the padded batch; its place in the sequence without one."""
        return self.places if self.index is None else self.index % self.shape[1]

    @cached_property
    def places(self) -> Tensor:
        """(tokens,) place of each token in its sequence."""
        row = torch.arange(self.tokens, device=self.cu_seqlens.device)
        return row - self.cu_seqlens[self.sequence]

    def pack(self, padded: Tensor) -> Tensor:
        """(batch, length, ...) -> (tokens, ...)"""
        flat = padded.reshape(-1, *padded.shape[2:])
        return flat if self.index is None else flat[self.index]

    def pad(self, packed: Tensor) -> Tensor:
        """(tokens, ...) -> (batch, length, ...), zeros where there is no token."""
        if self.index is None:
            return packed.reshape(*self.shape, *packed.shape[1:])
        rows = packed.new_zeros(self.shape[0] * self.shape[1], *packed.shape[1:])
        return rows.index_copy(0, self.index, packed).view(*self.shape, *packed.shape[1:])

    def split(self, max_tokens: int) -> list["Packed"]:
        """Consecutive parts of at most max_tokens tokens each (more where one sequence has more)."""
        parts: list[list[int]] = []
        tokens = 0
        for length in self.lengths:
            if not parts or tokens + length > max_tokens:
                parts.append([])
                tokens = 0
            parts[-1].append(length)
            tokens += length
        if len(parts) <= 1:
            return [self]
        return [unpadded(part, self.cu_seqlens.device) for part in parts]


def unpadded(lengths: list[int], device: torch.device) -> Packed:
    """Sequences that never were padded; their padded shape is one row."""
    return never_padded(lengths, *to_device(device, cu_seqlens_of(lengths)))


def never_padded(lengths: Sequence[int], cu_seqlens: Tensor, ids: Tensor | None = None) -> Packed:
    return Packed(tuple(lengths), cu_seqlens, (1, sum(lengths)), None, ids=ids)


def one_each(sequences: int, device: torch.device) -> Packed:
    """Sequences of one token each."""
    cu_seqlens = torch.arange(sequences + 1, dtype=torch.int32, device=device)
    return never_padded((1,) * sequences, cu_seqlens)


def end_to_end(sequences: list[list[int]], device: torch.device) -> tuple[Tensor, Packed]:
    """Token ids (tokens,) of sequences that never were padded, and where each lies."""
    ids = torch.tensor(list(chain.from_iterable(sequences)), dtype=torch.int64, device="cpu")
    lengths = [len(sequence) for sequence in sequences]
    input_ids, cu_seqlens = to_device(device, ids, cu_seqlens_of(lengths))
    return input_ids, never_padded(lengths, cu_seqlens, ids)


def cu_seqlens_of(lengths: Sequence[int]) -> Tensor:
    """(n + 1,) int32 on the CPU, from 0."""
    return torch.tensor([0, *lengths], device="cpu").cumsum(0, dtype=torch.int32)


class Irregular(ValueError):
    """A batch whose tokens do not stand together in each row. reason: why, whatever the row."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def pack(input_ids: Tensor, attention_mask: Tensor | None, name: str = "attention_mask") -> Packed:
    """How to pack a (batch, length) batch; padding may stand on either side of each row.

    name: of the mask, in errors.

    Raises Irregular, a ValueError, for ids that are no batch, a mask of another shape, a row without tokens,
    or a row with a hole.
    """
    if input_ids.dim() != 2:
        shape = tuple(input_ids.shape)
        raise Irregular(
            f"input_ids has {len(shape)} dimensions",
            f"input_ids: shape {shape}; accepted is (batch, length)",
        )
    batch, length = input_ids.shape
    device = input_ids.device
    if attention_mask is None:
        lengths = [length] * batch
        keep, starts_padded = None, False
    else:
        if attention_mask.shape != input_ids.shape:
            raise Irregular(
                f"{name} has another shape than input_ids",
                f"{name}: shape {tuple(attention_mask.shape)}; accepted is that of input_ids, "
                f"{tuple(input_ids.shape)}",
            )
        keep = attention_mask.to(device) != 0
        lengths, starts_padded = _count(keep, name)
    if 0 in lengths:
        raise Irregular(
            f"{name} leaves a row without tokens",
            f"{name}: row {lengths.index(0)} has no token; every row needs one",
        )
    index = None
    if keep is not None and sum(lengths) != batch * length:
        index = keep.flatten().nonzero().squeeze(1)
    (cu_seqlens,) = to_device(device, cu_seqlens_of(lengths))
    return Packed(tuple(lengths), cu_seqlens, (batch, length), index, starts_padded)


def _count(keep: Tensor, name: str) -> tuple[list[int], bool]:
    """Tokens of each row, and whether some row begins with padding; on a GPU one wait for both.

    Raises for rows whose tokens do not stand together.
    """
    if keep.shape[1] == 0:
        return [0] * keep.shape[0], False
    # A row has as many stretches of tokens as it has tokens whose left neighbour is none.
    begins = keep.clone()
    begins[:, 1:] &= ~keep[:, :-1]
    counts, stretches, first = torch.stack((keep.sum(1), begins.sum(1), keep[:, 0])).tolist()
    for row, n in enumerate(stretches):
        if n > 1:
            raise Irregular(
                f"{name} has a hole, 0 between ones",
                f"{name}: row {row} has a hole (0 between ones); accepted is padding at the ends",
            )
    return counts, 0 in first

"""Packed: the sequences of a padded batch laid end to end, and the way back."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from embedfuse.transfers import to_device


class LengthsUnknown(RuntimeError):
    """The host asked for lengths that only the device has."""


@dataclass(frozen=True)
class Packed:
    """Where the tokens of a padded (batch, length) batch are once the padding is gone.

    Attributes:
        lengths: Tokens of each sequence. None where only the device knows them, as in a CUDA graph, whose
            sequences change from replay to replay.
        cu_seqlens: (batch + 1,) int32, the running sum of the lengths from 0.
        shape: (batch, length) of the padded batch; (1, tokens) of one that was never padded.
        index: (tokens,) place of each token in the padded batch read row by row; None without padding.
        starts_padded: Whether some row begins with padding.
        ids: (tokens,) token ids on the CPU, where the host made them; None where only the device has them.
    """

    lengths: tuple[int, ...] | None
    cu_seqlens: Tensor
    shape: tuple[int, int]
    index: Tensor | None
    starts_padded: bool = False
    ids: Tensor | None = None

    @property
    def sequences(self) -> int:
        return len(self.cu_seqlens) - 1

    @cached_property
    def tokens(self) -> int:
        return self.shape[1] if self.lengths is None else sum(self.lengths)

    @cached_property
    def max_seqlen(self) -> int:
        """The longest length; of unknown lengths their bound, the number of tokens."""
        return self.shape[1] if self.lengths is None else max(self.lengths, default=0)

    def lengths_on_host(self) -> tuple[int, ...]:
        """lengths. Raises LengthsUnknown where only the device has them."""
        if self.lengths is None:
            raise LengthsUnknown("attention reads the lengths of the texts on the host")
        return self.lengths

    @cached_property
    def sequence(self) -> Tensor:
        """(tokens,) number of the sequence that each token belongs to."""
        lengths = self.cu_seqlens.diff().long()
        which = torch.arange(self.sequences, device=lengths.device)
        return which.repeat_interleave(lengths, output_size=self.tokens)

    @cached_property
    def columns(self) -> Tensor:
        """(tokens,) column of each token in the padded batch; its place in its sequence without padding."""
        return self.places if self.index is None else self.index % self.shape[1]

    @cached_property
    def places(self) -> Tensor:
        """(tokens,) place of each token in its sequence."""
        row = torch.arange(self.tokens, device=self.cu_seqlens.device)
        return row if self.sequences == 1 else row - self.cu_seqlens[self.sequence]

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
        for length in self.lengths_on_host():
            if not parts or tokens + length > max_tokens:
                parts.append([])
                tokens = 0
            parts[-1].append(length)
            tokens += length
        if len(parts) <= 1:
            return [self]
        return [unpadded(part, self.cu_seqlens.device) for part in parts]


def unpadded(lengths: list[int], device: torch.device) -> Packed:
    """Sequences that were never padded; their padded shape is one row."""
    return never_padded(lengths, *to_device(device, cu_seqlens_of(lengths)))


def never_padded(lengths: Sequence[int], cu_seqlens: Tensor, ids: Tensor | None = None) -> Packed:
    return Packed(tuple(lengths), cu_seqlens, (1, sum(lengths)), None, ids=ids)


def one_each(sequences: int, device: torch.device) -> Packed:
    """Sequences of one token each."""
    cu_seqlens = torch.arange(sequences + 1, dtype=torch.int32, device=device)
    return never_padded((1,) * sequences, cu_seqlens)


def end_to_end(sequences: list[list[int]], device: torch.device) -> tuple[Tensor, Packed]:
    """Token ids (tokens,) of sequences that were never padded, and where each is."""
    ids = torch.tensor(list(chain.from_iterable(sequences)), dtype=torch.int64, device="cpu")
    lengths = [len(sequence) for sequence in sequences]
    input_ids, cu_seqlens = to_device(device, ids, cu_seqlens_of(lengths))
    return input_ids, never_padded(lengths, cu_seqlens, ids)


def pad_right(input_ids: Tensor, packed: Packed, padding_idx: int) -> tuple[Tensor, Tensor]:
    """Token ids (tokens,) as input_ids and attention_mask (batch, length), padded on the right."""
    lengths = packed.lengths_on_host()
    padded = pad_sequence(list(input_ids.split(lengths)), True, padding_idx)
    ends = torch.tensor(lengths, device=input_ids.device)[:, None]
    mask = torch.arange(padded.shape[1], device=input_ids.device) < ends
    return padded, mask.long()


def cu_seqlens_of(lengths: Sequence[int]) -> Tensor:
    """(n + 1,) int32 on the CPU, from 0."""
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device="cpu")


class Irregular(ValueError):
    """A batch that cannot be packed. reason: why, without the numbers of this batch."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def pack(input_ids: Tensor, attention_mask: Tensor | None, name: str = "attention_mask") -> Packed:
    """How to pack a (batch, length) batch; padding may be on either side of each row.

    Args:
        input_ids: (batch, length).
        attention_mask: (batch, length), nonzero at tokens; None for a batch without padding.
        name: The mask's name in errors.

    Raises:
        Irregular: A ValueError. The ids have other dimensions, the mask another shape, a row no token, or a
            row padding between tokens.
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
        if not attention_mask.is_cpu:  # one on the host stays there: it would be read back
            attention_mask = attention_mask.to(device)
        keep = attention_mask != 0
        if keep.is_cpu and keep.all():
            lengths, starts_padded = [length] * batch, False
        else:
            lengths, starts_padded = _count(keep, name)
    if 0 in lengths:
        raise Irregular(
            f"{name} leaves a row without tokens",
            f"{name}: row {lengths.index(0)} has no token; every row needs one",
        )
    index, tokens = None, sum(lengths)
    cu_seqlens = cu_seqlens_of(lengths)
    if keep is not None and tokens != batch * length:
        index = torch.nonzero_static(keep.flatten(), size=tokens).squeeze(1)  # nonzero would wait
    on_host = [cu_seqlens] if index is None or not index.is_cpu else [cu_seqlens, index]
    cu_seqlens, *moved = to_device(device, *on_host)
    index = moved[0] if moved else index
    return Packed(tuple(lengths), cu_seqlens, (batch, length), index, starts_padded)


def _count(keep: Tensor, name: str) -> tuple[list[int], bool]:
    """Tokens of each row, and whether some row begins with padding. Waits for a GPU once."""
    if keep.shape[1] == 0:
        return [0] * keep.shape[0], False
    # A row has as many runs of tokens as it has tokens without a token on their left.
    begins = keep.clone()
    begins[:, 1:] &= ~keep[:, :-1]
    counts, runs, first = torch.stack((keep.sum(1), begins.sum(1), keep[:, 0])).tolist()
    for row, n in enumerate(runs):
        if n > 1:
            raise Irregular(
                f"{name} has a hole, 0 between ones",
                f"{name}: row {row} has a hole (0 between ones); accepted is padding at the ends",
            )
    return counts, 0 in first

"""Csr: rows of sparse vectors over a vocabulary of token ids."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from embedfuse import native
from embedfuse.ops.checks import check_tensors


@dataclass(frozen=True, eq=False)
class Csr:
    """Compressed sparse rows: one row per text, one entry per token id that has a weight in the text.

    Attributes:
        indptr: (rows + 1,) int64; the entries of row i are indptr[i] to indptr[i + 1].
        token_ids: (entries,) int64, ascending within a row, none twice.
        weights: (entries,) floating point, none zero.
        order: (entries,) int64, the entries of each row by number, from 0, in the order in which their ids
            first occur in the text; None: by id.

    Raises:
        TypeError: where an argument is no tensor.
        ValueError: for another dtype or shape, and for tensors on several devices.
    """

    indptr: Tensor
    token_ids: Tensor
    weights: Tensor
    order: Tensor | None = None

    def __post_init__(self):
        check_tensors(**vars(self))
        if self.token_ids.shape != self.weights.shape or self.weights.dim() != 1:
            raise ValueError(
                f"weights: shape {tuple(self.weights.shape)}; accepted is that of token_ids, (entries,), "
                f"here {tuple(self.token_ids.shape)}"
            )

        for name in ("indptr", "token_ids", "order"):
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if tensor.dtype != torch.int64 or tensor.dim() != 1:
                raise ValueError(
                    f"{name}: {tensor.dtype} of {tensor.dim()} dimensions; accepted is int64 of one"
                )
            if tensor.device != self.weights.device:
                raise ValueError(
                    f"{name}: on {tensor.device}; accepted is the device of weights, {self.weights.device}"
                )
        if len(self.indptr) == 0:
            raise ValueError("indptr: no entry; accepted is (rows + 1,)")
        if self.order is not None and self.order.shape != self.weights.shape:
            raise ValueError(
                f"order: {len(self.order)} entries; accepted are those of weights, {len(self.weights)}"
            )

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def __getitem__(self, rows: Tensor | Sequence[int] | slice) -> "Csr":
        """Those rows in that order, each as often as it is named. Differentiable in weights.

        Args:
            rows: numbers of rows, or a slice.

        Returns:
            A Csr of these rows.

        Raises:
            TypeError: for one number.
        """
        if isinstance(rows, int):
            raise TypeError(f"rows: {rows}; accepted are a list, a slice or a tensor of rows")
        starts, lengths = self.indptr[:-1][rows], self.indptr.diff()[rows]
        indptr = running_sum(lengths)
        entry = torch.arange(int(indptr[-1]), device=indptr.device)
        entry += torch.repeat_interleave(starts - indptr[:-1], lengths)
        order = None if self.order is None else self.order[entry]
        return Csr(indptr, self.token_ids[entry], self.weights[entry], order)

    @staticmethod
    def cat(parts: Sequence["Csr"]) -> "Csr":
        """The rows of all parts, one after the other.

        Args:
            parts: one Csr and more.

        Returns:
            A Csr of all rows.

        Raises:
            ValueError: where there is no part.
        """
        if not parts:
            raise ValueError("parts: none; accepted is at least one Csr")
        ordered = any(part.order is not None for part in parts)
        return Csr(
            running_sum(torch.cat([part.indptr.diff() for part in parts])),
            torch.cat([part.token_ids for part in parts]),
            torch.cat([part.weights for part in parts]),
            torch.cat([part.places() - part._starts() for part in parts]) if ordered else None,
        )

    def to(self, device: torch.device | str) -> "Csr":
        """The same rows on another device."""
        order = None if self.order is None else self.order.to(device)
        return Csr(
            self.indptr.to(device), self.token_ids.to(device), self.weights.to(device), order
        )

    def places(self) -> Tensor:
        """(entries,) int64: positions of the entries, row by row, in the order that `dicts` has."""
        if self.order is not None:
            return self.order + self._starts()
        return torch.arange(len(self.token_ids), device=self.indptr.device)

    def _starts(self) -> Tensor:
        return self.indptr[self.rows()]

    def rows(self) -> Tensor:
        """(entries,) int64: the row of each entry."""
        row = torch.arange(len(self), device=self.indptr.device)
        return torch.repeat_interleave(row, self.indptr.diff(), output_size=len(self.token_ids))

    def dense(self, vocabulary: int) -> Tensor:
        """The rows as a matrix, zero where a row has no entry. Differentiable in weights.

        Args:
            vocabulary: the number of columns.

        Returns:
            (rows, vocabulary), in the dtype of weights.

        Raises:
            IndexError: for a token id of vocabulary or more.
        """
        out = self.weights.new_zeros(len(self), vocabulary)
        return out.index_put((self.rows(), self.token_ids), self.weights)

    def dicts(self) -> list[dict[str, float]]:
        """The rows as FlagEmbedding's `lexical_weights`, in the same order, with Python floats.

        Keeps the strings of all ids up to the largest so far, below 2^20: 17 MB for BGE-M3's 250,002.

        Returns:
            One {str(token_id): weight} per row.
        """
        csr = self.to("cpu")
        weights, places = csr.weights.detach().double(), csr.places()
        arrays = [x.contiguous() for x in (csr.indptr, csr.token_ids, weights, places)]
        largest = int(csr.token_ids.max()) if len(csr.token_ids) else 0
        if largest >= 2**20:
            keys = {token_id: str(token_id) for token_id in csr.token_ids.unique().tolist()}
            return _dicts(keys, *arrays)
        try:
            build = native.cpu().csr_dicts
        except native.Unavailable:
            return _dicts(_keys(largest), *arrays)
        indptr, *entries = (x.data_ptr() for x in arrays)
        return build(_keys(largest), indptr, len(csr.indptr) - 1, *entries, len(weights))


def _dicts(
    keys: list[str] | dict[int, str],
    indptr: Tensor,
    token_ids: Tensor,
    weights: Tensor,
    places: Tensor,
) -> list[dict[str, float]]:
    """`csr_dicts` of the C++ module, for builds without it."""
    ids, values = token_ids[places].tolist(), weights[places].tolist()
    entries = zip(map(keys.__getitem__, ids), values, strict=True)
    return [dict(islice(entries, n)) for n in indptr.diff().tolist()]


def running_sum(lengths: Tensor) -> Tensor:
    """(n,) -> (n + 1,) int64, from 0."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


_KEYS: list[str] = []
_KEYS_LOCK = threading.Lock()


def _keys(largest: int) -> list[str]:
    """The ids as strings, made once: to make one costs more than everything else about an entry."""
    with _KEYS_LOCK:
        _KEYS.extend(map(str, range(len(_KEYS), largest + 1)))
    return _KEYS

"""Token weights to one sparse vector per text: the maximum over the tokens of equal id.

Formula: x_bv = max over the tokens t of text b with id v of max(w_t, 0).
Limits: ids below 2^31; on a GPU the size of a Csr is waited for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from embedfuse.ops.checks import (
    check_device,
    check_floating,
    check_shape,
    check_tensors,
    check_tokens,
    needs_gradient,
)
from embedfuse.ops.lexical import dense, kept
from embedfuse.ops.lexical.csr import Csr


@overload
def sparse_scatter(
    token_weights: Tensor,
    input_ids: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    attention_mask: Tensor | None = None,
    excluded: Sequence[int] = (),
    vocabulary: None = None,
) -> Csr: ...
@overload
def sparse_scatter(
    token_weights: Tensor,
    input_ids: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    attention_mask: Tensor | None = None,
    excluded: Sequence[int] = (),
    vocabulary: int,
) -> Tensor: ...
def sparse_scatter(
    token_weights: Tensor,
    input_ids: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    attention_mask: Tensor | None = None,
    excluded: Sequence[int] = (),
    vocabulary: int | None = None,
) -> Tensor | Csr:
    """One sparse vector per text: x_bv = max over the tokens t of text b with id v of max(w_t, 0).

    Tokens that the mask leaves out and ids in `excluded` give nothing. A NaN weight is not dropped: it
    counts as the largest, and stays NaN in the result. Of tokens with the same id and weight the first
    is taken. Differentiable in token_weights: the gradient of an entry goes to the token it was taken from.

    Source: BGE-M3's sparse embedding (arXiv 2402.03216), `_sparse_embedding` and
        `_process_token_weights` of FlagEmbedding, which drops NaN.

    Args:
        token_weights: (tokens,) with `cu_seqlens`, sequences end to end; or (batch, length). float16,
            bfloat16, float32 or float64.
        input_ids: int64, of that shape; 0 <= id < 2^31 where the weight counts.
        cu_seqlens: (batch + 1,) int32, 0 = first <= ... <= last = tokens: where each sequence starts, and the
            end.
        attention_mask: (batch, length), nonzero marks tokens.
        excluded: ids without an entry.
        vocabulary: the number of columns of a dense result; None for a Csr.

    Returns:
        A Csr with weights in the dtype of token_weights, which on a GPU waits for the number of entries; with
        `vocabulary` the dense (batch, vocabulary) instead, which does not wait.

    Raises:
        TypeError: for dtypes that are not accepted.
        ValueError: for shapes, devices or ids that do not fit (ids and cu_seqlens are not read on a GPU).
    """
    call = _prepared(token_weights, input_ids, cu_seqlens, attention_mask, excluded)
    if vocabulary is None:
        return _kept(*call).csr()
    if needs_gradient(call[0]):
        return dense.of_kept(kept.OP, *call, vocabulary)
    return dense.OP(*call, vocabulary)


@dataclass(frozen=True, eq=False)
class KeptTokens:
    """The tokens that give an entry: what a Csr is made of once its size may be waited for.

    Attributes:
        index, indptr, order: as kept.OP gives them.
        input_ids, weights: (tokens,), of all tokens.
    """

    index: Tensor
    indptr: Tensor
    order: Tensor
    input_ids: Tensor
    weights: Tensor

    def csr(self) -> Csr:
        """The sparse vectors; on a GPU this waits for the number of entries."""
        entries = int(self.indptr[-1])
        index = self.index[:entries]
        return Csr(
            self.indptr,
            self.input_ids.index_select(0, index),
            self.weights.index_select(0, index),
            self.order[:entries].clone(),  # a view would keep what has room for all tokens
        )


def kept_tokens(
    token_weights: Tensor, input_ids: Tensor, *, cu_seqlens: Tensor, excluded: Sequence[int] = ()
) -> KeptTokens:
    """`sparse_scatter` without waiting for a GPU; `csr()` of the result is what sparse_scatter returns."""
    return _kept(*_prepared(token_weights, input_ids, cu_seqlens, None, excluded))


def _kept(token_weights, input_ids, cu_seqlens, excluded) -> KeptTokens:
    index, indptr, order = kept.OP(token_weights.detach(), input_ids, cu_seqlens, excluded)
    return KeptTokens(index, indptr, order, input_ids, token_weights)


def _prepared(
    token_weights, input_ids, cu_seqlens, attention_mask, excluded
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """The arguments of the ops: sequences end to end, weights that the mask leaves out zero."""
    _check(token_weights, input_ids, cu_seqlens, attention_mask)
    keep, excluded = None if attention_mask is None else attention_mask != 0, list(excluded)
    for token_id in excluded[kept.MOST_EXCLUDED :]:
        other = input_ids != token_id
        keep = other if keep is None else keep & other
    if keep is not None:
        token_weights = torch.where(keep, token_weights, 0)
    if cu_seqlens is None:
        batch, length = input_ids.shape
        cu_seqlens = torch.arange(batch + 1, device=input_ids.device, dtype=torch.int32) * length
    few = excluded[: kept.MOST_EXCLUDED]
    return token_weights.reshape(-1), input_ids.reshape(-1), cu_seqlens, few


def _check(token_weights, input_ids, cu_seqlens, attention_mask) -> None:
    check_tensors(token_weights=token_weights, input_ids=input_ids)
    check_floating("token_weights", token_weights.dtype, TypeError)
    if input_ids.dtype != torch.int64:
        raise TypeError(f"input_ids: {input_ids.dtype}; accepted is int64")
    check_tokens("token_weights", token_weights, cu_seqlens, attention_mask)
    check_shape("input_ids", input_ids, token_weights.shape, of="token_weights")
    check_device("input_ids", input_ids, "token_weights", token_weights)

"""Token weights to one sparse vector per text: the maximum over the tokens of equal id.

Formula: x_bv = max over the tokens t of text b with id v of max(w_t, 0).
Limits: ids below 2^31; on a GPU the size of a Csr is waited for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from embedfuse import native
from embedfuse.ops.checks import (
    check_cu_seqlens_values,
    check_device,
    check_floating,
    check_shape,
    check_tensors,
    check_tokens,
)
from embedfuse.ops.cu_seqlens import sequence_of
from embedfuse.ops.lexical.csr import Csr, running_sum
from embedfuse.registry import Cost, Op, triton_function

# index (tokens,): from cu_seqlens[b] on, the tokens that sequence b keeps, by ascending id, then -1;
# counts (batch,): how many those are; order (tokens,): likewise, the numbers of its entries, from 0, in the
# order in which their ids first occur in it. Ids and weights are gathered by index, so that a gradient
# reaches each kept token, and no other, and needs no backward function.
OP = Op(
    "sparse_scatter(Tensor token_weights, Tensor input_ids, Tensor cu_seqlens) -> (Tensor, Tensor, Tensor)",
    "token weights to one sparse vector per text: the largest weight of each token id",
    differentiable=True,
)


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
    kept, cu_seqlens = _kept(token_weights, input_ids, cu_seqlens, attention_mask, excluded)
    return kept.csr() if vocabulary is None else _dense(kept, cu_seqlens, vocabulary)


@dataclass(frozen=True, eq=False)
class KeptTokens:
    """The tokens that give an entry: what a Csr is made of once its size may be waited for.

    Attributes:
        index, counts, order: as the op gives them.
        input_ids, weights: (tokens,), of all tokens.
    """

    index: Tensor
    counts: Tensor
    order: Tensor
    input_ids: Tensor
    weights: Tensor

    def csr(self) -> Csr:
        """The sparse vectors; on a GPU this waits for the number of entries."""
        index = self.index.masked_select(self.index >= 0)
        return Csr(
            running_sum(self.counts),
            self.input_ids.index_select(0, index),
            self.weights.index_select(0, index),
            self.order.masked_select(self.order >= 0),
        )


def kept_tokens(
    token_weights: Tensor, input_ids: Tensor, *, cu_seqlens: Tensor, excluded: Sequence[int] = ()
) -> KeptTokens:
    """`sparse_scatter` without waiting for a GPU; `csr()` of the result is what sparse_scatter returns."""
    return _kept(token_weights, input_ids, cu_seqlens, None, excluded)[0]


def _kept(
    token_weights, input_ids, cu_seqlens, attention_mask, excluded
) -> tuple[KeptTokens, Tensor]:
    """The kept tokens, and cu_seqlens, which padded inputs get from their shape."""
    _check(token_weights, input_ids, cu_seqlens, attention_mask)
    keep = None if attention_mask is None else attention_mask != 0
    for token_id in excluded:
        other = input_ids != token_id
        keep = other if keep is None else keep & other
    if keep is not None:
        token_weights = torch.where(keep, token_weights, 0)
    if cu_seqlens is None:
        batch, length = input_ids.shape
        cu_seqlens = torch.arange(batch + 1, device=input_ids.device, dtype=torch.int32) * length
    token_weights, input_ids = token_weights.reshape(-1), input_ids.reshape(-1)
    index, counts, order = OP(token_weights.detach(), input_ids, cu_seqlens)
    return KeptTokens(index, counts, order, input_ids, token_weights), cu_seqlens


def _check(token_weights, input_ids, cu_seqlens, attention_mask) -> None:
    check_tensors(token_weights=token_weights, input_ids=input_ids)
    check_floating("token_weights", token_weights.dtype, TypeError)
    if input_ids.dtype != torch.int64:
        raise TypeError(f"input_ids: {input_ids.dtype}; accepted is int64")
    check_tokens("token_weights", token_weights, cu_seqlens, attention_mask)
    check_shape("input_ids", input_ids, token_weights.shape, of="token_weights")
    check_device("input_ids", input_ids, "token_weights", token_weights)


def _dense(tokens: KeptTokens, cu_seqlens: Tensor, vocabulary: int) -> Tensor:
    """Entries of `index` without a token add zero to id 0, so that no shape depends on values."""
    token_weights, input_ids, index = tokens.weights, tokens.input_ids, tokens.index
    out = token_weights.new_zeros(len(cu_seqlens) - 1, vocabulary)
    if not len(index):
        return out
    kept, index = index >= 0, index.clamp_min(0)
    ids = torch.where(kept, input_ids.index_select(0, index), 0)
    if ids.is_cpu and (largest := int(ids.max())) >= vocabulary:
        raise ValueError(f"input_ids: {largest}; accepted are ids below vocabulary, {vocabulary}")
    weights = torch.where(kept, token_weights.index_select(0, index), 0)
    row = sequence_of(cu_seqlens, len(ids))
    return out.index_put((row, ids), weights, accumulate=True)


@OP.reference
def _(token_weights, input_ids, cu_seqlens):
    check_cu_seqlens_values("cu_seqlens", cu_seqlens, len(input_ids))
    counting = ~(token_weights <= 0)
    ids = torch.where(counting, input_ids, 0)
    if ids.is_cpu and len(ids) and not 0 <= ids.min() <= ids.max() < 2**31:
        raise ValueError("input_ids: an id is out of range; accepted are 0 to 2^31 - 1")
    # By descending weight, NaN first, then by sequence and id; both sorts are stable.
    order = token_weights.argsort(descending=True, stable=True)
    key = (sequence_of(cu_seqlens, len(ids)) << 32) + torch.where(counting, ids, 2**31)
    order = order[key[order].argsort(stable=True)]
    sorted_key = key[order]
    largest = torch.ones_like(counting)
    largest[1:] = sorted_key[1:] != sorted_key[:-1]
    kept = counting & torch.empty_like(counting).index_put((order,), largest)
    return _by_id(kept, token_weights, input_ids, cu_seqlens)


def _by_id(
    kept: Tensor, token_weights: Tensor, input_ids: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of the op from (tokens,) bool: whether each token is kept. Does not wait for a GPU."""
    tokens, sequence = len(kept), sequence_of(cu_seqlens, len(kept))
    key, place = ((sequence << 32) + torch.where(kept, input_ids, 2**31)).sort()
    is_entry = kept[place]
    # Of each entry the first token that counts, which need not be the kept one; `tokens` where none counts.
    entry = torch.searchsorted(key, (sequence << 32) + input_ids)
    entry = torch.where(token_weights <= 0, tokens, entry)
    number = torch.arange(tokens, device=kept.device)
    first = number.new_full((tokens + 1,), tokens).scatter_reduce(0, entry, number, "amin")[:-1]
    order = ((sequence << 32) + first).argsort() - cu_seqlens[sequence]
    return (
        torch.where(is_entry, place, -1),
        running_sum(kept)[cu_seqlens].diff(),
        torch.where(is_entry, order, -1),
    )


@OP.fake
def _(token_weights, input_ids, cu_seqlens):
    counts = input_ids.new_empty(cu_seqlens.shape[0] - 1)
    return torch.empty_like(input_ids), counts, torch.empty_like(input_ids)


def _load_cpp():
    kernel = native.cpu().sparse_scatter

    def run(token_weights, input_ids, cu_seqlens):
        token_weights = token_weights.float().contiguous()
        input_ids, cu_seqlens = input_ids.contiguous(), cu_seqlens.contiguous()
        index, order = torch.empty_like(input_ids), torch.empty_like(input_ids)
        counts = input_ids.new_empty(len(cu_seqlens) - 1)
        kernel(
            token_weights.data_ptr(),
            input_ids.data_ptr(),
            cu_seqlens.data_ptr(),
            len(input_ids),
            len(counts),
            *(x.data_ptr() for x in (index, counts, order)),
        )
        return index, counts, order

    return run


def _load_cuda():
    kernel = native.cuda().sparse_scatter

    def run(token_weights, input_ids, cu_seqlens):
        token_weights = token_weights.float().contiguous()
        input_ids, cu_seqlens = input_ids.contiguous(), cu_seqlens.contiguous()
        kept = torch.empty_like(input_ids, dtype=torch.bool)
        # Hash tables of the sequences that shared memory cannot hold: 12 bytes for each of 2 places a token.
        scratch = input_ids.new_empty(3 * len(input_ids))
        with torch.cuda.device(kept.device):
            kernel(
                token_weights.data_ptr(),
                input_ids.data_ptr(),
                cu_seqlens.data_ptr(),
                len(input_ids),
                len(cu_seqlens) - 1,
                kept.data_ptr(),
                scratch.data_ptr(),
                torch.cuda.current_stream().cuda_stream,
            )
        return kept

    return run


def _sorted_by_torch(load: Callable[[], Callable]) -> Callable[[], Callable]:
    """Loader of a GPU version: its kernel finds which tokens are kept, torch's radix sort orders them."""

    def load_both():
        kernel = load()
        return lambda *args: _by_id(kernel(*args), *args)

    return load_both


OP.impl("cpp", _load_cpp)
# Before Triton: hashing compares each token once, not with every other of its sequence.
OP.impl("cuda", _sorted_by_torch(_load_cuda))
OP.impl("triton", _sorted_by_torch(triton_function("lexical:sparse_scatter")))


@OP.samples
def _(device, dtype, size):
    generator = torch.Generator().manual_seed(0)

    def sample(lengths, vocabulary, step=1):
        ends = torch.tensor([0, *lengths]).cumsum(0)
        shape = (int(ends[-1]) * step,)
        weights = torch.randn(shape, generator=generator).to(device, dtype)[::step]
        ids = torch.randint(vocabulary, shape, generator=generator).to(device)[::step]
        return weights, ids, ends.to(device, torch.int32)

    if size == "bench":
        return [sample([512] * 32, 250_002), sample([8192] * 4, 250_002)]
    samples = [
        sample([5, 0, 1, 70, 0], 10),
        sample([1100, 3, 300], 400),
        sample([64], 2**31, step=2),
        sample([1], 5),
        sample([], 5),
        sample([33, 40], 250_002, step=3),
    ]
    weights, ids, cu_seqlens = sample([9, 130], 7)
    samples += [
        (-weights.abs(), ids, cu_seqlens),
        (torch.zeros_like(weights), ids, cu_seqlens),
        (torch.ones_like(weights), ids, cu_seqlens),
        (torch.where(weights > 1, float("nan"), weights), ids, cu_seqlens),
    ]
    return samples


@OP.cost
def _(token_weights, input_ids, cu_seqlens):
    return Cost(bytes=token_weights.nbytes + 2 * input_ids.nbytes + 3 * cu_seqlens.nbytes, flops=0)

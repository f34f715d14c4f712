"""The tokens that give the entries of sparse vectors: of a text's tokens of one id that of largest weight.

Formula: of the tokens t of text b with id v and w_t > 0 or NaN, the first of the largest w_t, NaN largest.
Limits: ids below 2^31; a text is sorted by one of the GPU's SMs, above 2,048 tokens through L2.
"""

import torch
from torch import Tensor

from embedfuse import native
from embedfuse.ops.checks import check_cu_seqlens_values
from embedfuse.ops.cu_seqlens import sequence_of
from embedfuse.registry import Cost, Op

# index (tokens,): the kept tokens of all sequences, by sequence and ascending id, then -1;
# indptr (batch + 1,): where each sequence's entries begin there, and the end;
# order (tokens,): for each sequence the numbers of its entries, from 0, in the order in which their ids first
# occur in it, then -1. Ids and weights are gathered by index, so that a gradient reaches each kept token, and
# no other, and needs no backward function.
OP = Op(
    "sparse_scatter(Tensor token_weights, Tensor input_ids, Tensor cu_seqlens, int[] excluded) "
    "-> (Tensor, Tensor, Tensor)",
    "token weights to one sparse vector per text: the largest weight of each token id",
    differentiable=True,
)
MOST_EXCLUDED = 8  # that the kernels take: kMaxExcluded in csrc/include/embedfuse/args.h
NOTHING = 2**62  # above every key


@OP.reference
def by_torch(token_weights, input_ids, cu_seqlens, excluded):
    """The op in plain torch. Does not wait for a GPU."""
    batch, tokens = len(cu_seqlens) - 1, len(input_ids)
    check_cu_seqlens_values("cu_seqlens", cu_seqlens, tokens)
    sequence = sequence_of(cu_seqlens, tokens)
    counting = ~(token_weights <= 0) & (sequence < batch)
    for token_id in excluded:
        counting &= input_ids != token_id
    ids = torch.where(counting, input_ids, 0)
    if ids.is_cpu and len(ids) and not 0 <= ids.min() <= ids.max() < 2**31:
        raise ValueError("input_ids: an id is out of range; accepted are 0 to 2^31 - 1")
    key = torch.where(counting, (sequence << 32) + ids, NOTHING)
    # By descending weight, NaN first, then by sequence and id; the sorts are stable.
    place = token_weights.argsort(descending=True, stable=True)
    place = place[key[place].argsort(stable=True)]
    sorted_key = key[place]
    repeated = torch.zeros_like(counting)
    repeated[1:] = sorted_key[1:] == sorted_key[:-1]
    entry_key, entry = torch.where(repeated, NOTHING, sorted_key).sort(stable=True)
    rows = torch.arange(batch + 1, device=key.device)
    indptr = torch.searchsorted(entry_key, rows << 32)
    is_entry = entry_key < NOTHING
    order = _first_tokens(key, entry_key).argsort()
    order -= indptr[(entry_key >> 32).clamp_max(batch)]
    return torch.where(is_entry, place[entry], -1), indptr, torch.where(is_entry, order, -1)


def _first_tokens(key: Tensor, entry_key: Tensor) -> Tensor:
    """Of each entry the first token that counts, which need not be the kept one; behind them `tokens`."""
    tokens = len(key)
    entry = torch.where(key < NOTHING, torch.searchsorted(entry_key, key), tokens)
    number = torch.arange(tokens, device=key.device)
    return number.new_full((tokens + 1,), tokens).scatter_reduce(0, entry, number, "amin")[:-1]


@OP.fake
def _(token_weights, input_ids, cu_seqlens, excluded):
    indptr = input_ids.new_empty(cu_seqlens.shape[0])
    return torch.empty_like(input_ids), indptr, torch.empty_like(input_ids)


def _empty(input_ids: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    index, order = torch.empty_like(input_ids), torch.empty_like(input_ids)
    return index, input_ids.new_empty(len(cu_seqlens)), order


def load_cpp():
    kernel = native.cpu().sparse_scatter

    def run(token_weights, input_ids, cu_seqlens, excluded):
        token_weights = token_weights.float().contiguous()
        input_ids, cu_seqlens = input_ids.contiguous(), cu_seqlens.contiguous()
        outputs = _empty(input_ids, cu_seqlens)
        kernel(
            token_weights.data_ptr(),
            input_ids.data_ptr(),
            cu_seqlens.data_ptr(),
            len(input_ids),
            len(cu_seqlens) - 1,
            excluded,
            *(x.data_ptr() for x in outputs),
        )
        return outputs

    return run


def _load_cuda():
    kernel = native.cuda().sparse_scatter

    def run(token_weights, input_ids, cu_seqlens, excluded):
        token_weights, input_ids = token_weights.contiguous(), input_ids.contiguous()
        cu_seqlens, tokens, batch = cu_seqlens.contiguous(), len(input_ids), len(cu_seqlens) - 1
        outputs = _empty(input_ids, cu_seqlens)
        scratch = input_ids.new_empty(28 * tokens + 4 * batch, dtype=torch.uint8)
        with torch.cuda.device(input_ids.device):
            kernel(
                token_weights.data_ptr(),
                native.DTYPES[token_weights.dtype],
                input_ids.data_ptr(),
                cu_seqlens.data_ptr(),
                tokens,
                batch,
                excluded,
                *(x.data_ptr() for x in outputs),
                scratch.data_ptr(),
                torch.cuda.current_stream().cuda_stream,
            )
        return outputs

    return run


OP.impl("cpp", load_cpp)
OP.impl("cuda", _load_cuda)


def make_samples(device, dtype, size) -> list[tuple]:
    generator = torch.Generator().manual_seed(0)

    def sample(lengths, vocabulary, step=1):
        ends = torch.tensor([0, *lengths]).cumsum(0)
        shape = (int(ends[-1]) * step,)
        weights = torch.randn(shape, generator=generator).to(device, dtype)[::step]
        ids = torch.randint(vocabulary, shape, generator=generator).to(device)[::step]
        return weights, ids, ends.to(device, torch.int32), []

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
    weights, ids, cu_seqlens, _ = sample([9, 130], 7)
    samples += [
        (-weights.abs(), ids, cu_seqlens, []),
        (torch.zeros_like(weights), ids, cu_seqlens, []),
        (torch.ones_like(weights), ids, cu_seqlens, [2**40]),
        (torch.where(weights > 1, float("nan"), weights), ids, cu_seqlens, [0, 3]),
    ]
    return samples


OP.samples(make_samples)


@OP.cost
def _(token_weights, input_ids, cu_seqlens, excluded):
    return Cost(bytes=token_weights.nbytes + 2 * input_ids.nbytes + 3 * cu_seqlens.nbytes, flops=0)

"""Losses over 2 and 3 processes (gloo): as one process with the whole batch."""

import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close

from embedfuse import ops
from embedfuse.testing import FLOOR
from tests import ranks
from tests.losses import distributed_work as whole


@pytest.fixture(scope="module", params=[2, 3])
def found(request, tmp_path_factory):
    """What each rank found."""
    return ranks.run(request.param, whole.work, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(params=whole.FORMS)
def by_rank(request, found):
    return [one[request.param] for one in found]


def joined(parts):
    """Of [loss, three gradients of embeddings, gradients of parameters] by rank: those of one process.

    The documented convention: the ranks' mean is the whole batch's loss, its gradient that of the parameters;
    embeddings carry the gradient of the ranks' sum.
    """
    loss, *grads = zip(*parts, strict=True)
    sides = [None if g[0] is None else torch.cat(g) / len(parts) for g in grads[:3]]
    return [torch.stack(loss).mean(), *sides, *(torch.stack(g).mean(0) for g in grads[3:])]


def everyone(by_rank):
    return list(range(len(by_rank))), len(by_rank)


def relative_errors(got, wanted):
    return [
        ((a.double() - b.double()).abs().max() / b.abs().max()).item()
        for a, b in zip(got, wanted, strict=True)
    ]


@pytest.mark.parametrize("name", whole.LOSSES)
def test_every_loss_and_its_gradient(by_rank, name):
    one = whole.evaluate(name, *everyone(by_rank))
    got = joined([rank["losses"][name] for rank in by_rank])
    assert max(relative_errors(got, one)) < 1e-6
    assert max(relative_errors(got[:4], one[:4])) < 1e-13
    assert all(grad.abs().max() > 1e-3 for grad in one[1:4])


def test_fp32(by_rank):
    one = whole.evaluate("InfoNCE", *everyone(by_rank), dtype=torch.float32)
    got = joined([rank["fp32"] for rank in by_rank])
    assert got[1].dtype == torch.float32
    assert max(relative_errors(got, one)) < 1e-6


def test_bf16(by_rank):
    """The bound of embedfuse/testing.py, with one process as the reference."""
    got = joined([rank["bf16"] for rank in by_rank])
    one = whole.evaluate("InfoNCE", *everyone(by_rank), dtype=torch.bfloat16)
    exact = whole.evaluate("InfoNCE", *everyone(by_rank))
    for error, one_error in zip(
        relative_errors(got, exact), relative_errors(one, exact), strict=True
    ):
        assert error <= 2 * one_error + FLOOR[torch.bfloat16]


def test_same_bits_again(by_rank):
    for rank in by_rank:
        assert all(map(torch.equal, rank["fp32"], rank["again"]))


def test_queue_holds_the_documents_of_all_ranks(by_rank):
    one = whole.with_queue(*everyone(by_rank))
    assert_close(torch.stack([rank["queue"] for rank in by_rank]).mean(0), one)


def test_training_under_distributed_data_parallel(by_rank):
    one = whole.train(*everyone(by_rank))
    for rank in by_rank:
        for got, wanted in zip(rank["trained"], one, strict=True):
            assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_documents_without_gradient(by_rank):
    got = torch.cat([rank["frozen"] for rank in by_rank]) / len(by_rank)
    assert_close(got, whole.frozen_documents(*everyone(by_rank)), rtol=1e-12, atol=1e-14)


def test_unequal_batches_raise_on_every_rank(by_rank):
    for number, rank in enumerate(by_rank):
        other, there, here = (0, 5, 4) if number == 1 else (1, 4, 5)
        assert rank["unequal"].startswith(
            f"pool: rows {there} on rank {other}, {here} on rank {number}; accepted is one number"
        )


def test_a_gradient_on_some_ranks_alone_raises_on_every_rank(by_rank):
    # Backward they would wait for each other.
    for number, rank in enumerate(by_rank):
        other, there, here = (0, 1, 0) if number == 1 else (1, 0, 1)
        assert rank["uneven gradients"].startswith(
            f"pool: gradient {there} on rank {other}, {here} on rank {number}; accepted is one number"
        )


def test_frozen_documents_and_queries_with_a_gradient_on_some_ranks(found):
    """The Ring goes round again backward, where total asks for it; gathered documents stay where they are."""
    for number, one in enumerate(found):
        assert one["gather"]["uneven queries"] is None
        other, there, here = (0, 1, 0) if number == 1 else (1, 0, 1)
        assert one["ring"]["uneven queries"].startswith(
            f"pool: backward {there} on rank {other}, {here} on rank {number}; accepted is one number"
        )


def test_what_one_rank_raises_alone_ends_the_others(by_rank):
    raised = [
        "documents: 4 rows; accepted are as many as queries, 5",
        "documents: torch.float64 of shape (5, 8); accepted is torch.float32 of (any, 8)",
        "labels: accepted are 0 to 4",
        "documents: with ids or a guide; GTELoss knows no false negatives",
        "documents: no guide; accepted are ops.Rows with the guide's embeddings",
    ]
    for number, rank in enumerate(by_rank):
        *errors, loss = rank["alone"]
        assert errors == (raised if number == 1 else ["across: rank 1 raised, and says why"] * 5)
        # Every document is the same: log of how many there are.
        assert loss.item() == pytest.approx(math.log(5 * len(by_rank)))


def test_group(found):
    one = whole.evaluate("InfoNCE", [0, 1], 2)
    got = joined([rank["group"] for rank in found[:2]])
    assert max(relative_errors(got, one)) < 1e-13


class RingOfOne(ops.Ring):
    """`size` ranks that all have the same documents."""

    size, rank = None, 0

    def check(self, *args):
        pass

    def _pass_on(self, parts):
        coming = [part.clone() for part in parts]
        return lambda: coming


def peak_bytes(size):
    q, d = (x.requires_grad_() for x in torch.randn(2, 256, 512).unbind())
    ring = RingOfOne()
    ring.size = size
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        ops.info_nce(q, d, across=ring).loss.sum().backward()
    held = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_memory_of_the_ring_does_not_grow_with_its_size():
    part = 256 * 512 * 4
    peaks = [peak_bytes(size) for size in (4, 12)]
    assert peaks[1] <= peaks[0] + 4096
    # Three parts, as many of their gradients, two of the queries' gradients, a tile of half a part.
    assert 5 * part < peaks[0] < 9 * part

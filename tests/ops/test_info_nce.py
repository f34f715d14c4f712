"""Losses by hand and against fp64: temperatures, masks, extreme logits, NaN, pools of several tiles."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from embedfuse.ops import FalseNegatives, Rows, info_nce

# Scores 1 0.5 -1 and 0 2 0.5 against POOL.
Q = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
POOL = torch.tensor([[1.0, 0.0], [0.5, 2.0], [-1.0, 0.5]])
NAN = float("nan")


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(*shape, generator=generator), dim=-1)


def nll(positive, *negatives):
    return math.log(1 + sum(math.exp(n - positive) for n in negatives))


def check(loss, *wanted):
    assert loss.tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def definition(q, pool, labels, temperature, keep=None):
    """In fp64, all logits stored."""
    logits = q.double() @ pool.double().T / temperature
    if keep is not None:
        logits = logits.masked_fill(~keep, -math.inf)
    return cross_entropy(logits, labels, reduction="none"), logits.logsumexp(1)


def test_values_by_hand(backend):
    out = info_nce(Q, POOL, temperature=0.5)
    check(out.loss, nll(2, 1, -2), nll(4, 0, 1))
    check(out.logsumexp, nll(2, 1, -2) + 2, nll(4, 0, 1) + 4)
    assert out.negatives.tolist() == [2, 2]
    out = info_nce(Q, POOL, torch.tensor([2, 2]), temperature=torch.tensor(1.0))
    check(out.loss, nll(-1, 1, 0.5), nll(0.5, 0, 2))


def test_bank_and_hard_negatives_by_hand(backend):
    bank = torch.tensor([[3.0, -3.0]])
    hard = torch.tensor([[[0.5, 9.0], [0.25, 9.0]], [[9.0, -1.0], [9.0, 1.5]]])
    out = info_nce(Q, POOL, bank=bank, hard_negatives=hard, temperature=1.0)
    check(out.loss, nll(1, 0.5, -1, 3, 0.5, 0.25), nll(2, 0, 0.5, -3, -1, 1.5))
    assert out.negatives.tolist() == [5, 5]
    assert torch.equal(
        info_nce(Q, POOL, bank=bank[:0], hard_negatives=hard[:, :0]).loss, info_nce(Q, POOL).loss
    )


def test_hardness_by_hand(backend):
    hard = torch.tensor([[[0.5, 9.0]], [[9.0, -1.0]]])
    out = info_nce(Q, POOL, hard_negatives=hard, temperature=1.0, hardness=2.0, hard_hardness=0.5)
    check(out.loss, nll(1, 1.5, -3, 0.75), nll(2, 0, 1.5, -1.5))


def test_label_smoothing_is_torchs(backend):
    q, pool = unit(9, 8), unit(40, 8, seed=1)
    labels = torch.arange(9) * 4
    got = info_nce(q, pool, labels, temperature=0.1, label_smoothing=0.2).loss
    logits = q.double() @ pool.double().T / 0.1
    wanted = cross_entropy(logits, labels, reduction="none", label_smoothing=0.2)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)


def test_margins_by_hand(backend):
    def loss(**margins):
        return info_nce(Q, POOL, temperature=1.0, false_negatives=FalseNegatives(**margins)).loss

    check(loss(margin=-0.6), nll(1, -1), nll(2, 0, 0.5))  # above 0.4 and above 1.4
    check(loss(margin=-1.6), nll(1, -1), nll(2, 0))
    check(loss(relative=-0.6), nll(1, -1), nll(2, 0, 0.5))  # above 0.4 and above 0.8
    check(loss(relative=-0.8), nll(1, -1), nll(2, 0))
    check(loss(margin=-1.6, relative=-0.6), nll(1, -1), nll(2, 0))
    check(loss(margin=-9.0), 0, 0)


def test_a_margin_spares_what_equals_it(backend):
    pool = torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.75, 0.0]])
    rule = FalseNegatives(margin=-0.5)
    out = info_nce(Q[:1], pool, temperature=1.0, false_negatives=rule)
    check(out.loss, nll(1, 0.5))


def test_ids_by_hand(backend):
    ids = torch.tensor([7, 8, 7])
    out = info_nce(
        Q,
        Rows(POOL, ids),
        bank=Rows(POOL[:1] * 3, ids[1:2]),
        hard_negatives=Rows(POOL[None, :2].expand(2, -1, -1), torch.tensor([[7, 1], [1, 8]])),
        temperature=1.0,
    )
    check(out.loss, nll(1, 0.5, 3, 0.5), nll(2, 0, 0.5, 0))
    assert out.negatives.tolist() == [3, 3]


def test_guide_by_hand(backend):
    # Guide scores 1 2 0 and 3 1 0.5, the positives' on the diagonal.
    guide_q = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    guide_pool = torch.tensor([[1.0, 3.0, 0.0], [2.0, 1.0, 5.0], [0.0, 0.5, 5.0]])
    q, pool = Rows(Q, guide=guide_q), Rows(POOL, guide=guide_pool)
    check(info_nce(q, pool, temperature=1.0).loss, nll(1, -1), nll(2, 0.5))
    rule = FalseNegatives(guide_margin=-0.6)
    check(info_nce(q, pool, temperature=1.0, false_negatives=rule).loss, nll(1, -1), nll(2))
    rule = FalseNegatives(guide_relative=1.5)
    out = info_nce(q, pool, temperature=1.0, false_negatives=rule)
    check(out.loss, nll(1, 0.5, -1), nll(2, 0.5))
    hard = Rows(POOL[None, 2:].expand(2, -1, -1), guide=guide_q[None, 1:].expand(2, -1, -1) * 2)
    out = info_nce(q, pool, hard_negatives=hard, temperature=1.0)
    check(out.loss, nll(1, -1, -1), nll(2, 0.5))


@pytest.mark.parametrize(
    ("columns", "temperature"), [(1024, 0.01), (2500, 0.02), (1024, 0.05), (2500, 1.0)]
)
def test_against_fp64(backend, temperature, columns):
    q, pool = unit(67, 48), unit(columns, 48, seed=1)
    pool[30:60] = q[30:60]  # a sure positive
    scores = q @ pool.T
    labels = torch.arange(67)
    labels[:15], labels[15:30] = scores[:15].argmin(1), scores[15:30].argmax(1)
    pool[-5:] = pool[labels[:5]]  # duplicated documents
    out = info_nce(q, pool, labels, temperature=temperature)
    loss, logsumexp = definition(q, pool, labels, temperature)
    torch.testing.assert_close(out.logsumexp.double(), logsumexp, rtol=1e-5, atol=0)
    # A loss is the difference of logits that are rounded to fp32.
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-5, atol=4e-7 / temperature)


def test_low_temperature_without_a_similar_candidate(backend):
    # exp((s - 1) / temperature) is 0 in fp32 for all of them: the largest logit must be subtracted, not 1.
    pool = torch.eye(64)[:40]
    q = -normalize(torch.ones(3, 64), dim=1)
    assert torch.exp((q @ pool.T - 1) / 0.01).max() == 0
    check(info_nce(q, pool, temperature=0.01).loss, *[math.log(40)] * 3)


@pytest.mark.parametrize("sign", [1, -1])
def test_logits_of_ten_thousand(backend, sign):
    q = torch.tensor([[100.0, 0.0], [0.0, 100.0], [100.0, 100.0]])
    pool = sign * torch.tensor([[100.0, 0.0], [-100.0, 0.0], [0.0, -100.0], [99.0, 0.0]])
    labels = torch.tensor([1, 2, 0])
    out = info_nce(q, pool, labels, temperature=1.0)
    loss, logsumexp = definition(q, pool, labels, 1.0)
    assert out.loss.tolist() == pytest.approx(loss.tolist(), rel=1e-5, abs=1e-30)
    assert out.logsumexp.tolist() == pytest.approx(logsumexp.tolist(), rel=1e-5)


def test_a_small_loss_keeps_its_digits(backend):
    q = torch.tensor([[64.0, 0.0]])
    pool = torch.tensor([[1.0, 0.0], [0.75, 0.0], [0.5, 9.0]])
    out = info_nce(q, pool, temperature=1.0)
    assert out.loss.item() == pytest.approx(nll(64, 48, 32), rel=1e-5)  # 1.1e-7


def test_all_negatives_masked(backend):
    ids = torch.zeros(3, dtype=torch.int64)
    out = info_nce(Q, Rows(POOL, ids), bank=Rows(POOL, ids), temperature=0.01)
    assert out.loss.tolist() == [0, 0]
    assert out.negatives.tolist() == [0, 0]
    check(out.logsumexp, 100, 200)
    assert info_nce(Q[:1], POOL[:1]).loss.tolist() == [0]


def test_nan_spreads(backend):
    q, pool = unit(4, 8), unit(20, 8, seed=1)
    q[1, 3] = NAN
    assert info_nce(q, pool).loss.isnan().tolist() == [False, True, False, False]
    pool[17, 0] = NAN
    assert info_nce(q, pool).loss.isnan().all()
    # A NaN is not above a margin; what leaves by its id does not count.
    rule = FalseNegatives(margin=0.1)
    assert info_nce(q, pool, false_negatives=rule).loss.isnan().all()
    ids = torch.arange(20)
    ids[17] = 0
    assert not info_nce(q, Rows(pool, ids)).loss[0].isnan()


def test_masks_across_tiles(backend):
    q, pool = unit(40, 16), unit(3000, 16, seed=1)
    ids = torch.arange(3000) % 300
    guide_q, guide_pool = unit(40, 6, seed=2), unit(3000, 6, seed=3)
    labels = torch.arange(40) * 70 + 5
    rule = FalseNegatives(margin=0.05, guide_relative=-0.1)
    out = info_nce(
        Rows(q, guide=guide_q), Rows(pool, ids, guide_pool), labels, false_negatives=rule
    )
    keep = torch.ones(40, 3000, dtype=torch.bool)
    scores, guide = q.double() @ pool.double().T, guide_q.double() @ guide_pool.double().T
    positive, guide_positive = (s.gather(1, labels[:, None]) for s in (scores, guide))
    for margin in (scores - positive - 0.05, guide - guide_positive + 0.1 * guide_positive.abs()):
        assert margin.abs().min() > 1e-6  # fp32 tells every score from the limit
        keep &= margin <= 0
    keep &= ids[labels][:, None] != ids
    keep[torch.arange(40), labels] = True
    assert 0.05 < keep.float().mean() < 0.8
    loss, _ = definition(q, pool, labels, 0.05, keep)
    assert out.negatives.tolist() == (keep.sum(1) - 1).tolist()
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(backend, dtype):
    q, pool = unit(30, 64).to(dtype), unit(1500, 64, seed=1).to(dtype)
    out = info_nce(q, pool, temperature=0.05)
    loss, _ = definition(q, pool, torch.arange(30), 0.05)
    assert out.loss.dtype == torch.float32
    # Of each score one rounding to its dtype, and fp32 sums.
    rounding = torch.finfo(dtype).eps / 2 * (q.float() @ pool.float().T).abs().max().item()
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-5, atol=rounding / 0.05)


def test_views_are_their_copies(backend):
    wide = unit(60, 40)
    q, pool = wide[::2, 3:30], unit(40, 50, seed=1).T[:, :27]
    labels = torch.arange(60)[::2].flip(0) // 2
    got = info_nce(q, pool, labels)
    copied = info_nce(q.clone(), pool.contiguous(), labels.clone())
    torch.testing.assert_close(got.loss, copied.loss, rtol=1e-5, atol=1e-5)


def test_same_bits_each_time_on_several_threads(backend, restore_threads):
    q, pool = unit(300, 32), unit(2500, 32, seed=1)
    torch.set_num_threads(2)
    alone = info_nce(q, pool)
    for _ in range(3):
        again = info_nce(q, pool)
        assert all(map(torch.equal, again, alone))

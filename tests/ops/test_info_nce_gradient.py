"""Gradients: gradcheck in fp64, and every option against autograd through stored logits."""

import math

import pytest
import torch
from torch.nn.functional import normalize, softplus

from embedfuse import testing
from embedfuse.ops import FalseNegatives, Rows, info_nce
from embedfuse.ops.info_nce.statistics import Excluded, hard_negative_statistics, statistics
from embedfuse.registry import use_backend


def leaf(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)
    return x.to(dtype).requires_grad_()


def dense(q, pool, labels, temperature, hard=None, bank=None, keep=None, hardness=(0, 0), smooth=0):
    """Autograd's own, all logits stored."""
    scores = [q @ pool.T]
    if bank is not None:
        scores.append(q @ bank.T)
    scores = torch.cat(scores, 1)
    own = torch.nn.functional.one_hot(labels, scores.shape[1]).bool()
    z = scores / temperature + hardness[0] * scores.detach() * ~own
    if keep is not None:
        z = z.masked_fill(~keep, -math.inf)
    if hard is not None:
        scores = torch.einsum("bd,bkd->bk", q, hard)
        z = torch.cat((z, scores / temperature + hardness[1] * scores.detach()), 1)
    log_p = z.log_softmax(1)
    nll = -log_p.gather(1, labels[:, None])[:, 0]
    kept = z > -math.inf
    uniform = -torch.where(kept, log_p, 0).sum(1) / kept.sum(1)
    return (1 - smooth) * nll + smooth * uniform


def test_gradcheck_of_the_reference():
    q, pool = leaf(3, 4, dtype=torch.float64), leaf(5, 4, seed=1, dtype=torch.float64)
    hard, bank = leaf(3, 2, 4, seed=2, dtype=torch.float64), leaf(6, 4, seed=3, dtype=torch.float64)
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    guides = (leaf(3, 2, seed=4).detach(), leaf(5, 2, seed=5).detach())
    ids = torch.tensor([0, 1, 2, 1, 3])
    rule = FalseNegatives(margin=0.2, guide_margin=0.3)

    def loss(q, pool, hard, temperature, smooth):
        rows = Rows(q, guide=guides[0]), Rows(pool, ids, guides[1])
        settings = {"false_negatives": rule, "label_smoothing": smooth, "bank": bank.detach()}
        return info_nce(*rows, hard_negatives=hard, temperature=temperature, **settings)[:2]

    for smooth in (0.0, 0.3):
        assert torch.autograd.gradcheck(loss, (q, pool, hard, temperature, smooth))
    assert torch.autograd.gradcheck(
        lambda q, t: loss(q, pool.detach(), hard.detach(), t, 0), (q, temperature)
    )


OPTIONS = {
    "plain": {},
    "hard": {"hard": True},
    "bank": {"bank": True},
    "all": {"hard": True, "bank": True, "hardness": (3.0, 2.0), "smooth": 0.1},
    "hardness": {"hardness": (9.0, 0.0)},
    "smooth": {"smooth": 0.2, "bank": True},
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_against_stored_logits(backend, dtype, option, frozen):
    settings = {"hard": False, "bank": False, "hardness": (0, 0), "smooth": 0} | OPTIONS[option]
    q, pool = leaf(40, 32, dtype=dtype), leaf(2100, 32, seed=1, dtype=dtype)
    pool.requires_grad_(not frozen)
    hard = leaf(40, 3, 32, seed=2, dtype=dtype) if settings["hard"] else None
    bank = leaf(70, 32, seed=3, dtype=dtype).detach() if settings["bank"] else None
    temperature = torch.tensor(0.1, requires_grad=True)
    labels = torch.arange(40) * 50 % 2100
    labels[3] = labels[2]
    weights = torch.linspace(-1, 2, 40)
    loss = info_nce(
        q,
        pool,
        labels,
        hard_negatives=hard,
        bank=bank,
        temperature=temperature,
        hardness=settings["hardness"][0],
        hard_hardness=settings["hardness"][1],
        label_smoothing=settings["smooth"],
    ).loss
    inputs = [x for x in (q, pool, hard, temperature) if x is not None and x.requires_grad]
    grads = torch.autograd.grad((loss * weights).sum(), inputs)

    def plain(cast):
        """Gradients with everything cast."""
        x = [None if t is None else cast(t.detach()) for t in (q, pool, hard, bank, temperature)]
        wanted = [t for t in (x[0], x[1], x[2], x[4]) if t is not None]
        wanted = [t.requires_grad_() for t in wanted if not (frozen and t is x[1])]
        loss = dense(x[0], x[1], labels, x[4], *x[2:4], None, *list(settings.values())[2:])
        return torch.autograd.grad((loss * weights).sum(), wanted)

    torchs, exact = plain(lambda x: x.to(dtype)), plain(torch.Tensor.double)
    for x, got, own, wanted in zip(inputs, grads, torchs, exact, strict=True):
        assert got.dtype == x.dtype
        if x is temperature:  # a sum over all rows, of which most cancel
            continue
        testing.assert_as_good(got, own, wanted)
    if dtype == torch.float32:
        torch.testing.assert_close(grads[-1].double(), exact[-1], rtol=1e-4, atol=1e-4)


def test_masked_columns_have_none(backend):
    q, pool = leaf(20, 16), leaf(1500, 16, seed=1)
    ids = torch.arange(1500) % 40
    rule = FalseNegatives(margin=0.05)
    loss = info_nce(q, Rows(pool, ids), temperature=0.1, false_negatives=rule).loss
    grads = torch.autograd.grad(loss.sum(), (q, pool))
    wide = [x.detach().double().requires_grad_() for x in (q, pool)]
    scores = (wide[0] @ wide[1].T).detach()
    keep = (scores <= scores.diagonal()[:, None] + 0.05) & (ids[:20, None] != ids)
    keep |= torch.eye(20, 1500, dtype=torch.bool)
    exact = dense(*wide, torch.arange(20), 0.1, keep=keep).sum()
    for got, wanted in zip(grads, torch.autograd.grad(exact, wide), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("with_hard", [False, True])
def test_all_negatives_masked(backend, with_hard):
    q, pool = leaf(3, 4), leaf(6, 4, seed=1)
    ids, temperature = torch.zeros(6, dtype=torch.int64), torch.tensor(0.01, requires_grad=True)
    hard = leaf(3, 2, 4, seed=2)
    sides = {"bank": Rows(pool, ids)}
    if with_hard:
        sides["hard_negatives"] = Rows(hard, ids.view(3, 2))
    loss = info_nce(q, Rows(pool, ids), **sides, temperature=temperature).loss
    inputs = (q, pool, temperature, *((hard,) if with_hard else ()))
    for grad in torch.autograd.grad(loss.sum(), inputs):
        assert grad.eq(0).all()


def test_gradient_of_logsumexp(backend):
    q, pool = leaf(5, 8), leaf(30, 8, seed=1)
    out = info_nce(q, pool, temperature=0.1)
    grads = torch.autograd.grad((out.logsumexp.square() - out.loss).sum(), (q, pool))
    wide = [x.detach().double().requires_grad_() for x in (q, pool)]
    logits = wide[0] @ wide[1].T / 0.1
    exact = logits.logsumexp(1).square() - dense(*wide, torch.arange(5), 0.1)
    for got, wanted in zip(grads, torch.autograd.grad(exact.sum(), wide), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen", [False, True])
def test_sigmoid_statistics(backend, frozen):
    q, pool = leaf(30, 16), leaf(1400, 16, seed=1)
    pool.requires_grad_(not frozen)
    scale, bias = (torch.tensor(v, requires_grad=True) for v in (10.0, -4.0))
    own = torch.arange(30) * 40
    own[4] = -1
    parts = statistics(q, pool, scale, Excluded(own), bias=bias, sigmoid=True)
    inputs = [x for x in (q, pool, scale, bias) if x.requires_grad]
    got = (parts.logsumexp + 2 * parts.target)[own >= 0].sum()
    grads = torch.autograd.grad(got, inputs)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    x, y = (wide[0], pool.detach().double()) if frozen else wide[:2]
    z = wide[-2] * (x @ y.T) + wide[-1]
    is_own = own[:, None] == torch.arange(1400)
    exact = (softplus(z).masked_fill(is_own, 0).sum(1) + 2 * (z * is_own).sum(1))[own >= 0].sum()
    assert got.item() == pytest.approx(exact.item(), rel=1e-5)
    for a, b in zip(grads, torch.autograd.grad(exact, wide), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)


def test_hard_negatives_are_columns_of_one_row(backend):
    q, own_pool = leaf(4, 8), leaf(4, 6, 8, seed=1)
    scale = torch.tensor(5.0)
    for sigmoid in (False, True):
        settings = {"bias": torch.tensor(-1.0) if sigmoid else None, "sigmoid": sigmoid}
        limit = torch.full((4,), 0.2)
        each = hard_negative_statistics(q, own_pool, scale, Excluded(limit=limit), **settings)
        for i in range(4):
            one = Excluded(limit=limit[i : i + 1])
            alone = statistics(q[i : i + 1], own_pool[i], scale, one, **settings)
            for a, b in zip(each[1:], alone[1:], strict=True):
                torch.testing.assert_close(a[i : i + 1], b)


def test_same_bits_each_time_on_several_threads(backend, restore_threads):
    q, pool = leaf(1100, 16), leaf(1300, 16, seed=1)

    def gradients():
        return torch.autograd.grad(info_nce(q, pool).loss.sum(), (q, pool))

    torch.set_num_threads(2)
    alone = gradients()
    for _ in range(3):
        assert all(map(torch.equal, gradients(), alone))


def test_autocast_changes_nothing(backend):
    q, pool = leaf(10, 16), leaf(50, 16, seed=1)
    plain = info_nce(q, pool).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = info_nce(q, pool).loss
        grad = torch.autograd.grad(loss.sum(), q)[0]
    assert torch.equal(loss, plain)
    assert torch.equal(grad, torch.autograd.grad(plain.sum(), q)[0])


def test_offsets_of_tiles():
    q, pool = leaf(1030, 8), leaf(2060, 8, seed=1)
    labels = torch.arange(1030) + 1030

    def gradients(backend, *sides):
        with use_backend(backend):
            return torch.autograd.grad(info_nce(*sides, labels).loss.sum(), sides)

    exact = gradients("reference", *(x.detach().double().requires_grad_() for x in (q, pool)))
    found, own = gradients("cpp", q, pool), gradients("reference", q, pool)
    for outputs in zip(found, own, exact, strict=True):
        testing.assert_as_good(*outputs)

"""Every loss against its definition written out with stored logits in fp64, values and gradients."""

import math
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import normalize, softplus

from embedfuse import losses
from embedfuse.ops import FalseNegatives, Rows

B, K, D = 12, 3, 16
EYE = torch.eye(B, dtype=torch.bool)


def embeddings(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).requires_grad_()


def sides():
    q = embeddings(B, D, seed=0)
    d = (q.detach() + embeddings(B, D, seed=1).detach()).requires_grad_()
    return q, d, embeddings(B, K, D, seed=2)


def cosines(x, y):
    return normalize(x, dim=-1) @ normalize(y, dim=-1).T


def own_cosines(q, hard):
    return torch.einsum("bd,bkd->bk", normalize(q, dim=-1), normalize(hard, dim=-1))


def check(loss, definition, inputs, *, rows=None, parameters=()):
    """rows: what the module takes in place of the tensors; parameters: (ours, those of the definition)."""
    got = loss(*(rows or inputs))
    ours = [x for x, _ in parameters]
    grads = torch.autograd.grad(got, [*inputs, *ours])
    wide = [x.detach().double().requires_grad_() for x in inputs]
    wanted = definition(*wide).mean()
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5)
    exact = torch.autograd.grad(wanted, [*wide, *(x for _, x in parameters)])
    for a, b in zip(grads, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-5 * b.abs().max().item())


def nll(positive, *negatives):
    """-log of the positive's share; negatives: (B, any), those of -inf do not count."""
    return torch.cat((positive[:, None], *negatives), 1).logsumexp(1) - positive


def off_diagonal(scores):
    return scores.masked_fill(EYE, -math.inf)


def test_info_nce(backend):
    def definition(q, d, hard):
        s = cosines(q, d) / 0.01
        return nll(s.diagonal(), off_diagonal(s), own_cosines(q, hard) / 0.01)

    check(losses.InfoNCE(), definition, sides())


def test_info_nce_learns_its_temperature(backend):
    temperature = torch.nn.Parameter(torch.tensor(0.1))
    exact = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    loss = losses.InfoNCE(temperature, hard_hardness=5.0, label_smoothing=0.1)
    assert [name for name, _ in loss.named_parameters()] == ["temperature"]

    def definition(q, d, hard):
        s, h = cosines(q, d), own_cosines(q, hard)
        z = torch.cat((s / exact, h / exact + 5 * h.detach()), 1)
        return torch.nn.functional.cross_entropy(
            z, torch.arange(B), reduction="none", label_smoothing=0.1
        )

    check(loss, definition, sides(), parameters=[(temperature, exact)])


def test_symmetric_info_nce(backend):
    loss = losses.SymmetricInfoNCE()
    scale = torch.tensor(-math.log(0.07), dtype=torch.float64, requires_grad=True)

    def definition(q, d):
        s = cosines(q, d) * scale.exp()
        return (nll(s.diagonal(), off_diagonal(s)) + nll(s.diagonal(), off_diagonal(s.T))) / 2

    check(loss, definition, sides()[:2], parameters=[(loss.logit_scale, scale)])


def test_symmetric_info_nce_holds_its_scale(backend):
    q, d, _ = sides()
    loss = losses.SymmetricInfoNCE(0.001)
    loss(q, d).backward()
    assert loss.logit_scale.grad == 0
    other = losses.SymmetricInfoNCE(0.01, max_scale=1e9)
    assert loss(q, d).item() == pytest.approx(other(q, d).item(), rel=1e-5)


def test_symmetric_info_nce_masks_both_ways(backend):
    q, d, _ = sides()
    ids = torch.arange(B) % 5
    same = (ids[:, None] == ids) & ~EYE
    got = losses.SymmetricInfoNCE(0.1)(q, Rows(d, ids))
    s = (cosines(q, d) / 0.1).masked_fill(same, -math.inf).detach().double()
    wanted = (s.logsumexp(0) + s.logsumexp(1)) / 2 - s.diagonal()
    assert got.item() == pytest.approx(wanted.mean().item(), rel=1e-5)


@pytest.mark.parametrize("tau_plus", [0.0, 0.1])
def test_debiased(backend, tau_plus):
    def definition(q, d, hard):
        s = cosines(q, d) / 0.5
        rest = torch.cat((off_diagonal(s), own_cosines(q, hard) / 0.5), 1).exp()
        positive, n = s.diagonal().exp(), B - 1 + K
        estimate = (rest.sum(1) / n - tau_plus * positive) / (1 - tau_plus)
        return -torch.log(positive / (positive + n * estimate.clamp_min(math.exp(-1 / 0.5))))

    check(losses.DebiasedInfoNCE(tau_plus=tau_plus), definition, sides())


def test_debiased_at_its_floor(backend):
    q = embeddings(4, 4, seed=0)
    loss = losses.DebiasedInfoNCE(0.01, tau_plus=0.5, reduction="none")
    d = torch.eye(4)
    value = loss(d.clone().requires_grad_(), d)
    # Positives at e^100, of which half is taken off the negatives: g is its floor, e^-100.
    assert value.tolist() == pytest.approx([3 * math.exp(-200)] * 4, abs=1e-30)
    value = loss(q, q.detach())
    assert torch.autograd.grad(value.sum(), q)[0].isfinite().all()
    assert loss(q[:1], q[:1].detach()).tolist() == [0]


@pytest.mark.parametrize("twice", [True, False])
def test_gte(backend, twice):
    def definition(q, d, hard):
        docs = torch.cat((d, hard.flatten(0, 1)))
        owner = torch.cat((torch.arange(B), torch.arange(B).repeat_interleave(K)))
        qd, qq, dq = cosines(q, docs), cosines(q, q), cosines(d, q)
        dd = cosines(d, docs).masked_fill(torch.arange(B)[:, None] == owner, -math.inf)
        back = dq if twice else off_diagonal(dq)
        z = torch.cat((qd, off_diagonal(qq), back, dd), 1) / 0.01
        return z.logsumexp(1) - qd.diagonal() / 0.01

    check(losses.GTELoss(positive_twice=twice), definition, sides())


def test_qwen3(backend):
    ids = torch.arange(B)
    ids[7] = 2

    def definition(q, d, hard):
        qd, qq, dd, h = cosines(q, d), cosines(q, q), cosines(d, d), own_cosines(q, hard)
        positive = qd.diagonal()[:, None]
        same = (ids[:, None] == ids) | EYE
        above = [(s > positive + 0.1) | same for s in (qd, qq)]
        assert above[0].sum() > same.sum()
        terms = [qd.masked_fill(above[0], -math.inf), qq.masked_fill(above[1], -math.inf)]
        # The score of (q_i, d_j) stands for that of (d_i, d_j).
        terms.append(dd.masked_fill(above[0], -math.inf))
        terms.append(h.masked_fill(h > positive + 0.1, -math.inf))
        return nll(qd.diagonal() / 0.02, *(t / 0.02 for t in terms))

    q, d, hard = sides()
    d = (0.6 * d).detach() + 1.2 * d[[1, 2, 0, *range(3, B)]].detach()
    d.requires_grad_()
    check(losses.Qwen3Loss(), definition, (q, d, hard), rows=(q, Rows(d, ids), hard))


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("between", [False, True])
def test_gist(backend, relative, between):
    guides = [
        embeddings(*shape, 5, seed=9 + i).detach() for i, shape in enumerate(((B,), (B,), (B, K)))
    ]
    guides[1] += guides[0]

    def definition(q, d, hard):
        gq, gd, gh = (g.double() for g in guides)
        positive = cosines(gq, gd).diagonal()[:, None]
        limit = positive - 0.05 * positive.abs() if relative else positive - 0.05
        terms = [off_diagonal(cosines(q, d)).masked_fill(cosines(gq, gd) > limit, -math.inf)]
        if between:
            for x, g in ((q, gq), (d, gd)):
                s = off_diagonal(cosines(x, x))
                terms.append(s.masked_fill(cosines(g, g) > limit, -math.inf))
        terms.append(own_cosines(q, hard).masked_fill(own_cosines(gq, gh) > limit, -math.inf))
        assert (terms[0] == -math.inf).sum() > B
        return nll(cosines(q, d).diagonal() / 0.01, *(t / 0.01 for t in terms))

    loss = losses.GISTLoss(
        margin=0.05, relative=relative, between_queries=between, between_documents=between
    )
    inputs = sides()
    rows = [Rows(x, guide=g) for x, g in zip(inputs, guides, strict=True)]
    check(loss, definition, inputs, rows=rows)


def test_siglip(backend):
    loss = losses.SigLIPLoss()
    t, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (math.log(10), -10))

    def definition(q, d, hard):
        z, h = cosines(q, d) * t.exp() + b, own_cosines(q, hard) * t.exp() + b
        return softplus(torch.where(EYE, -z, z)).sum(1) + softplus(h).sum(1)

    check(loss, definition, sides(), parameters=[(loss.logit_scale, t), (loss.logit_bias, b)])


def test_matryoshka(backend):
    inner = losses.InfoNCE(0.1)
    loss = losses.MatryoshkaLoss(inner, [16, 8, 3], [1.0, 0.5, 2.0])
    q, d, hard = sides()
    parts = [inner(q[:, :m], d[:, :m], hard[..., :m]) for m in (16, 8, 3)]
    wanted = parts[0] + 0.5 * parts[1] + 2 * parts[2]
    got = loss(q, d, hard)
    torch.testing.assert_close(got, wanted)
    for a, b in zip(*(torch.autograd.grad(x, (q, d, hard)) for x in (got, wanted)), strict=True):
        torch.testing.assert_close(a, b)


def test_matryoshka_stays_fp32_under_autocast():
    q, d = (torch.randn(6, 16, generator=torch.Generator().manual_seed(i)) for i in range(2))
    loss = losses.MatryoshkaLoss(losses.InfoNCE(0.05), [16, 4], [1.0, 0.3])
    expected = loss(q, d)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(q, d)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_reductions_and_dot_products(backend):
    q, d, _ = sides()
    rows = losses.InfoNCE(1.0, normalize=False, reduction="none")(q, d)
    s = (q @ d.T).double()
    torch.testing.assert_close(rows.double(), s.logsumexp(1) - s.diagonal(), rtol=1e-5, atol=1e-5)
    assert losses.InfoNCE(1.0, normalize=False, reduction="sum")(q, d) == rows.sum()
    assert losses.InfoNCE(1.0, normalize=False)(q, d) == rows.mean()


def test_false_negatives_of_info_nce(backend):
    q, d, _ = sides()
    loss = losses.InfoNCE(0.1, false_negatives=FalseNegatives(relative=-0.5), reduction="none")
    s = cosines(q, d).detach().double()
    positive = s.diagonal()[:, None]
    z = s.masked_fill((s > positive - 0.5 * positive.abs()) & ~EYE, -math.inf) / 0.1
    torch.testing.assert_close(
        loss(q, d).double(), z.logsumexp(1) - z.diagonal(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("reduction", lambda q, d: losses.InfoNCE(reduction="max")),
        ("temperature", lambda q, d: losses.InfoNCE(0.0)(q, d)),
        ("temperature", lambda q, d: losses.SymmetricInfoNCE(-1.0)),
        ("tau_plus", lambda q, d: losses.DebiasedInfoNCE(tau_plus=1.0)),
        ("documents", lambda q, d: losses.InfoNCE()(q, d[1:])),
        ("documents", lambda q, d: losses.GTELoss()(q, d.half())),
        ("documents", lambda q, d: losses.GTELoss()(q, Rows(d, torch.arange(B)))),
        ("queries", lambda q, d: losses.GISTLoss()(q, d)),
        ("dims", lambda q, d: losses.MatryoshkaLoss(losses.InfoNCE(), [4, 4])),
        ("weights", lambda q, d: losses.MatryoshkaLoss(losses.InfoNCE(), [4, 2], [1.0])),
        ("queries", lambda q, d: losses.MatryoshkaLoss(losses.InfoNCE(), [D + 1])(q, d)),
    ],
)
def test_errors(name, call):
    with pytest.raises(ValueError, match=rf"^{name}[:=]"):
        call(*sides()[:2])


def test_loaded_on_first_use():
    script = (
        "import sys, embedfuse; assert 'embedfuse.losses' not in sys.modules; "
        "embedfuse.losses.InfoNCE; assert 'embedfuse.losses' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "loss",
    [losses.InfoNCE(0.01), losses.GTELoss(0.01), losses.SigLIPLoss(), losses.DebiasedInfoNCE(0.5)],
    ids=lambda loss: type(loss).__name__,
)
def test_of_16_bits_only_gradients_are_rounded(loss, dtype):
    """0.4 % in bf16 and 0.05 % in fp16 at most, half of that on average."""
    generator = torch.Generator().manual_seed(0)
    center = 0.01 * torch.randn(32, 64, generator=generator)
    sides = [(center + 0.01 * torch.randn(32, 64, generator=generator)).to(dtype) for _ in range(2)]
    found = []
    for kind in (dtype, torch.float64):
        q, d = (x.to(kind).requires_grad_() for x in sides)
        value = loss(q, d)
        found.append((value.detach(), *torch.autograd.grad(value, (q, d))))
    (value, *grads), (exact, *wanted) = found
    assert value.item() == pytest.approx(exact.item(), rel=1e-4)
    for got, best in zip(grads, wanted, strict=True):
        assert got.dtype == dtype
        assert (got - best).norm() <= torch.finfo(dtype).eps / 2 * best.norm()


def test_debiased_near_the_pole_of_the_logarithm():
    """A mean that tau_plus e^p leaves 7.5e-9 of: e^share rounds to 1."""
    loss = losses.DebiasedInfoNCE(1.0, tau_plus=0.9)
    positive = torch.zeros(1, requires_grad=True)
    mean = torch.nextafter(torch.tensor([math.log(0.9)]), torch.zeros(1)).requires_grad_()
    estimate = loss._log_estimate(positive, mean, torch.tensor(-50.0))
    share = math.log(0.9) - mean.item()
    exact = mean.item() + math.log(-math.expm1(share)) - math.log(0.1)
    assert estimate.item() == pytest.approx(exact, abs=1.0)
    assert all(x.isfinite().all() for x in torch.autograd.grad(estimate, (positive, mean)))


def test_16_bit_embeddings_with_a_queue_in_fp32():
    loss = losses.InfoNCE(0.05, queue=losses.NegativeQueue(4, 8))
    q, d = (torch.randn(3, 8).bfloat16() for _ in range(2))
    loss(q, d)
    torch.testing.assert_close(
        loss.queue.rows().vectors, torch.nn.functional.normalize(d.float(), dim=1)
    )
    assert loss(q, d).isfinite()

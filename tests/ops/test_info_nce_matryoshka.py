"""info_nce at several widths in one pass against a call per width, in fp64 and in each dtype."""

import math
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import normalize

from embedfuse import testing
from embedfuse.ops import FalseNegatives, Matryoshka, Ring, Rows, info_nce
from embedfuse.registry import use_backend

WIDTHS = (5, 12, 32)
LABELS = torch.arange(40) * 50


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_by_one(sides, matryoshka, **settings):
    """(widths, B): the definition. sides: q, pool, hard negatives and bank, Rows or None."""

    def cut(side, width):
        if side is None:
            return None
        x = side.vectors[..., :width]
        return side._replace(vectors=normalize(x, dim=-1) if matryoshka.normalize else x)

    losses = []
    for width in matryoshka.widths:
        q, pool, hard, bank = (cut(side, width) for side in sides)
        losses.append(info_nce(q, pool, hard_negatives=hard, bank=bank, **settings).loss)
    return torch.stack(losses)


OPTIONS = {
    "plain": ((), {}),
    "hard": (("hard",), {}),
    "bank": (("bank",), {}),
    "frozen": (("bank", "frozen"), {}),
    "ids": (("hard", "bank", "ids"), {}),
    "guide": (("hard", "bank", "guide"), {"false_negatives": FalseNegatives(guide_margin=0.1)}),
    "margin": (("hard", "bank"), {"false_negatives": FalseNegatives(margin=-0.05)}),
    "relative": (("hard",), {"false_negatives": FalseNegatives(relative=-0.2)}),
    "hardness": (("hard", "bank"), {"hardness": 3.0, "hard_hardness": 2.0}),
    "smoothing": (("hard", "bank"), {"label_smoothing": 0.2}),
    "all": (
        ("hard", "bank", "ids", "guide"),
        {
            "false_negatives": FalseNegatives(margin=0.3, relative=0.2, guide_relative=0.1),
            "hardness": 3.0,
            "hard_hardness": 2.0,
            "label_smoothing": 0.1,
        },
    ),
}
# Which scores are above a margin depends on the rounding of 16 bits.
CASES = [
    (dtype, option)
    for dtype in testing.DTYPES
    for option, (_, settings) in OPTIONS.items()
    if dtype == torch.float32 or "false_negatives" not in settings
]


def batch(names, normalize):
    """Vectors and leaves of q, pool, hard negatives and bank, with ids and guides where named."""
    scale = 1.0 if normalize else WIDTHS[-1] ** -0.5
    shapes = {"q": (40,), "pool": (2100,), "hard": (40, 3), "bank": (70,)}
    pool = draw(2100, 32, seed=1)
    vectors = {"pool": pool, "q": pool[LABELS] + draw(40, 32, seed=0)}
    vectors |= {"hard": draw(40, 3, 32, seed=2), "bank": draw(70, 32, seed=3)}
    sides = []
    for i, (name, shape) in enumerate(shapes.items()):
        if name in ("hard", "bank") and name not in names:
            sides.append(None)
            continue
        generator = torch.Generator().manual_seed(20 + i)
        ids = torch.randint(0, 300, shape, generator=generator)
        guide = draw(*shape, 6, seed=10 + i)
        has_ids = "ids" in names and name != "q"
        has_guide = "guide" in names
        sides.append(
            (scale * vectors[name], ids if has_ids else None, guide if has_guide else None)
        )
    return sides


def evaluate(function, sides, frozen, cast, guide_dtype=None):
    """Loss (widths, B) and the gradients of what has one, in the dtype that `cast` gives."""
    rows, inputs = [], []
    for i, side in enumerate(sides):
        if side is None:
            rows.append(None)
            continue
        x = cast(side[0])
        if i < 3 and not (frozen and i == 1):
            inputs.append(x.requires_grad_())
        guide = side[2] if side[2] is None or guide_dtype is None else side[2].to(guide_dtype)
        rows.append(Rows(x, side[1], guide))
    wide = torch.promote_types(rows[0].vectors.dtype, torch.float32)
    temperature = torch.tensor(0.1, dtype=wide, requires_grad=True)
    loss = function(rows, temperature)
    weights = torch.linspace(-1, 2, 40) * torch.tensor([[1.0], [0.5], [2.0]])
    grads = torch.autograd.grad((loss * weights).sum(), [*inputs, temperature])
    return loss.detach(), *grads


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("dtype", "option"), CASES, ids=str)
def test_equals_a_call_per_width(backend, dtype, option, normalize):
    names, settings = OPTIONS[option]
    matryoshka, frozen = Matryoshka(WIDTHS, normalize), "frozen" in names
    sides = batch(names, normalize)
    sides = [None if side is None else (side[0].to(dtype), *side[1:]) for side in sides]

    def in_one_pass(rows, temperature):
        q, pool, hard, bank = rows
        options = {"hard_negatives": hard, "bank": bank, "temperature": temperature, **settings}
        return info_nce(q, pool, LABELS, matryoshka=matryoshka, **options).loss

    def definition(rows, temperature):
        options = {"labels": LABELS, "temperature": temperature, **settings}
        return one_by_one(rows, matryoshka, **options)

    def own(x):
        return x.detach().clone()

    def double(x):
        return x.detach().double()

    got = evaluate(in_one_pass, sides, frozen, own)
    with use_backend("reference"):
        torchs = evaluate(definition, sides, frozen, own)
        exact = evaluate(definition, sides, frozen, double, torch.float64)
    assert got[0].shape == (3, 40)
    if dtype == torch.float32:
        torch.testing.assert_close(got[0].double(), exact[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got[-1].double(), exact[-1], rtol=1e-4, atol=1e-4)
    for x, its, wanted in zip(got[:-1], torchs[:-1], exact[:-1], strict=True):
        testing.assert_as_good(x, its, wanted)


def nll(positive, *negatives):
    return math.log(1 + sum(math.exp(n - positive) for n in negatives))


def test_values_by_hand(backend):
    # Scores of the first component 1 -2, 0 0; of both 5 -2, 6 3.
    q, pool = torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([[1.0, 2.0], [-2.0, 1.0]])
    out = info_nce(q, pool, temperature=1.0, matryoshka=Matryoshka((1, 2), normalize=False))
    wanted = [nll(1, -2), nll(0, 0), nll(5, 0), nll(3, 6)]
    assert out.loss.flatten().tolist() == pytest.approx(wanted, rel=1e-5)
    assert out.negatives.tolist() == [[1, 1], [1, 1]]
    # Cosines of the first component 1 -1, 0 0 (the second row has none); of both 1 0, 2 and 1 over root 5.
    out = info_nce(q, pool, temperature=1.0, matryoshka=Matryoshka((1, 2)))
    wanted = [nll(1, -1), nll(0, 0), nll(1, 0), nll(5**-0.5, 2 * 5**-0.5)]
    assert out.loss.flatten().tolist() == pytest.approx(wanted, rel=1e-5)


def test_zeros_in_the_first_components_have_the_gradient_of_torch(backend):
    q, pool = draw(6, 8, seed=0), draw(20, 8, seed=1)
    q[2, :3], pool[2, :3], pool[9] = 0, 0, 0
    matryoshka, found = Matryoshka((3, 8)), []
    for function in ("one pass", "definition"):
        x, y = (side.clone().requires_grad_() for side in (q, pool))
        if function == "definition":
            loss = one_by_one([Rows(x), Rows(y), None, None], matryoshka)
        else:
            loss = info_nce(x, y, matryoshka=matryoshka).loss
        grads = torch.autograd.grad(loss.sum(), (x, y))
        found.append([loss, *grads])
    for got, wanted in zip(*found, strict=True):
        scale = wanted.abs().max().item()
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * min(scale, 1.0))


def test_components_beyond_the_widest_have_no_gradient(backend):
    q, pool = (draw(n, 16, seed=n).requires_grad_() for n in (4, 30))
    loss = info_nce(q, pool, matryoshka=Matryoshka((4, 10))).loss
    for grad in torch.autograd.grad(loss.sum(), (q, pool)):
        assert grad[:, 10:].eq(0).all()
        assert grad[:, :10].ne(0).all()


def test_gradcheck_of_the_reference():
    sides = [draw(*s, 4, seed=i).double() for i, s in enumerate(((3,), (5,), (3, 2)))]
    q, pool, hard = (x.requires_grad_() for x in sides)
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def loss(q, pool, hard, temperature):
        settings = {"hard_negatives": hard, "temperature": temperature, "label_smoothing": 0.1}
        return info_nce(q, pool, matryoshka=Matryoshka((2, 4)), **settings)[:2]

    assert torch.autograd.gradcheck(loss, (q, pool, hard, temperature))


def test_same_bits_each_time_on_several_threads(backend, restore_threads):
    q, pool = (draw(n, 16, seed=n).requires_grad_() for n in (1100, 1300))

    def gradients():
        loss = info_nce(q, pool, matryoshka=Matryoshka((4, 16))).loss
        return torch.autograd.grad(loss.sum(), (q, pool))

    torch.set_num_threads(2)
    alone = gradients()
    for _ in range(3):
        assert all(map(torch.equal, gradients(), alone))


@pytest.mark.parametrize("widths", [(), (0, 4), (4, 4), (8, 4)])
def test_errors_of_widths(widths):
    with pytest.raises(ValueError, match=r"^widths="):
        Matryoshka(widths)


def test_errors():
    q = draw(4, 8, seed=0)
    with pytest.raises(ValueError, match=r"^matryoshka: width 9"):
        info_nce(q, q, matryoshka=Matryoshka((4, 9)))
    with pytest.raises(ValueError, match=r"^across: Ring"):
        info_nce(q, q, matryoshka=Matryoshka((4, 8)), across=Ring())


SCRIPT = """
import resource, torch
from embedfuse.ops import Matryoshka, info_nce

def step(q, pool):
    loss = info_nce(q, pool, matryoshka=Matryoshka((4, 8, 16))).loss.mean()
    return torch.autograd.grad(loss, (q, pool))

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB, on Linux

q, pool = (torch.randn(n, 16).requires_grad_() for n in (1024, 65536))
step(q, pool[:2048])  # libraries, threads
before = peak()
grads = step(q, pool)
print(peak() - before - sum(g.nbytes for g in grads) / 2**20)
"""


def test_memory_is_a_fraction_of_the_logits(cpu_module):
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    extra, logits = float(run.stdout), 1024 * 65536 * 4 / 2**20
    assert extra < logits / 10

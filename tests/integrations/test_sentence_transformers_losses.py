"""sentence-transformers' losses and their drop-ins give one value and one gradient."""

import inspect
import itertools
import logging

import pytest
import torch
from torch.nn.functional import normalize

from embedfuse.testing import assert_as_good

st = pytest.importorskip("sentence_transformers")

from sentence_transformers.sentence_transformer import losses  # noqa: E402
from sentence_transformers.util import cos_sim, dot_score, euclidean_sim  # noqa: E402

from embedfuse.integrations import sentence_transformers_losses as ours  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

QUERY_TO_DOC, ALL = (
    ("query_to_doc",),
    ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"),
)
DIRECTIONS = [
    (QUERY_TO_DOC, "joint"),
    (ALL, "joint"),
    (("query_to_doc", "doc_to_query"), "joint"),
    (("doc_to_doc", "query_to_doc"), "joint"),
    (("query_to_query", "query_to_doc"), "joint"),
    (QUERY_TO_DOC, "per_direction"),
    (("query_to_doc", "doc_to_query"), "per_direction"),
]
HARDNESS = [
    (None, 0.0),
    ("in_batch_negatives", 9.0),
    ("hard_negatives", 5.0),
    ("all_negatives", 3.0),
]
NAMES = ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"]


class Given(torch.nn.Sequential):
    """In place of a model: embeddings are given."""

    def forward(self, features):
        return {"sentence_embedding": features["rows"]}

    def get_embedding_dimension(self):
        return 12


MODEL = Given(torch.nn.Identity())


def columns(count: int, rows=21, dim=12, dtype=torch.float32, norm=1.0):
    """Embeddings of `count` columns, of any length around `norm`."""
    generator = torch.Generator().manual_seed(count)
    center = torch.randn(rows, dim, generator=generator)
    far = torch.randn(count, rows, dim, generator=generator)
    return [(norm * (center + x)).to(dtype).requires_grad_() for x in far]


def value_and_gradients(loss, embeddings):
    """Of any of the losses, from embeddings."""
    leaves = [x.detach().clone().requires_grad_() for x in embeddings]
    if isinstance(loss, losses.MultipleNegativesRankingLoss):
        value = loss.compute_loss_from_embeddings(leaves, None)
        value.backward()
    else:
        chunks = [list(x.split(loss.mini_batch_size)) for x in leaves]
        reps = [[part.detach().requires_grad_() for part in column] for column in chunks]
        value = loss.calculate_loss(reps, with_backward=True)
        assert not value.requires_grad
        for leaf, column in zip(leaves, reps, strict=True):
            leaf.grad = torch.cat([part.grad for part in column])
    return value.detach(), [x.grad for x in leaves]


def assert_same(name, embeddings, rtol=1e-6, **options):
    """Value within rtol; gradients as in embedfuse/testing.py, against the original's in fp64."""
    wide = [x.detach().double() for x in embeddings]
    original, drop_in = (getattr(module, name)(MODEL, **options) for module in (losses, ours))
    wanted, expected = value_and_gradients(original, embeddings)
    exact, exact_grads = value_and_gradients(original, wide)
    found, grads = value_and_gradients(drop_in, embeddings)
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=0)
    assert abs(found - exact) <= 2 * abs(wanted - exact) + rtol * abs(exact)
    for got, own, best in zip(grads, expected, exact_grads, strict=True):
        assert_as_good(got, own, best)
    return found


@pytest.mark.parametrize("negatives", [0, 1, 3])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("directions", "partition_mode"), DIRECTIONS)
def test_every_option(name, directions, partition_mode, negatives):
    for mode, strength in HARDNESS:
        options = {"hardness_mode": mode, "hardness_strength": strength}
        options |= {"directions": directions, "partition_mode": partition_mode}
        if name.startswith("Cached"):
            options["mini_batch_size"] = 8
        assert_same(name, columns(2 + negatives), **options)


@pytest.mark.parametrize("name", NAMES)
def test_scale_and_dot_product(name):
    embeddings = columns(3, norm=0.3)
    found = [
        assert_same(name, embeddings, similarity_fct=similarity, scale=scale)
        for similarity, scale in itertools.product((cos_sim, dot_score), (1.0, 40.0))
    ]
    assert len({round(x.item(), 5) for x in found}) == 4


def test_by_hand():
    q = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    d = torch.tensor([[1.0, 0.0], [4.0, 0.0]])
    loss = ours.MultipleNegativesRankingLoss(MODEL, scale=2.0)
    # Cosines 1 1 / 0 0: log(2) for both rows.
    found = loss.compute_loss_from_embeddings([q, d], None)
    assert found.item() == pytest.approx(0.693147, abs=1e-6)


def test_another_similarity_runs_the_original_and_says_so_once(caplog):
    embeddings = columns(3)

    def similarity(a, b):
        return euclidean_sim(a, b)

    with caplog.at_level(logging.WARNING, "embedfuse"):
        for name, _ in itertools.product(NAMES, range(2)):
            options = {"similarity_fct": similarity, "scale": 1.0}
            pairs = [getattr(m, name)(MODEL, **options) for m in (losses, ours)]
            wanted, found = (value_and_gradients(loss, embeddings) for loss in pairs)
            assert torch.equal(found[0], wanted[0])
            assert all(map(torch.equal, found[1], wanted[1]))
    assert [record.args[0] for record in caplog.records] == NAMES
    assert "similarity_fct=<function" in caplog.text


def test_a_learned_scale():
    embeddings = columns(3)
    grads = []
    for module in (losses, ours):
        scale = torch.nn.Parameter(torch.tensor(7.0))
        loss = module.MultipleNegativesRankingLoss(MODEL, scale=scale)
        assert dict(loss.named_parameters())["scale"] is scale
        loss.compute_loss_from_embeddings(embeddings, None).backward()
        grads.append(scale.grad)
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_another_process(name, rank, monkeypatch):
    """Two processes: its rows stand before or after ours, column by column in one order."""
    embeddings = columns(4)
    others = [normalize(x.detach().roll(1, 0), dim=1) for x in embeddings]
    calls = itertools.count()

    def gather(x):
        both = [others[next(calls) % 4].to(x.dtype), x]
        return torch.cat(both if rank else both[::-1])

    for module in (ours, *map(inspect.getmodule, (getattr(losses, name) for name in NAMES))):
        monkeypatch.setattr(module, "all_gather_with_grad", gather)
        monkeypatch.setattr(module, "get_rank", lambda: rank)
    for mode in ("in_batch_negatives", "hard_negatives"):
        options = {"hardness_mode": mode, "hardness_strength": 4.0, "directions": ALL}
        assert_same(name, embeddings, gather_across_devices=True, **options)
    assert next(calls) == 2 * 3 * 4


def test_stored_scores_stay_within_a_tile(monkeypatch):
    """The largest tensor that autograd keeps has the size of the pool, not of the scores."""
    loss = ours.MultipleNegativesRankingLoss(MODEL, directions=ALL)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        loss.compute_loss_from_embeddings(columns(2, rows=300, dim=4), None)
    assert max(kept) == 1200


def test_errors_are_the_originals():
    loss = ours.MultipleNegativesRankingLoss(MODEL)
    with pytest.raises(ValueError, match="at least 2"):
        loss.compute_loss_from_embeddings(columns(1), None)
    for name in NAMES:
        with pytest.raises(ValueError, match="query_to_doc"):
            getattr(ours, name)(MODEL, directions=("doc_to_query",))


@pytest.mark.parametrize("name", NAMES)
def test_class_config_and_citation(name):
    options = {"scale": 3.0, "directions": ALL}
    original, drop_in = (getattr(m, name)(MODEL, **options) for m in (losses, ours))
    assert isinstance(drop_in, type(original))
    assert type(drop_in).__name__ == type(original).__name__
    assert drop_in.get_config_dict() == original.get_config_dict()
    assert drop_in.citation == original.citation
    assert drop_in.temperature == original.temperature
    drop_in.scale = 5.0
    assert drop_in.get_config_dict()["scale"] == 5.0


@pytest.mark.parametrize("name", NAMES)
def test_inside_matryoshka(name):
    found = []
    for module in (losses, ours):
        inner = getattr(module, name)(MODEL)
        loss = losses.MatryoshkaLoss(MODEL, inner, [12, 5])
        embeddings = columns(3)
        features = [{"rows": x, "input_ids": torch.zeros(len(x), 1)} for x in embeddings]
        value = loss(features, None)
        value.backward()
        found.append((value.detach(), [x.grad for x in embeddings]))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [20.0, 100.0])
@pytest.mark.parametrize("autocast", [False, True])
def test_16_bits_are_as_accurate_as_the_original(dtype, scale, autocast):
    """Loss and gradients beside fp64; of a gradient what it is off by as a whole."""
    # Norms such that no gradient falls below fp16's smallest number.
    embeddings = columns(3, rows=64, dim=96, norm=0.02 if scale == 20 else 0.002)
    if not autocast:
        embeddings = [x.detach().to(dtype) for x in embeddings]
    for number, (directions, mode) in enumerate(DIRECTIONS):
        hardness, strength = HARDNESS[number % len(HARDNESS)]
        options = {"directions": directions, "partition_mode": mode, "scale": scale}
        options |= {"hardness_mode": hardness, "hardness_strength": strength}
        name = NAMES[number % 2]
        loss, original = (getattr(module, name)(MODEL, **options) for module in (ours, losses))
        exact = value_and_gradients(original, [x.double() for x in embeddings])
        with torch.autocast("cpu", dtype, enabled=autocast):
            found, own = (value_and_gradients(f, embeddings) for f in (loss, original))
        for got, wanted, best in zip(*([x[0], *x[1]] for x in (found, own, exact)), strict=True):
            assert best.shape == () or got.dtype == wanted.dtype
            error, its_error = ((x - best).norm() / best.norm() for x in (got, wanted))
            # As good up to what two orders of adding up the same numbers differ by.
            assert error <= 1.02 * its_error + 1e-6, (options, error, its_error)


def test_compiles_in_one_graph():
    options = {"directions": ALL, "hardness_mode": "hard_negatives", "hardness_strength": 3.0}
    loss = ours.MultipleNegativesRankingLoss(MODEL, **options)

    def call(*embeddings):
        return loss.compute_loss_from_embeddings(list(embeddings), None)

    embeddings = columns(3)
    found = torch.compile(call, fullgraph=True, backend="aot_eager")(*embeddings)
    assert found.item() == pytest.approx(call(*embeddings).item(), rel=1e-6)
    for got, wanted in zip(
        *(torch.autograd.grad(x, embeddings) for x in (found, call(*embeddings))), strict=True
    ):
        torch.testing.assert_close(got, wanted)

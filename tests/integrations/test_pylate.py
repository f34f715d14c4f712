"""Drop-ins for PyLate's scoring, alone and in its losses, against the library's functions."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from embedfuse.testing import assert_as_good
from tests.integrations.late import (
    DOCUMENTS,
    DTYPES,
    QUERIES,
    holed,
    padded,
    texts,
)

pytest.importorskip("pylate.models")
from pylate import losses, rank, scores

from embedfuse.integrations import pylate as drop_ins

NAMES = ("colbert_scores", "colbert_scores_pairwise", "colbert_kd_scores", "ColBERTScores")
DROP_INS, ORIGINALS = ({name: getattr(m, name) for name in NAMES} for m in (drop_ins, scores))
DROP_INS["ColBERTScores"], ORIGINALS["ColBERTScores"] = (
    drop_ins.ColBERTScores(),
    scores.ColBERTScores(),
)


@pytest.fixture
def alone(monkeypatch):
    """Removes the library's scoring functions, so that none can be called."""

    def remove():
        for name in NAMES[:3]:
            monkeypatch.setattr(scores, name, None)

    return remove


def flat(dtype=torch.float32, mask=None):
    q, q_mask = holed(texts(QUERIES, dtype))
    d, d_mask = holed(texts(DOCUMENTS, dtype, seed=2))
    return q, d, *((None, None) if mask is None else (q_mask.to(mask), d_mask.to(mask)))


def grouped(dtype=torch.float32, mask=None):
    """Two queries, three documents for each: (2, 3, tokens, dim)."""
    q, q_mask = holed(texts(QUERIES[:2], dtype))
    d, d_mask = holed(texts([*DOCUMENTS, 2, 3], dtype, seed=2))
    masks = (
        (None, None) if mask is None else (q_mask.to(mask), d_mask.unflatten(0, (2, 3)).to(mask))
    )
    return q, d.unflatten(0, (2, 3)), *masks


def call_of(name, dtype=torch.float32, mask=None):
    return (flat if name == "colbert_scores" else grouped)(dtype, mask)


def check(name, call, alone):
    reference = ORIGINALS[name](*call)
    exact = ORIGINALS[name](*(x.double() for x in call[:2]), *call[2:])
    alone()
    found = DROP_INS[name](*call)
    assert_as_good(found, reference, exact)
    return found


@pytest.mark.parametrize("mask", [None, torch.bool, torch.int64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["colbert_scores", "colbert_kd_scores", "ColBERTScores"])
def test_masks_and_dtypes(name, dtype, mask, alone):
    check(name, call_of(name, dtype, mask), alone)


@pytest.mark.parametrize("name", ["colbert_scores", "colbert_kd_scores", "ColBERTScores"])
@pytest.mark.parametrize("which", [2, 3])
def test_one_mask(name, which, alone):
    call = list(call_of(name, mask=torch.bool))
    call[which] = None
    check(name, call, alone)


@pytest.mark.parametrize("name", ["colbert_scores", "colbert_kd_scores", "ColBERTScores"])
def test_a_masked_token_is_similarity_zero(name, alone):
    """All similarities are negative here, so a document with a masked token scores 0."""
    q, d, q_mask, d_mask = call_of(name, mask=torch.bool)
    d = -d.abs()
    d_mask[0] = True
    d_mask[1] = False
    found = check(name, (q.abs(), d, q_mask, d_mask), alone)
    if name == "colbert_scores":
        assert (found[:, 0] < -0.1).all()
        assert (found[:, 1] == 0).all()


def test_hand_computed(alone):
    alone()
    q = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    d = torch.tensor([[[3.0, -1.0], [0.0, -5.0]], [[1.0, -1.0], [9.0, 9.0]]])
    mask = torch.tensor([[1, 1], [1, 0]])
    assert drop_ins.colbert_scores(q, d).tolist() == [[1.0, 27.0]]
    assert drop_ins.colbert_scores(q, d, documents_mask=mask).tolist() == [[1.0, 1.0]]
    assert drop_ins.colbert_kd_scores(q, d[None], None, mask[None]).tolist() == [[1.0, 1.0]]
    assert drop_ins.colbert_scores_pairwise(q, d[:1]).tolist() == [1.0]


def test_left_padding(alone):
    q, q_mask = padded(texts(QUERIES), "left", fill=0.5)
    d, d_mask = padded(texts(DOCUMENTS, seed=2), "left", fill=0.5)
    check("colbert_scores", (q, d, q_mask, d_mask), alone)


def test_groups_that_are_not_one_for_each_query():
    q, d, *_ = grouped()
    with pytest.raises(ValueError, match=r"documents_embeddings: 2 .* as queries, 4"):
        drop_ins.colbert_kd_scores(q.repeat(2, 1, 1), d)


@pytest.mark.parametrize("name", ["colbert_scores", "colbert_kd_scores"])
def test_one_mask_for_all_texts(name, alone):
    q, d, q_mask, d_mask = call_of(name, mask=torch.bool)
    check(name, (q, d, q_mask[:1], d_mask[:1]), alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["lists", "tensors"])
def test_pairwise(kind, dtype, alone):
    q, d = texts(QUERIES, dtype), texts(DOCUMENTS, dtype, seed=1)
    check_ = (q, d) if kind == "lists" else (padded(q)[0], padded(d)[0])
    reference = scores.colbert_scores_pairwise(*check_)
    wide = [[x.double() for x in side] for side in check_]
    exact = scores.colbert_scores_pairwise(*wide)
    alone()
    assert_as_good(drop_ins.colbert_scores_pairwise(*check_), reference, exact)


def test_pairs_end_with_the_shorter_side(alone):
    q, d = texts(QUERIES), texts(DOCUMENTS, seed=1)
    expected = scores.colbert_scores_pairwise(q[:3], d)
    alone()
    assert_close(drop_ins.colbert_scores_pairwise(q[:3], d), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["array", "list of arrays", "list of tensors", "nested"])
def test_inputs(how, name, alone):
    convert = {
        "array": lambda x: x.numpy(),
        "list of arrays": lambda x: list(x.numpy()),
        "list of tensors": list,
        "nested": lambda x: x.tolist(),
    }[how]
    q, d, q_mask, d_mask = (
        flat(mask=torch.float32) if "pair" in name else call_of(name, mask=torch.float32)
    )
    masks = (
        () if "pair" in name else (q_mask, d_mask.numpy() if name != "ColBERTScores" else d_mask)
    )
    q, d = convert(q), convert(d)
    expected = ORIGINALS[name](q, d, *masks)
    alone()
    assert_close(DROP_INS[name](q, d, *masks), expected)


@pytest.mark.parametrize("name", NAMES)
def test_gradient(name, alone):
    """Of a randomly weighted sum of the scores; no two similarities are equal."""
    q, d, *masks = flat() if "pair" in name else call_of(name, mask=torch.bool)
    masks = [] if "pair" in name else masks
    weights = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))

    def gradients(function, dtype):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (q, d)]
        found = function(*leaves, *masks)
        weight = weights.flatten()[: found.numel()].view(found.shape)
        return torch.autograd.grad((found * weight).sum(), leaves)

    exact, reference = (
        gradients(ORIGINALS[name], dtype) for dtype in (torch.float64, torch.float32)
    )
    alone()
    for found, *wanted in zip(
        gradients(DROP_INS[name], torch.float32), reference, exact, strict=True
    ):
        assert_as_good(found, *wanted)
    assert found.abs().max() > 0.01


@pytest.mark.parametrize("name", ["colbert_scores", "colbert_kd_scores", "ColBERTScores"])
def test_weights_are_the_librarys_business(name):
    q, d, q_mask, d_mask = call_of(name, mask=torch.float32)
    for weights in ((q_mask * 0.5, d_mask), (q_mask, d_mask * 0.5)):
        expected = ORIGINALS[name](q, d, *weights)
        assert torch.equal(DROP_INS[name](q, d, *weights), expected)
        assert (expected != ORIGINALS[name](q, d, q_mask, d_mask)).any()


@pytest.mark.parametrize("name", NAMES)
def test_a_backend_that_is_named_computes(name):
    q, d, *masks = flat() if "pair" in name else call_of(name, mask=torch.bool)
    masks = [] if "pair" in name else masks
    found = DROP_INS[name](q, d, *masks, backend="torch")
    assert torch.equal(found, ORIGINALS[name](q, d, *masks, backend="torch"))
    with pytest.raises(RuntimeError, match="requires CUDA"):
        DROP_INS[name](q, d, *masks, backend="flash")


@pytest.mark.parametrize("dtype", DTYPES)
def test_rerank(dtype, monkeypatch):
    lengths = [[5, 9, 2, 9], [3, 1], [4]]
    documents = [texts(n, dtype, seed=i) for i, n in enumerate(lengths, 3)]
    # Some documents have no positive similarity: their padding is the maximum.
    documents[0][2], documents[1][1] = (
        -x[j].abs() for x, j in ((documents[0], 2), (documents[1], 1))
    )
    documents[0][1] = documents[0][1].abs()
    ids = [["a", "b", "c", "d"], [7, 8], ["x"]]
    queries = texts([4, 6, 2], dtype)
    for q, d in ((queries, documents), (padded(queries)[0][:, :2], documents)):
        expected = rank.rerank(ids, q, d)
        monkeypatch.setattr(rank.rank, "colbert_scores", None)
        found = drop_ins.rerank(ids, q, d, device="cpu")
        monkeypatch.undo()
        assert [[r["id"] for r in row] for row in found] == [
            [r["id"] for r in row] for row in expected
        ]
        for row, other in zip(found, expected, strict=True):
            tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
            wanted = pytest.approx([r["score"] for r in other], abs=tolerance, rel=tolerance)
            assert [r["score"] for r in row] == wanted


def test_rerank_of_a_query_without_documents():
    q, d = texts([4, 2]), [[], texts([3], seed=2)]
    found = drop_ins.rerank([[], ["x"]], q, d)
    assert found[0] == []
    assert found[1] == drop_ins.rerank([["x"]], q[1:], d[1:])[0]


def test_rerank_of_one_array():
    q, d = texts([4])[0].numpy(), [[x.numpy() for x in texts([3, 5], seed=2)]]
    expected = rank.rerank([[1, 2]], q, d)
    found = drop_ins.rerank([[1, 2]], q, d)
    assert [r["id"] for r in found[0]] == [r["id"] for r in expected[0]]
    np.testing.assert_allclose(
        *([r["score"] for r in rows[0]] for rows in (found, expected)), rtol=1e-6
    )


class Encoder(nn.Module):
    """What PyLate's losses call on a model; ColBERT does not load with every release."""

    skiplist = [3, 4]

    def __init__(self, do_query_expansion: bool):
        super().__init__()
        self.do_query_expansion = do_query_expansion
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 24)

    def forward(self, features):
        return {**features, "token_embeddings": self.embedding(features["input_ids"])}


def features(rows: int, width: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, width, (rows, 1), generator=generator)
    return {
        "input_ids": torch.randint(50, (rows, width), generator=generator),
        "attention_mask": (torch.arange(width) < lengths).long(),
    }


@pytest.mark.parametrize("expansion", [False, True])
@pytest.mark.parametrize(
    ("kind", "metric", "settings"),
    [
        ("Contrastive", "ColBERTScores", {}),
        ("Contrastive", "ColBERTScores", {"score_mini_batch_size": 2, "temperature": 0.5}),
        ("CachedContrastive", "ColBERTScores", {"mini_batch_size": 2}),
        ("Distillation", "colbert_kd_scores", {}),
    ],
)
def test_losses(kind, metric, settings, expansion, alone):
    columns = [features(4, 8, 0), features(4, 15, 1), features(4, 15, 2)]
    labels = None
    if kind == "Distillation":
        columns, labels = [columns[0], features(12, 15, 3)], torch.rand(4, 3)

    def run(function):
        model = Encoder(expansion)
        loss = getattr(losses, kind)(model, score_metric=function, **settings)
        value = loss([dict(column) for column in columns], labels)
        value.backward()
        return value.detach(), model.embedding.weight.grad

    expected = run(ORIGINALS[metric])
    alone()
    value, gradient = run(DROP_INS[metric])
    assert_close(value, expected[0], rtol=1e-5, atol=1e-6)
    assert_close(gradient, expected[1], rtol=1e-4, atol=1e-6)
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("masked", [False, True])
def test_compiles_in_one_graph(masked):
    (q, q_mask), (d, d_mask) = (holed(texts(QUERIES, seed=2)), holed(texts(DOCUMENTS, seed=3), 1))
    masks = (q_mask, d_mask) if masked else ()
    grouped = (q_mask, d_mask[:, None]) if masked else ()
    for call in (
        lambda q, d: drop_ins.colbert_scores(q, d, *masks),
        lambda q, d: drop_ins.colbert_kd_scores(q, d[:, None], *grouped),
        drop_ins.colbert_scores_pairwise,
    ):
        torch.compiler.reset()
        found = torch.compile(call, fullgraph=True, backend="aot_eager")(q, d)
        torch.testing.assert_close(found, call(q, d))

"""Drop-ins for sentence-transformers' multi-vector scoring, against the library's functions."""

import functools

import pytest
import torch
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

pytest.importorskip("sentence_transformers.multi_vector_encoder")
from sentence_transformers.multi_vector_encoder import scoring
from sentence_transformers.util import similarity

from embedfuse.integrations.sentence_transformers import scoring as drop_ins

DROP_INS = {
    name: getattr(drop_ins, name)
    for name in (
        "maxsim",
        "maxsim_pairwise",
        "colbert_scores",
        "colbert_scores_pairwise",
        "colbert_kd_scores",
    )
}
ORIGINALS = {name: getattr(similarity if "maxsim" in name else scoring, name) for name in DROP_INS}


@pytest.fixture
def alone(monkeypatch):
    """Removes the library's scoring functions, so that none can be called."""

    def remove():
        for name in ("maxsim", "maxsim_pairwise"):
            monkeypatch.setattr(similarity, name, None)
        monkeypatch.setattr(scoring, "colbert_kd_scores", None)

    return remove


def side(kind: str, lengths: list[int], dtype, seed: int):
    """Embeddings of a kind and their mask."""
    rows = texts(lengths, dtype, seed)
    match kind:
        case "list":
            return rows, None
        case "arrays":
            return [row.numpy() for row in rows], None
        case "nested":
            return [row.tolist() for row in rows], None
        case "right" | "left":
            return padded(rows, kind)[0], None
        case "array":
            return padded(rows)[0].numpy(), None
        case "bool":
            return holed(rows)
        case "int":
            x, mask = holed(rows)
            return x, mask.long()
        case "float array":
            x, mask = holed(rows)
            return x, mask.float().numpy()
        case "list and mask":
            mask = padded(rows)[1][:, :-1]
            mask[:, 1::3] = False
            return rows, mask
        case "lists":
            return rows, [torch.arange(len(row)) % 3 != 1 for row in rows]


KINDS = (
    *("list", "arrays", "nested", "right", "left", "array", "bool", "int", "float array"),
    *("list and mask", "lists"),
)


def call_of(queries: str, documents: str, dtype=torch.float32, lengths=(QUERIES, DOCUMENTS)):
    (q, q_mask), (d, d_mask) = (
        side(kind, lengths[i], dtype, seed=i) for i, kind in enumerate((queries, documents))
    )
    return q, d, q_mask, d_mask


def widened(x):
    if isinstance(x, list):
        return [widened(row) for row in x]
    return torch.as_tensor(x).double()


def check(name, call, alone, **settings):
    q, d, *masks = call
    reference = ORIGINALS[name](q, d, *masks, **settings)
    exact = ORIGINALS[name](widened(q), widened(d), *masks, **settings)
    alone()
    found = DROP_INS[name](q, d, *masks, **settings)
    assert_as_good(found, reference, exact)
    return found


@pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("name", ["maxsim", "maxsim_pairwise"])
@pytest.mark.parametrize("documents", KINDS)
@pytest.mark.parametrize("queries", ["list", "left", "bool", "lists"])
def test_inputs(queries, documents, name, mean, alone):
    check(name, call_of(queries, documents), alone, length_normalize=mean)


@pytest.mark.parametrize("name", ["maxsim", "maxsim_pairwise", "colbert_scores_pairwise"])
@pytest.mark.parametrize("kinds", [("list", "list"), ("right", "right"), ("bool", "int")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, kinds, name, alone):
    found = check(name, call_of(*kinds, dtype), alone)
    assert found.dtype == torch.float32


def groups(dtype, masked: bool):
    """Two queries, three documents for each: (2, 3, tokens, dim)."""
    q, q_mask = holed(texts(QUERIES[:2], dtype))
    d, d_mask = (holed if masked else padded)(texts([*DOCUMENTS, 2, 3], dtype, seed=1))
    d, d_mask = (x.unflatten(0, (2, 3)) for x in (d, d_mask))
    return q, d, q_mask if masked else None, d_mask if masked else None


@pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["colbert_scores", "colbert_kd_scores"])
def test_groups(name, dtype, masked, mean, alone):
    found = check(name, groups(dtype, masked), alone, length_normalize=mean)
    assert found.shape == ((2, 6) if name == "colbert_scores" else (2, 3))


def test_hand_computed(alone):
    alone()
    q = [torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[-1.0, -1.0]])]
    d = [torch.tensor([[3.0, 1.0], [0.0, 5.0]]), torch.tensor([[1.0, 1.0]])]
    assert drop_ins.maxsim(q, d).tolist() == [[13.0, 3.0], [-4.0, -2.0]]
    assert drop_ins.maxsim_pairwise(q, d).tolist() == [13.0, -2.0]
    assert drop_ins.maxsim(q, d, length_normalize=True).tolist() == [[6.5, 1.5], [-4.0, -2.0]]


@pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("name", ["maxsim", "maxsim_pairwise"])
@pytest.mark.parametrize("kind", ["list", "right", "bool"])
def test_texts_without_tokens(kind, name, mean, alone):
    call = call_of(kind, kind, lengths=([4, 0, 2], [3, 5, 0]))
    if kind == "bool":
        call[2][1], call[3][2] = False, False
    found = check(name, call, alone, length_normalize=mean)
    empty = found[:, 2] if name == "maxsim" else found[2:]
    assert empty.max() <= -2.5e8
    assert (found[1, 0] if name == "maxsim" else found[1]) == 0


@pytest.mark.parametrize("documents", [[torch.zeros(0, 24)] * 2, torch.zeros(2, 0, 24)])
def test_only_documents_without_tokens(documents, alone):
    q = texts(QUERIES)
    expected = similarity.maxsim(q, documents)
    alone()
    assert torch.equal(drop_ins.maxsim(q, documents), expected)
    assert (expected == -1e9).all()


@pytest.mark.parametrize(("a", "b"), [([], [1]), ([1], []), ([], [])])
def test_no_texts(a, b):
    a, b = texts(a), texts(b)
    assert drop_ins.maxsim(a, b).shape == similarity.maxsim(a, b).shape == (len(a), len(b))


def test_single_texts(alone):
    q, d = texts([5])[0], texts([7], seed=1)[0]
    mask = torch.tensor([1, 0, 1, 1, 1]), torch.tensor([0, 1, 1, 1, 0, 1, 1])
    expected = similarity.maxsim(q, d), similarity.maxsim(q, d.numpy(), *mask)
    pairwise = similarity.maxsim_pairwise(q, d, *mask)
    alone()
    assert_close(drop_ins.maxsim(q, d), expected[0])
    assert_close(drop_ins.maxsim(q, d.numpy(), *mask), expected[1])
    assert_close(drop_ins.maxsim_pairwise(q, d, *mask), pairwise)


def test_a_row_of_zeros_in_a_padded_tensor_is_padding(alone):
    d, _ = padded(texts([6, 5], seed=1))
    d[0, 2] = 0
    d[1, 1, 0] = 0  # a zero in a row that has other values
    d[1, 3] = 0
    d[1, 3, -1] = -1e-30  # too small for its square
    q = texts(QUERIES)
    expected = similarity.maxsim(q, d)
    alone()
    assert_close(drop_ins.maxsim(q, d), expected)


def test_integers(alone):
    q, d = (
        [(row * 100).to(torch.int8) for row in texts(n, seed=i)]
        for i, n in enumerate([[3], [4, 2]])
    )
    expected = similarity.maxsim(q, d)
    alone()
    assert torch.equal(drop_ins.maxsim(q, d), expected)


def test_many_documents_in_parts(alone, monkeypatch):
    from embedfuse.integrations import late_interaction

    q, d = texts(QUERIES), texts([7, 1, 12, 30, 2, 5], seed=1)
    expected = similarity.maxsim(q, d)
    monkeypatch.setattr(late_interaction, "_PART", 10 * 24)
    assert [len(part) for part in late_interaction._parts(d)] == [2, 1, 1, 2]
    alone()
    assert_close(drop_ins.maxsim(q, d), expected)


@pytest.mark.parametrize("name", ["maxsim", "maxsim_pairwise", "colbert_kd_scores"])
def test_weights_of_query_tokens_are_the_librarys_business(name):
    q, d, q_mask, d_mask = groups(torch.float32, masked=True)
    d, d_mask = (d, d_mask) if "kd" in name else (d[:, 0], d_mask[:, 0])
    weights = q_mask * 0.25
    expected = ORIGINALS[name](q, d, weights, d_mask)
    assert torch.equal(DROP_INS[name](q, d, weights, d_mask), expected)
    assert (expected != ORIGINALS[name](q, d, q_mask, d_mask)).any()


@pytest.mark.parametrize("name", ["maxsim", "maxsim_pairwise"])
def test_another_device_is_the_librarys_business(name, monkeypatch):
    called = []
    monkeypatch.setattr(similarity, name, lambda *args: called.append(args[-1]))
    DROP_INS[name](texts([2]), texts([3]), device="cpu")
    assert called == []
    DROP_INS[name](texts([2]), texts([3]), device="meta")
    assert called == ["meta"]


def test_errors():
    q, d = texts(QUERIES), padded(texts(DOCUMENTS))[0]
    with pytest.raises(ValueError, match="b: 3 documents; accepted are as many as queries, 4"):
        drop_ins.maxsim_pairwise(q, d[:3])
    with pytest.raises(ValueError, match="b_mask: 5 tokens; accepted are those of b, 13"):
        drop_ins.maxsim(q, d, b_mask=torch.ones(4, 5))
    with pytest.raises(ValueError, match="accepted are float16, bfloat16"):
        drop_ins.maxsim(q, d.bfloat16())
    q, d, *_ = groups(torch.float32, masked=False)
    for queries in (q[:1], q.repeat(2, 1, 1)):
        count = len(queries)
        with pytest.raises(ValueError, match=f"documents_embeddings: 2 .* as queries, {count}"):
            drop_ins.colbert_kd_scores(queries, d)


@pytest.mark.parametrize("name", DROP_INS)
def test_gradient(name, alone):
    """Of a randomly weighted sum of the scores; no two similarities are equal."""
    grouped = "kd" in name or name == "colbert_scores"
    q, d, *masks = groups(torch.float32, masked=True)
    d, masks = (d, masks) if grouped else (d[:, 0], (masks[0], masks[1][:, 0]))
    weights = None

    def gradients(function, dtype):
        nonlocal weights
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (q, d)]
        scores = function(*leaves, *masks)
        if weights is None:
            weights = torch.randn(scores.shape, generator=torch.Generator().manual_seed(0))
        return torch.autograd.grad((scores * weights).sum(), leaves)

    exact, reference = (
        gradients(ORIGINALS[name], dtype) for dtype in (torch.float64, torch.float32)
    )
    alone()
    for found, *wanted in zip(
        gradients(DROP_INS[name], torch.float32), reference, exact, strict=True
    ):
        assert_as_good(found, *wanted)
        assert found.abs().max() > 0.1


def test_no_gradient_through_a_document_without_tokens(alone):
    q, d = padded(texts([3]))[0].requires_grad_(), texts([0, 4], seed=1)
    alone()
    scores = drop_ins.maxsim(q, d)
    (grad,) = torch.autograd.grad(scores[0, 0], q, retain_graph=True)
    assert torch.equal(grad, torch.zeros_like(q))
    (grad,) = torch.autograd.grad(scores[0, 1], q)
    assert grad.abs().max() > 0


def test_a_partial_is_named_in_a_models_card():
    from sentence_transformers.util import similarity_fct_name

    fct = functools.partial(drop_ins.colbert_scores, length_normalize=True)
    assert similarity_fct_name(fct) == "colbert_scores(length_normalize=True)"


@pytest.mark.parametrize("name", DROP_INS)
def test_fp64_is_kept(name):
    q = torch.randn(3, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    d = torch.randn(3, 7, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    best = torch.einsum("ash,bth->abst", q, d).amax(-1).sum(-1)
    if name.startswith("colbert") and "pairwise" not in name:
        d = d[:, None]
    if name not in ("maxsim", "colbert_scores"):
        best = best.diagonal()
    found = DROP_INS[name](q, d)
    assert found.dtype == torch.float64
    assert_close(found.flatten(), best.flatten(), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", DROP_INS)
def test_compiles_in_one_graph(name):
    """With masks that have holes and without masks, lists of texts, gradients."""
    (q, q_mask), (d, d_mask) = (holed(texts(QUERIES, seed=2)), holed(texts(DOCUMENTS, seed=3), 1))
    if name.startswith("colbert") and "pairwise" not in name:
        d, d_mask = d[:, None], d_mask[:, None]
    q, d = q.requires_grad_(), d.requires_grad_()
    calls = [lambda q, d: DROP_INS[name](q, d, q_mask, d_mask), DROP_INS[name]]
    if name.startswith("maxsim"):
        calls.append(lambda q, d: DROP_INS[name](list(q), list(d), length_normalize=True))
    for call in calls:
        torch.compiler.reset()
        found = torch.compile(call, fullgraph=True, backend="aot_eager")(q, d)
        expected = call(q, d)
        assert_close(found, expected)
        gradients = (torch.autograd.grad(x.sum(), (q, d)) for x in (found, expected))
        for got, wanted in zip(*gradients, strict=True):
            assert_close(got, wanted)

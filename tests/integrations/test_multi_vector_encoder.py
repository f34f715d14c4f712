"""A patched MultiVectorEncoder returns what the unpatched one returns."""

import copy
import functools
import pickle

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import embedfuse
from embedfuse.cli.corpus import stdlib_docstrings

pytest.importorskip("sentence_transformers.multi_vector_encoder")
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.multi_vector_encoder import evaluation, losses, scoring
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.util import similarity

TEXTS = [*stdlib_docstrings(12), "", "Short.", "日本語のテキスト and emoji 🎉"]
QUERIES = [TEXTS[0], "", "Short.", TEXTS[3][:40], "日本語"]
UNATTENDED = "states of query expansion tokens that no token attends to"


@pytest.fixture(scope="module")
def loaded(m3_folder):
    torch.manual_seed(0)
    modules = [
        Transformer(m3_folder, max_seq_length=80, query_length=40),
        Dense(64, 16, bias=False, module_input_name="token_embeddings"),
        MultiVectorMask(skiplist_words=[".", ","]),
        Normalize(module_input_name="token_embeddings"),
    ]
    prompts = {"query": "question: ", "document": "passage: "}
    return MultiVectorEncoder(modules=modules, device="cpu", prompts=prompts)


@pytest.fixture
def model(loaded):
    return copy.deepcopy(loaded)


def vectors(model, **kwargs):
    return model.encode_query(QUERIES, **kwargs), model.encode_document(TEXTS, **kwargs)


def assert_same_vectors(found, expected):
    for rows, wanted in zip(found, expected, strict=True):
        assert type(rows) is type(wanted)
        for row, other in zip(rows, wanted, strict=True):
            assert type(row) is type(other)
            assert row.dtype == other.dtype
            assert_close(torch.as_tensor(row), torch.as_tensor(other), rtol=0, atol=3e-6)


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"batch_size": 2}, {"convert_to_numpy": True}, {"normalize_embeddings": False}],
    ids=str,
)
def test_encode(model, kwargs):
    expected = vectors(model, **kwargs)
    report = embedfuse.patch(model)
    assert_same_vectors(vectors(model, **kwargs), expected)
    assert not report.original_calls
    assert max(report.deviations.values()) < 1e-5
    assert {"query_vectors", "document_vectors", "similarity"} <= set(report.deviations)


@pytest.mark.parametrize("name", ["maxsim", "meanmaxsim"])
def test_similarity(model, name, monkeypatch):
    model.similarity_fn_name = name
    q, d = vectors(model)
    q[1] = q[1][:0]
    d[2] = d[2][:0]
    expected = model.similarity(q, d), model.similarity_pairwise(q, d[:5])
    other = model.similarity(q, d, length_normalize=name == "maxsim")
    embedfuse.patch(model)
    monkeypatch.setattr(similarity, "maxsim", None)
    monkeypatch.setattr(similarity, "maxsim_pairwise", None)
    assert_close(model.similarity(q, d), expected[0], rtol=1e-5, atol=1e-5)
    assert_close(model.similarity_pairwise(q, d[:5]), expected[1], rtol=1e-5, atol=1e-5)
    found = model.similarity(q, d, length_normalize=name == "maxsim", chunk_elements=100)
    assert_close(found, other, rtol=1e-5, atol=1e-5)
    assert (expected[0] - other).abs().max() > 1


@pytest.mark.parametrize("strategy", ["fixed", "min"])
@pytest.mark.parametrize("attend", [False, True])
def test_query_expansion(model, attend, strategy):
    """Expansion tokens without attention are padding for the encoder, but are scored."""
    model[0].query_expansion = {"strategy": strategy, "attend": attend, "length": 32}
    expected = vectors(model)
    assert min(map(len, expected[0])) == 32
    report = embedfuse.patch(model)
    assert_same_vectors(vectors(model), expected)
    assert report.original_calls == ({} if attend else {UNATTENDED: 1})


def test_unpatch_is_exact(model):
    expected = vectors(model)
    scores = model.similarity(*expected)
    kinds = [type(m) for m in model.modules()]
    embedfuse.patch(model)
    vectors(model)
    embedfuse.unpatch(model)
    assert [type(m) for m in model.modules()] == kinds
    assert type(model) is MultiVectorEncoder
    found = vectors(model)
    for rows, wanted in zip(found, expected, strict=True):
        assert all(map(torch.equal, rows, wanted))
    assert torch.equal(model.similarity(*found), scores)


def test_patching_changes_no_mode(model):
    model.train()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    embedfuse.patch(model)
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(model, how):
    embedfuse.patch(model)
    expected = vectors(model)
    assert_same_vectors(vectors(how(model)), expected)


def test_saved_model_needs_no_embedfuse(model, tmp_path):
    embedfuse.patch(model)
    expected = vectors(model)
    model.save_pretrained(str(tmp_path))
    for file in ("modules.json", "config.json", "config_sentence_transformers.json"):
        assert "embedfuse" not in (tmp_path / file).read_text()
    loaded = MultiVectorEncoder(str(tmp_path), device="cpu")
    assert_same_vectors(vectors(loaded), expected)


def test_a_wrong_similarity_rolls_back(model, monkeypatch):
    from embedfuse.integrations.sentence_transformers import multi_vector

    right = multi_vector.maxsim
    monkeypatch.setattr(multi_vector, "maxsim", lambda *args, **kw: right(*args, **kw) * 0.99)
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(embedfuse.PatchError, match="similarity: the patched forward deviates"):
        embedfuse.patch(model)
    assert [type(m) for m in model.modules()] == kinds


def test_first_module_of_another_kind(model):
    model[0] = model[1]
    with pytest.raises(TypeError, match="its first module is Dense; accepted is Transformer"):
        embedfuse.patch(model)


def loss_and_gradient(model, loss, labels=None, texts=3):
    columns = [TEXTS[i : i + texts] for i in (0, 4, 8)]
    tasks = ("query", "document", "document")
    features = [model.preprocess(c, task=t) for c, t in zip(columns, tasks, strict=True)]
    model.zero_grad()
    value = loss(features, labels)
    value.backward()
    return value.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize(
    ("kind", "name", "labels"),
    [
        ("MultiVectorMultipleNegativesRankingLoss", "colbert_scores", None),
        ("MultiVectorDistillKLDivLoss", "colbert_kd_scores", [[0.3, 0.7]] * 3),
        ("MultiVectorMarginMSELoss", "colbert_scores_pairwise", [0.5, -0.2, 0.1]),
    ],
)
def test_losses(model, kind, name, labels, mean):
    from embedfuse.integrations.sentence_transformers import scoring as drop_ins

    model.eval()  # no dropout
    labels = None if labels is None else torch.tensor(labels)
    original, drop_in = (
        getattr(losses, kind)(
            model, similarity_fct=functools.partial(getattr(module, name), length_normalize=mean)
        )
        for module in (scoring, drop_ins)
    )
    expected = loss_and_gradient(model, original, labels)
    for patch in (lambda _: None, embedfuse.patch):
        patch(model)
        value, gradients = loss_and_gradient(model, drop_in, labels)
        assert_close(value, expected[0], rtol=1e-5, atol=1e-5)
        assert gradients.keys() == expected[1].keys()
        largest = max(g.abs().max() for g in expected[1].values())
        for parameter, gradient in gradients.items():
            assert_close(gradient, expected[1][parameter], rtol=0, atol=1e-4 * largest.item())


def test_evaluators(model, monkeypatch):
    from embedfuse.integrations.sentence_transformers.scoring import maxsim

    queries = {str(i): text for i, text in enumerate(QUERIES)}
    corpus = {str(i): text for i, text in enumerate(TEXTS)}
    retrieval = functools.partial(
        evaluation.MultiVectorInformationRetrievalEvaluator,
        *(queries, corpus, {key: {key} for key in queries}),
    )
    expected = retrieval()(model)
    samples = [
        {"query": query, "positive": [TEXTS[i]], "negative": TEXTS[5:9]}
        for i, query in enumerate(QUERIES)
    ]
    reranking = evaluation.MultiVectorRerankingEvaluator(samples)
    ranked = reranking(model)
    embedfuse.patch(model)
    monkeypatch.setattr(similarity, "maxsim", None)
    found = retrieval(score_functions={"maxsim": maxsim})(model)
    assert found == pytest.approx(expected)
    assert reranking(model) == pytest.approx(ranked)


def test_arrays(model):
    q, d = vectors(model, convert_to_numpy=True)
    assert isinstance(q[0], np.ndarray)
    expected = model.similarity(q, d)
    embedfuse.patch(model)
    assert_close(model.similarity(q, d), expected, rtol=1e-5, atol=1e-5)

"""A patched ColBERT of PyLate returns what the unpatched one returns."""

import copy
import shutil
from importlib.metadata import version

import pytest
import torch
from torch.testing import assert_close

import embedfuse
from embedfuse.cli.corpus import stdlib_docstrings

pytest.importorskip("pylate.models")
from pylate import scores
from pylate.models import ColBERT

from embedfuse.integrations import pylate as drop_ins

if int(version("sentence-transformers").split(".")[0]) > 5:
    reason = "PyLate's ColBERT does not load with sentence-transformers"
    pytest.skip(f"{reason} {version('sentence-transformers')}", allow_module_level=True)

TEXTS = [*stdlib_docstrings(12), "Short.", "日本語のテキスト and emoji 🎉"]
QUERIES = [TEXTS[0], "Short.", TEXTS[3][:40]]
UNATTENDED = "states of query expansion tokens that no token attends to"


@pytest.fixture(scope="module")
def folder(m3_folder, tmp_path_factory):
    """A transformers model and its tokenizer, nothing of sentence-transformers."""
    folder = tmp_path_factory.mktemp("colbert") / "model"
    skip = shutil.ignore_patterns("modules.json", "sentence_bert_config.json", "1_Pooling", "*.pt")
    return str(shutil.copytree(m3_folder, folder, ignore=skip))


@pytest.fixture(params=["expanded", "attended", "plain"])
def model(folder, request):
    settings = {
        "expanded": {},
        "attended": {"attend_to_expansion_tokens": True},
        "plain": {"do_query_expansion": False},
    }[request.param]
    torch.manual_seed(0)
    lengths = {"query_length": 24, "document_length": 60}
    return ColBERT(folder, device="cpu", embedding_size=16, **lengths, **settings)


def vectors(model, **kwargs):
    return [model.encode(t, is_query=t is QUERIES, **kwargs) for t in (QUERIES, TEXTS)]


def assert_same_vectors(found, expected):
    for rows, wanted in zip(found, expected, strict=True):
        for row, other in zip(rows, wanted, strict=True):
            assert type(row) is type(other)
            assert row.dtype == other.dtype
            assert_close(torch.as_tensor(row), torch.as_tensor(other), rtol=0, atol=3e-6)


@pytest.mark.parametrize(
    "kwargs", [{}, {"convert_to_tensor": True, "batch_size": 3}, {"pool_factor": 2}], ids=str
)
def test_encode(model, kwargs):
    expected = vectors(model, **kwargs)
    report = embedfuse.patch(model)
    assert_same_vectors(vectors(model, **kwargs), expected)
    unattended = model.do_query_expansion and not model.attend_to_expansion_tokens
    assert report.original_calls == ({UNATTENDED: 1} if unattended else {})
    assert max(report.deviations.values()) < 1e-5


def test_similarity(model):
    q, d = vectors(model, convert_to_tensor=True)
    q, d = (torch.nn.utils.rnn.pad_sequence(x, batch_first=True) for x in (q, d))
    masks = torch.ones(q.shape[:2]), torch.ones(d.shape[:2])
    masks[1][1::2, 5:] = 0
    expected = model.similarity(q, d, *masks), model.similarity_pairwise(q, d[: len(q)])
    embedfuse.patch(model)
    assert model.similarity is drop_ins.colbert_scores
    assert model.similarity_pairwise is drop_ins.colbert_scores_pairwise
    assert_close(model.similarity(q, d, *masks), expected[0])
    assert_close(model.similarity_pairwise(q, d[: len(q)]), expected[1])


def test_unpatch_is_exact(model):
    longest = model.max_seq_length
    kinds = [type(m) for m in model.modules()]
    embedfuse.patch(model)
    assert model.max_seq_length == longest
    embedfuse.unpatch(model)
    assert [type(m) for m in model.modules()] == kinds
    twin = copy.deepcopy(model)
    expected = vectors(model)
    embedfuse.patch(model)
    vectors(model)
    embedfuse.unpatch(model)
    for rows, wanted, other in zip(vectors(model), expected, vectors(twin), strict=True):
        for row, one, two in zip(rows, wanted, other, strict=True):
            assert (row == one).all()
            assert (row == two).all()
    assert model.similarity is scores.colbert_scores


def test_training_features(model):
    """Losses call the model on the output of `tokenize`; there too the padding of queries may be scored."""
    for t, is_query in ((QUERIES, True), (TEXTS, False)):
        features = model.tokenize(t, is_query=is_query)
        expected = model(dict(features))["token_embeddings"]
        with embedfuse.patched(model):
            found = model(dict(features))["token_embeddings"]
        kept = features["attention_mask"].bool()
        if is_query and model.do_query_expansion:
            kept = torch.ones_like(kept)
        assert_close(found[kept], expected[kept], rtol=0, atol=3e-5)


def test_saved_model_needs_no_embedfuse(model, tmp_path):
    embedfuse.patch(model)
    expected = vectors(model)
    model.save_pretrained(str(tmp_path))
    assert "embedfuse" not in (tmp_path / "modules.json").read_text()
    assert_same_vectors(vectors(ColBERT(str(tmp_path), device="cpu")), expected)

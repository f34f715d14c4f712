"""A patched …ForSequenceClassification gives the original's scores, losses and gradients."""

import copy
import pickle

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

import embedfuse
from embedfuse.patching.forward import classifier
from embedfuse.patching.forward import encoder as reader
from embedfuse.testing import assert_as_good
from tests.patching.encoders import logits, make_batch, make_classifier

TIGHT = {"rtol": 0, "atol": 2e-5}
# With five labels 160 numbers: of a few, one rounding error may well be twice another.
LENGTHS = (20, 3, 11, 1, 30, 30, 5, 17) * 4


@pytest.fixture
def model(family):
    return make_classifier(family)


@pytest.mark.parametrize("lengths", [(20, 3, 11, 1), (7,), (9, 9, 9), (1, 64), (60, 60, 2)])
@pytest.mark.parametrize("labels", [1, 3])
def test_logits(family, lengths, labels):
    model = make_classifier(family, num_labels=labels)
    batch = make_batch(model, lengths)
    with torch.no_grad():
        expected = model(**batch)
        report = embedfuse.patch(model)
        found = model(**batch)
    assert type(found) is type(expected)
    assert found.keys() == expected.keys() == {"logits"}
    assert found.logits.shape == (len(lengths), labels)
    assert_close(found.logits, expected.logits, **TIGHT)
    assert not report.original_calls


def test_nothing_is_padded_back(model, monkeypatch):
    """The head gets one row per sequence."""
    seen = []
    make_output = reader.PackedEncoder.make_output
    monkeypatch.setattr(
        reader.PackedEncoder,
        "make_output",
        lambda self, states, **kw: seen.append(states.shape) or make_output(self, states, **kw),
    )
    embedfuse.patch(model)
    seen.clear()
    logits(model, make_batch(model))
    assert seen == [(4, 1, 48)]


def test_segments_of_a_pair(model):
    batch = make_batch(model)
    batch["token_type_ids"] = (torch.arange(20) > 5).long() * batch["attention_mask"]
    expected = logits(model, batch)
    report = embedfuse.patch(model)
    assert_close(logits(model, batch), expected, **TIGHT)
    batch["token_type_ids"] = torch.zeros_like(batch["token_type_ids"])
    assert (logits(model, batch) - expected).abs().max() > 1e-2  # they do matter
    assert not report.original_calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_error_is_at_most_twice_the_originals(family, dtype):
    exact = make_classifier(family, num_labels=5).double()
    model = make_classifier(family, num_labels=5).to(dtype)
    exact.load_state_dict(model.state_dict())
    batch = make_batch(model, LENGTHS)
    reference = logits(exact, batch)
    own = logits(model, batch)
    assert own.dtype == dtype
    embedfuse.patch(model)
    assert_as_good(logits(model, batch), own, reference)


def test_positional_arguments_and_tuples(model):
    batch = make_batch(model)
    labels = torch.linspace(-1, 1, 4)
    call = (batch["input_ids"], batch["attention_mask"], None, None, None, labels)
    with torch.no_grad():
        expected = model(*call, return_dict=False)
        report = embedfuse.patch(model)
        found = model(*call, return_dict=False)
        model.config.return_dict = False
        again = model(*call)
    assert isinstance(found, tuple)
    assert isinstance(again, tuple)
    for outputs in (found, again):
        assert len(outputs) == len(expected) == 2
        assert_close(outputs[0], expected[0], **TIGHT)
        assert_close(outputs[1], expected[1], **TIGHT)
    assert not report.original_calls


LOSSES = {
    "regression": (1, torch.linspace(-1, 1, 4)),
    "regression of several": (3, torch.linspace(-1, 1, 12).view(4, 3)),
    "single label": (3, torch.tensor([0, 2, 1, 1])),
    "multi label": (3, torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]])),
}


def loss_and_gradients(model, batch, **kwargs):
    output = model(**batch, **kwargs)
    output.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return output.loss.detach(), gradients


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("training", [False, True])
def test_loss_and_gradients(family, kind, training):
    count, labels = LOSSES[kind]
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = make_classifier(family, num_labels=count, **off).double().train(training)
    if kind == "regression of several":
        model.config.problem_type = "regression"
    labels = labels.double() if labels.is_floating_point() else labels
    patched = copy.deepcopy(model)
    report = embedfuse.patch(patched)
    if training:
        patched.gradient_checkpointing_enable()
    batch = make_batch(model)
    expected, expected_gradients = loss_and_gradients(model, batch, labels=labels)
    # transformers' Trainer passes the second.
    found, gradients = loss_and_gradients(patched, batch, labels=labels, num_items_in_batch=4)
    assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert gradients.keys() == expected_gradients.keys()
    for name, value in expected_gradients.items():
        assert_close(gradients[name], value, rtol=1e-8, atol=1e-10, msg=name)
    assert patched.config.problem_type == model.config.problem_type is not None
    assert not report.original_calls


def test_dropout_of_the_head_acts(family):
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = make_classifier(family, **off, classifier_dropout=0.5)
    embedfuse.patch(model)
    batch = make_batch(model)
    assert torch.equal(logits(model, batch), logits(model, batch))
    model.train()
    assert (logits(model, batch) - logits(model, batch)).abs().max() > 1e-2


def test_autocast(family):
    model = make_classifier(family, num_labels=5)
    patched = copy.deepcopy(model)
    embedfuse.patch(patched)
    batch = make_batch(model, LENGTHS)
    exact = logits(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = logits(model, batch), logits(patched, batch)
    assert (expected - exact).abs().max() > 1e-3  # autocast is on
    assert_as_good(found, expected, exact)


def snapshot(model) -> dict:
    return {
        "classes": [type(m) for m in model.modules()],
        "attributes": [set(m.__dict__) for m in model.modules()],
        "parameters": {n: (id(p), p.clone()) for n, p in model.named_parameters()},
        "storages": len({p.untyped_storage().data_ptr() for p in model.parameters()}),
        "logits": logits(model, make_batch(model)),
    }


def assert_unchanged(model, before):
    after = snapshot(model)
    for what in ("classes", "attributes", "storages"):
        assert after[what] == before[what], what
    for name, (identity, value) in before["parameters"].items():
        assert after["parameters"][name][0] == identity
        assert torch.equal(after["parameters"][name][1], value)
    assert torch.equal(after["logits"], before["logits"])


def test_unpatch_is_exact(model):
    before = snapshot(model)
    report = embedfuse.patch(model)
    assert embedfuse.patch(model) is report is embedfuse.report(model)
    assert report.model == before["classes"][0].__name__
    assert report.fused == ["3 layers without padding"]
    assert report.refused == {}
    assert set(report.deviations) == {"logits"}
    assert report.deviations["logits"] < 1e-5
    assert report.memory_bytes == 0
    embedfuse.unpatch(model)
    assert_unchanged(model, before)


def test_a_wrong_row_is_found_and_rolled_back(model, monkeypatch):
    before = snapshot(model)
    run = reader.PackedEncoder.run

    def last_rows(self, batch, pooling):
        return run(self, batch, "last")

    monkeypatch.setattr(classifier.PackedClassifier, "run", last_rows)
    with pytest.raises(embedfuse.PatchError, match="logits: the patched forward deviates by"):
        embedfuse.patch(model)
    assert_unchanged(model, before)


def test_base_model_patched_on_its_own(model):
    embedfuse.patch(model.base_model)
    base = model.base_model_prefix
    with pytest.raises(embedfuse.PatchError, match=f"{base} is patched on its own: unpatch it"):
        embedfuse.patch(model)
    embedfuse.unpatch(model.base_model)
    embedfuse.patch(model)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(model, how):
    batch = make_batch(model)
    before = logits(model, batch)
    embedfuse.patch(model)
    expected = logits(model, batch)
    twin = how(model)
    assert torch.equal(logits(twin, batch), expected)
    with torch.no_grad():
        twin.base_model.encoder.layer[0].attention.self.query.weight.zero_()
    assert torch.equal(logits(model, batch), expected)  # nothing is shared
    embedfuse.unpatch(twin)
    embedfuse.unpatch(model)
    assert type(twin) is type(model)
    assert torch.equal(logits(model, batch), before)


def test_save_pretrained(model, tmp_path):
    embedfuse.patch(model)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    embedfuse.unpatch(model)
    assert not info["missing_keys"]
    assert loaded.config.architectures == [type(model).__name__]
    assert type(loaded) is type(model)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_cast(model):
    patched = copy.deepcopy(model)
    embedfuse.patch(patched)
    for m in (model, patched):
        m.double()
    batch = make_batch(model)
    assert_close(logits(patched, batch), logits(model, batch), rtol=0, atol=1e-10)


@pytest.mark.slow
def test_torch_compile():
    model = make_classifier("xlm_roberta")  # as the others are compiled: the original is traced
    patched = copy.deepcopy(model)
    embedfuse.patch(patched)
    compiled = torch.compile(patched, backend="aot_eager", dynamic=True)
    batch = make_batch(model, (9, 4))
    assert_close(logits(compiled, batch), logits(model, batch), **TIGHT)


def test_empty_batch(model):
    embedfuse.patch(model)
    found = logits(model, {"input_ids": torch.empty(0, 5, dtype=torch.long)})
    assert found.shape == (0, 1)

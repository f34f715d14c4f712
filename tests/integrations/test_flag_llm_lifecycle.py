"""Patching, checking, undoing, copying and dropping a FlagLLMModel, and what it refuses."""

import copy
import gc
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

import embedfuse
from embedfuse.nn.program import Program
from embedfuse.patching.swap import Patched
from embedfuse.pipeline.pipeline import EmbeddingPipeline
from tests.integrations.flag import TEXTS
from tests.integrations.flag_llm import assert_same, load, make_qwen2

fe = pytest.importorskip("FlagEmbedding")


@pytest.fixture(scope="module")
def folder(e5_mistral_folder) -> str:
    return e5_mistral_folder


@pytest.fixture
def model(folder):
    return load(folder)


@pytest.fixture
def before(model):
    return model.encode(TEXTS[:12])


def assert_as_loaded(model, before) -> None:
    for thing in (model, model.model):
        assert not isinstance(thing, Patched)
        assert not hasattr(thing, "_embedfuse")
    assert type(model) is fe.FlagLLMModel
    assert np.array_equal(model.encode(TEXTS[:12]), before)


def test_class_and_attributes_stay(model):
    attributes = set(vars(model))
    embedfuse.patch(model)
    assert isinstance(model, fe.FlagLLMModel)
    assert type(model).__name__ == fe.FlagLLMModel.__name__
    assert type(model).__module__ == fe.FlagLLMModel.__module__
    assert set(vars(model)) == attributes | {"_embedfuse"}


def test_unpatch_is_exact(model, before):
    state = {name: p.clone() for name, p in model.model.state_dict().items()}
    report = embedfuse.patch(model)
    assert embedfuse.patch(model) is report
    assert embedfuse.report(model) is report
    assert_same(model.encode(TEXTS[:12]), before)
    embedfuse.unpatch(model)
    assert_as_loaded(model, before)
    for name, p in model.model.state_dict().items():
        assert torch.equal(p, state[name]), name
        assert p.untyped_storage().nbytes() == p.nbytes, name
    with pytest.raises(ValueError, match="this BaseLLMEmbedder is not patched"):
        embedfuse.unpatch(model)


def test_patched_context(model, before):
    with embedfuse.patched(model) as report:
        assert embedfuse.report(model) is report
        assert_same(model.encode(TEXTS[:12]), before)
    assert_as_loaded(model, before)


def test_a_model_that_was_patched_before(model, before):
    report = embedfuse.patch(model.model)
    assert embedfuse.patch(model) is report
    assert_same(model.encode(TEXTS[:12]), before)
    embedfuse.unpatch(model)
    assert embedfuse.report(model.model) is report  # stays as it was
    embedfuse.unpatch(model.model)
    assert_as_loaded(model, before)


def test_only_the_model_inside_unpatched(model, before):
    report = embedfuse.patch(model)
    embedfuse.unpatch(model.model)
    assert np.array_equal(model.encode(TEXTS[:12]), before)
    assert report.original_calls == {"the model inside is not patched": 1}
    embedfuse.unpatch(model)
    assert_as_loaded(model, before)


def test_a_mode_is_left_as_it_was(model):
    model.model.train()
    embedfuse.patch(model)
    assert model.model.training
    assert model.model.layers[0].training


def wrong_layer(monkeypatch):
    run = Program.run
    monkeypatch.setattr(Program, "run", lambda *args: run(*args) * 1.01)


def wrong_pooling(monkeypatch):
    make = EmbeddingPipeline.__init__

    def wrong(self, *args, pooling, **kwargs):
        make(self, *args, pooling="cls", **kwargs)

    monkeypatch.setattr(EmbeddingPipeline, "__init__", wrong)


@pytest.mark.parametrize(
    ("breakage", "output"), [(wrong_layer, "last_hidden_state"), (wrong_pooling, "embeddings")]
)
def test_a_wrong_forward_is_found_and_undone(model, before, breakage, output):
    with pytest.MonkeyPatch.context() as monkeypatch:
        breakage(monkeypatch)
        with pytest.raises(embedfuse.PatchError, match=f"{output}: the patched forward deviates"):
            embedfuse.patch(model)
    assert_as_loaded(model, before)
    embedfuse.patch(model)


def test_an_error_while_patching_undoes_it(model, before, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(EmbeddingPipeline, "stream", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            embedfuse.patch(model)
    assert_as_loaded(model, before)


def test_a_tokenizer_that_cannot_pad_is_refused_as_before(model, before):
    """FlagEmbedding pads even one text, so it cannot encode with this tokenizer, and nothing is patched."""
    pad, model.tokenizer.pad_token = model.tokenizer.pad_token, None
    for call in (model.encode, embedfuse.patch):
        with pytest.raises(ValueError, match="does not have a padding token"):
            call(model if call is embedfuse.patch else TEXTS[:2])
    model.tokenizer.pad_token = pad
    assert_as_loaded(model, before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), r"Linear; accepted are BertModel"),
        (
            lambda: BertModel(BertConfig(hidden_size=12, num_hidden_layers=1)),
            r"the model inside is a BertModel; accepted are MistralModel, LlamaModel, Qwen2Model",
        ),
    ],
)
def test_other_models_inside_are_refused(model, before, make, message):
    inner, model.model = model.model, make()
    with pytest.raises(TypeError, match=message):
        embedfuse.patch(model)
    model.model = inner
    assert_as_loaded(model, before)


def test_other_decoder_embedders_are_refused(folder):
    model = fe.FlagICLModel(folder, use_fp16=False, devices="cpu")
    with pytest.raises(TypeError, match=r"icl\.ICLLLMEmbedder; accepted are .*BaseLLMEmbedder"):
        embedfuse.patch(model)


@pytest.mark.parametrize("call", ["encode", "encode_queries", "encode_corpus"])
@pytest.mark.parametrize("numpy", [True, False])
def test_further_arguments_go_to_the_original(model, call, numpy):
    arguments = {"pad_to_multiple_of": 8, "convert_to_numpy": numpy, "max_length": 20}
    expected = getattr(model, call)(TEXTS[:8], **arguments)
    report = embedfuse.patch(model)
    assert_same(getattr(model, call)(TEXTS[:8], **arguments), expected)
    assert report.original_calls == {"called with pad_to_multiple_of": 1}


def test_a_hook_on_the_model_runs(model, before):
    report = embedfuse.patch(model)
    calls = []
    hook = model.model.register_forward_hook(lambda *_: calls.append(1))
    assert_same(model.encode(TEXTS[:12]), before)
    hook.remove()
    assert len(calls) == 2  # FlagEmbedding runs its first batch twice
    assert report.original_calls == {"the model has a hook": 1}
    assert_same(model.encode(TEXTS[:12]), before)
    assert len(calls) == 2


def test_a_hook_on_a_layer_runs(model, before):
    report = embedfuse.patch(model)
    calls = []
    hook = model.model.layers[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    assert_same(model.encode(TEXTS[:12]), before)
    hook.remove()
    assert len(calls) == 1
    assert report.original_calls == {"layers.1.mlp has a hook": 1}
    assert_same(model.encode(TEXTS[:12]), before)


def test_changed_weights_are_seen(model, before):
    embedfuse.patch(model)
    with torch.no_grad():
        model.model.layers[2].self_attn.v_proj.weight.mul_(2)
        model.model.norm.weight[3] = 5
    found = model.encode(TEXTS[:12])
    assert np.abs(found - before).max() > 0.01
    embedfuse.unpatch(model)
    assert_same(model.encode(TEXTS[:12]), found)


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        (["a", None], TypeError, r"texts\[1\]: NoneType; accepted is str"),
        (["a", b"b"], TypeError, r"texts\[1\]: bytes; accepted is str"),
        ([("a", "b")], TypeError, r"texts\[0\]: tuple; accepted is str"),
        (["a", "b", "c\ud800"], ValueError, r"texts\[2\]: lone surrogate"),
        (None, TypeError, "NoneType"),
        (7, TypeError, "int"),
        (iter(["a"]), TypeError, "has no len"),
    ],
)
def test_bad_texts(model, texts, error, message):
    embedfuse.patch(model)
    with pytest.raises(error, match=message):
        model.encode(texts)


@pytest.mark.parametrize("batch_size", [0, -3])
def test_bad_batch_size(model, batch_size):
    embedfuse.patch(model)
    with pytest.raises(ValueError, match=f"batch_size={batch_size}: accepted is 1 or more"):
        model.encode(["a"], batch_size=batch_size)


@pytest.mark.parametrize("max_length", [0, 1, 2])
@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_a_max_length_without_room(folder, tmp_path, kind, max_length):
    """Where the special tokens do not fit, the tokenizer truncates nothing."""
    model = load(folder if kind == "mistral" else make_qwen2(tmp_path))
    texts = ["word " * 20, "a word"]
    expected = model.encode(texts, max_length=max_length)
    embedfuse.patch(model)
    assert_same(model.encode(texts, max_length=max_length), expected)


def test_a_negative_max_length_raises_as_before(model):
    for call in (model.encode, embedfuse.patch, model.encode):
        if call is embedfuse.patch:
            embedfuse.patch(model)
        else:
            with pytest.raises(OverflowError, match="negative"):
                call(["a word"], max_length=-1)


def test_a_text_without_tokens(tmp_path):
    """The original runs: it pools a padding token there, and wrong tokens in a left-padded batch."""
    model = load(make_qwen2(tmp_path))
    model.tokenizer.backend_tokenizer.post_processor = None
    texts = ["a", "", "b"]
    report = embedfuse.patch(model)
    found = model.encode(texts)
    assert report.original_calls["a text without tokens"] == 1
    assert model.encode(["a", " "]).shape == (2, 48)
    embedfuse.unpatch(model)
    model.tokenizer.backend_tokenizer.post_processor = None
    assert_same(found, model.encode(texts))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(model, before, copied):
    embedfuse.patch(model)
    other = copied(model)
    assert type(other) is type(model)
    assert other.model is not model.model
    assert_same(other.encode(TEXTS[:12]), before)
    embedfuse.unpatch(other)
    assert_as_loaded(other, before)
    assert_same(model.encode(TEXTS[:12]), before)
    embedfuse.unpatch(model)
    assert_as_loaded(model, before)
    assert b"embedfuse" not in pickle.dumps(model)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_dropping_it_raises_nothing(folder):
    for undo in (False, True):
        model = load(folder)
        embedfuse.patch(model)
        model.encode(TEXTS[:3])
        if undo:
            embedfuse.unpatch(model)
        del model
        gc.collect()


_SCRIPT = """
import sys, FlagEmbedding, embedfuse
model = FlagEmbedding.FlagLLMModel(sys.argv[1], use_fp16=False, devices="cpu")
embedfuse.patch(model)
print(model.encode(["at the end of the program"]).shape)
"""


@pytest.mark.slow  # the wrapper's code is that of test_flag_embedding_lifecycle.py
def test_the_end_of_the_program(folder):
    command = [sys.executable, "-c", _SCRIPT, folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert done.stdout.strip() == "(1, 64)"
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.slow  # as above
def test_several_devices(folder, before):
    """FlagEmbedding pickles the object into one process per device."""
    model = load(folder, devices=["cpu", "cpu"])
    embedfuse.patch(model)
    try:
        found = model.encode(TEXTS[:12])
        assert model.pool is not None
    finally:
        model.stop_self_pool()
    assert_same(found, before)

"""Patching, checking, undoing, copying and dropping a BGEM3FlagModel."""

import copy
import gc
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import embedfuse
from embedfuse.nn.program import Program
from embedfuse.pipeline.pipeline import EmbeddingPipeline
from tests.integrations.flag import TEXTS
from tests.integrations.flag_m3 import ALL, assert_same, load

fe = pytest.importorskip("FlagEmbedding")


@pytest.fixture
def model(m3_folder):
    return load(m3_folder)


@pytest.fixture
def before(model):
    return model.encode(TEXTS[:12], **ALL)


def assert_bit_equal(found: dict, expected: dict) -> None:
    assert np.array_equal(found["dense_vecs"], expected["dense_vecs"])
    assert found["lexical_weights"] == expected["lexical_weights"]
    for a, b in zip(found["colbert_vecs"], expected["colbert_vecs"], strict=True):
        assert np.array_equal(a, b)


def assert_as_loaded(model, before: dict) -> None:
    for thing in (model, model.model, model.model.model):
        assert "embedfuse" not in type(thing).__mro__[0].__init__.__module__
        assert not hasattr(thing, "_embedfuse")
    assert type(model) is fe.BGEM3FlagModel
    assert_bit_equal(model.encode(TEXTS[:12], **ALL), before)


def test_class_and_attributes_stay(model):
    attributes = set(vars(model))
    embedfuse.patch(model)
    assert isinstance(model, fe.BGEM3FlagModel)
    assert type(model).__name__ == fe.BGEM3FlagModel.__name__
    assert type(model).__module__ == fe.BGEM3FlagModel.__module__
    assert set(vars(model)) == attributes | {"_embedfuse"}


def test_unpatch_is_exact(model, before):
    names = {name: p.data_ptr() for name, p in model.model.named_parameters()}
    state = {name: p.clone() for name, p in model.model.state_dict().items()}
    embedfuse.patch(model)
    embedfuse.unpatch(model)
    assert_as_loaded(model, before)
    assert names.keys() == dict(model.model.named_parameters()).keys()
    for name, p in model.model.state_dict().items():
        assert torch.equal(p, state[name]), name
    with pytest.raises(ValueError, match="this M3Embedder is not patched"):
        embedfuse.unpatch(model)


def test_patch_twice_is_one_patch(model, before):
    report = embedfuse.patch(model)
    assert embedfuse.patch(model) is report
    embedfuse.unpatch(model)
    assert_as_loaded(model, before)


def test_patched_context(model, before):
    with embedfuse.patched(model) as report:
        assert embedfuse.report(model) is report
        assert_same(model.encode(TEXTS[:12], **ALL), before)
    assert_as_loaded(model, before)


def test_an_encoder_that_was_patched_before(model, before):
    report = embedfuse.patch(model.model.model)
    assert embedfuse.patch(model) is report
    assert_same(model.encode(TEXTS[:12], **ALL), before)
    embedfuse.unpatch(model)
    assert embedfuse.report(model.model.model) is report  # stays as it was
    embedfuse.unpatch(model.model.model)
    assert_as_loaded(model, before)


def test_a_mode_is_left_as_it_was(model):
    model.model.train()
    embedfuse.patch(model)
    assert model.model.training
    assert model.model.model.encoder.layer[0].training


def wrong_layer(monkeypatch):
    run = Program.run
    monkeypatch.setattr(Program, "run", lambda *args: run(*args) * 1.01)


def wrong_head(monkeypatch):
    forward = EmbeddingPipeline._forward

    def wrong(self, *args):
        vectors = forward(self, *args)
        return replace(vectors, multi=vectors.multi + 0.1)

    monkeypatch.setattr(EmbeddingPipeline, "_forward", wrong)


def fewer_tokens(monkeypatch):
    monkeypatch.setattr(EmbeddingPipeline, "_special_ids", lambda self: tuple(range(1000)))


def more_tokens(monkeypatch):
    monkeypatch.setattr(EmbeddingPipeline, "_special_ids", lambda self: ())


@pytest.mark.parametrize(
    ("breakage", "output"),
    [
        (wrong_layer, "last_hidden_state"),
        (wrong_head, "colbert_vecs"),
        (fewer_tokens, "lexical_weights"),
        (more_tokens, "lexical_weights"),
    ],
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


def test_a_model_without_any_lexical_weight(model):
    with torch.no_grad():
        model.model.sparse_linear.bias.fill_(-100)
    expected = model.encode(TEXTS[:5], **ALL)
    assert expected["lexical_weights"] == [{}] * 5
    embedfuse.patch(model)
    assert_same(model.encode(TEXTS[:5], **ALL), expected)


def test_a_weight_next_to_zero_does_not_hinder(model):
    # After rounding such a weight may be 0, which is no entry.
    state = model.encode("One", return_colbert_vecs=True)
    assert state["colbert_vecs"] is not None
    ids = model.tokenizer("One", return_tensors="pt")
    with torch.no_grad():
        hidden = model.model.model(**ids).last_hidden_state[0]
        scores = hidden @ model.model.sparse_linear.weight[0]
        model.model.sparse_linear.bias.fill_(-scores[1].item() + 1e-7)
    report = embedfuse.patch(model)
    assert report.deviations["lexical_weights"] < 1e-4


def test_another_encoder_is_refused(model, before):
    encoder = model.model.model
    model.model.model = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"Linear; accepted are BertModel"):
        embedfuse.patch(model)
    model.model.model = encoder
    assert_as_loaded(model, before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(model, before, copied):
    embedfuse.patch(model)
    other = copied(model)
    assert type(other) is type(model)
    assert other.model is not model.model
    assert_same(other.encode(TEXTS[:12], **ALL), before)
    embedfuse.unpatch(other)
    assert_as_loaded(other, before)
    assert_same(model.encode(TEXTS[:12], **ALL), before)
    embedfuse.unpatch(model)
    assert_as_loaded(model, before)


def test_a_copy_of_an_unpatched_model_loads_without_embedfuse(model):
    embedfuse.patch(model)
    embedfuse.unpatch(model)
    assert b"embedfuse" not in pickle.dumps(model)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_dropping_it_raises_nothing(m3_folder):
    for undo in (False, True):
        model = load(m3_folder)
        embedfuse.patch(model)
        model.encode(TEXTS[:3], **ALL)
        if undo:
            embedfuse.unpatch(model)
        del model
        gc.collect()


_SCRIPT = """
import sys, FlagEmbedding, embedfuse
model = FlagEmbedding.BGEM3FlagModel(sys.argv[1], use_fp16=False, devices="cpu")
embedfuse.patch(model)
print(model.encode(["at the end of the program"])["dense_vecs"].shape)
"""


def test_the_end_of_the_program(m3_folder):
    command = [sys.executable, "-c", _SCRIPT, m3_folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert done.stdout.strip() == "(1, 64)"
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.slow  # tests/integrations/test_processes.py sends the object to a process
def test_several_devices(m3_folder, before):
    """FlagEmbedding pickles the object into one process per device."""
    model = fe.BGEM3FlagModel(m3_folder, use_fp16=False, devices=["cpu", "cpu"])
    embedfuse.patch(model)
    try:
        found = model.encode(TEXTS[:12], **ALL)
        assert model.pool is not None
    finally:
        model.stop_self_pool()
    assert_same(found, before)

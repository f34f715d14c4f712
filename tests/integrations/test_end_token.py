"""patch makes a wrapper's tokenizer add the end token that the checkpoint expects; unpatch undoes it."""

import copy
import pickle

import numpy as np
import pytest
from tokenizers.processors import ByteLevel

import embedfuse
from tests.integrations.flag_llm import load as load_flag
from tests.pipeline.families import (
    TEXTS,
    Plain,
    make,
    write_llama_tokenizer,
    write_qwen_tokenizer,
    write_sentence_transformers,
)

st = pytest.importorskip("sentence_transformers")
ADDS = {"add_bos_token": True, "add_eos_token": True}


def checkpoint(folder, kind="mistral", pooling="lasttoken"):
    make(folder, kind)
    write_sentence_transformers(folder, pooling)
    return folder


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    folder = checkpoint(tmp_path_factory.mktemp("mine") / "mine")
    write_llama_tokenizer(folder, **ADDS)
    return folder


def load(folder):
    return st.SentenceTransformer(str(folder), device="cpu")


def vectors(folder, end):
    return Plain(folder, end)(TEXTS, "last").float().numpy()


def test_repaired_and_undone(mistral, caplog):
    model = load(mistral)
    before = model.encode(TEXTS)
    state = model.tokenizer.backend_tokenizer.to_str()
    np.testing.assert_allclose(before, vectors(mistral, None), rtol=0, atol=2e-5)
    report = embedfuse.patch(model)
    assert report.repaired == {
        "tokenizer": "added no </s>, which the checkpoint expects after each text"
    }
    assert "  repaired      tokenizer: added no </s>" in str(report)
    assert caplog.text.count("adds no </s>") == 1
    found = model.encode(TEXTS)
    np.testing.assert_allclose(found, vectors(mistral, 2), rtol=0, atol=2e-5)
    assert np.abs(found - before).max() > 0.1
    assert not report.original_calls
    embedfuse.unpatch(model)
    assert model.tokenizer.backend_tokenizer.to_str() == state
    assert np.array_equal(model.encode(TEXTS), before)
    assert "_embedfuse_end" not in vars(model)


def test_a_post_processor_set_since_stays(mistral):
    model = load(mistral)
    embedfuse.patch(model)
    backend = model.tokenizer.backend_tokenizer
    backend.post_processor = ByteLevel(trim_offsets=False)
    state = backend.to_str()
    embedfuse.unpatch(model)
    assert backend.to_str() == state


def test_a_cut_text_ends_in_it_too(mistral):
    model = load(mistral)
    model.max_seq_length = 12
    embedfuse.patch(model)
    text = "word after word " * 50
    expected = Plain(mistral, 2)([text], "last", 12).float().numpy()
    np.testing.assert_allclose(model.encode([text]), expected, rtol=0, atol=2e-5)
    assert model.preprocess([text])["input_ids"][0, -1] == 2


def test_the_inner_model_was_patched_before(mistral):
    model = load(mistral)
    report = embedfuse.patch(model[0].model)
    assert embedfuse.patch(model) is report
    assert report.repaired
    embedfuse.unpatch(model)
    assert not report.repaired
    assert model.tokenizer("a")["input_ids"][-1] != 2


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(mistral, again):
    model = load(mistral)
    embedfuse.patch(model)
    other = again(model)
    np.testing.assert_allclose(other.encode(TEXTS), model.encode(TEXTS), rtol=0, atol=1e-6)
    embedfuse.unpatch(other)
    assert other.tokenizer("a")["input_ids"][-1] != 2
    assert model.tokenizer("a")["input_ids"][-1] == 2


def test_a_failed_patch_leaves_the_tokenizer(mistral, monkeypatch):
    model = load(mistral)

    def fail(*args):
        raise embedfuse.PatchError("on purpose")

    monkeypatch.setattr("embedfuse.integrations.sentence_transformers.model.deviations", fail)
    with pytest.raises(embedfuse.PatchError, match="on purpose"):
        embedfuse.patch(model)
    assert type(model) is st.SentenceTransformer
    assert model.tokenizer("a")["input_ids"][-1] != 2


@pytest.mark.parametrize("template", ["<s> $A </s>", "$A </s>"])
def test_a_tokenizer_that_adds_it_is_left_alone(tmp_path, template, caplog):
    folder = checkpoint(tmp_path / "e5-mistral-7b-instruct")
    write_llama_tokenizer(folder, template, **ADDS)
    model = load(folder)
    expected = model.encode(TEXTS)
    report = embedfuse.patch(model)
    assert not report.repaired
    np.testing.assert_allclose(model.encode(TEXTS), expected, rtol=0, atol=2e-5)
    assert "adds no" not in caplog.text


@pytest.mark.parametrize(("pooling", "repaired"), [("lasttoken", True), ("mean", False)])
def test_the_preset_of_a_name(tmp_path, pooling, repaired):
    folder = checkpoint(tmp_path / "Qwen3-Embedding-0.6B", "qwen3", pooling)
    write_qwen_tokenizer(folder)
    model = load(folder)
    assert bool(embedfuse.patch(model).repaired) is repaired
    if repaired:
        np.testing.assert_allclose(model.encode(TEXTS), vectors(folder, 0), rtol=0, atol=2e-5)


def test_what_cannot_be_repaired_is_reported(tmp_path):
    from tokenizers import processors

    folder = checkpoint(tmp_path / "mine")
    write_llama_tokenizer(folder, **ADDS)
    model = load(folder)
    before = processors.BertProcessing(("<unk>", 0), ("<s>", 1))
    model.tokenizer.backend_tokenizer.post_processor = before
    expected = model.encode(TEXTS)
    report = embedfuse.patch(model)
    assert "post-processor is BertProcessing" in report.unrepaired["tokenizer"]
    np.testing.assert_allclose(model.encode(TEXTS), expected, rtol=0, atol=2e-5)


def test_saved_after_patching(mistral, tmp_path):
    model = load(mistral)
    embedfuse.patch(model)
    model.save(str(tmp_path / "saved"))
    again = load(tmp_path / "saved")
    np.testing.assert_allclose(again.encode(TEXTS), vectors(mistral, 2), rtol=0, atol=2e-5)


@pytest.fixture
def flag(mistral):
    return load_flag(str(mistral))


def test_flag_llm_repaired_and_undone(flag, mistral, caplog):
    before = flag.encode(TEXTS)
    state = flag.tokenizer.backend_tokenizer.to_str()
    attributes = set(vars(flag))
    np.testing.assert_allclose(before, vectors(mistral, None), rtol=0, atol=2e-5)
    report = embedfuse.patch(flag)
    assert report.repaired == {
        "tokenizer": "added no </s>, which the checkpoint expects after each text"
    }
    assert caplog.text.count("adds no </s>") == 1
    expected = vectors(mistral, 2)
    np.testing.assert_allclose(flag.encode(TEXTS), expected, rtol=0, atol=2e-5)
    assert np.abs(expected - before).max() > 0.1
    assert not report.original_calls
    # The original runs this call, with the same tokenizer.
    found = flag.encode(TEXTS, pad_to_multiple_of=8)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    embedfuse.unpatch(flag)
    assert flag.tokenizer.backend_tokenizer.to_str() == state
    assert set(vars(flag)) == attributes
    assert np.array_equal(flag.encode(TEXTS), before)


def test_flag_llm_cuts_before_the_end(flag, mistral):
    embedfuse.patch(flag)
    text = "word after word " * 50
    expected = Plain(mistral, 2)([text], "last", 12).float().numpy()
    np.testing.assert_allclose(flag.encode([text], max_length=12), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_flag_llm_copies(flag, again):
    """FlagEmbedding pickles the object into a process per device."""
    embedfuse.patch(flag)
    other = again(flag)
    assert np.array_equal(other.encode(TEXTS), flag.encode(TEXTS))
    embedfuse.unpatch(other)
    assert other.tokenizer("a")["input_ids"][-1] != 2
    assert flag.tokenizer("a")["input_ids"][-1] == 2


def test_flag_llm_a_failed_patch_leaves_the_tokenizer(flag, monkeypatch):
    def fail(*args):
        raise embedfuse.PatchError("on purpose")

    monkeypatch.setattr("embedfuse.integrations.flag_embedding.llm.deviations", fail)
    with pytest.raises(embedfuse.PatchError, match="on purpose"):
        embedfuse.patch(flag)
    assert flag.tokenizer("a")["input_ids"][-1] != 2


def test_flag_llm_the_preset_of_a_name(tmp_path):
    folder = make(tmp_path / "Qwen3-Embedding-0.6B", "qwen3")
    flag = load_flag(str(folder))
    assert embedfuse.patch(flag).repaired
    np.testing.assert_allclose(flag.encode(TEXTS), vectors(folder, 0), rtol=0, atol=2e-5)


def test_flag_llm_a_tokenizer_that_adds_it_is_left_alone(tmp_path):
    folder = make(tmp_path / "e5-mistral-7b-instruct", "mistral")
    write_llama_tokenizer(folder, "<s> $A </s>", **ADDS)
    flag = load_flag(str(folder))
    expected, state = flag.encode(TEXTS), flag.tokenizer.backend_tokenizer.to_str()
    report = embedfuse.patch(flag)
    assert not report.repaired
    assert flag.tokenizer.backend_tokenizer.to_str() == state
    np.testing.assert_allclose(flag.encode(TEXTS), expected, rtol=0, atol=2e-5)

"""A patched BGEM3FlagModel gives what FlagEmbedding gives: keys, types, shapes and values."""

import numpy as np
import pytest
import torch

import embedfuse
from tests.integrations.flag import TEXTS, counted, original_forbidden
from tests.integrations.flag_m3 import (
    ALL,
    KEYS,
    assert_same,
    assert_same_array,
    assert_same_rows,
    assert_same_weights,
    load,
)

fe = pytest.importorskip("FlagEmbedding")


@pytest.fixture(scope="module")
def original(m3_folder):
    return load(m3_folder)


@pytest.fixture(scope="module")
def model(m3_folder):
    model = load(m3_folder)
    embedfuse.patch(model)
    return model


@pytest.fixture(scope="module")
def pair(original, model):
    return original, model


def test_report(model):
    report = embedfuse.report(model)
    assert report is embedfuse.report(model.model.model)
    assert report.fused[-1] == "dense, sparse and multi-vector outputs from one packed pass"
    assert set(KEYS) < report.deviations.keys()
    assert max(report.deviations.values()) < 1e-5


def test_encode(pair):
    expected, found = (model.encode(TEXTS, **ALL) for model in pair)
    assert_same(found, expected)
    assert found["dense_vecs"].shape == (len(TEXTS), 64)
    assert {type(w) for row in found["lexical_weights"] for w in row.values()} == {np.float32}
    assert len(found["lexical_weights"][0]) > 3
    assert all(array.base is None for array in found["colbert_vecs"])


@pytest.mark.parametrize("on", KEYS)
def test_what_is_not_asked_for_is_none(pair, on):
    flags = dict(zip(ALL, (name == on for name in KEYS), strict=True))
    expected, found = (model.encode(TEXTS[:5], **flags) for model in pair)
    assert_same(found, expected)
    assert [name for name in KEYS if found[name] is not None] == [on]


def test_dense_is_the_default(pair):
    expected, found = (model.encode(TEXTS[:5]) for model in pair)
    assert_same(found, expected)


def test_one_str(pair):
    expected, found = (model.encode(TEXTS[0], **ALL) for model in pair)
    assert_same_rows(found["dense_vecs"], expected["dense_vecs"])
    assert found["dense_vecs"].shape == (64,)
    assert_same_weights(found["lexical_weights"], expected["lexical_weights"])
    assert_same_array(found["colbert_vecs"], expected["colbert_vecs"])
    assert model_outputs_none(pair[1].encode(TEXTS[0])) == KEYS[1:]


def model_outputs_none(found: dict) -> list[str]:
    return [name for name, value in found.items() if value is None]


def test_no_texts(model):
    # The original never returns from an empty list, or raises.
    found = model.encode([], **ALL)
    assert list(found) == KEYS
    assert (found["dense_vecs"].shape, found["dense_vecs"].dtype) == ((0, 64), np.float32)
    assert found["lexical_weights"] == found["colbert_vecs"] == []


@pytest.mark.parametrize("call", ["encode", "encode_queries", "encode_corpus"])
@pytest.mark.parametrize("arguments", [{"max_length": 7}, {"batch_size": 4}], ids=str)
def test_arguments(pair, call, arguments):
    expected, found = (getattr(model, call)(TEXTS[:30], **ALL, **arguments) for model in pair)
    assert_same(found, expected)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_bad_batch_size(model, batch_size):
    message = f"batch_size={batch_size}: accepted is 1 or more"
    with pytest.raises(ValueError, match=message):
        model.encode(TEXTS[:2], batch_size=batch_size)
    with pytest.raises(ValueError, match=message):
        model.compute_score([("a", "b")], batch_size=batch_size)


def test_a_small_batch_size_holds_for_its_call_alone(model):
    with counted(model.model.model) as tokens:
        model.encode(TEXTS[:30], batch_size=1, max_length=16)
        assert max(tokens) <= 16
        tokens.clear()
        model.encode(TEXTS[:30])
        assert len(tokens) == 1
        tokens.clear()
        model.compute_score([("a query", "a passage")] * 3, batch_size=1, max_passage_length=4)
        model.encode(TEXTS[:30])
        assert len(tokens) == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"normalize_embeddings": False},
        {"truncate_dim": 24},
        {"truncate_dim": 24, "normalize_embeddings": False},
        {"pooling_method": "mean"},
        {"pooling_method": "last_token"},
        {"query_max_length": 5, "passage_max_length": 11},
        {
            "query_instruction_for_retrieval": "Find: ",
            "query_instruction_format": "{}<{}>",
            "passage_instruction_for_retrieval": "Text",
            "passage_instruction_format": "{}: {}",
        },
    ],
    ids=lambda settings: "+".join(settings)[:40],
)
def test_settings(m3_folder, settings):
    model = load(m3_folder, **settings)
    pairs = list(zip(TEXTS[:3], TEXTS[3:6], strict=True))

    def everything():
        calls = [model.encode_queries, model.encode_corpus, model.encode]
        scores = [model.compute_score(pair) for pair in pairs]
        return [call(TEXTS[:12], **ALL) for call in calls], scores

    expected, scores = everything()
    embedfuse.patch(model)
    found, found_scores = everything()
    for a, b in zip(found, expected, strict=True):
        assert_same(a, b)
    for a, b in zip(found_scores, scores, strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_settings_changed_after_patching(m3_folder):
    original, model = load(m3_folder), load(m3_folder)
    embedfuse.patch(model)
    for m in (original, model):
        m.model.normalize_embeddings = False
        m.model.sentence_pooling_method = "mean"
        with torch.no_grad():
            m.model.sparse_linear = torch.nn.Linear(64, 1)
            m.model.sparse_linear.weight.fill_(0.1)
            m.model.sparse_linear.bias.fill_(0.2)
    assert_same(model.encode(TEXTS[:9], **ALL), original.encode(TEXTS[:9], **ALL))


def test_tokenizer_arguments_go_to_the_original(pair):
    original, model = pair
    report = embedfuse.report(model)
    before = report.original_calls["called with add_special_tokens"]
    call = {"add_special_tokens": False, **ALL}
    texts = [text for text in TEXTS[:8] if text]
    for m in (model, original):
        with pytest.raises(TypeError):  # the original passes them to `pad` too
            m.encode(texts, **call)
    assert report.original_calls["called with add_special_tokens"] == before + 1
    extra = {"verbose": False}
    assert_same(model.encode(texts, **extra, **ALL), original.encode(texts, **extra, **ALL))
    scores = [m.compute_score(("a", "b"), **extra) for m in pair]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    assert report.original_calls["called with verbose"] == 2


def test_one_packed_forward_and_no_padded_one(model):
    inner = model.model.model
    with original_forbidden(), counted(inner) as tokens:
        model.encode(TEXTS[:20], **ALL)
        assert len(tokens) == 1
        model.encode("one query")
        assert len(tokens) == 2
        model.compute_score([("a", "b"), ("a", "c")])
        assert len(tokens) == 4  # queries, passages
    assert sum(tokens[1:2]) == len(model.tokenizer("one query")["input_ids"])


def test_16_bits_on_the_cpu_become_fp32(m3_folder, original):
    model = fe.BGEM3FlagModel(m3_folder, use_fp16=True, devices="cpu")
    assert model.model.model.dtype == torch.float16
    embedfuse.patch(model)
    assert model.model.model.dtype == torch.float32  # as FlagEmbedding does on its first call
    found, expected = (m.encode(TEXTS[:9], **ALL) for m in (model, original))
    assert found["dense_vecs"].dtype == np.float32
    np.testing.assert_allclose(found["dense_vecs"], expected["dense_vecs"], rtol=0, atol=5e-3)


def test_hooks_and_replaced_heads_are_honoured(pair):
    """A hook on the model runs; a head of another class weighs the tokens."""
    original, model = pair
    calls = []
    hook = model.model.register_forward_hook(lambda *_: calls.append(1))
    try:
        assert_same(model.encode(TEXTS[:4], **ALL), original.encode(TEXTS[:4], **ALL))
    finally:
        hook.remove()
    assert calls
    assert embedfuse.report(model).original_calls["the model has a hook"] == 1

    class PlusOne(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    heads = [m.model.sparse_linear for m in pair]
    for head in heads:
        head.__class__ = PlusOne
    try:
        assert_same(model.encode(TEXTS[:4], **ALL), original.encode(TEXTS[:4], **ALL))
    finally:
        for head in heads:
            head.__class__ = torch.nn.Linear

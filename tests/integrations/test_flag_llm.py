"""A patched FlagLLMModel gives what FlagEmbedding gives: types, dtypes, shapes and values."""

import numpy as np
import pytest
import torch

import embedfuse
from embedfuse.testing import assert_as_good
from tests.integrations.flag import TEXTS, counted, original_forbidden
from tests.integrations.flag_llm import assert_same, load, make_qwen2

fe = pytest.importorskip("FlagEmbedding")


@pytest.fixture(scope="module", params=["mistral", "qwen2"])
def folder(request, tmp_path_factory) -> str:
    if request.param == "mistral":
        return request.getfixturevalue("e5_mistral_folder")
    return make_qwen2(tmp_path_factory.mktemp("qwen2"))


@pytest.fixture(scope="module")
def original(folder):
    return load(folder)


@pytest.fixture(scope="module")
def model(folder):
    model = load(folder)
    embedfuse.patch(model)
    return model


@pytest.fixture(scope="module")
def pair(original, model):
    return original, model


def test_report(model):
    report = embedfuse.report(model)
    assert report is embedfuse.report(model.model)
    assert report.fused == [
        "3 layers without padding",
        "last-token embeddings from one packed pass, batched by tokens",
    ]
    assert report.deviations.keys() == {"last_hidden_state", "embeddings"}
    assert max(report.deviations.values()) < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
def test_encode(pair, side):
    original, model = pair
    before = original.tokenizer.padding_side
    original.tokenizer.padding_side = side
    try:
        expected = original.encode(TEXTS)
    finally:
        original.tokenizer.padding_side = before
    found = model.encode(TEXTS)
    assert_same(found, expected)
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=0, atol=1e-5)
    # Vectors of two texts differ by far more than the bound.
    assert np.linalg.norm(found[0] - found[1]) > 0.1


def test_it_is_the_state_of_the_last_token(original, model):
    """Against transformers' forward on one text, without padding."""
    ids = original.tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    assert ids[0, -1] == original.tokenizer.pad_token_id  # the EOS of both
    with torch.no_grad():
        last = original.model(ids).last_hidden_state[0, -1]
    wanted = torch.nn.functional.normalize(last, dim=0).numpy()
    np.testing.assert_allclose(model.encode(TEXTS[0]), wanted, rtol=0, atol=1e-5)


def test_tensors(pair):
    expected, found = (model.encode(TEXTS[:9], convert_to_numpy=False) for model in pair)
    assert_same(found, expected)
    assert found.device == expected.device
    assert not found.is_inference()  # so that training code may take it
    assert not found.requires_grad


@pytest.mark.parametrize("numpy", [True, False])
def test_one_str(pair, numpy):
    expected, found = (model.encode(TEXTS[0], convert_to_numpy=numpy) for model in pair)
    assert_same(found, expected)
    assert found.ndim == 1


def test_no_texts(model):
    # The original raises inside the tokenizer.
    found = model.encode([])
    assert (found.shape, found.dtype) == ((0, model.model.config.hidden_size), np.float32)
    found = model.encode([], convert_to_numpy=False)
    assert (found.shape, found.dtype) == ((0, model.model.config.hidden_size), torch.float32)


@pytest.mark.parametrize("call", ["encode", "encode_queries", "encode_corpus"])
@pytest.mark.parametrize("arguments", [{"max_length": 7}, {"batch_size": 4}], ids=str)
def test_arguments(pair, call, arguments):
    expected, found = (getattr(model, call)(TEXTS[:30], **arguments) for model in pair)
    assert_same(found, expected)


def test_truncation_keeps_the_last_special_token(pair):
    original, model = pair
    with counted(model.model) as tokens:
        found = model.encode(["word " * 300], max_length=9)
    assert tokens == [9]
    assert_same(found, original.encode(["word " * 300], max_length=9))


@pytest.mark.parametrize("texts", [tuple(TEXTS[:5]), np.array(TEXTS[:5])], ids=["tuple", "array"])
def test_other_sequences_of_texts(pair, texts):
    expected, found = pair[0].encode(list(TEXTS[:5])), pair[1].encode(texts)
    assert_same(found, expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"normalize_embeddings": False},
        {"truncate_dim": 24},
        {"truncate_dim": 24, "normalize_embeddings": False},
        {"truncate_dim": 4000},
        {"convert_to_numpy": False, "batch_size": 3},
        {"query_max_length": 5, "passage_max_length": 11},
        {"query_instruction_for_retrieval": "Find what answers"},
        {
            "query_instruction_for_retrieval": "Find: ",
            "query_instruction_format": "{}<{}>\\n",
            "passage_instruction_for_retrieval": "Text",
            "passage_instruction_format": "{}: {}",
        },
    ],
    ids=lambda settings: "+".join(settings)[:40],
)
def test_settings(folder, settings):
    model = load(folder, **settings)

    def everything():
        calls = [model.encode_queries, model.encode_corpus, model.encode]
        return [call(TEXTS[:12]) for call in calls] + [model.encode_queries(TEXTS[0])]

    expected = everything()
    embedfuse.patch(model)
    for a, b in zip(everything(), expected, strict=True):
        assert_same(a, b)


def test_settings_changed_after_patching(folder, original):
    model = load(folder)
    embedfuse.patch(model)
    first = model.encode(TEXTS[:9])
    expected = load(folder, normalize_embeddings=False, truncate_dim=20).encode(TEXTS[:9])
    model.normalize_embeddings, model.truncate_dim = False, 20
    assert_same(model.encode(TEXTS[:9]), expected)
    model.normalize_embeddings, model.truncate_dim = True, None
    assert_same(model.encode(TEXTS[:9]), first)
    model.tokenizer.truncation_side = "left"
    other = load(folder)
    other.tokenizer.truncation_side = "left"
    found = model.encode(TEXTS[:9], max_length=12)
    assert_same(found, other.encode(TEXTS[:9], max_length=12))
    assert np.abs(found - original.encode(TEXTS[:9], max_length=12)).max() > 0.01


def test_one_packed_forward_and_no_padded_one(model):
    rows = []
    inner = model.model
    run = type(inner).run_layers

    def spy(self, batch, wanted):
        rows.append((batch.packed.cu_seqlens[1:] - 1 == wanted).all().item())
        return run(self, batch, wanted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(inner), "run_layers", spy)
        with original_forbidden(), counted(inner) as tokens:
            model.encode(TEXTS[:20])
            assert len(tokens) == 1
            model.encode("one query")
            assert tokens[1:] == [len(model.tokenizer("one query")["input_ids"])]
            model.encode(TEXTS[:30], batch_size=1, max_length=16)
            assert max(tokens[2:]) <= 16
            tokens.clear()
            model.encode(TEXTS[:30])  # a small batch size holds for its call alone
            assert len(tokens) == 1
    assert rows
    assert all(rows)  # the last layer computed the last tokens only


@pytest.mark.parametrize("use", ["use_fp16", "use_bf16"])
def test_16_bits_on_the_cpu_become_fp32(folder, original, use):
    model = load(folder, **{use: True})
    assert model.model.dtype == {"use_fp16": torch.float16, "use_bf16": torch.bfloat16}[use]
    embedfuse.patch(model)
    assert model.model.dtype == torch.float32  # as FlagEmbedding does on its first call
    found = model.encode(TEXTS[:9])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, original.encode(TEXTS[:9]), rtol=0, atol=3e-2)
    model.model.bfloat16()
    again = model.encode(TEXTS[:9])
    assert model.model.dtype == torch.float32
    np.testing.assert_allclose(again, found, rtol=0, atol=3e-2)


@pytest.mark.parametrize(("use", "numpy"), [("use_fp16", True), ("use_bf16", False)])
def test_16_bits_stay_on_other_devices(folder, use, numpy):
    """FlagEmbedding casts to fp32 on "cpu" alone; "cpu:0" is the same memory and keeps its dtype."""
    settings = {use: True, "devices": "cpu:0", "convert_to_numpy": numpy}
    model = load(folder, **settings)
    exact = load(folder)
    exact.model.load_state_dict(model.model.state_dict())
    exact = exact.encode(TEXTS[:20])
    expected = model.encode(TEXTS[:20])
    embedfuse.patch(model)
    found = model.encode(TEXTS[:20])
    assert (type(found), found.dtype) == (type(expected), expected.dtype)
    assert model.model.dtype != torch.float32
    assert_as_good(*map(torch.as_tensor, (found, expected, exact)))


def test_a_bf16_model_that_does_not_know_it_raises_as_before(folder):
    model = load(folder, devices="cpu:0")
    model.model.bfloat16()
    for patched in (False, True):
        if patched:
            embedfuse.patch(model)
        with pytest.raises(TypeError, match="BFloat16"):
            model.encode(TEXTS[:3])
        assert model.encode(TEXTS[:3], convert_to_numpy=False).dtype == torch.bfloat16


@pytest.mark.parametrize("reuse", ["off", "batch", "stream"])
def test_an_instruction_that_queries_share(folder, reuse):
    instruction = "Given a question, find the part of the documentation that answers it"
    model = load(folder, query_instruction_for_retrieval=instruction)
    queries = [text[:40] for text in TEXTS]
    expected = model.encode_queries(queries)
    report = embedfuse.patch(model, reuse_prefixes=reuse)
    for _ in range(3):
        assert_same(model.encode_queries(queries), expected)
    assert not report.original_calls


def test_bidirectional_attention(folder):
    model = load(folder)
    causal = model.encode(TEXTS[:9])
    embedfuse.patch(model, attention="bidirectional")
    found = model.encode(TEXTS[:9])
    assert np.abs(found - causal).max() > 0.01
    assert_same(
        model.encode(TEXTS[:9], verbose=False), found
    )  # FlagEmbedding's code on the padded model

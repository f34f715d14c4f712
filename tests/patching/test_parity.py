"""The patched model gives the original's vectors."""

import copy

import pytest
import torch
from torch.testing import assert_close

import embedfuse
from embedfuse.nn import tower
from embedfuse.testing import assert_as_good
from tests.patching.encoders import PLACES, make_batch, make_model, states

TIGHT = {"rtol": 0, "atol": 2e-5}


@pytest.mark.parametrize("lengths", [(20, 3, 11, 1), (7,), (1,), (9, 9, 9), (1, 64), (60, 60, 2)])
def test_right_padding(model, lengths):
    batch = make_batch(model, lengths)
    with torch.no_grad():
        expected = model(**batch)
    embedfuse.patch(model)
    with torch.no_grad():
        found = model(**batch)
    kept = batch["attention_mask"] != 0
    assert_close(found.last_hidden_state[kept], expected.last_hidden_state[kept], **TIGHT)
    assert_close(found.pooler_output, expected.pooler_output, **TIGHT)
    assert (found.last_hidden_state[~kept] == 0).all()
    assert type(found) is type(expected)
    assert not embedfuse.report(model).original_calls


def test_left_padding(family):
    model = make_model(family, pooler=False)
    batch = make_batch(model, side="left")
    expected = states(model, batch)
    report = embedfuse.patch(model)
    assert_close(states(model, batch), expected, **TIGHT)
    assert not report.original_calls


def test_left_padding_with_a_pooler_is_the_originals(model):
    batch = make_batch(model, side="left")
    with torch.no_grad():
        expected = model(**batch)
    report = embedfuse.patch(model)
    with torch.no_grad():
        found = model(**batch)
    assert torch.equal(found.pooler_output, expected.pooler_output)
    assert list(report.original_calls) == [
        "left padding: the model's pooler reads column 0, where a row has no token"
    ]


def test_without_a_mask(model):
    """RoBERTa numbers positions by input_ids: a padding token inside a row counts."""
    ids = make_batch(model, (12, 5))["input_ids"]
    with torch.no_grad():
        expected = model(ids).last_hidden_state
        embedfuse.patch(model)
        assert_close(model(ids).last_hidden_state, expected, **TIGHT)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_mask_dtypes(model, dtype):
    batch = make_batch(model)
    expected = states(model, batch)
    embedfuse.patch(model)
    found = states(model, {**batch, "attention_mask": batch["attention_mask"].to(dtype)})
    assert_close(found, expected, **TIGHT)


def test_token_types_and_positions():
    model = make_model("bert")
    batch = make_batch(model)
    extra = {
        "token_type_ids": (batch["input_ids"] % 2),
        "position_ids": torch.arange(20).flip(0)[None],
    }
    expected = states(model, batch, **extra)
    plain = states(model, batch)
    embedfuse.patch(model)
    assert_close(states(model, batch, **extra), expected, **TIGHT)
    assert (expected - plain).abs().max() > 0.1  # they do matter


def test_positional_arguments_and_tuples(model):
    batch = make_batch(model)
    call = (batch["input_ids"], batch["attention_mask"])
    with torch.no_grad():
        expected = model(*call, return_dict=False)
        embedfuse.patch(model)
        found = model(*call, return_dict=False)
    assert isinstance(found, tuple)
    assert len(found) == len(expected)
    assert_close(found[1], expected[1], **TIGHT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_error_is_at_most_twice_the_originals(family, dtype):
    exact = make_model(family).double()
    model = make_model(family).to(dtype)
    exact.load_state_dict(model.state_dict())
    batch = make_batch(model)
    reference = states(exact, batch)
    own = states(model, batch)
    assert own.dtype == dtype
    embedfuse.patch(model)
    assert_as_good(states(model, batch), own, reference)


def test_empty_batch(model):
    embedfuse.patch(model)
    ids = torch.empty(0, 5, dtype=torch.long)
    with torch.no_grad():
        output = model(ids, attention_mask=torch.empty(0, 5))
        assert output.last_hidden_state.shape == (0, 5, 48)
        assert output.pooler_output.shape == (0, 48)
        assert embedfuse.embed(model, ids, pooling="mean").shape == (0, 48)


def test_steps_do_not_change_the_vectors(model, monkeypatch):
    batch = make_batch(model, (20, 3, 11, 1, 20, 20))
    expected = states(model, batch)
    embedfuse.patch(model)
    monkeypatch.setattr(tower, "STEP_TOKENS", 21)
    assert_close(states(model, batch), expected, **TIGHT)


def test_nan_weights_propagate(model):
    batch = make_batch(model)
    with torch.no_grad():
        model.encoder.layer[1].output.dense.bias[0] = float("nan")
    embedfuse.patch(model)
    assert states(model, batch).isnan().all()


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("pooling", ["cls", "last", "mean", "weighted_mean"])
def test_embed(family, pooling, backend):
    model = make_model(family, pooler=False)
    batch = make_batch(model, side="left")
    with torch.no_grad(), embedfuse.use_backend(backend):
        expected = embedfuse.embed(model, **batch, pooling=pooling)
        h = model(**batch).last_hidden_state[1, -3:]  # the row of 3 tokens
        weights = {
            "cls": [1.0, 0, 0],
            "last": [0, 0, 1.0],
            "mean": [1 / 3] * 3,
            "weighted_mean": [1 / 6, 2 / 6, 3 / 6],
        }[pooling]
        by_hand = torch.nn.functional.normalize(torch.tensor(weights) @ h, dim=0)
        assert_close(expected[1], by_hand, **TIGHT)
        embedfuse.patch(model)
        assert_close(embedfuse.embed(model, **batch, pooling=pooling), expected, **TIGHT)
    assert not embedfuse.report(model).original_calls


def test_same_vectors_when_patched_copies_disagree_in_shape(model):
    """One model serving batches of changing shape, one after the other."""
    reference = copy.deepcopy(model)
    embedfuse.patch(model)
    for lengths in ((5, 5), (1,), (30, 2, 2, 2), (64,), (3, 40)):
        batch = make_batch(model, lengths)
        assert_close(states(model, batch), states(reference, batch), **TIGHT)


@pytest.mark.parametrize("family", ["roberta", "xlm_roberta"])
def test_ids_that_the_mask_leaves_out_count_as_positions(family):
    """RoBERTa numbers positions by input_ids, also where the mask hides them."""
    model = make_model(family, pooler=False)
    batch = make_batch(model, (12, 12, 12, 12))
    batch["attention_mask"][0, :3] = 0
    batch["attention_mask"][1, 9:] = 0
    batch["attention_mask"][2, :2] = batch["attention_mask"][2, 10:] = 0
    batch["input_ids"][2, :1] = model.config.pad_token_id
    expected = states(model, batch)
    report = embedfuse.patch(model)
    assert_close(states(model, batch), expected, **TIGHT)
    hidden = torch.full((1, PLACES), 7)
    mask = torch.ones_like(hidden)
    mask[0, :-3] = 0
    with pytest.raises(ValueError, match="the position table ends at 69"):
        model(hidden, attention_mask=mask)
    assert not report.original_calls

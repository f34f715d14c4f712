"""Refused calls run on the original forward: right, counted, logged once."""

import logging

import pytest
import torch
from torch import nn

import embedfuse
from tests.patching.encoders import make_batch, make_model


def both(model, call) -> tuple:
    """The call's output before and after patching, and the report."""
    with torch.no_grad():
        before = model(**call)
        report = embedfuse.patch(model)
        return before, model(**call), report


def assert_same(before, after):
    assert before.keys() == after.keys()
    for name, value in before.items():
        values = (
            zip(value, after[name], strict=True)
            if isinstance(value, tuple)
            else [(value, after[name])]
        )
        for expected, found in values:
            assert torch.equal(expected, found), name


@pytest.mark.parametrize("flag", ["output_attentions", "output_hidden_states"])
def test_outputs_of_every_layer(family, flag):
    model = make_model(family, attn_implementation="eager")
    batch = make_batch(model)
    before, after, report = both(model, {**batch, flag: True})
    assert_same(before, after)
    assert len(after["hidden_states" if "hidden" in flag else "attentions"]) >= 3
    assert dict(report.original_calls) == {f"called with {flag}": 1}
    # The hooks that transformers leaves behind do not keep later calls from the packed path.
    with torch.no_grad():
        model(**batch)
    assert report.original_calls.total() == 1


def test_config_asks_for_hidden_states(model):
    model.config.output_hidden_states = True
    before, after, report = both(model, make_batch(model))
    assert_same(before, after)
    assert dict(report.original_calls) == {"config.output_hidden_states is set": 1}


def test_inputs_embeds(model):
    batch = make_batch(model)
    embeds = model.embeddings.word_embeddings(batch["input_ids"]).detach()
    call = {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}
    before, after, report = both(model, call)
    assert_same(before, after)
    assert dict(report.original_calls) == {"called with inputs_embeds": 1}


def test_4d_mask(model):
    ids = make_batch(model, (6, 6))["input_ids"]
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    before, after, report = both(model, {"input_ids": ids, "attention_mask": mask})
    assert_same(before, after)
    assert dict(report.original_calls) == {"attention_mask has 4 dimensions": 1}


def test_3d_mask(model):
    """Whatever the original makes of it, an error included."""
    ids = make_batch(model, (6, 6))["input_ids"]
    call = {"input_ids": ids, "attention_mask": torch.ones(2, 6, 6).tril()}

    def run():
        try:
            with torch.no_grad():
                return model(**call).last_hidden_state
        except Exception as error:
            return type(error)

    before = run()
    report = embedfuse.patch(model)
    after = run()
    assert before == after if isinstance(before, type) else torch.equal(before, after)
    assert dict(report.original_calls) == {"attention_mask has 3 dimensions": 1}


def test_decoder(family):
    model = make_model(family, is_decoder=True)
    before, after, report = both(model, make_batch(model, (6, 6)))
    assert torch.equal(before.last_hidden_state, after.last_hidden_state)
    assert after.past_key_values is not None
    assert report.refused == {"forward": "the model is configured as a decoder"}


def test_hook_on_an_inner_module(model):
    batch = make_batch(model)
    report = embedfuse.patch(model)
    seen = []
    handle = model.encoder.layer[1].register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        model(**batch)
    assert seen == [1]
    assert dict(report.original_calls) == {"encoder.layer.1 has a hook": 1}
    handle.remove()
    with torch.no_grad():
        model(**batch)
    assert report.original_calls.total() == 1


def test_hook_on_the_model_runs_on_the_packed_path(model):
    batch = make_batch(model)
    report = embedfuse.patch(model)
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        model(**batch)
        embedfuse.embed(model, **batch, pooling="mean")
    assert seen == [1, 1]
    assert not report.original_calls


def test_a_layer_of_another_class(model):
    class Mine(type(model.encoder.layer[0])):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs) * 2

    model.encoder.layer[1].__class__ = Mine
    before, after, report = both(model, make_batch(model))
    assert_same(before, after)
    assert "encoder.layer.1 is" in report.refused["forward"]


def test_a_layer_replaced_after_patching(model):
    batch = make_batch(model)
    report = embedfuse.patch(model)

    class Identity(nn.Module):
        def forward(self, hidden_states, *args, **kwargs):
            return hidden_states

    model.encoder.layer[1] = Identity()
    with torch.no_grad():
        found = model(**batch).last_hidden_state
        embedfuse.unpatch(model)
        assert torch.equal(found, model(**batch).last_hidden_state)
    assert "encoder.layer.1 is" in next(iter(report.original_calls))


def test_announced_once(model, caplog):
    embedfuse.patch(model)
    with caplog.at_level(logging.WARNING, "embedfuse"), torch.no_grad():
        for _ in range(3):
            model(**make_batch(model), output_hidden_states=True)
    assert [r.getMessage().split(": ", 1)[1] for r in caplog.records] == [
        "this call runs on the original code: called with output_hidden_states"
    ]
    assert embedfuse.report(model).original_calls["called with output_hidden_states"] == 3
    with torch.no_grad():
        model(**make_batch(model), output_attentions=True)
    lines = str(embedfuse.report(model)).splitlines()
    assert lines[-2:] == [
        "  3 calls on the original code: called with output_hidden_states",
        "  1 call on the original code: called with output_attentions",
    ]

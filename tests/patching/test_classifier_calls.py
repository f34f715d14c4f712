"""Calls that a patched classifier leaves to the original, and bad input."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import embedfuse
from tests.patching.encoders import logits, make_batch, make_classifier

TIGHT = {"rtol": 0, "atol": 2e-5}
LEFT = "left padding: the classifier reads column 0, where a row has no token"


@pytest.fixture
def model(family):
    return make_classifier(family)


def test_left_padding_is_the_originals(model):
    """Column 0 is padding there, and the original scores by what it makes of that."""
    batch = make_batch(model, side="left")
    expected = logits(model, batch)
    report = embedfuse.patch(model)
    assert torch.equal(logits(model, batch), expected)
    assert dict(report.original_calls) == {LEFT: 1}
    unpadded = make_batch(model, (9, 9), side="left")
    logits(model, unpadded)
    assert report.original_calls.total() == 1


@pytest.mark.parametrize("flag", ["output_attentions", "output_hidden_states"])
def test_outputs_of_every_layer(family, flag):
    model = make_classifier(family, attn_implementation="eager")
    call = {**make_batch(model), flag: True, "labels": torch.ones(4)}
    with torch.no_grad():
        expected = model(**call)
        report = embedfuse.patch(model)
        found = model(**call)
    assert found.keys() == expected.keys()
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)
    name = flag.removeprefix("output_")
    assert len(found[name]) >= 3
    for a, b in zip(found[name], expected[name], strict=True):
        assert torch.equal(a, b)
    assert dict(report.original_calls) == {f"called with {flag}": 1}


def test_inputs_embeds(model):
    batch = make_batch(model)
    embeds = model.base_model.embeddings.word_embeddings(batch["input_ids"]).detach()
    call = {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}
    expected = logits(model, call)
    report = embedfuse.patch(model)
    assert torch.equal(logits(model, call), expected)
    assert dict(report.original_calls) == {"called with inputs_embeds": 1}


INNER = {"base": "", "layer": ".encoder.layer.1", "head": None}


@pytest.mark.parametrize("where", INNER)
def test_hooks_inside_run_and_see_what_they_saw(model, where):
    path = "classifier" if where == "head" else model.base_model_prefix + INNER[where]
    seen = []
    batch = make_batch(model)
    report = embedfuse.patch(model)
    handle = model.get_submodule(path).register_forward_hook(
        lambda module, args, output: seen.append([getattr(a, "shape", a) for a in args])
    )
    found = logits(model, batch)
    assert dict(report.original_calls) == {f"{path} has a hook": 1}
    embedfuse.unpatch(model)
    assert torch.equal(logits(model, batch), found)
    handle.remove()
    assert len(seen) == 2
    assert seen[0] == seen[1]


def test_hook_on_the_model_runs_on_the_packed_path(model):
    batch = make_batch(model)
    expected = logits(model, batch)
    report = embedfuse.patch(model)
    seen = []
    model.register_forward_hook(lambda _, __, output: seen.append(output.logits))
    logits(model, batch)
    assert_close(seen, [expected], **TIGHT)
    assert not report.original_calls


def test_a_head_of_somebody_elses_reads_what_it_did(model):
    """One that looks at all rows needs all rows, padding included."""

    class Mean(nn.Module):
        def forward(self, states):
            return states.mean(1)

    base = model.base_model_prefix
    path = "classifier" if base == "roberta" else "bert.pooler"
    parent = model if base == "roberta" else model.bert
    setattr(parent, path.rsplit(".", 1)[-1], Mean())
    batch = make_batch(model)
    expected = logits(model, batch)
    report = embedfuse.patch(model)
    assert torch.equal(logits(model, batch), expected)
    assert report.refused["forward"].startswith(f"{path} is a {__name__}.")


def test_bad_input(model):
    embedfuse.patch(model)
    ids = torch.full((2, 5), 7)
    with pytest.raises(IndexError, match="input_ids: token 999; accepted are 0 to 210"):
        model(ids + 992)
    with pytest.raises(ValueError, match=r"input_ids: length 80 .* table ends at 69"):
        model(torch.full((1, 80), 9))
    with pytest.raises(TypeError):
        model(ids, input_ids=ids)


def test_embed_takes_no_classifier(model):
    with pytest.raises(TypeError, match=r"Classification; accepted are .* without a head"):
        embedfuse.embed(model, torch.ones(1, 3, dtype=torch.long), pooling="mean")


def test_meta(family):
    with torch.device("meta"):
        model = make_classifier(family)
    with pytest.raises(embedfuse.PatchError, match="on the meta device"):
        embedfuse.patch(model)
    assert not hasattr(model, "_embedfuse")

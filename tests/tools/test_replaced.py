"""Forwards and functions replaced on a class or in a modelling file, as Liger does."""

import pytest
import torch
from torch.testing import assert_close
from transformers.models.bert import modeling_bert
from transformers.models.mistral import modeling_mistral

import embedfuse
from tests.tools.rows import Row, check_document
from tests.tools.twins import make_model, outcome, states


def layer_forward(monkeypatch):
    plain = modeling_bert.BertLayer.forward
    monkeypatch.setattr(modeling_bert.BertLayer, "forward", lambda *a, **k: plain(*a, **k) * 1.1)


def norm_forward(monkeypatch):
    kind = modeling_mistral.MistralRMSNorm
    plain = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: plain(self, x) * 1.1)


def mlp_forward(monkeypatch):
    kind = modeling_mistral.MistralMLP
    plain = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: plain(self, x) * 1.1)


def rotary(monkeypatch):
    plain = modeling_mistral.apply_rotary_pos_emb

    def swapped(q, k, cos, sin, *args, **kwargs):
        return plain(q, k, sin, cos, *args, **kwargs)

    monkeypatch.setattr(modeling_mistral, "apply_rotary_pos_emb", swapped)


def replaced_class(monkeypatch):
    """A class of the modelling file; existing objects keep their class."""

    class Other(modeling_mistral.MistralRMSNorm):
        pass

    monkeypatch.setattr(modeling_mistral, "MistralRMSNorm", Other)


CHANGES = {
    "`BertLayer.forward` replaced": ("bert", layer_forward),
    "`MistralRMSNorm.forward` replaced": ("mistral", norm_forward),
    "`MistralMLP.forward` replaced": ("mistral", mlp_forward),
    "`apply_rotary_pos_emb` replaced": ("mistral", rotary),
}
ROWS = [
    *(
        Row(f"Liger's way: {name}", "original", "original", reason="was replaced by")
        for name in CHANGES
    ),
    Row(
        "Liger's way: a class in the modelling file replaced",
        before="-",
        remark="existing models keep their class",
    ),
]


@pytest.mark.parametrize("when", ["before patch", "after patch"])
@pytest.mark.parametrize("name", CHANGES)
def test_replaced(name, when, monkeypatch):
    family, change = CHANGES[name]
    original, model = make_model(family), make_model(family)
    with torch.no_grad():
        plain = states(original)
        if when == "after patch":
            embedfuse.patch(model)
            assert_close(states(model), plain, rtol=0, atol=5e-5)
        change(monkeypatch)
        if when == "before patch":
            embedfuse.patch(model)
        expected = states(original)
        assert torch.equal(states(model), expected)
    assert (expected - plain).abs().max() > 0.01
    assert "was replaced by" in outcome(model)


def test_a_replaced_class(monkeypatch):
    original, model = make_model("mistral"), make_model("mistral")
    embedfuse.patch(model)
    replaced_class(monkeypatch)
    with torch.no_grad():
        assert_close(states(model), states(original), rtol=0, atol=5e-5)
    assert outcome(model) == "works"


def test_document():
    check_document("Replaced code", ROWS)

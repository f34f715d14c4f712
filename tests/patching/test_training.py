"""Under grad the patched forward is differentiable, and train mode is the original's."""

import copy

import pytest
import torch
from torch.testing import assert_close

import embedfuse
from tests.patching.encoders import make_batch, make_model


def gradients(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    output = model(**batch)
    kept = output.last_hidden_state[batch["attention_mask"] != 0]
    weights = torch.linspace(-1, 1, kept.numel(), dtype=kept.dtype).view_as(kept)
    (kept * weights).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_all_parameters(family, training, checkpointing):
    model = make_model(family, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = model.double().train(training)
    batch = make_batch(model)
    expected = gradients(model, batch)
    patched = copy.deepcopy(model)
    embedfuse.patch(patched)
    if checkpointing:
        patched.gradient_checkpointing_enable()
    found = gradients(patched, batch)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(found[name], value, rtol=1e-8, atol=1e-10, msg=name)
    assert not embedfuse.report(patched).original_calls


def test_gradient_checkpointing_recomputes(family):
    model = make_model(family, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    embedfuse.patch(model)
    model.gradient_checkpointing_enable()
    calls = []
    block = model.encoder.layer[0]
    block.intermediate.intermediate_act_fn = _Counting(
        block.intermediate.intermediate_act_fn, calls
    )
    batch = make_batch(model)
    model(**batch)  # the self-check with the module that is new
    calls.clear()
    model(**batch).last_hidden_state.sum().backward()
    assert len(calls) == 2


class _Counting(torch.nn.Module):
    def __init__(self, inner, calls):
        super().__init__()
        self.inner, self.calls = inner, calls

    def forward(self, x):
        self.calls.append(1)
        return self.inner(x)


def test_dropout_stays_as_the_model_has_it(family):
    model = make_model(family, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2)
    embedfuse.patch(model)
    batch = make_batch(model, (20, 11))

    def run(seed):
        torch.manual_seed(seed)
        with torch.no_grad():
            return model(**batch).last_hidden_state

    assert torch.equal(run(0), run(1))
    model.train()
    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


def test_train_and_eval_reach_every_module(model):
    embedfuse.patch(model)
    for mode in (True, False):
        model.encoder.layer[1].train(not mode)
        model.pooler.train(mode)
        assert model.train(mode) is model
        assert {m.training for m in model.modules()} == {mode}


@pytest.mark.parametrize("where", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_acts_in_both_places(family, where):
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = make_model(family, **{**off, where: 0.5}).train()
    embedfuse.patch(model)
    batch = make_batch(model, (20, 11))
    with torch.no_grad():
        first, second = (model(**batch).last_hidden_state for _ in range(2))
    assert (first - second).abs().max() > 0.1


def test_embed_is_differentiable(family):
    model = make_model(family, pooler=False).double()
    batch = make_batch(model)
    grads = {}
    for name in ("original", "patched"):
        if name == "patched":
            embedfuse.patch(model)
        model.zero_grad()
        vectors = embedfuse.embed(model, **batch, pooling="mean")
        (vectors @ vectors.T).sum().backward()
        grads[name] = model.encoder.layer[0].attention.self.key.weight.grad.clone()
    assert_close(grads["patched"], grads["original"], rtol=1e-8, atol=1e-10)

"""Patched models on a GPU agree with the original there."""

import copy

import pytest
import torch

import embedfuse
from tests.patching.encoders import FAMILIES, make_batch, make_model, states

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "heads", [4, 3]
)  # head_dim 12 is our kernel's, 16 in 16 bits FlashAttention's
def test_parity(family, dtype, heads):
    """Error against fp64 at most twice the original's own in this dtype, plus fp32 rounding."""
    model = make_model(family, num_attention_heads=heads).to("cuda", dtype)
    exact = copy.deepcopy(model).double()
    batch = {name: value.cuda() for name, value in make_batch(model).items()}
    reference = states(exact, batch)
    own_error = (states(model, batch).double() - reference).abs().max()
    report = embedfuse.patch(model)
    found = states(model, batch)
    assert (found.double() - reference).abs().max() <= 2 * own_error + 2e-5
    assert not report.original_calls


@pytest.mark.covers("xlm_roberta")
@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
def test_embed(backend):
    model = make_model("xlm_roberta", pooler=False).cuda()
    batch = {name: value.cuda() for name, value in make_batch(model, side="left").items()}
    with torch.no_grad(), embedfuse.use_backend("reference"):
        expected = embedfuse.embed(model, **batch, pooling="last")
    embedfuse.patch(model)
    with torch.no_grad(), embedfuse.use_backend(backend):
        found = embedfuse.embed(model, **batch, pooling="last")
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.covers("bert")
def test_moving_a_patched_model():
    model = make_model("bert")
    batch = make_batch(model)
    expected = states(model, batch)
    embedfuse.patch(model)
    model.cuda()
    found = states(model, {name: value.cuda() for name, value in batch.items()})
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=2e-4)
    model.cpu()
    torch.testing.assert_close(states(model, batch), expected, rtol=0, atol=2e-5)


@pytest.mark.covers("bert")
def test_gradients():
    model = make_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = model.cuda().double()
    batch = {name: value.cuda() for name, value in make_batch(model).items()}
    weight = model.encoder.layer[0].attention.self.query.weight
    grads = []
    for _ in range(2):
        model.zero_grad()
        embedfuse.embed(model, **batch, pooling="mean").sum(0).square().sum().backward()
        grads.append(weight.grad.clone())
        embedfuse.patch(model)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-8, atol=1e-10)

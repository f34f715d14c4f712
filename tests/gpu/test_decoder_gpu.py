"""Patched decoders on a GPU agree with the original there, with and without shared prefixes."""

import copy

import pytest
import torch

import embedfuse
from tests.patching.decoders import DEEP, FAMILIES, batch_of, make_model, open_mask
from tests.patching.encoders import make_batch, states

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def on_gpu(batch: dict) -> dict:
    return {name: value.cuda() for name, value in batch.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_states(family, side, dtype):
    """head_dim 16 is FlashAttention's; windows of 6 tokens in all families but LLaMA."""
    model = make_model(family, head_dim=16).to("cuda", dtype)
    exact = copy.deepcopy(model).double()
    batch = on_gpu(make_batch(model, (20, 3, 11, 1), side))
    reference = states(exact, batch)
    own_error = (states(model, batch).double() - reference).abs().max()
    report = embedfuse.patch(model)
    assert (states(model, batch).double() - reference).abs().max() <= 2 * own_error + 2e-5
    assert not report.original_calls


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reuse", ["off", "batch", "stream"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pooled_with_shared_prefixes(family, reuse, dtype):
    model = make_model(family, head_dim=16).to("cuda", dtype)
    exact = copy.deepcopy(model).double()
    batch = on_gpu(batch_of(DEEP, "left"))
    with torch.no_grad():
        reference = embedfuse.embed(exact, **batch, pooling="last")
        own = embedfuse.embed(model, **batch, pooling="last").double()
        embedfuse.patch(model, reuse_prefixes=reuse)
        for _ in range(3):
            found = embedfuse.embed(model, **batch, pooling="last").double()
            assert (found - reference).abs().max() <= 2 * (own - reference).abs().max() + 2e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_bidirectional(family):
    model = make_model(family, head_dim=16).cuda()
    batch = make_batch(model, (20, 3, 11, 1), "left")
    mask = open_mask({name: value.cpu() for name, value in batch.items()}).cuda()
    batch = on_gpu(batch)
    with torch.no_grad():
        expected = model(batch["input_ids"], attention_mask=mask).last_hidden_state
        embedfuse.patch(model, attention="bidirectional")
        found = model(**batch).last_hidden_state
    kept = batch["attention_mask"] != 0
    torch.testing.assert_close(found[kept], expected[kept], rtol=0, atol=5e-5)

"""attention="bidirectional" (LLM2Vec), against transformers' own forward under a full 4-D mask."""

import copy
import pickle

import pytest
import torch
from torch.testing import assert_close
from transformers import BertConfig, BertModel

import embedfuse
from embedfuse.patching.swap import Patched
from embedfuse.testing import assert_as_good
from tests.patching.decoders import FAMILIES, TIGHT, make_model, open_mask
from tests.patching.encoders import make_batch


@pytest.fixture(params=FAMILIES)
def model(request):
    return make_model(request.param)


def looking_both_ways(model, batch) -> torch.Tensor:
    with torch.no_grad():
        call = {"input_ids": batch["input_ids"], "attention_mask": open_mask(batch, model.dtype)}
        return model(**call).last_hidden_state


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("lengths", [(20, 3, 11, 1), (7,), (1,), (60, 60, 2)])
def test_states(model, lengths, side):
    batch = make_batch(model, lengths, side)
    expected = looking_both_ways(model, batch)
    exact = looking_both_ways(copy.deepcopy(model).double(), batch)
    with torch.no_grad():
        causal = model(**batch).last_hidden_state
        report = embedfuse.patch(model, attention="bidirectional")
        found = model(**batch).last_hidden_state
    kept = batch["attention_mask"] != 0
    assert_as_good(found[kept], expected[kept], exact[kept])
    if max(lengths) > 1:
        assert (causal - expected)[kept].abs().max() > 0.01
    assert not report.original_calls


@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "last"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("patched", [True, False], ids=["packed", "original"])
def test_pooled_without_the_instruction(model, pooling, side, patched):
    """LLM2Vec pools the text's own tokens, the last of each row; weights count from its first."""
    lengths, own = (20, 3, 11, 5), (13, 3, 4, 1)
    batch = make_batch(model, lengths, side)
    expected = []
    states = looking_both_ways(model, batch)
    pooling_mask = torch.zeros_like(batch["attention_mask"])
    for row, (n, k) in enumerate(zip(lengths, own, strict=True)):
        end = 20 if side == "left" else n
        rows = states[row, end - k : end]
        weights = torch.arange(1, k + 1)[:, None] / sum(range(1, k + 1))
        vector = {"mean": rows.mean(0), "weighted_mean": (rows * weights).sum(0), "last": rows[-1]}
        expected.append(vector[pooling] / vector[pooling].norm())
        pooling_mask[row, end - k : end] = 1
    embedfuse.patch(model, attention="bidirectional")
    if not patched:
        model.layers[1].register_forward_hook(lambda *_: None)  # runs on the original forward
    with torch.no_grad():
        found = embedfuse.embed(model, **batch, pooling=pooling, pooling_mask=pooling_mask)
    assert_close(found, torch.stack(expected), **TIGHT)
    assert bool(embedfuse.report(model).original_calls) is not patched


def test_calls_that_the_original_serves_look_both_ways_too(model):
    batch = make_batch(model)
    expected = looking_both_ways(model, batch)
    embedfuse.patch(model, attention="bidirectional")
    kept = batch["attention_mask"] != 0
    with torch.no_grad():
        found = model(**batch, output_hidden_states=True)
        embedded = {"inputs_embeds": model.embed_tokens(batch["input_ids"])}
        of_vectors = model(**embedded, attention_mask=batch["attention_mask"])
        unpadded = model(batch["input_ids"][:1, :5], use_cache=True).last_hidden_state
    assert_close(found.last_hidden_state[kept], expected[kept], **TIGHT)
    assert_close(of_vectors.last_hidden_state[kept], expected[kept], **TIGHT)
    alone = {"input_ids": batch["input_ids"][:1, :5], "attention_mask": torch.ones(1, 5)}
    embedfuse.unpatch(model)
    assert_close(unpadded, looking_both_ways(model, alone), **TIGHT)


def test_a_mask_of_four_dimensions_is_the_callers(model):
    batch = make_batch(model, (6, 6))
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    with torch.no_grad():
        expected = model(batch["input_ids"], attention_mask=mask).last_hidden_state
        embedfuse.patch(model, attention="bidirectional")
        found = model(batch["input_ids"], attention_mask=mask).last_hidden_state
    assert torch.equal(found, expected)


def test_gradients_of_all_parameters(model):
    model = model.double().train()
    batch = make_batch(model, side="left")
    kept = batch["attention_mask"] != 0

    def gradients(states) -> dict[str, torch.Tensor]:
        model.zero_grad()
        weights = torch.linspace(-1, 1, kept.sum() * states.shape[-1], dtype=states.dtype)
        (states[kept].flatten() * weights).sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    call = {"input_ids": batch["input_ids"], "attention_mask": open_mask(batch, torch.float64)}
    expected = gradients(model(**call).last_hidden_state)
    embedfuse.patch(model, attention="bidirectional")
    found = gradients(model(**batch).last_hidden_state)
    for name, value in expected.items():
        assert_close(found[name], value, rtol=0, atol=2e-6 * value.abs().max().item(), msg=name)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_look_both_ways(model, again):
    batch = make_batch(model)
    expected = looking_both_ways(model, batch)
    embedfuse.patch(model, attention="bidirectional")
    other = again(model)
    kept = batch["attention_mask"] != 0
    with torch.no_grad():
        assert_close(other(**batch).last_hidden_state[kept], expected[kept], **TIGHT)


def test_unpatched_is_causal_again(model):
    batch = make_batch(model)
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        with embedfuse.patched(model, attention="bidirectional"):
            assert not torch.equal(model(**batch).last_hidden_state, expected)
        assert torch.equal(model(**batch).last_hidden_state, expected)


def test_options_that_are_not_accepted(model):
    with pytest.raises(ValueError, match="attention='causal': accepted are None"):
        embedfuse.patch(model, attention="causal")
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    bert = BertModel(config)
    with pytest.raises(ValueError, match="attention='bidirectional': BertModel accepts None"):
        embedfuse.patch(bert, attention="bidirectional")
    with pytest.raises(
        ValueError, match="reuse_prefixes='stream': BertModel accepts off and batch"
    ):
        embedfuse.patch(bert, reuse_prefixes="stream")
    assert type(bert) is BertModel


def test_prefixes_that_cannot_be_kept(model):
    """What an instruction's tokens see depends on the text after it."""
    message = "reuse_prefixes='stream' with attention='bidirectional'.*accepted are off and batch"
    with pytest.raises(ValueError, match=message):
        embedfuse.patch(model, attention="bidirectional", reuse_prefixes="stream")
    assert not isinstance(model, Patched)
    for reuse in ("off", "batch"):
        with embedfuse.patched(model, attention="bidirectional", reuse_prefixes=reuse):
            assert isinstance(model, Patched)


def test_pooling_mask_without_a_token(model):
    batch = make_batch(model)
    nothing = torch.zeros_like(batch["attention_mask"])
    with pytest.raises(ValueError, match="pooling_mask: row 0 has no token"):
        embedfuse.embed(model, **batch, pooling="mean", pooling_mask=nothing)


def test_pooling_mask_of_another_shape(model):
    batch = make_batch(model)
    with pytest.raises(ValueError, match=r"pooling_mask: shape \(1, 20\); accepted .*\(4, 20\)"):
        embedfuse.embed(model, **batch, pooling="mean", pooling_mask=torch.ones(1, 20))

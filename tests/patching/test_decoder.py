"""Mistral, LLaMA, Qwen2, Qwen3: the original's vectors and gradients, and the refused calls."""

import copy

import pytest
import torch
from torch.testing import assert_close

import embedfuse
from embedfuse.nn import tower
from embedfuse.testing import assert_as_good
from tests.patching.decoders import FAMILIES, TIGHT, make_model
from tests.patching.encoders import VOCABULARY, exact_states, make_batch, states


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def model(family):
    return make_model(family)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    "lengths", [(20, 3, 11, 1), (7,), (1,), (9, 9, 9), (1, 64), (60, 60, 2), (6, 7)]
)
def test_states(model, lengths, side):
    batch = make_batch(model, lengths, side)
    exact = exact_states(model, batch)
    with torch.no_grad():
        expected = model(**batch)
        report = embedfuse.patch(model)
        found = model(**batch)
    kept = batch["attention_mask"] != 0
    assert_as_good(found.last_hidden_state[kept], expected.last_hidden_state[kept], exact)
    assert (found.last_hidden_state[~kept] == 0).all()
    assert type(found) is type(expected)
    assert not report.original_calls


def test_report(model):
    report = embedfuse.patch(model)
    assert report.fused == ["3 layers without padding"]
    assert report.refused == {}
    assert report.memory_bytes == 0


def test_windows_and_positions_matter(family):
    """What the parity tests would not see if the models were blind to it."""
    model = make_model(family)
    batch = make_batch(model, (20, 20))
    expected = states(model, batch)
    if family != "llama":
        other = make_model(family, sliding_window=5)
        assert (states(other, batch) - expected).abs().max() > 0.01
    shuffled = {**batch, "position_ids": torch.arange(20).flip(0)[None].expand(2, 20)}
    assert (states(model, shuffled) - expected).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_error_is_at_most_twice_the_originals(family, dtype):
    exact = make_model(family).double()
    model = make_model(family).to(dtype)
    exact.load_state_dict(model.state_dict())
    batch = make_batch(model, side="left")
    reference = states(exact, batch)
    own = states(model, batch)
    assert own.dtype == dtype
    embedfuse.patch(model)
    assert_as_good(states(model, batch), own, reference)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pooling", ["last", "cls", "mean"])
def test_embed(model, pooling, side):
    batch = make_batch(model, side=side)
    with torch.no_grad():
        expected = embedfuse.embed(model, **batch, pooling=pooling)
        report = embedfuse.patch(model)
        assert_close(embedfuse.embed(model, **batch, pooling=pooling), expected, **TIGHT)
    assert not report.original_calls


def test_given_positions(model):
    """As callers number them under left padding: from 0 at the first token."""
    batch = make_batch(model, side="left")
    mask = batch["attention_mask"]
    batch["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0) * 2
    expected, exact = states(model, batch), exact_states(model, batch)
    report = embedfuse.patch(model)
    assert_as_good(states(model, batch), expected, exact)
    assert not report.original_calls


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_positions(rope):
    """(90, 30): longer than max_position_embeddings, where `dynamic` changes its frequencies."""
    plain = make_model("llama")
    model = make_model("llama", rope_parameters={"rope_theta": 10000.0, **rope})
    for lengths in ((20, 3), (90, 30)):
        batch = make_batch(model, lengths, "left")
        expected, exact = states(model, batch), exact_states(model, batch)
        if lengths[0] == 90:
            assert (expected - states(plain, batch)).abs().max() > 0.01
        with embedfuse.patched(model):
            assert_as_good(states(model, batch), expected, exact)


def test_steps_do_not_change_the_vectors(model, monkeypatch):
    batch = make_batch(model, (20, 3, 11, 1, 20, 20))
    expected, exact = states(model, batch), exact_states(model, batch)
    embedfuse.patch(model)
    monkeypatch.setattr(tower, "STEP_TOKENS", 21)
    assert_as_good(states(model, batch), expected, exact)


def gradients(model, batch, pruned: bool) -> dict[str, torch.Tensor]:
    model.zero_grad()
    if pruned:
        kept = embedfuse.embed(model, **batch, pooling="last", normalize=False)
    else:
        kept = model(**batch).last_hidden_state[batch["attention_mask"] != 0]
    weights = torch.linspace(-1, 1, kept.numel(), dtype=kept.dtype).view_as(kept)
    (kept * weights).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_all_parameters(model, checkpointing, pruned):
    """In fp64, but transformers' norms and angles stay fp32."""
    model = model.double().train()
    batch = make_batch(model, side="left")
    expected = gradients(model, batch, pruned)
    patched = copy.deepcopy(model)
    report = embedfuse.patch(patched)
    if checkpointing:
        patched.gradient_checkpointing_enable()
    found = gradients(patched, batch, pruned)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max()
        assert_close(found[name], value, rtol=0, atol=2e-6 * scale.item(), msg=name)
    assert not report.original_calls


def test_unpatched_is_bit_equal(model):
    batch = make_batch(model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    places = len({p.untyped_storage().data_ptr() for p in model.parameters()})
    kind, expected = type(model), states(model, batch)
    embedfuse.patch(model)
    states(model, batch)
    embedfuse.unpatch(model)
    assert type(model) is kind
    assert not hasattr(model, "_embedfuse")
    assert torch.equal(states(model, batch), expected)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == places


def original_calls(model, call) -> tuple:
    """The output before and after patching, and whom the report names."""
    with torch.no_grad():
        before = model(**call)
        report = embedfuse.patch(model)
        return before, model(**call), list(report.original_calls)


def test_a_cache_is_the_originals(model):
    batch = make_batch(model)
    before, after, reasons = original_calls(model, {**batch, "use_cache": True})
    assert reasons == ["called with use_cache"]
    assert torch.equal(before.last_hidden_state, after.last_hidden_state)
    with torch.no_grad():
        more = {"input_ids": batch["input_ids"][:, :1], "past_key_values": after.past_key_values}
        model(**more)
        assert list(embedfuse.report(model).original_calls)[1:] == ["called with past_key_values"]
        assert model(**batch).past_key_values is None  # config.use_cache does not count as asking


@pytest.mark.parametrize("flag", ["output_hidden_states", "output_attentions"])
def test_outputs_of_every_layer_are_the_originals(family, flag):
    model = make_model(family, attn_implementation="eager")
    before, after, reasons = original_calls(model, {**make_batch(model), flag: True})
    assert reasons == [f"called with {flag}"]
    name = flag.removeprefix("output_")
    assert all(torch.equal(*pair) for pair in zip(before[name], after[name], strict=True))


def test_other_masks_are_the_originals(model):
    ids = make_batch(model, (6, 6))["input_ids"]
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    before, after, reasons = original_calls(model, {"input_ids": ids, "attention_mask": mask})
    assert reasons == ["attention_mask has 4 dimensions"]
    assert torch.equal(before.last_hidden_state, after.last_hidden_state)


def test_texts_told_apart_by_their_positions_are_the_originals(model):
    """Two texts of 3 tokens in one row, which transformers finds by the restart."""
    call = {
        "input_ids": make_batch(model, (6,))["input_ids"],
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]),
    }
    before, after, reasons = original_calls(model, call)
    assert reasons == ["position_ids without attention_mask: each restart begins a text of its own"]
    assert torch.equal(before.last_hidden_state, after.last_hidden_state)


def test_a_model_that_looks_ahead_is_the_originals(model):
    embedfuse.patch(model)
    model.config.is_causal = False
    states(model, make_batch(model))
    (reason,) = embedfuse.report(model).original_calls
    assert "is_causal is false" in reason


def test_token_out_of_the_vocabulary(model):
    batch = make_batch(model)
    embedfuse.patch(model)
    batch["input_ids"][2, 1] = VOCABULARY
    with pytest.raises(IndexError, match="input_ids: token 211; accepted are 0 to 210"):
        model(**batch)


def test_eager_attention_in_fp64_is_the_originals(family):
    """Its softmax is fp32, whatever the model's dtype."""
    model = make_model(family).double()
    model.set_attn_implementation("eager")
    batch = make_batch(model, (9, 9))
    expected = states(model, batch)
    report = embedfuse.patch(model)
    assert report.refused == {"forward": "eager attention in float64, whose softmax is float32"}
    assert torch.equal(states(model, batch), expected)
    embedfuse.unpatch(model)
    embedfuse.patch(model.float())
    assert torch.equal(states(model.double(), batch), expected)

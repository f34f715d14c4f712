"""Models that were changed: each gives what the original gives, or the original's error."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.testing import assert_close

import embedfuse
from tests.patching.encoders import VOCABULARY, make_batch, make_model, states

TIGHT = {"rtol": 0, "atol": 2e-5}


@pytest.mark.parametrize("rows", [3, 60])
def test_layers_of_mixed_dtype_raise_as_in_the_original(family, rows):
    model = make_model(family).bfloat16()
    embedfuse.patch(model)
    model.encoder.layer[1].intermediate.dense.float()
    with pytest.raises(RuntimeError, match="dtype"):
        states(model, make_batch(model, (rows,)))


def test_parameters_in_a_flat_buffer_stay_there(model):
    """DeepSpeed and others step the buffer, and the parameters follow."""
    attention = model.encoder.layer[0].attention.self
    linears = (attention.query, attention.key, attention.value)
    flat = torch.cat([m.weight.data.flatten() for m in linears] + [torch.zeros(5)])
    for i, m in enumerate(linears):
        m.weight.data = flat[i * 48 * 48 :][: 48 * 48].view(48, 48)
    reference = copy.deepcopy(model)
    embedfuse.patch(model)
    flat.mul_(1.5)
    with torch.no_grad():
        for m in reference.encoder.layer[0].attention.self.children():
            for p in m.parameters():
                p.data = p.data * 1.5 if p.dim() == 2 else p.data
    batch = make_batch(model)
    assert_close(states(model, batch), states(reference, batch), **TIGHT)


def test_one_linear_twice(model):
    attention = model.encoder.layer[0].attention.self
    attention.key = attention.query
    batch = make_batch(model)
    expected = states(model, batch)
    embedfuse.patch(model)
    assert_close(states(model, batch), expected, **TIGHT)


def test_unpatch_after_parts_were_moved_or_replaced(model):
    embedfuse.patch(model)
    model.encoder.layer[0].attention.self.key.double().float()
    model.encoder.layer[1] = nn.Identity()
    embedfuse.unpatch(model)
    for name, p in model.named_parameters():
        assert p.untyped_storage().nbytes() == p.nbytes, name


def test_monte_carlo_dropout_follows_the_layers_flag(family):
    """The original drops attention weights by the attention module's mode, not its Dropout's."""
    model = make_model(family, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5)
    embedfuse.patch(model)
    batch = make_batch(model)
    dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    for m in dropouts:
        m.train()
    assert torch.equal(states(model, batch), states(model, batch))
    model.train()
    for m in dropouts:
        m.eval()
    assert not torch.equal(states(model, batch), states(model, batch))


def test_a_dropout_of_the_users_own_runs(model):
    class Half(nn.Module):
        def forward(self, x):
            return x / 2

    for block in model.encoder.layer:
        block.output.dropout = Half()
    batch = make_batch(model)
    expected = states(model, batch)
    embedfuse.patch(model)
    assert_close(states(model, batch), expected, **TIGHT)


def test_global_hooks(model):
    report = embedfuse.patch(model)
    seen = []
    handle = torch_module.register_module_full_backward_hook(lambda *_: seen.append(1))
    try:
        model(**make_batch(model)).last_hidden_state.sum().backward()
    finally:
        handle.remove()
    assert len(seen) > 20
    assert dict(report.original_calls) == {"a hook on all modules": 1}


def test_patching_under_autocast(model):
    batch = make_batch(model)
    expected = states(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        embedfuse.patch(model)
    assert_close(states(model, batch), expected, **TIGHT)


def test_vocabulary_and_padding_of_the_config_may_lie():
    model = make_model("bert", pad_token_id=VOCABULARY - 1)
    model.config.vocab_size = 10**6
    batch = make_batch(model)
    expected = states(model, batch)
    embedfuse.patch(model)
    assert_close(states(model, batch), expected, **TIGHT)


def test_position_ids_that_restart(model):
    """Explicit positions may be given for rows longer than the table."""
    ids = torch.full((1, 100), 9)
    positions = (torch.arange(100) % 50 + 2)[None]
    with torch.no_grad():
        expected = model(ids, position_ids=positions, token_type_ids=ids * 0).last_hidden_state
        embedfuse.patch(model)
        found = model(ids, position_ids=positions, token_type_ids=ids * 0).last_hidden_state
    assert_close(found, expected, **TIGHT)


def test_wrong_arguments_raise_as_in_the_original(model):
    ids = torch.ones(1, 2, dtype=torch.long)
    embedfuse.patch(model)
    with pytest.raises(TypeError):
        model(ids, input_ids=ids)
    with pytest.raises(TypeError):
        model(ids, *[None] * 20)


def test_an_attention_of_somebody_elses_runs(model):
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def doubled(*args, **kwargs):
        out, weights = sdpa_attention_forward(*args, **kwargs)
        return out * 2, weights

    AttentionInterface.register("doubled", doubled)
    AttentionMaskInterface.register("doubled", sdpa_mask)
    model.set_attn_implementation("doubled")
    batch = make_batch(model)
    expected = states(model, batch)
    report = embedfuse.patch(model)
    assert torch.equal(states(model, batch), expected)
    assert report.refused == {"forward": "attention 'doubled' is not one of transformers' own"}

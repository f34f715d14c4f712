"""The pre-norm tower against LLaMA's own layers, whole and for the last row of each sequence."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaModel

import embedfuse
from embedfuse.nn import decoder, tower
from embedfuse.nn.decoder import DecoderLayer, decode
from embedfuse.packing import unpadded

HIDDEN, HEAD_DIM, MLP = 24, 6, 40
LENGTHS = [5, 1, 9, 9, 2]
PACKED = unpadded(LENGTHS, torch.device("cpu"))
LAST = PACKED.cu_seqlens[1:].long() - 1


def make():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=10,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=MLP,
    )
    model = LlamaModel(config).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model, [read(i, block) for i, block in enumerate(model.layers)]


def read(index: int, block: nn.Module) -> DecoderLayer:
    attention, mlp = block.self_attn, block.mlp
    return DecoderLayer(
        index=index,
        block=block,
        norm1=block.input_layernorm,
        qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
        head_dim=HEAD_DIM,
        scale=attention.scaling,
        causal=True,
        window=None,
        attention=attention,
        dropout=0.0,
        query_norm=None,
        key_norm=None,
        out=attention.o_proj,
        norm2=block.post_attention_layernorm,
        gate_up=(mlp.gate_proj, mlp.up_proj),
        activation=mlp.act_fn,
        down=mlp.down_proj,
    )


def by_transformers(model, x):
    parts = [model(inputs_embeds=part[None]).last_hidden_state[0] for part in x.split(LENGTHS)]
    return torch.cat(parts)


def by_tower(model, layers, x, rows=None):
    cos, sin = (t[0, :, : HEAD_DIM // 2] for t in model.rotary_emb(x, PACKED.columns[None]))
    return decode(layers, model.norm, x, cos, sin, PACKED, rows)


@pytest.fixture
def x():
    return torch.randn(sum(LENGTHS), HIDDEN, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("backend", ["chosen", "reference"])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("step", [2048, 10])
def test_states_are_those_of_transformers(x, monkeypatch, step, grad, backend):
    monkeypatch.setattr(tower, "STEP_TOKENS", step)
    model, layers = make()
    expected = by_transformers(model, x)
    with torch.set_grad_enabled(grad):
        if backend == "chosen":
            found, rows = by_tower(model, layers, x), by_tower(model, layers, x, LAST)
        else:
            with embedfuse.use_backend("reference"):
                found, rows = by_tower(model, layers, x), by_tower(model, layers, x, LAST)
    assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert_close(rows, expected[LAST], rtol=1e-4, atol=1e-5)


def test_the_last_layer_computes_keys_and_values_for_all_tokens_and_the_rest_for_the_rows(
    x, monkeypatch
):
    model, layers = make()
    rows, tokens = len(LENGTHS), sum(LENGTHS)
    seen = []
    linear, linears = decoder.linear, decoder.linears

    def noted_linear(module, x, inference):
        seen.append((module.out_features, len(x)))
        return linear(module, x, inference)

    def noted_linears(modules, x, inference):
        seen.append((sum(m.out_features for m in modules), len(x)))
        return linears(modules, x, inference)

    monkeypatch.setattr(decoder, "linear", noted_linear)
    monkeypatch.setattr(tower, "linear", noted_linear)
    monkeypatch.setattr(decoder, "linears", noted_linears)
    monkeypatch.setattr(tower, "linears", noted_linears)
    with torch.no_grad():
        by_tower(model, layers, x, LAST)
    whole = [(n, tokens) for n in (2 * HIDDEN, HIDDEN, 2 * MLP, HIDDEN)]
    pruned = [(HIDDEN, tokens), *((n, rows) for n in (HIDDEN, HIDDEN, 2 * MLP, HIDDEN))]
    assert seen == whole + pruned


def test_results_of_foreign_modules_are_not_written_to(x):
    class Kept(nn.Linear):
        def forward(self, x):
            self.kept = super().forward(x)
            return self.kept

    module = Kept(HIDDEN, HIDDEN)
    cos, sin = torch.zeros(len(x), 3), torch.ones(len(x), 3)
    with torch.no_grad():
        y = module(x)
        before = y.clone()
        turned = decoder.norm_and_rotate(
            module, None, y.unflatten(1, (-1, 6)), cos, sin, inference=True
        )
        assert torch.equal(module.kept, before)
        assert_close(turned[..., :3].flatten(1), -before.unflatten(1, (-1, 6))[..., 3:].flatten(1))


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.GELU()], ids=str)
def test_activations(x, activation):
    with torch.no_grad():
        found = decoder.activate(activation, x, x.flip(0), inference=True)
    assert_close(found, activation(x) * x.flip(0))

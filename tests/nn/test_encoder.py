"""The post-norm tower against torch's own TransformerEncoderLayer, whole and for one row per sequence."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import embedfuse
from embedfuse.nn import encoder, tower
from embedfuse.nn.encoder import EncoderLayer, encode
from embedfuse.packing import unpadded

HIDDEN, HEADS, MLP = 24, 3, 40
LENGTHS = [5, 1, 9, 9, 2]
PACKED = unpadded(LENGTHS, torch.device("cpu"))
FIRST = PACKED.cu_seqlens[:-1].long()
LAST = PACKED.cu_seqlens[1:].long() - 1


def make(layers: int = 3):
    """torch's encoder layers, and ours on the same values."""
    torch.manual_seed(0)
    originals = [
        nn.TransformerEncoderLayer(HIDDEN, HEADS, MLP, activation="gelu", batch_first=True).eval()
        for _ in range(layers)
    ]
    for layer in originals:
        for p in layer.parameters():
            nn.init.normal_(p, std=0.3)
    return originals, [read(layer) for layer in originals]


def read(layer: nn.TransformerEncoderLayer) -> EncoderLayer:
    attention = layer.self_attn
    projections = []
    for weight, bias in zip(
        attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True
    ):
        linear = nn.Linear(HIDDEN, HIDDEN)
        linear.load_state_dict({"weight": weight, "bias": bias})
        projections.append(linear)
    out = nn.Linear(HIDDEN, HIDDEN)  # the original's is a subclass of nn.Linear
    out.load_state_dict(attention.out_proj.state_dict())
    block = nn.Module().eval()
    block.dropout = nn.Dropout(0.1).eval()
    return EncoderLayer(
        block=block,
        qkv=tuple(projections),
        head_dim=HIDDEN // HEADS,
        scale=(HIDDEN // HEADS) ** -0.5,
        attention=block,
        out=out,
        dropout1=layer.dropout1,
        norm1=layer.norm1,
        up=layer.linear1,
        activation=nn.GELU(),
        down=layer.linear2,
        dropout2=layer.dropout2,
        norm2=layer.norm2,
    )


def by_torch(originals, x):
    parts = []
    for part in x.split(LENGTHS):
        for layer in originals:
            part = layer(part[None])[0]
        parts.append(part)
    return torch.cat(parts)


@pytest.fixture
def x():
    return torch.randn(sum(LENGTHS), HIDDEN, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["at once", "in steps"])
def steps(request, monkeypatch):
    if request.param == "in steps":
        monkeypatch.setattr(tower, "STEP_TOKENS", 10)


@pytest.mark.parametrize("backend", ["chosen", "reference"])
@pytest.mark.parametrize("grad", [True, False])
def test_states_are_those_of_torch(x, steps, grad, backend):
    originals, layers = make()
    expected = by_torch(originals, x)
    with torch.set_grad_enabled(grad):
        if backend == "chosen":
            found = encode(layers, x, PACKED)
        else:
            with embedfuse.use_backend("reference"):
                found = encode(layers, x, PACKED)
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [FIRST, LAST], ids=["first", "last"])
@pytest.mark.parametrize("grad", [True, False])
def test_one_row_of_each_sequence(x, steps, grad, rows):
    originals, layers = make()
    with torch.set_grad_enabled(grad):
        found = encode(layers, x, PACKED, rows)
    assert found.shape == (len(LENGTHS), HIDDEN)
    assert_close(found, by_torch(originals, x)[rows], rtol=1e-4, atol=1e-5)


def parameters_of(layer):
    modules = (*layer.qkv, layer.out, layer.norm1, layer.up, layer.down, layer.norm2)
    return [p for module in modules for p in module.parameters()]


def test_gradient_of_one_row_of_each_sequence(x):
    _, layers = make(layers=2)
    leaves = [x.requires_grad_(), *(p for layer in layers for p in parameters_of(layer))]
    upstream = torch.randn(len(LENGTHS), HIDDEN, generator=torch.Generator().manual_seed(2))
    expected = torch.autograd.grad(encode(layers, x, PACKED)[LAST], leaves, upstream)
    found = torch.autograd.grad(encode(layers, x, PACKED, LAST), leaves, upstream)
    for f, e in zip(found, expected, strict=True):
        assert_close(f, e, rtol=1e-4, atol=1e-5)


def test_the_last_layer_computes_keys_and_values_for_all_tokens_and_the_rest_for_the_rows(
    x, monkeypatch
):
    _, layers = make(layers=2)
    rows, tokens = len(LENGTHS), sum(LENGTHS)
    seen = []
    linear, linear_gelu, linears = encoder.linear, encoder.linear_gelu, tower.linears

    def noted_linear(module, x, inference):
        seen.append((module.out_features, len(x)))
        return linear(module, x, inference)

    def noted_linear_gelu(module, x):
        seen.append((module.out_features, len(x)))
        return linear_gelu(module, x)

    def noted_linears(modules, x, inference):
        seen.append((sum(m.out_features for m in modules), len(x)))
        return linears(modules, x, inference)

    monkeypatch.setattr(encoder, "linear", noted_linear)
    monkeypatch.setattr(encoder, "linear_gelu", noted_linear_gelu)
    monkeypatch.setattr(tower, "linear", noted_linear)
    monkeypatch.setattr(tower, "linears", noted_linears)
    with torch.no_grad():
        encode(layers, x, PACKED, FIRST)
    whole = [(3 * HIDDEN, tokens), (HIDDEN, tokens), (MLP, tokens), (HIDDEN, tokens)]
    pruned = [(2 * HIDDEN, tokens), *((n, rows) for n in (HIDDEN, HIDDEN, MLP, HIDDEN))]
    assert seen == whole + pruned


def test_checkpointed_last_layer(x):
    from torch.utils.checkpoint import checkpoint

    originals, layers = make(layers=2)
    for layer in layers:
        layer.block.gradient_checkpointing = layer.block.training = True
        layer.block._gradient_checkpointing_func = lambda step, x: checkpoint(
            step, x, use_reentrant=False
        )
        layer.attention = nn.Module().eval()
    x.requires_grad_()
    found = torch.autograd.grad(encode(layers, x, PACKED, LAST).sum(), x)
    expected = torch.autograd.grad(by_torch(originals, x)[LAST].sum(), x)
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_rows_of_no_layer_and_no_sequence(x):
    assert torch.equal(encode([], x, PACKED, LAST), x[LAST])
    _, layers = make(layers=1)
    none = unpadded([], torch.device("cpu"))
    with torch.no_grad():
        assert encode(layers, x[:0], none, LAST[:0]).shape == (0, HIDDEN)


def test_rows_that_do_not_fit(x):
    with pytest.raises(ValueError, match=r"rows: shape \(4,\); accepted is .* \(5,\)"):
        encode([], x, PACKED, LAST[:4])


@pytest.mark.parametrize("norm", ["no bias", "no weight", "subclass", "fp64"])
def test_other_norms_run_as_they_are(x, norm):
    class Doubled(nn.LayerNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    layer_norm = {
        "no bias": lambda: nn.LayerNorm(HIDDEN, bias=False),
        "no weight": lambda: nn.LayerNorm(HIDDEN, elementwise_affine=False),
        "subclass": lambda: Doubled(HIDDEN),
        "fp64": lambda: nn.LayerNorm(HIDDEN).double(),
    }[norm]()
    for p in layer_norm.parameters():
        nn.init.normal_(p)
    y, dropout = x.flip(0), nn.Dropout(0.5).eval()
    if norm == "fp64":
        y = y.double()
    with torch.no_grad():
        found = encoder.add_norm(layer_norm, dropout, y, x, inference=True)
        assert_close(found, layer_norm(y + x))


def test_dropout_in_training_and_of_another_kind(x):
    """nn.Dropout drops a third of the first term; a module in its place is called."""
    norm = nn.LayerNorm(HIDDEN)

    class Triple(nn.Module):
        def forward(self, x):
            return 3 * x

    with torch.no_grad():
        assert_close(encoder.add_norm(norm, Triple(), x, x, inference=True), norm(4 * x))
        torch.manual_seed(0)
        found = encoder.add_norm(norm, nn.Dropout(0.3), x, x, inference=True)
        torch.manual_seed(0)
        assert_close(found, norm(nn.functional.dropout(x, 0.3) + x))


@pytest.mark.parametrize("activation", [nn.GELU(), nn.GELU("tanh"), nn.SiLU()], ids=str)
def test_activations(x, activation):
    up = nn.Linear(HIDDEN, MLP)
    with torch.no_grad():
        assert_close(encoder.activate(activation, up, x, inference=True), activation(up(x)))
    y = encoder.activate(activation, up, x, inference=False)
    assert_close(y, activation(up(x)))
    y.sum().backward()
    assert up.weight.grad.abs().sum() > 0


def test_results_of_foreign_modules_are_not_written_to(x):
    class Kept(nn.Linear):
        def forward(self, x):
            self.kept = super().forward(x)
            return self.kept

    up = Kept(HIDDEN, MLP)
    with torch.no_grad():
        encoder.activate(nn.GELU(), up, x, inference=True)
        assert torch.equal(up.kept, nn.functional.linear(x, up.weight, up.bias))

"""Compilers, transforms of torch.func, parametrisations, averages, ties, offloading, dtypes."""

import accelerate
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close

import embedfuse
from tests.tools.rows import Row, cases, check, check_document
from tests.tools.twins import (
    assert_same,
    batch_for,
    layers,
    linears,
    make_model,
    outcome,
    patched_inside,
    states,
)


class Called(nn.Module):
    """A model that is called through a function."""

    def __init__(self, model, call):
        super().__init__()
        self.model, self.call = model, call

    def forward(self, **batch):
        return self.call(**batch)


class Scaled(nn.Module):
    def forward(self, weight):
        return weight * 1.5


def on_linears(change):
    """change(module) for every linear layer."""

    def act(model, folder):
        torch.manual_seed(5)
        for module in linears(model):
            change(module)
        return model.eval()

    return act


def scaled(kind):
    def act(model, folder):
        for module in [
            m for m in model.modules() if type(m).__name__.endswith(kind) and hasattr(m, "weight")
        ]:
            parametrize.register_parametrization(module, "weight", Scaled())
        return model

    return act


def pruned(module):
    prune.l1_unstructured(module, "weight", 0.3)


def pruned_for_good(module):
    pruned(module)
    prune.remove(module, "weight")


def averaged(model, folder):
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.9)
    average.update_parameters(model)
    return average


def called_with_others(model, folder):
    def call(**batch):
        larger = {name: p * 1.1 for name, p in model.named_parameters()}
        return functional_call(model, larger, (), batch)

    return Called(model, call)


def tied(model, folder):
    for first, second in zip(*map(linears, layers(model)), strict=True):
        second.weight = first.weight
    return model


def exported(model, folder):
    batch = batch_for(model)
    options = {"use_cache": False} if hasattr(model, "layers") else {}
    program = torch.export.export(model, (), {**batch, **options}).module()
    return Called(model, lambda **batch: program(**batch, **options))


def traced(model, folder):
    batch = batch_for(model)
    model.config.return_dict = model.config.use_cache = False
    trace = torch.jit.trace(model, tuple(batch.values()), strict=False, check_trace=False)
    model.config.return_dict = True
    output = type("Output", (), {})

    def call(input_ids, attention_mask):
        output.last_hidden_state = trace(input_ids, attention_mask)[0]
        return output

    return Called(model, call)


def compiled_forward(model, folder):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def compiled_layers(model, folder):
    for i in range(2):
        layers(model)[i] = torch.compile(layers(model)[i], backend="eager")
    return model


def resized(model, folder):
    torch.manual_seed(0)
    model.resize_token_embeddings(300, mean_resizing=False)
    return model


def frozen(model, folder):
    for p in list(model.parameters())[:10]:
        p.requires_grad_(False)
    return model


def eager(model, folder):
    model.set_attn_implementation("eager")
    return model


def offloaded(model, folder):
    return accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))


_HOOK = {"before": "original", "after": "original", "reason": "has a hook"}
_NORM = {"before": "original", "after": "original", "reason": "not one of transformers.models"}
_OWN = "has a forward of its own"
_COMPILED = "the original forward is compiled"

ROWS = [
    Row(
        "`torch.compile(model)`",
        remark=_COMPILED,
        act=lambda m, _: torch.compile(m, backend="eager"),
    ),
    Row(
        "`model.forward = torch.compile(model.forward)`",
        before="original",
        reason=_OWN,
        remark=f"before: “… {_OWN} …”; after: {_COMPILED}",
        act=compiled_forward,
    ),
    Row(
        "`layer = torch.compile(layer)`",
        before="original",
        after="original",
        reason=_OWN,
        act=compiled_layers,
    ),
    Row("`torch.export.export`", remark="exports the original forward", act=exported),
    Row("`torch.jit.trace`", remark="traces the original forward", act=traced),
    Row("torch.func: `functional_call`", act=called_with_others),
    Row(
        "torch.func: `grad`, `vmap`",
        before="-",
        after="original",
        reason="inside a transform of torch.func",
    ),
    Row("prune: `l1_unstructured`", **_HOOK, act=on_linears(pruned)),
    Row("prune: `l1_unstructured`, then `remove`", act=on_linears(pruned_for_good)),
    Row("parametrizations: `weight_norm`", act=on_linears(parametrizations.weight_norm)),
    Row("parametrizations: `spectral_norm`", act=on_linears(parametrizations.spectral_norm)),
    Row("parametrizations: `orthogonal`", act=on_linears(parametrizations.orthogonal)),
    Row("utils: `weight_norm`, by hooks", **_HOOK, act=on_linears(weight_norm)),
    Row("utils: `spectral_norm`, by hooks", **_HOOK, act=on_linears(spectral_norm)),
    Row("parametrize: embeddings", act=scaled("Embedding")),
    Row("parametrize: LayerNorm", act=scaled("LayerNorm"), families=("bert",)),
    Row("parametrize: RMSNorm", **_NORM, act=scaled("RMSNorm"), families=("mistral", "qwen3")),
    Row("`AveragedModel` (EMA)", remark="the average of a patched model is patched", act=averaged),
    Row("weights tied between layers", act=tied),
    Row("`resize_token_embeddings`", act=resized),
    Row("frozen parameters", act=frozen),
    Row(
        '`set_attn_implementation("eager")`',
        remark="with gradients the original runs, which can be differentiated twice",
        act=eager,
        train=False,
    ),
    Row(
        "accelerate: `disk_offload`",
        before="original",
        after="original",
        reason=_OWN,
        act=offloaded,
        train=False,
    ),
    Row(
        "`half()` of one linear layer",
        before="refused",
        after="original",
        remark="the original's error: dtypes differ",
    ),
    Row("`gradient_checkpointing_enable`", before="-"),
]


@cases(ROWS)
def test_transform(row, when, family, tmp_path):
    check(row, when, family, tmp_path)


@pytest.mark.parametrize("family", ["bert", "mistral"])
def test_transforms_of_torch_func(family):
    results = []
    for patch in (False, True):
        model = make_model(family)
        if patch:
            report = embedfuse.patch(model)
        batch = batch_for(model)
        parameters = dict(model.named_parameters())

        def loss(parameters, model=model, batch=batch):
            output = functional_call(model, parameters, (), batch)
            return output.last_hidden_state[batch["attention_mask"] != 0].pow(3).mean()

        stacked = {n: torch.stack([p, p * 1.1]) for n, p in parameters.items()}
        with torch.no_grad():
            results.append((grad(loss)(parameters), vmap(loss, randomness="error")(stacked)))
    (expected, losses), (found, found_losses) = results
    assert_close(found_losses, losses, rtol=1e-5, atol=0)
    for name, value in expected.items():
        assert_close(found[name], value, rtol=0, atol=1e-5 * value.abs().max().item() + 1e-7)
    assert report.original_calls == {"the call is inside a transform of torch.func": 2}


@pytest.mark.parametrize("family", ["bert", "mistral"])
def test_half_of_one_layer_raises_as_in_the_original(family):
    model = make_model(family)
    linears(layers(model)[1])[-1].half()
    for unpatched in (True, False):
        with pytest.raises(RuntimeError, match="same dtype"):
            states(model) if unpatched else embedfuse.patch(model)
    model = make_model(family)
    embedfuse.patch(model)
    linears(layers(model)[1])[-1].half()
    with pytest.raises(RuntimeError, match="dtype"):
        states(model)


@pytest.mark.parametrize("family", ["bert", "mistral"])
def test_gradient_checkpointing(family):
    twins = make_model(family), make_model(family)
    embedfuse.patch(twins[0])
    for model in twins:
        model.gradient_checkpointing_enable()
        for module in model.modules():  # checkpointing works only in training, where dropout is on
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.train()
    assert_same(*twins)
    assert outcome(patched_inside(twins[0])) == "works"


def test_document():
    check_document("Compilers, transforms, parametrisations", ROWS)

"""A model and its patched twin: how both are made, called and compared."""

import torch
from torch import nn
from torch.testing import assert_close

import embedfuse
from embedfuse.patching.swap import Patched
from tests.patching.decoders import make_model as make_decoder
from tests.patching.encoders import make_batch
from tests.patching.encoders import make_model as make_encoder

MAKERS = {"bert": make_encoder, "mistral": make_decoder, "qwen3": make_decoder}
LENGTHS = (20, 3, 11, 1)


def make_model(family: str, **changes) -> nn.Module:
    return MAKERS[family](family, **{"num_hidden_layers": 2, **changes})


def layers(model: nn.Module) -> nn.ModuleList:
    return model.encoder.layer if hasattr(model, "encoder") else model.layers


def linears(model: nn.Module) -> list[nn.Linear]:
    return [m for m in model.modules() if type(m) is nn.Linear]


def patched_inside(model: nn.Module) -> nn.Module | None:
    """The patched transformers model inside what a tool has made of it."""
    return next((m for m in model.modules() if isinstance(m, Patched)), None)


def batch_for(model: nn.Module) -> dict[str, torch.Tensor]:
    return make_batch(next(m for m in model.modules() if hasattr(m, "config")), LENGTHS)


def states(model: nn.Module, batch: dict | None = None) -> torch.Tensor:
    """last_hidden_state at the tokens, without the rows of learned prompts."""
    batch = batch_for(model) if batch is None else batch
    found = model(**batch).last_hidden_state
    text = found[:, -batch["attention_mask"].shape[1] :]
    return text[batch["attention_mask"] != 0]


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """By parameter, of a weighted sum of all states."""
    model.zero_grad()
    kept = states(model)
    (kept * torch.linspace(-1, 1, kept.numel()).view_as(kept)).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(patched: nn.Module, original: nn.Module, train: bool = True) -> None:
    """Compare states, and gradients of all parameters that require them."""
    with torch.no_grad():
        expected, found = states(original), states(patched)
    assert expected.isfinite().all()
    assert_close(found, expected, rtol=0, atol=1e-5 * max(2, expected.abs().max().item()))
    if not (train and any(p.requires_grad for p in original.parameters())):
        return
    expected, found = gradients(original), gradients(patched)
    assert found.keys() == expected.keys()
    scale = max(g.abs().max() for g in expected.values()).item()
    for name, value in expected.items():
        bound = 1e-4 * max(value.abs().max().item(), 1e-3 * scale)
        assert_close(found[name], value, rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


def outcome(model: nn.Module) -> str:
    """How the patched model ran its calls: "works" on the fused path, or the reasons why not."""
    report = embedfuse.report(patched_inside(model))
    reasons = {**report.original_calls, **dict.fromkeys(report.refused.values())}
    return "; ".join(reasons) or "works"

"""Checkpoints: an unpatched model reads every tensor that a patched one writes, and the reverse."""

import copy
import io

import accelerate
import huggingface_hub
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import embedfuse
from embedfuse.patching.swap import Patched
from tests.tools.rows import Row, cases, check, check_document
from tests.tools.twins import make_model, states


def halved(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    return model


def through(write, read):
    """write(model, folder), then read(unpatched copy with other weights, folder), patched if the model is."""

    def act(model, folder):
        write(model, folder)
        other = copy.deepcopy(model)
        if isinstance(other, Patched):
            embedfuse.unpatch(other)
        read(halved(other), folder)
        if isinstance(model, Patched):
            embedfuse.patch(other)
        return other

    return act


def accelerate_state(model, folder):
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(model)
    accelerator.save_state(folder)
    halved(model)
    accelerator.load_state(folder)
    return model


def read_dcp(model, folder):
    state = {"model": get_model_state_dict(model)}
    dcp.load(state, checkpoint_id=folder / "dcp")
    set_model_state_dict(model, state["model"])


def loaded_plain(model, folder):
    """from_pretrained called on the object, as many trainers do."""
    model.save_pretrained(folder)
    loaded = model.from_pretrained(folder).eval()
    assert type(loaded) is getattr(type(model), "original", type(model))
    if isinstance(model, Patched):
        embedfuse.patch(loaded)
    return loaded


def made_from_config(model, folder):
    kind = type(model)
    for make in (kind, kind._from_config, model._from_config):
        made = make(model.config).eval()
        assert type(made) is getattr(kind, "original", kind)
    made.load_state_dict(model.state_dict())
    if isinstance(model, Patched):
        embedfuse.patch(made)
    return made


def saved_whole(model, folder):
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


ROWS = [
    Row(
        "accelerate: `save_model`",
        act=through(
            lambda m, folder: accelerate.Accelerator(cpu=True).save_model(m, folder),
            accelerate.load_checkpoint_in_model,
        ),
    ),
    Row("accelerate: `save_state`, `load_state`", act=accelerate_state),
    Row(
        "safetensors: `save_model`, `load_model`",
        act=through(
            lambda m, folder: safetensors.torch.save_model(m, str(folder / "x")),
            lambda m, folder: safetensors.torch.load_model(m, str(folder / "x")),
        ),
    ),
    Row(
        "safetensors: `save_file(model.state_dict())`",
        act=through(
            lambda m, folder: safetensors.torch.save_file(m.state_dict(), folder / "x"),
            lambda m, folder: m.load_state_dict(safetensors.torch.load_file(folder / "x")),
        ),
    ),
    Row(
        "huggingface_hub: `save_torch_model`",
        act=through(huggingface_hub.save_torch_model, huggingface_hub.load_torch_model),
    ),
    Row("torch: `save(model)`", remark="loads patched", act=saved_whole),
    Row(
        "torch: `save(model.state_dict())`",
        act=through(
            lambda m, folder: torch.save(m.state_dict(), folder / "x"),
            lambda m, folder: m.load_state_dict(torch.load(folder / "x")),
        ),
    ),
    Row("torch: `save` of one weight", before="-", remark="writes that weight alone"),
    Row(
        "torch.distributed.checkpoint",
        act=through(
            lambda m, folder: dcp.save(
                {"model": get_model_state_dict(m)}, checkpoint_id=folder / "dcp"
            ),
            read_dcp,
        ),
    ),
    Row(
        "transformers: `save_pretrained`, `model.from_pretrained`",
        remark="loads a plain model",
        act=loaded_plain,
    ),
    Row(
        "`type(model)(config)`, `model._from_config`",
        remark="makes a plain model",
        act=made_from_config,
    ),
]


@cases(ROWS)
def test_checkpoint(row, when, family, tmp_path):
    check(row, when, family, tmp_path)


@pytest.mark.parametrize("family", ["bert", "mistral"])
def test_one_weight_is_saved_alone(family):
    sizes = []
    for patch in (False, True):
        model = make_model(family)
        if patch:
            embedfuse.patch(model)
            states(model).sum()
        stream = io.BytesIO()
        torch.save(
            next(p for n, p in model.named_parameters() if n.endswith("proj.weight") or "key" in n),
            stream,
        )
        sizes.append(len(stream.getvalue()))
    assert sizes[0] == sizes[1]


def test_document():
    check_document("Checkpoints", ROWS)

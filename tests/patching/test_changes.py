"""Edits of a live model: the patched one follows its original, or runs it and says why."""

import contextlib
import copy
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import nn
from torch.testing import assert_close
from transformers import masking_utils

import embedfuse
from embedfuse.native import _unchanged
from embedfuse.patching import watch
from tests.patching import decoders
from tests.patching.edits import CHANGES, attention_of, blocks, first_norm
from tests.patching.encoders import CLASSIFIERS, FAMILIES, make_batch, make_classifier, make_model

MODELS = {
    **{name: lambda name=name: make_model(name) for name in FAMILIES},
    **{f"{name} classifier": lambda name=name: make_classifier(name) for name in CLASSIFIERS},
    **{name: lambda name=name: decoders.make_model(name) for name in decoders.FAMILIES},
}
TIGHT = {"rtol": 0, "atol": 2e-5}


@pytest.fixture(params=MODELS)
def pair(request):
    """A patched model and its unpatched twin."""
    original = MODELS[request.param]()
    patched = copy.deepcopy(original)
    embedfuse.patch(patched)
    return patched, original


def outputs(model):
    """What the model gives for padded texts and for texts of one length, or the error that it raises."""
    batch = make_batch(model, (9, 3))
    alone = {"input_ids": batch["input_ids"][:1]}
    kept = batch["attention_mask"] != 0
    try:
        with torch.no_grad():
            padded, full = (model(**call)[0] for call in (batch, alone))
    except Exception as error:
        return type(error)
    return torch.cat([padded[kept], full[0]]) if padded.dim() == 3 else torch.cat([padded, full])


def assert_alike(patched, original, what=""):
    found, expected = outputs(patched), outputs(original)
    if isinstance(expected, type) or isinstance(found, type):
        assert found is expected, what
    else:
        assert_close(found, expected, **TIGHT, msg=lambda text: f"{what}: {text}")


def settings(model) -> list[tuple[str, str, object]]:
    """(path of a module or "config", name, value) of all that says how the model computes."""
    found = [("config", name, value) for name, value in vars(model.config).items()]
    own = type(model).__module__
    for path, module in model.named_modules():
        if type(module).__module__ == own:
            found += ((path, name, value) for name, value in watch._settings(vars(module)))
    return found


def owner_of(model, path: str):
    return model.config if path == "config" else model.get_submodule(path)


def others(value) -> list:
    """Other values of the same kind."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, max(1, value // 2)]
    if isinstance(value, float):
        return [value * 1.5 + 0.01]
    if value is None:
        return [2]
    if isinstance(value, list) and value:
        changed = "full_attention" if value[0] != "full_attention" else "sliding_attention"
        return [[changed, *value[1:]]] if isinstance(value[0], str) else []
    return []


def test_every_setting(pair):
    patched, original = pair
    tried = 0
    for path, name, value in settings(original):
        for other in others(value):
            try:
                for model in pair:
                    setattr(owner_of(model, path), name, copy.copy(other))
            except StrictDataclassFieldValidationError:  # transformers takes no such value
                continue
            assert_alike(patched, original, f"{path}.{name} = {other!r}")
            for model in pair:
                setattr(owner_of(model, path), name, value)
            tried += 1
    assert tried > 30
    assert_alike(patched, original)
    assert patched.current_layout().refusal is None


def test_lists_of_the_config_edited_in_place(pair):
    patched, original = pair
    for model in pair:
        for value in vars(model.config).values():
            if isinstance(value, list) and value[:1] == ["sliding_attention"]:
                value[0] = "full_attention"
    assert_alike(patched, original)


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_modules(pair, change):
    patched, original = pair
    assert_alike(patched, original)
    for model in pair:
        CHANGES[change](model)
    assert_alike(patched, original)
    assert_alike(patched, original)


@contextlib.contextmanager
def replaced(owner, name: str, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def replacements(model) -> list[tuple[object, str, object]]:
    """What Liger and others replace, in one place for all models of a class: owner, name, and another."""

    def twice(forward):
        def doubled(self, *args, **kwargs):
            out = forward(self, *args, **kwargs)
            return (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out

        return doubled

    parent, name = first_norm(model)
    kinds = {type(x) for x in (blocks(model)[0], attention_of(model), getattr(parent, name))}
    kinds.add(nn.Linear)
    found = [(kind, "forward", twice(kind.forward)) for kind in kinds]
    file = sys.modules[type(model.base_model).__module__]
    if hasattr(file, "apply_rotary_pos_emb"):
        found += (
            (file, "apply_rotary_pos_emb", lambda q, k, *args, **kwargs: (q, k)),
            (file, "apply_rotary_pos_emb", partial(lambda q, k, *args, **kwargs: (q, k))),
            (file, "create_causal_mask", masking_utils.create_bidirectional_mask),
            (type(getattr(parent, name)), "forward", nn.Identity.forward),
        )
    else:
        layer = type(blocks(model)[0])
        found.append((layer, "feed_forward_chunk", lambda self, x: 2 * x))
    sdpa = F.scaled_dot_product_attention
    found.append((F, "scaled_dot_product_attention", lambda *args, **how: 2 * sdpa(*args, **how)))
    return found


def test_replaced_for_all_models(pair):
    patched, original = pair
    expected = outputs(original)
    for owner, name, value in replacements(original):
        with replaced(owner, name, value):
            assert_alike(patched, original, f"{owner.__name__}.{name} = {value}")
            if name != "create_causal_mask":  # without sliding windows the last layers have none
                assert not torch.allclose(outputs(original), expected, **TIGHT)
            twin = copy.deepcopy(original)
            report = embedfuse.patch(twin)
            assert "was replaced by" in report.refused["forward"]
            assert_alike(twin, original)
        assert_alike(patched, original)
    assert patched.current_layout().refusal is None


def test_a_hook_comes_and_goes(pair):
    patched, original = pair
    report = embedfuse.report(patched)
    for _ in range(2):
        handles = [blocks(m)[1].register_forward_hook(lambda *_: None) for m in pair]
        patched.eval()  # looks at the layout, and makes none
        assert_alike(patched, original)
        assert report.original_calls.total() == 2
        report.original_calls.clear()
        for handle in handles:
            handle.remove()
        assert_alike(patched, original)
        assert not report.original_calls


@pytest.mark.parametrize("native", [True, False])
def test_both_comparisons_see_the_same(monkeypatch, native):
    """The C++ one, and the Python one where it was not built."""
    model = make_model("bert")
    if not native:
        monkeypatch.setattr(watch, "comparison", lambda: _unchanged)
    seen = watch.Watch(model, type(model))
    layer = model.encoder.layer[1]
    for owner, name, value in (
        (layer.attention.self, "scaling", 7.0),
        (layer.attention.self, "new", 1),
        (layer.output, "dense", nn.Linear(80, 48)),
        (layer.output.dense, "forward", print),
        (model.config, "hidden_act", "relu"),
        (model.embeddings, "position_ids", torch.zeros(1, 70)),
    ):
        before = getattr(owner, name, None)
        assert not seen.changed(model)
        setattr(owner, name, value)
        assert seen.changed(model), name
        delattr(owner, name) if before is None or name == "forward" else setattr(
            owner, name, before
        )
    assert not seen.changed(model)
    model.encoder.layer.append(layer)
    assert seen.changed(model)
    seen = watch.Watch(model, type(model), tuple(model.embeddings.buffers()))
    model.embeddings.token_type_ids.fill_(1)
    assert seen.changed(model)


@pytest.mark.parametrize("name", ["position_ids", "token_type_ids"])
def test_buffers_edited_in_place(name):
    original = make_model("bert", type_vocab_size=2)
    patched = copy.deepcopy(original)
    embedfuse.patch(patched)
    for model in (patched, original):
        getattr(model.embeddings, name)[0, :3] = torch.tensor([1, 0, 1])
    assert_alike(patched, original)
    assert embedfuse.report(patched).original_calls

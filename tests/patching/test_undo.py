"""patch changes nothing but speed, unpatch leaves nothing behind, a failed patch neither."""

import contextlib
import copy
import dataclasses
import gc
import pickle
import weakref

import pytest
import torch

import embedfuse
from embedfuse.nn import encoder as tower
from embedfuse.nn.program import Program
from embedfuse.nn.programs import Programs
from embedfuse.patching.forward import encoder
from tests.patching.encoders import make_batch, make_model, states


def snapshot(model) -> dict:
    return {
        "class": type(model),
        "attributes": set(model.__dict__),
        "parameters": {n: (id(p), p.clone()) for n, p in model.named_parameters()},
        "storages": {p.untyped_storage().data_ptr() for p in model.parameters()},
        "modes": [m.training for m in model.modules()],
        "output": run(model),
    }


def run(model) -> torch.Tensor:
    torch.manual_seed(3)
    with torch.no_grad():
        return model(**make_batch(model)).last_hidden_state


def assert_unchanged(model, before):
    assert type(model) is before["class"]
    assert set(model.__dict__) == before["attributes"]
    for name, p in model.named_parameters():
        identity, value = before["parameters"][name]
        assert id(p) == identity
        assert torch.equal(p, value)
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == len(
        before["storages"]
    )
    assert [m.training for m in model.modules()] == before["modes"]
    assert torch.equal(run(model), before["output"])


def test_is_patched(model):
    twin = copy.deepcopy(model)
    wrapper = torch.nn.Sequential(model)
    assert not embedfuse.is_patched(model)
    embedfuse.patch(model)
    assert embedfuse.is_patched(model)
    assert embedfuse.is_patched(copy.deepcopy(model))
    assert not embedfuse.is_patched(twin)
    assert not embedfuse.is_patched(wrapper)
    assert not embedfuse.is_patched(None)
    embedfuse.unpatch(model)
    assert not embedfuse.is_patched(model)


@pytest.mark.parametrize("training", [False, True])
def test_patch_and_unpatch(model, training):
    model.train(training)
    model.encoder.layer[1].eval()  # mixed modes are kept
    before = snapshot(model)
    embedfuse.patch(model)
    assert [m.training for m in model.modules()] == before["modes"]
    assert isinstance(model, before["class"])
    embedfuse.unpatch(model)
    assert_unchanged(model, before)


def test_patching_leaves_the_global_random_state(model):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    embedfuse.patch(model.train())
    assert torch.equal(torch.get_rng_state(), state)


def test_twice_is_once(model):
    before = snapshot(model)
    assert embedfuse.patch(model) is embedfuse.patch(model)
    assert embedfuse.report(model) is embedfuse.patch(model)
    embedfuse.unpatch(model)
    assert_unchanged(model, before)


def test_scoped(model):
    before = snapshot(model)
    with embedfuse.patched(model) as report:
        assert type(model) is not before["class"]
        assert report is embedfuse.report(model)
    assert_unchanged(model, before)
    with contextlib.suppress(ZeroDivisionError), embedfuse.patched(model):
        1 / 0  # noqa: B018
    assert_unchanged(model, before)
    embedfuse.patch(model)
    with embedfuse.patched(model):
        pass
    assert type(model) is not before["class"]  # it was patched before the block


def test_names_stay(model):
    kind = type(model)
    embedfuse.patch(model)
    assert (type(model).__name__, type(model).__module__) == (kind.__name__, kind.__module__)
    assert str(type(model)) == str(kind)


def test_report(model):
    report = embedfuse.patch(model)
    assert report.fused == ["3 layers without padding"]
    assert report.refused == {}
    assert set(report.deviations) == {"last_hidden_state", "pooler_output"}
    assert max(report.deviations.values()) < 1e-5
    assert report.memory_bytes == 0
    assert "memory        +0 bytes" in str(report)


@pytest.mark.parametrize("broken", ["program", "positions", "mask", "heads", "norm", "raises"])
def test_a_wrong_forward_is_found_and_rolled_back(family, monkeypatch, broken):
    model = make_model(family)
    before = snapshot(model)
    if broken != "program":  # op by op
        monkeypatch.setattr(Programs, "for_call", lambda *args: None)
    if broken == "program":
        run = Program.run
        monkeypatch.setattr(Program, "run", lambda *args: 1.01 * run(*args))
    elif broken == "positions":
        original = encoder.PackedEncoder._embed

        def off_by_one(self, batch):
            positions = self.position_ids(batch.tokens.input_ids, batch.packed) + 1
            tokens = dataclasses.replace(batch.tokens, position_ids=positions)
            return original(self, dataclasses.replace(batch, tokens=tokens))

        monkeypatch.setattr(encoder.PackedEncoder, "_embed", off_by_one)
    elif broken == "mask":
        attention = tower.attention

        def across_sequences(q, k, v, packed, **kwargs):
            from embedfuse.packing import unpadded

            return attention(q, k, v, unpadded([packed.tokens], q.device), **kwargs)

        monkeypatch.setattr(tower, "attention", across_sequences)
    elif broken == "heads":
        read = encoder.read_layer
        monkeypatch.setattr(encoder, "read_layer", lambda b: _with(read(b), head_dim=24))
    elif broken == "norm":
        monkeypatch.setattr(tower, "norm_of_sum", lambda norm, y, x, inference: y + x)
    else:
        monkeypatch.setattr(tower, "attention", lambda *a, **k: 1 / 0)
    expected = ZeroDivisionError if broken == "raises" else embedfuse.PatchError
    match = None if broken == "raises" else "last_hidden_state: the patched forward deviates by"
    with pytest.raises(expected, match=match):
        embedfuse.patch(model)
    assert_unchanged(model, before)


def _with(layer, **changes):
    layer = copy.copy(layer)
    for name, value in changes.items():
        setattr(layer, name, value)
    return layer


def test_the_class_makes_originals(family, tmp_path):
    """type(model)(...) and its class methods give what they gave before."""
    model = make_model(family)
    original = type(model)
    embedfuse.patch(model)
    model.save_pretrained(tmp_path)
    made = [
        type(model)(model.config),
        type(model)._from_config(model.config),
        type(model).from_pretrained(tmp_path),
        model.from_pretrained(tmp_path),
        pickle.loads(pickle.dumps(type(model).from_pretrained))(tmp_path),
    ]
    assert {type(m) for m in made} == {original}
    batch = make_batch(model)
    assert torch.allclose(states(made[-1], batch), states(model, batch), rtol=0, atol=2e-5)
    assert pickle.loads(pickle.dumps(type(model))) is type(model)
    assert copy.deepcopy(type(model)) is type(model)


def test_a_class_changed_since_is_undone_first(model):
    embedfuse.patch(model)
    patched = type(model)
    model.__class__ = type("Sharded", (patched,), {})
    with pytest.raises(ValueError, match="model: its class is Sharded now; undo first"):
        embedfuse.unpatch(model)
    model.__class__ = patched
    embedfuse.unpatch(model)


def test_a_forward_kept_by_a_wrapper_outlives_the_patch(model):
    """accelerate, autocast and profilers keep the bound method that they found."""
    batch = make_batch(model)
    expected = states(model, batch)
    embedfuse.patch(model)
    kept = model.forward
    model.forward = lambda *args, **kwargs: kept(*args, **kwargs)
    assert torch.allclose(states(model, batch), expected, rtol=0, atol=2e-5)
    assert not embedfuse.report(model).original_calls
    embedfuse.unpatch(model)
    assert torch.equal(states(model, batch), expected)
    model.forward = kept
    assert torch.equal(states(model, batch), expected)
    embedfuse.patch(model)
    assert torch.allclose(states(model, batch), expected, rtol=0, atol=2e-5)


def test_a_patched_model_dies_with_its_last_name(family):
    model = make_model(family)
    embedfuse.patch(model)
    batch = make_batch(model)
    states(model, batch)
    gc.collect()
    gc.disable()
    try:
        dead, weight = weakref.ref(model), weakref.ref(model.encoder.layer[0].output.dense.weight)
        del model
        assert dead() is None
        assert weight() is None
    finally:
        gc.enable()

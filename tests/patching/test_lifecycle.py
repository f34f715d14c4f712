"""A patched model lives on: moved, cast, trained, copied, saved, compiled, hooked, shared."""

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoModel

import embedfuse
from embedfuse.testing import assert_as_good
from tests.patching.encoders import make_batch, make_model, states

TIGHT = {"rtol": 0, "atol": 2e-5}


@pytest.fixture
def pair(family):
    """The same model patched and unpatched."""
    original = make_model(family)
    patched = copy.deepcopy(original)
    embedfuse.patch(patched)
    return patched, original


def assert_agree(patched, original, tolerance=TIGHT):
    batch = make_batch(original)
    assert_close(states(patched, batch), states(original, batch), **tolerance)
    assert not embedfuse.report(patched).original_calls


def test_cast_and_back(pair):
    patched, original = pair
    for model in pair:
        model.half().double()
    assert_agree(patched, original)
    for model in pair:
        model.to(torch.bfloat16)
    assert_agree(patched, original, {"rtol": 0, "atol": 0.1})


def test_moving_a_part_only(pair):
    patched, original = pair
    for model in pair:
        model.encoder.layer[1].double().float()
        model.encoder.layer[2].attention.self.key.double().float()
    assert_agree(patched, original)


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(pair, family, assign):
    patched, original = pair
    other = make_model(family)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    for model in pair:
        model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    assert_agree(patched, original)
    assert_agree(patched, other)


def test_state_dict_is_the_same(pair):
    patched, original = pair
    assert list(patched.state_dict()) == list(original.state_dict())
    for name, value in original.state_dict().items():
        assert torch.equal(patched.state_dict()[name], value), name


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_optimizer_step(pair, optimizer):
    patched, original = pair
    batch = make_batch(original)
    assert_agree(patched, original)  # a forward first, so that anything stale would show
    before = states(original, batch)
    for model in pair:
        step = getattr(torch.optim, optimizer)(model.parameters(), lr=0.01)
        model(**batch).pooler_output.square().sum().backward()
        step.step()
    assert (states(original, batch) - before).abs().max() > 1e-2
    assert_agree(patched, original, {"rtol": 0, "atol": 1e-3})


def test_edits_that_bypass_the_version_counter(pair):
    """`weight.data += delta` is how PEFT merges LoRA; torch's version counter does not see it."""
    patched, original = pair
    assert_agree(patched, original)
    for model in pair:
        weight = model.encoder.layer[0].attention.self.value.weight
        weight.data += 0.3
        model.encoder.layer[1].attention.self.query.weight.data[3, 5] = 7.0
    assert_agree(patched, original)


@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "torch.save"])
def test_copies(pair, copier):
    patched, original = pair
    if copier == "deepcopy":
        twin = copy.deepcopy(patched)
    elif copier == "pickle":
        twin = pickle.loads(pickle.dumps(patched))
    else:
        buffer = io.BytesIO()
        torch.save(patched, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert_agree(twin, original)
    with torch.no_grad():
        twin.encoder.layer[0].attention.self.query.weight.zero_()
    assert_agree(patched, original)  # nothing is shared
    embedfuse.unpatch(twin)
    assert type(twin) is type(original)


def test_shallow_copies_read_their_own_modules(pair):
    """As DataParallel makes them: same attributes, other modules."""
    patched, original = pair
    twin = copy.copy(patched)
    twin._modules = dict(twin._modules)
    twin.encoder = copy.deepcopy(patched.encoder)
    with torch.no_grad():
        twin.encoder.layer[0].output.dense.bias += 1
        original.encoder.layer[0].output.dense.bias += 1
    assert_agree(twin, original)


def test_save_pretrained(pair, tmp_path):
    patched, original = pair
    patched.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert type(loaded) is type(original)
    for name, value in original.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert_agree(patched, original)


@pytest.mark.slow  # tests/tools/test_transforms.py compiles before and after patching
@pytest.mark.parametrize("family", ["bert"])  # the original is traced, whatever the family
def test_torch_compile(pair):
    patched, original = pair
    compiled = torch.compile(patched, backend="aot_eager", dynamic=True)
    for lengths in ((9, 4), (12, 12, 3)):
        batch = make_batch(original, lengths)
        assert_close(states(compiled, batch), states(original, batch), **TIGHT)


def test_autocast(pair):
    patched, original = pair
    batch = make_batch(original)
    exact = states(original, batch)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = states(original, batch), states(patched, batch)
        pooled = embedfuse.embed(patched, **batch, pooling="mean")
    assert pooled.dtype == expected.dtype
    assert (expected - exact).abs().max() > 1e-4  # autocast is on
    assert_as_good(found, expected, exact)


def test_one_query_of_few_tokens(pair):
    """Few rows take another GEMM."""
    patched, original = pair
    batch = make_batch(original, (3,))
    assert_close(states(patched, batch), states(original, batch), **TIGHT)


def test_lora_injected_after_patching(pair):
    """A Linear that is not exactly nn.Linear runs as the module that it is."""

    class LoRA(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.out_features = base, base.out_features
            torch.manual_seed(2)
            self.a = nn.Linear(base.in_features, 2, bias=False)
            self.b = nn.Linear(2, base.out_features, bias=False)

        def forward(self, x):
            return self.base(x) + self.b(self.a(x))

    patched, original = pair
    batch = make_batch(original)
    plain = states(original, batch)
    for model in pair:
        for block in model.encoder.layer:
            block.attention.self.query = LoRA(block.attention.self.query)
            block.output.dense = LoRA(block.output.dense)
    assert_agree(patched, original)
    assert (states(original, batch) - plain).abs().max() > 1e-2


def test_device_map(family, tmp_path):
    """Offloaded layers: accelerate's hooks have to run, so the original forward does."""
    accelerate = pytest.importorskip("accelerate")
    original = make_model(family)
    model = copy.deepcopy(original)
    device_map = dict.fromkeys((name for name, _ in model.named_children()), "cpu")
    device_map["encoder"] = "disk"
    accelerate.dispatch_model(
        model, device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True
    )
    assert any(p.is_meta for p in model.parameters())
    report = embedfuse.patch(model)
    batch = make_batch(original)
    assert torch.equal(states(model, batch), states(original, batch))
    assert "has a forward of its own" in report.refused["forward"]
    assert report.fused == []
    with torch.no_grad():
        expected, found = (embedfuse.embed(m, **batch, pooling="mean") for m in (original, model))
    assert torch.equal(found, expected)
    embedfuse.unpatch(model)


def test_a_compiled_forward_stays(pair):
    """`model.forward = torch.compile(model.forward)` hides the class's forward."""
    patched, original = pair
    original.forward = torch.compile(original.forward, backend="eager")
    report = embedfuse.patch(original)
    assert report.refused == {
        "forward": "the model has a forward of its own (offloaded, compiled or wrapped)"
    }
    batch = make_batch(patched)
    assert_close(states(original, batch), states(patched, batch), **TIGHT)


def test_threads(pair):
    patched, original = pair
    batches = [make_batch(original, lengths) for lengths in ((20, 3), (1,), (9, 9, 9), (30, 2, 2))]
    expected = [states(original, batch) for batch in batches]
    failures = []

    def work(i):
        for _ in range(20):
            found = states(patched, batches[i])
            if not torch.allclose(found, expected[i], rtol=0, atol=2e-5):
                failures.append(i)

    threads = [threading.Thread(target=work, args=(i % 4,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_inference_mode_then_training(family):
    """Patching and running under inference mode leaves a model that can still be trained."""
    model = make_model(family)
    with torch.inference_mode():
        embedfuse.patch(model)
        model(**make_batch(model))
    model.double().float()
    model(**make_batch(model)).pooler_output.sum().backward()
    assert model.encoder.layer[0].attention.self.query.weight.grad.abs().max() > 0

"""Programs of a GPU in Triton's interpreter: the bits of the ops. Run by test_interpret.py."""

import contextlib

import pytest
import torch
from torch import nn

import embedfuse
from embedfuse.nn import device_calls
from embedfuse.nn.device_calls import DeviceCalls
from embedfuse.nn.flash import Flash
from embedfuse.nn.programs import Programs
from embedfuse.ops.varlen_attention import varlen_attention
from embedfuse.packing import unpadded
from embedfuse.triton_kernels.launch import Launch
from tests.no_wait import META, NoTensorOfAList, NoWait
from tests.patching import decoders, encoders

FAMILIES = {
    "bert": encoders.make_model,
    "xlm_roberta": encoders.make_model,
    "mistral": decoders.make_model,
    "qwen3": decoders.make_model,
}
F32, BF16 = torch.float32, torch.bfloat16
# A window of 2 is narrower than the longest text.
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32}
DECODER = {"sliding_window": 2, "num_key_value_heads": 1}
OF_FAMILY = {"mistral": DECODER, "qwen3": DECODER}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(autouse=True)
def triton():
    """Products by torch, as on a GPU."""
    with embedfuse.use_backend("triton"):
        yield


@pytest.fixture
def runs(monkeypatch):
    ran, run = [], DeviceCalls.run
    monkeypatch.setattr(DeviceCalls, "run", lambda *args: ran.append(args) or run(*args))
    return ran


def make(family, dtype=F32):
    # An encoder's inner product is larger than those whose memory it uses.
    sizes = SIZES | OF_FAMILY.get(family, {"intermediate_size": 256})
    model = FAMILIES[family](family, **sizes)
    with embedfuse.use_backend("reference"):  # of patch's check
        embedfuse.patch(model)
    return model.to(dtype)


def states(model, batch, pooling=None):
    with torch.inference_mode():
        return model.packed_states(batch, pooling=pooling).states


def by_ops(model, batch, pooling=None):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Programs, "for_call", lambda *args: None)
        return states(model, batch, pooling)


@pytest.mark.parametrize(
    ("family", "dtype", "pooled"),
    [
        *(("bert", F32, False), ("xlm_roberta", F32, True), ("xlm_roberta", BF16, False)),
        *(("mistral", F32, True), ("qwen3", F32, False), ("qwen3", BF16, False)),
    ],
    ids=str,
)
def test_same_bits_as_the_ops(family, dtype, pooled, runs):
    model = make(family, dtype)
    pooling = model.pruned_poolings[-1] if pooled else None
    batches = [encoders.make_batch(model, n) for n in ((2, 1), (5, 1, 3), (1,))]
    if dtype == F32:
        batches[1]["input_ids"][0, 1] = model.config.pad_token_id  # inside a text
    found = [states(model, batch, pooling) for batch in batches]
    assert len(runs) == len(batches)
    for result, batch in zip(found, batches, strict=True):
        assert torch.equal(result, by_ops(model, batch, pooling))


@pytest.mark.parametrize("family", ["bert"])
def test_token_types(family, runs):
    model = make(family)
    batch = encoders.make_batch(model, (3, 2))
    batch["token_type_ids"] = batch["attention_mask"].cumsum(1) % 2
    found = states(model, batch)
    assert len(runs) == 1
    assert torch.equal(found, by_ops(model, batch))
    batch["token_type_ids"] *= 0
    assert not torch.equal(found, states(model, batch))


@pytest.mark.parametrize("family", ["mistral"])
def test_calls_in_and_outside_of_inference_mode(family, runs):
    model = make(family)
    batch = encoders.make_batch(model, (2, 1))
    expected = states(model, batch)
    with torch.no_grad():
        found = model.packed_states(batch, pooling=None).states
    assert torch.equal(found, expected)
    assert not found.is_inference()
    assert torch.equal(states(model, batch), expected)
    assert len(runs) == 3


def first(model, kind) -> nn.Module:
    return next(m for m in model.modules() if type(m) is kind)


def new_memory(model):
    first(model, nn.Linear).weight.data = first(model, nn.Linear).weight.data * 2


def new_values(model):
    with torch.no_grad():
        first(model, nn.Linear).weight.mul_(2)


def new_parameter(model):
    first(model, nn.LayerNorm).bias = nn.Parameter(torch.ones(32))


def new_setting(model):
    first(model, nn.LayerNorm).eps = 0.5


@pytest.mark.parametrize("change", [new_memory, new_values, new_parameter, new_setting])
def test_a_change_is_seen(change, runs):
    model = make("bert")
    batch = encoders.make_batch(model, (2, 1))
    before = states(model, batch)
    change(model)
    found = states(model, batch)
    assert len(runs) == 2
    assert not torch.equal(found, before)
    assert torch.equal(found, by_ops(model, batch))


def test_what_no_kernel_computes_runs_op_by_op(runs):
    model = make("bert")
    batch = encoders.make_batch(model, (2, 1))
    expected = states(model, batch)
    with embedfuse.use_backend("reference"):
        states(model, batch)
    assert model(**batch).last_hidden_state.requires_grad
    assert len(runs) == 1
    assert torch.equal(states(model, batch), expected)
    model.encoder.layer[1].intermediate.intermediate_act_fn = nn.GELU("tanh")
    found = states(model, batch)
    assert len(runs) == 2
    assert torch.equal(found, by_ops(model, batch))
    assert not torch.equal(found, expected)


def test_another_dtype(runs):
    model = make("mistral")
    batch = encoders.make_batch(model, (2, 1))
    for dtype in (F32, BF16, F32):
        found = states(model.to(dtype), batch)
        assert found.dtype == dtype
        assert torch.equal(found, by_ops(model, batch))
    assert len(runs) == 3


def flash_of_the_op(query, key, value, queries, packed, scale, causal, window):
    assert query.shape[1:] == (2, query.shape[2])
    bounds = {"cu_seqlens_q": queries.cu_seqlens, "cu_seqlens_k": packed.cu_seqlens}
    mask = {"causal": causal, "window": window}
    with embedfuse.use_backend("reference"):
        return varlen_attention(query, key, value, scale=scale, **bounds, **mask)


@pytest.mark.parametrize("pooled", [False, True])
def test_flash_attention(family, pooled, monkeypatch, runs):
    """It makes its result, in place of a part of the program's memory."""
    flash = Flash("stub", lambda: None, ((0, 0), (99, 0)), lambda _, *args: flash_of_the_op(*args))
    monkeypatch.setattr(device_calls, "choose", lambda *args: flash)
    model = make(family)
    pooling = model.pruned_poolings[-1] if pooled else None
    batch = encoders.make_batch(model, (5, 1))
    found = states(model, batch, pooling)
    assert len(runs) == 1
    torch.testing.assert_close(found, by_ops(model, batch, pooling), rtol=0, atol=2e-5)


@pytest.mark.parametrize("pooled", [False, True])
def test_waits_for_nothing(family, pooled, monkeypatch):
    launched = []
    monkeypatch.setattr(Launch, "by_look_up", lambda launch, *args, **_: launched.append(launch))
    # torch knows no autocast on this device.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device=None: False)
    model = make(family).to(META)
    packed = unpadded([5, 1, 3], torch.device("cpu"))
    packed = type(packed)(packed.lengths, packed.cu_seqlens.to(META), packed.shape, None)
    program = model.current_layout().programs._make(F32, META, pooled)
    assert program.refusal is None
    inputs = [torch.empty(9, width, device=META) for width in program._external[:-1]]
    ids = [torch.empty(9, dtype=torch.int64, device=META)] * 3
    rows = torch.empty(3, dtype=torch.int64, device=META) if pooled else None
    with torch.inference_mode(), NoTensorOfAList(), NoWait():
        out = program.run(inputs, packed, rows, ids)
    assert out.shape == (3 if pooled else 9, 32)
    assert len(launched) >= 3 * 2


def test_memory_that_is_shared_is_not_read_again():
    """Poisoned before each run, so that what a run reads it has written."""
    model = make("qwen3")
    batch = encoders.make_batch(model, (2, 1))
    expected, empty = states(model, batch), torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(torch, "empty", poisoned)
        assert torch.equal(states(model, batch), expected)

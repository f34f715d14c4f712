"""A tower as one native call: the same bits as op by op, and no stale weight, setting or address."""

import contextlib
import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import embedfuse
from embedfuse.nn.program import Program
from embedfuse.nn.programs import Programs, kernels_run
from embedfuse.ops.linear import most_rows
from embedfuse.ops.varlen_attention import OP as VARLEN
from tests.patching import decoders, encoders

FAMILIES = {
    **dict.fromkeys(encoders.FAMILIES, encoders.make_model),
    **dict.fromkeys(decoders.FAMILIES, decoders.make_model),
}
LENGTHS = (9, 4, 1, 17)

pytestmark = pytest.mark.usefixtures("cpp")


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def model(family):
    model = FAMILIES[family](family)
    embedfuse.patch(model)
    return model


@pytest.fixture
def runs(monkeypatch) -> list[Program]:
    """The programs that have run."""
    ran, run = [], Program.run

    def recorded(program, *args):
        ran.append(program)
        return run(program, *args)

    monkeypatch.setattr(Program, "run", recorded)
    return ran


def pooling_of(model) -> str:
    return model.pruned_poolings[-1]


@torch.inference_mode()
def states(model, batch, pooling=None):
    return model.packed_states(batch, pooling=pooling).states.clone()


@torch.inference_mode()
def by_ops(model, batch, pooling=None):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Programs, "for_call", lambda *args: None)
        return model.packed_states(batch, pooling=pooling).states.clone()


def assert_same_bits(model, batch, pooling=None):
    weight = model.get_input_embeddings().weight
    with torch.inference_mode():
        assert model.current_layout().programs.for_call(weight, 1, pooling is not None)
    found, expected = states(model, batch, pooling), by_ops(model, batch, pooling)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_same_bits_as_the_ops(model, dtype, pooled, runs):
    model.to(dtype)
    pooling = pooling_of(model) if pooled else None
    batches = (LENGTHS, (9,), (3,) * 40)
    for lengths in batches:
        assert_same_bits(model, encoders.make_batch(model, lengths), pooling)
    # With AMX torch's bf16 runs more rows.
    assert len(runs) == sum(sum(lengths) <= most_rows(dtype) for lengths in batches)


def test_same_bits_with_padding_inside_a_text(model):
    batch = encoders.make_batch(model, LENGTHS)
    batch["input_ids"][3, 5] = model.config.pad_token_id
    assert_same_bits(model, batch)


def test_same_bits_in_several_steps(model, runs, monkeypatch):
    monkeypatch.setattr("embedfuse.nn.tower.STEP_TOKENS", 20)
    for pooling in (None, pooling_of(model)):
        assert_same_bits(model, encoders.make_batch(model, LENGTHS), pooling)
    assert len(runs) == 2


def test_recorded_once(model, monkeypatch):
    batch = encoders.make_batch(model, LENGTHS)
    states(model, batch)
    monkeypatch.setattr(Programs, "_make", None)
    states(model, batch)


def first_linear(model) -> nn.Linear:
    return next(m for m in model.modules() if type(m) is nn.Linear)


def first_norm(model) -> nn.Module:
    names = ("LayerNorm", "input_layernorm")
    return next(m for path, m in model.named_modules() if path.endswith(names))


def new_values(weight):
    with torch.no_grad():
        weight.mul_(1.5)


def new_memory(weight):
    weight.data = weight.data * 1.5


def transposed(model):
    squares = (m.weight for m in model.modules() if type(m) is nn.Linear)
    weight = next((w for w in squares if w.shape[0] == w.shape[1]), None)
    if weight is None:
        pytest.skip("no square weight")
    weight.data = weight.data.t()


def reversed_rows(weight):
    weight.data = weight.data.flip(0)


def lazily_negated(weight):
    weight.data = torch._neg_view(weight.data)  # the same memory


CHANGES = {
    "values": lambda model: new_values(first_linear(model).weight),
    "memory": lambda model: new_memory(first_linear(model).weight),
    "transposed": transposed,
    "rows": lambda model: reversed_rows(first_linear(model).weight),
    "sign": lambda model: lazily_negated(first_linear(model).weight),
    "parameter": lambda model: setattr(
        first_linear(model), "weight", nn.Parameter(first_linear(model).weight * 2)
    ),
    "one bias more": lambda model: setattr(
        first_linear(model), "bias", nn.Parameter(torch.ones(len(first_linear(model).weight)))
    ),
    "norm": lambda model: new_memory(first_norm(model).weight),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(model, change):
    batch = encoders.make_batch(model, LENGTHS)
    before = states(model, batch)
    CHANGES[change](model)
    found = states(model, batch)
    assert not torch.equal(found, before)
    assert torch.equal(found, by_ops(model, batch))


def test_another_tensor_at_the_same_address(model, runs):
    """Memory that a weight gave back may come back as that of its successor."""
    batch = encoders.make_batch(model, LENGTHS)
    weight = first_linear(model).weight
    expected = states(model, batch)
    memory = weight.data
    halves = memory.flatten().view(torch.float16)
    square = memory.view(memory.shape[::-1]) if memory.shape[0] != memory.shape[1] else memory[:1]
    for other in (square, halves[: memory.numel()].view(memory.shape), memory[: len(memory) // 2]):
        weight.data = other
        with pytest.raises((RuntimeError, ValueError)):
            states(model, batch)
    runs.clear()
    weight.data = memory
    assert torch.equal(states(model, batch), expected)
    assert len(runs) == 1


def test_inputs_of_other_kinds_are_torchs(model, runs):
    batch = encoders.make_batch(model, LENGTHS)
    for dtype in (torch.float32, torch.bool):
        with pytest.raises(RuntimeError):
            states(model, {**batch, "input_ids": batch["input_ids"].to(dtype)})
    words = model.get_input_embeddings()
    words.weight.data = words.weight.data[:, :24].contiguous()
    with pytest.raises(RuntimeError):
        states(model, batch)
    assert not runs


def test_int32_ids(model):
    batch = encoders.make_batch(model, LENGTHS)
    expected = states(model, batch)
    assert torch.equal(states(model, {**batch, "input_ids": batch["input_ids"].int()}), expected)


def test_settings_of_norms(model, family):
    batch = encoders.make_batch(model, LENGTHS)
    before = states(model, batch)
    for module in model.modules():
        for name in ("eps", "variance_epsilon"):
            if hasattr(module, name):
                setattr(module, name, 0.5)
    assert not torch.equal(states(model, batch), before)
    assert_same_bits(model, batch)


def test_training_and_gradients_run_op_by_op(model, runs):
    batch = encoders.make_batch(model, LENGTHS)
    assert model(**batch).last_hidden_state.requires_grad
    model.train()
    states(model, batch)
    assert not runs
    model.eval()
    states(model, batch)
    assert len(runs) == 1


def test_modes_of_torch_see_the_ops(model, runs):
    batch = encoders.make_batch(model, LENGTHS)
    expected, seen = states(model, batch), set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.add(function)
            return function(*args, **kwargs or {})

    runs.clear()
    with Recorder():
        found = states(model, batch)
    assert not runs
    assert torch.ops.embedfuse.linear.default in seen
    assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_a_forced_backend(model, runs, backend):
    with embedfuse.use_backend(backend):
        states(model, encoders.make_batch(model, LENGTHS))
    assert bool(runs) is (backend == "cpp")


class OnGpu:
    """A weight on a GPU: all that the choice depends on."""

    is_cpu, is_meta, device, dtype = False, False, torch.device("cuda", 0), torch.float16


@pytest.mark.parametrize(
    ("backend", "accelerates", "runs"),
    [
        (None, True, True),
        ("triton", True, True),
        ("cpp", True, False),
        ("reference", False, False),
        (None, False, False),
    ],
)
def test_on_a_gpu(backend, accelerates, runs, monkeypatch):
    """Where Triton runs the ops: of any size, in inference."""
    monkeypatch.setattr(VARLEN, "accelerates", lambda x: accelerates)
    with contextlib.nullcontext() if backend is None else embedfuse.use_backend(backend):
        assert not kernels_run(OnGpu(), 5)
        with torch.inference_mode():
            assert [kernels_run(OnGpu(), tokens) for tokens in (0, 5, 10**6)] == [False, runs, runs]


def test_ids_out_of_range(model):
    batch = encoders.make_batch(model, LENGTHS)
    batch["input_ids"][0, 0] = model.config.vocab_size
    with pytest.raises(IndexError, match=rf"token {model.config.vocab_size}; accepted are 0 to"):
        states(model, batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_token(model, dtype, runs):
    model.to(dtype)
    batch = {"input_ids": torch.empty(0, 5, dtype=torch.long)}
    assert states(model, batch).shape == (0, model.config.hidden_size)
    assert not runs


def test_threads(model):
    """One model in several threads: nothing is shared but the weights."""
    batches = [
        encoders.make_batch(model, lengths) for lengths in ((9, 4), (30,), (1, 1, 1), (60, 2))
    ]
    expected = [states(model, batch) for batch in batches]
    wrong = []

    def work(i):
        for n in range(30):
            which = (i + n) % len(batches)
            if not torch.equal(states(model, batches[which]), expected[which]):
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_weights_may_be_replaced_during_a_run(model):
    """By another thread: values may be those of before or after, and no freed memory is read."""
    batch = encoders.make_batch(model, (60,) * 8)
    expected = states(model, batch)
    stop = threading.Event()

    def replace():
        while not stop.is_set():
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        for _ in range(30):
            torch.testing.assert_close(states(model, batch), expected, rtol=0, atol=1e-5)
    finally:
        stop.set()
        thread.join()


def test_weights_that_were_away(model, runs):
    batch = encoders.make_batch(model, (9, 3))
    expected = states(model, batch)
    kept = [parameter.data for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    with pytest.raises((RuntimeError, ValueError, IndexError, AssertionError)):
        states(model, batch)
    for parameter, data in zip(model.parameters(), kept, strict=True):
        parameter.data = data
    runs.clear()
    assert torch.equal(states(model, batch), expected)
    assert len(runs) == 1


def test_freed_with_the_model(model):
    states(model, encoders.make_batch(model, LENGTHS))
    program = next(iter(model.current_layout().programs._recorded.values()))
    alive = weakref.ref(program)
    del program
    embedfuse.unpatch(model)
    del model
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_were_replaced_are_freed(model, dtype):
    batch = encoders.make_batch(model, (9, 3))
    for pooling in (None, pooling_of(model)):
        states(model, batch, pooling)
    alive = weakref.ref(first_linear(model).weight)
    state = {name: x.to(dtype, copy=True) for name, x in model.state_dict().items()}
    if "embeddings.position_ids" in state:
        state["embeddings.position_ids"] = model.embeddings.position_ids.clone()
    model.load_state_dict(state, assign=True)
    states(model, batch)
    del state
    gc.collect()
    assert alive() is None


def test_what_no_kernel_computes_runs_op_by_op(runs):
    model = encoders.make_model("bert")
    model.encoder.layer[1].intermediate.intermediate_act_fn = nn.ReLU()
    embedfuse.patch(model)
    batch = encoders.make_batch(model, LENGTHS)
    states(model, batch)
    assert not runs
    model.encoder.layer[1].intermediate.intermediate_act_fn = nn.GELU()
    states(model, batch)
    assert len(runs) == 1
    model.encoder.layer[1].intermediate.intermediate_act_fn.approximate = "tanh"
    assert torch.equal(states(model, batch), by_ops(model, batch))
    assert len(runs) == 1

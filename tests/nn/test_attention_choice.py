"""Which attention is chosen on a GPU, its arguments, and what doctor and report say. Needs no GPU."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from embedfuse import native, use_backend
from embedfuse.cli import doctor
from embedfuse.nn import attention as nn_attention
from embedfuse.nn import flash
from embedfuse.nn.attention import KERNEL, SDPA, VARLEN, attention, choose, cuda_refusals
from embedfuse.nn.flash import FLASH_ATTENTION_3, TORCH_VARLEN
from embedfuse.ops.varlen_attention import varlen_attention
from embedfuse.packing import unpadded
from embedfuse.patching.forward.packed_model import attention_in_use

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
CPU = torch.device("cpu")
CACHES = (
    nn_attention.choose_flash,
    flash.load_flash_attention_3,
    flash.load_torch_varlen,
    flash.accepts,
    flash.reads_groups,
)


class OnGpu:
    """Shape, dtype and device of a CUDA tensor: all that the choice depends on."""

    is_cuda, is_cpu = True, False
    device = torch.device("cuda", 0)

    def __init__(self, dtype=F16, head_dim=64):
        self.dtype, self.shape = dtype, torch.Size((5, 2, head_dim))


class Stub:
    """flash_attn_varlen_func, or torch's: records its arguments and computes by the op's reference."""

    def __init__(self, scale_name, tuple_=False):
        self.scale_name, self.tuple, self.calls = scale_name, tuple_, []
        self.demands_heads = False

    def __call__(self, query, key, value, *bounds, **options):
        if self.demands_heads and key.shape[1] != query.shape[1]:
            raise RuntimeError("Number of heads must match")
        self.calls.append((bounds[2:], key.shape[1], dict(options)))
        left, right = options["window_size"]
        with use_backend("reference"):
            out = varlen_attention(
                query,
                key,
                value,
                cu_seqlens_q=bounds[0],
                cu_seqlens_k=bounds[1],
                scale=options[self.scale_name],
                causal=right == 0,
                window=None if left == -1 else left + 1,
            )
        return (out, None) if self.tuple else out


def fa3(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=None, causal=False, window_size=(-1, -1)):
    raise AssertionError


def torch_2_10(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False, return_aux=None):
    raise AssertionError


def torch_2_13(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    raise AssertionError


@pytest.fixture
def gpu(monkeypatch):
    """gpu(capability, flash_attention_3, torch_varlen): a machine with that GPU and those packages."""
    varlen = importlib.import_module("torch.nn.attention.varlen")
    caches = [function.cache_clear for function in CACHES]

    def machine(capability=(9, 0), flash_attention_3=None, torch_varlen=torch_2_13):
        for clear in caches:
            clear()
        monkeypatch.setattr(native, "require_gpu", lambda: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        installed = flash_attention_3 and SimpleNamespace(flash_attn_varlen_func=flash_attention_3)
        monkeypatch.setitem(sys.modules, "flash_attn_interface", installed)
        monkeypatch.setattr(varlen, "varlen_attn", torch_varlen)

    monkeypatch.delenv("EMBEDFUSE_BACKEND", raising=False)
    monkeypatch.setattr(nn_attention, "varlen_takes", inference)
    monkeypatch.setattr(VARLEN, "refusal", lambda *args: None)
    yield machine
    monkeypatch.undo()
    for clear in caches:
        clear()


def inference(query, key, value):
    """varlen_takes of CUDA tensors where Triton loads."""
    forced = nn_attention.forced_backend()
    return not torch.is_grad_enabled() and query.shape[-1] <= 256 and forced in (None, "triton")


def who(dtype=F16, head_dim=64, dropout=0.0, grad=False):
    x = OnGpu(dtype, head_dim)
    with torch.set_grad_enabled(grad):
        return choose(x, x, x, dropout)


def test_order_on_hopper(gpu):
    gpu((9, 0), fa3)
    for grad in (False, True):  # both are differentiable
        assert who(F16, grad=grad) is FLASH_ATTENTION_3
        assert who(BF16, grad=grad) is FLASH_ATTENTION_3
    gpu((9, 0))
    for grad in (False, True):
        assert who(BF16, grad=grad) is TORCH_VARLEN
    gpu((9, 0), None, torch_2_10)
    assert who(BF16) is VARLEN
    assert who(BF16, grad=True) is None


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_flash_attention_3_is_for_hopper(gpu, capability):
    gpu(capability, fa3)
    assert who() is TORCH_VARLEN


def test_what_flash_attention_does_not_serve(gpu):
    gpu((9, 0), fa3)
    for unserved in ({"dtype": F32}, {"head_dim": 36}, {"head_dim": 7}):
        assert who(**unserved) is VARLEN
        assert who(**unserved, grad=True) is None
    assert who(head_dim=264) is None
    assert who(dropout=0.1) is None
    gpu((7, 5), fa3)
    assert who(F16) is VARLEN
    assert who(F16, grad=True) is None


def test_a_backend_asked_for_goes_first(gpu):
    gpu((9, 0), fa3)
    with use_backend("triton"):
        assert who() is VARLEN
        assert who(grad=True) is TORCH_VARLEN
    for name in ("reference", "cuda", "cpp"):
        with use_backend(name):
            assert who() is TORCH_VARLEN
            assert who(F32) is None


@pytest.mark.parametrize(
    ("causal", "window", "window_size"),
    [(False, None, (-1, -1)), (True, None, (-1, 0)), (True, 1, (0, 0)), (True, 3, (2, 0))],
)
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize(
    "name", ["fa3", "fa3 of 2024", "torch", "torch 2.11", "torch that demands heads"]
)
def test_arguments_and_values(gpu, monkeypatch, name, group, causal, window, window_size):
    lengths_q, lengths_k = [2, 1, 4], [3, 5, 4]
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(7, 4, 8, generator=generator)
    k, v = torch.randn(2, 12, 4 // group, 8, generator=generator)
    stub = Stub("softmax_scale" if "fa3" in name else "scale", name == "fa3 of 2024")
    stub.demands_heads = "demands" in name
    monkeypatch.setattr(
        flash, "accepts", lambda function, argument: name == "torch" or argument == "scale"
    )
    gpu((9, 0), stub, stub)
    chosen = FLASH_ATTENTION_3 if "fa3" in name else TORCH_VARLEN
    masks = {"causal": causal, "window": window}
    packed, queries = unpadded(lengths_k, CPU), unpadded(lengths_q, CPU)
    monkeypatch.setattr(nn_attention, "choose", lambda *args: chosen)
    with torch.no_grad():
        found = attention(q, k, v, packed, scale=0.3, dropout=0.0, queries=queries, **masks)
        monkeypatch.setattr(nn_attention, "choose", lambda *args: None)
        expected = attention(q, k, v, packed, scale=0.3, dropout=0.0, queries=queries, **masks)
    assert_close(found, expected, rtol=1e-5, atol=1e-6)
    options = {"window_size": window_size}
    if "fa3" in name:
        options |= {"softmax_scale": 0.3, "causal": causal}
    else:
        options |= {"scale": 0.3} | ({"enable_gqa": True} if (name, group) == ("torch", 2) else {})
    kv_heads = 4 if "demands" in name else 4 // group
    assert stub.calls[-1] == ((4, 5), kv_heads, options)


def test_groups_are_read_where_the_values_are_right():
    def reads_the_first(query, key, value, *bounds, **options):
        return query + key.sum()

    assert flash.reads_groups(Stub("scale"), CPU, F32)
    assert not flash.reads_groups(reads_the_first, CPU, F32)


def test_gradients_get_repeated_keys(monkeypatch):
    def product(query, key, value, *bounds, **options):
        heads.append(key.shape[1])
        return query * key * value

    heads: list[int] = []
    packed = unpadded([3, 5], CPU)
    q, k = torch.randn(8, 4, 8), torch.randn(8, 2, 8)
    flash.run_torch_varlen(product, q, k, k, packed, packed, 0.3, True, None)
    assert heads == [4]


def test_the_op_gets_no_lengths(gpu, monkeypatch):
    """Only cu_seqlens, which is on the device: there is nothing to read on the host."""
    packed = unpadded([3, 5], CPU)
    x = torch.randn(8, 2, 8, generator=torch.Generator().manual_seed(0))
    expected = attention(x, x, x, packed, scale=0.3, dropout=0.0, causal=True)
    monkeypatch.setattr(type(packed), "max_seqlen", property(lambda _: 1 / 0))
    monkeypatch.setattr(type(packed), "tokens", property(lambda _: 1 / 0))
    object.__setattr__(packed, "lengths", None)
    monkeypatch.setattr(nn_attention, "choose", lambda *args: VARLEN)
    with torch.no_grad():
        found = attention(x, x, x, packed, scale=0.3, dropout=0.0, causal=True)
    assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_reasons(gpu, monkeypatch):
    monkeypatch.setattr(VARLEN, "refusal", lambda *args: "Triton is not there")
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    gpu((8, 0), None, torch_2_10)
    assert list(cuda_refusals(F16, 64).items()) == [
        (FLASH_ATTENTION_3.name, "runs on sm_90, not on sm_80"),
        (TORCH_VARLEN.name, "that of torch 2.10.0 does not take a scale"),
        (KERNEL, "Triton is not there"),
        (SDPA, None),
    ]
    gpu((7, 5), fa3)
    assert cuda_refusals(F16, 64)[TORCH_VARLEN.name] == "runs on sm_80 and later, not on sm_75"
    gpu((9, 0))
    answers = cuda_refusals(F32, 64)
    assert answers[FLASH_ATTENTION_3.name] == "takes float16, bfloat16, not float32"
    assert cuda_refusals(F16, 300)[KERNEL] == "takes a head_dim up to 256, not 300"
    for head_dim in (20, 264):
        text = f"takes a head_dim that is a multiple of 8 up to 256, not {head_dim}"
        assert cuda_refusals(F16, head_dim)[TORCH_VARLEN.name] == text


def test_why_flash_attention_3_does_not_load(gpu, monkeypatch, tmp_path):
    gpu((9, 0))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn_interface")
    # Two files of one size and one second would share their compiled code.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    name = FLASH_ATTENTION_3.name
    assert cuda_refusals(F16, 64)[name] == "flash_attn_interface is not installed"
    for content, reason in (
        ("import flash_attn_3_that_is_not_there", "No module named 'flash_attn_3_that"),
        ("raise ImportError('undefined symbol')", "undefined symbol"),
        ("", "no attribute 'flash_attn_varlen_func'"),
    ):
        (tmp_path / "flash_attn_interface.py").write_text(content)
        sys.modules.pop("flash_attn_interface", None)
        flash.load_flash_attention_3.cache_clear()
        found = cuda_refusals(F16, 64)[name]
        assert found.startswith("flash_attn_interface does not load: ")
        assert reason in found
    sys.modules.pop("flash_attn_interface", None)


def test_asked_for_by_name_in_the_answers(gpu):
    gpu((9, 0), fa3)
    with use_backend("triton"):
        answers = cuda_refusals(F16, 64)
        assert next(iter(answers)) == KERNEL
        assert answers[FLASH_ATTENTION_3.name] == "backend 'triton' was asked for"
    with use_backend("reference"):
        answers = cuda_refusals(F16, 64)
        assert answers[KERNEL] == "backend 'reference' was asked for"
        assert next(name for name, reason in answers.items() if reason is None) == TORCH_VARLEN.name


def test_doctor_shows_the_order(gpu):
    gpu((9, 0), fa3)
    names = [FLASH_ATTENTION_3.name, TORCH_VARLEN.name, KERNEL, SDPA]
    assert list(doctor.attention(BF16).items()) == [(name, "yes") for name in names]
    assert doctor.attention(F32)[FLASH_ATTENTION_3.name] == "takes float16, bfloat16, not float32"


def test_report_names_what_runs(gpu):
    gpu((9, 0), fa3)
    layout = SimpleNamespace(layers=[SimpleNamespace(head_dim=64)])
    model = SimpleNamespace(device=torch.device("cuda", 0), dtype=F16)
    assert attention_in_use(model, layout) == ["attention by FlashAttention-3"]
    gpu((8, 0))
    assert attention_in_use(model, layout) == ["attention by torch.nn.attention.varlen"]
    model.dtype = F32
    assert attention_in_use(model, layout) == ["attention by varlen_attention in Triton"]
    model.device = CPU
    assert attention_in_use(model, layout) == []

"""Selection of a backend: order, caching, explicit choice, and the reasons of refusals."""

import sys
import threading

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import embedfuse
from embedfuse import native, registry
from embedfuse.ops.linear import OP as LINEAR
from embedfuse.ops.pool_normalize import OP as POOL
from embedfuse.registry import BackendError, Op, use_backend

CPU, F32 = "cpu", torch.float32


@pytest.fixture(scope="module")
def defined():
    """An op for this file, not in OPS. Defined once, because torch keeps definitions."""
    op = Op("selection_under_test(Tensor x) -> Tensor")
    del registry.OPS[op.name]
    op.reference(lambda x: x * 0)
    return op


@pytest.fixture
def op(defined, monkeypatch):
    monkeypatch.delenv("EMBEDFUSE_BACKEND", raising=False)
    monkeypatch.setattr(defined, "implementations", [])
    monkeypatch.setattr(defined, "_chosen", {})
    return defined


def times(factor):
    """A loader of x -> factor * x that counts its calls."""

    def load():
        load.calls += 1
        return lambda x: factor * x

    load.calls = 0
    return load


def broken():
    raise native.Unavailable("its parts are missing")


def run(op, dtype=F32):
    return op(torch.ones(1, dtype=dtype)).item()


def test_first_version_that_can_run_is_taken(op):
    op.impl("cuda", times(2))
    op.impl("cpp", times(3), dtypes=(torch.float16,))
    op.impl("cpp", broken, dtypes=(torch.bfloat16,))
    op.impl("cpp", times(5), dtypes=(F32, torch.bfloat16, torch.float16))
    assert run(op, torch.float16) == 3
    assert run(op, F32) == 5
    assert run(op, torch.bfloat16) == 5
    assert run(op, torch.float64) == 0  # the reference


def test_choice_is_cached_by_device_dtype_and_backend(op):
    load = times(3)
    op.impl("cpp", load)
    chosen = op.select(CPU, F32)
    calls = load.calls
    assert op.select(CPU, F32) is chosen
    assert load.calls == calls
    with use_backend("reference"):
        assert run(op) == 0
    assert op.select(CPU, F32) is chosen
    assert load.calls == calls


def test_automatic_choice_goes_past_a_version_that_does_not_load(op):
    op.impl("cpp", broken)
    assert run(op) == 0
    assert op.refusal("cpp", CPU, F32) == "its parts are missing"


def test_explicit_choice_never_falls_back(op):
    op.impl("cpp", broken)
    for _ in range(2):  # a failure is not cached as a choice
        with (
            use_backend("cpp"),
            pytest.raises(BackendError, match=r"selection_under_test: .*'cpp'.*parts are missing"),
        ):
            run(op)


@pytest.mark.parametrize(
    ("op", "backend", "dtype", "reason"),
    [
        (LINEAR, "triton", F32, "this op has no such version"),
        (POOL, "triton", F32, "runs on cuda tensors, not on cpu"),
        (POOL, "cpp", torch.float64, "takes float32, float16, bfloat16, not float64"),
    ],
    ids=["no version", "device", "dtype"],
)
def test_backend_error_holds_the_reason(op, backend, dtype, reason):
    assert op.refusal(backend, CPU, dtype) == reason
    args = op.make_samples(CPU, dtype, "test")[0]
    with use_backend(backend), pytest.raises(BackendError, match=f"{op.name}.*{reason}"):
        op(*args)
    assert op.refusal("reference", CPU, dtype) is None


def test_use_backend_nests_and_restores(op):
    op.impl("cpp", times(3))
    assert run(op) == 3
    with use_backend("reference"):
        assert run(op) == 0
        with use_backend("cpp"):
            assert run(op) == 3
        assert run(op) == 0
        with pytest.raises(KeyError), use_backend("cpp"):
            raise KeyError
        assert run(op) == 0
    assert registry.forced_backend() is None


def test_use_backend_stays_in_its_thread():
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(registry.forced_backend()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_environment_chooses_and_use_backend_goes_before_it(op, monkeypatch):
    op.impl("cpp", times(3))
    monkeypatch.setenv("EMBEDFUSE_BACKEND", "reference")
    assert run(op) == 0
    with use_backend("cpp"):
        assert run(op) == 3
    monkeypatch.setenv("EMBEDFUSE_BACKEND", "cuda")
    with pytest.raises(BackendError, match="'cuda' was asked for but this op has no such version"):
        run(op)
    monkeypatch.setenv("EMBEDFUSE_BACKEND", "")
    assert run(op) == 3


def test_unknown_backend_names_the_accepted_ones(op, monkeypatch):
    accepted = "accepted are reference, cpp, triton, cuda"
    with pytest.raises(ValueError, match=f"name='opencl': {accepted}"), use_backend("opencl"):
        pass
    monkeypatch.setenv("EMBEDFUSE_BACKEND", "opencl")
    with pytest.raises(ValueError, match=f"EMBEDFUSE_BACKEND='opencl': {accepted}"):
        run(op)


def test_triton_takes_cpu_tensors_only_in_its_interpreter(op, monkeypatch):
    op.impl("triton", times(7))
    assert op.refusal("triton", CPU, F32) == "runs on cuda tensors, not on cpu"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert op.refusal("triton", CPU, F32) is None
    assert run(op) == 7


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for the reason why there is no GPU")
def test_reason_of_a_missing_gpu():
    reason = "CUDA"
    assert reason in POOL.refusal("triton", "cuda", F32)
    with pytest.raises(native.Unavailable, match=reason):
        native.cuda()


@pytest.fixture
def reloaded(monkeypatch):
    """native loads its modules again, in the test and after it."""
    caches = (native._load_cpu, native.cpu)
    for cache in caches:
        cache.cache_clear()
    yield monkeypatch
    for cache in caches:
        cache.cache_clear()


def test_reason_of_a_missing_module(op, reloaded):
    reloaded.setitem(sys.modules, "embedfuse._cpu", None)
    reloaded.setattr(native, "build_notes", lambda: {"cpp": "left out by the packager"})
    op.impl("cpp", native.cpu)
    assert "embedfuse._cpu does not load: left out by the packager" in op.refusal("cpp", CPU, F32)
    assert run(op) == 0
    with use_backend("cpp"), pytest.raises(BackendError, match="left out by the packager"):
        run(op)
    reloaded.setattr(native, "build_notes", dict)
    assert "this copy of embedfuse was not built" in op.refusal("cpp", CPU, F32)


class OldProcessor:
    selected = None

    def supported_isas(self):
        return ["avx2", "baseline"]

    def select_isa(self, name):
        self.selected = name


def test_instruction_set_is_that_asked_for_or_the_best(reloaded):
    reloaded.setattr(native, "_load_cpu", OldProcessor)
    reloaded.delenv("EMBEDFUSE_CPU_ISA", raising=False)
    assert native.cpu().selected == "avx2"
    native.cpu.cache_clear()
    reloaded.setenv("EMBEDFUSE_CPU_ISA", "baseline")
    assert native.cpu().selected == "baseline"
    native.cpu.cache_clear()
    reloaded.setenv("EMBEDFUSE_CPU_ISA", "avx512")
    with pytest.raises(
        ValueError, match="EMBEDFUSE_CPU_ISA=avx512: this processor runs avx2, base"
    ):
        native.cpu()


def test_environment_reaches_the_public_function(monkeypatch):
    monkeypatch.setenv("EMBEDFUSE_BACKEND", "cuda")
    with pytest.raises(embedfuse.BackendError):
        embedfuse.ops.pool_normalize(torch.ones(1, 2, 3))
    monkeypatch.setenv("EMBEDFUSE_BACKEND", "reference")
    assert embedfuse.ops.pool_normalize(torch.ones(1, 2, 4)).eq(0.5).all()


def test_every_op_says_what_it_means_and_whether_it_has_a_gradient():
    for op in registry.OPS.values():
        assert op.meaning, op.name
        assert "\n" not in op.meaning
    without = {name for name, op in registry.OPS.items() if not op.differentiable}
    assert {"linear", "varlen_attention", "segment_sum"} < without
    assert {"maxsim", "pool_normalize", "rope_", "info_nce_forward"}.isdisjoint(without)


def seen(op, monkeypatch, x) -> bool:
    """Whether torch's dispatcher saw a call on x."""
    calls, overload = [], op.overload
    monkeypatch.setattr(op, "overload", lambda *args: calls.append(args) or overload(*args))
    op(x)
    return bool(calls)


class Other(torch.Tensor):
    pass


@torch.no_grad()
@pytest.mark.parametrize(
    "x",
    [
        torch.ones(1, device="meta"),
        torch.ones(1)._neg_view(),
        torch._efficientzerotensor((1,)),
        torch.ones(1).as_subclass(Other),
    ],
    ids=["meta", "minus sign", "zeros", "subclass"],
)
def test_the_dispatcher_sees_what_it_resolves(op, monkeypatch, x):
    op.impl("cpp", times(2))
    assert not seen(op, monkeypatch, torch.ones(1))
    assert not seen(op, monkeypatch, nn.Parameter(torch.ones(1)))
    assert seen(op, monkeypatch, x)


@pytest.mark.parametrize(
    "around",
    [torch.enable_grad, torch.profiler.profile, lambda: FlopCounterMode(display=False)],
    ids=["gradient", "profiler", "mode"],
)
def test_the_dispatcher_runs_where_something_looks(op, monkeypatch, around):
    op.impl("cpp", times(2))
    with torch.no_grad(), around():
        assert seen(op, monkeypatch, torch.ones(1))


def test_the_dispatcher_runs_inside_transforms(op, monkeypatch):
    op.impl("cpp", times(2))
    with torch.no_grad():
        assert torch.vmap(lambda x: x * seen(op, monkeypatch, torch.ones(1)))(torch.ones(2)).all()


def test_a_minus_sign_is_resolved():
    x, weight, bias = torch.randn(2, 8), torch.randn(3, 8), torch.randn(3)
    with torch.no_grad():
        found = LINEAR(x._neg_view(), [weight._neg_view()], [bias])
    torch.testing.assert_close(found, x @ weight.T + bias)

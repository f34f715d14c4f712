"""Launches without Triton's look-up: what it would launch, with the same arguments, and nothing else."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from triton._C.libtriton import native_specialize_impl
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.driver import driver

from benchmarks.kernels.stubbed import StubDriver
from embedfuse.registry import triton_interprets
from embedfuse.triton_kernels import (
    add_layer_norm,
    add_rms_norm,
    rope,
    silu_mul,
    tuned,
    varlen_attention,
)
from embedfuse.triton_kernels.launch import Launch, forget, prepared

if triton_interprets():
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)

NUMBERS = (0, 1, 2, 15, 16, 17, 32, -1, -16, 2**31 - 1, 2**31, 2**31 + 1, 2**35, -(2**31))
NUMBERS += (-(2**31) - 1, None, True, False, 0.0, 1.0, 16.0)


class StubKernel:
    """A kernel of a pointer, an integer that is not specialised, and one that is."""

    arg_names = ("p_x", "batch", "n", "B_D")

    def __init__(self):
        self.looked_up, self.direct = [], []

    def __getitem__(self, grid):
        def launch(x, batch, n, B_D):
            self.looked_up.append((grid, x, batch, n, B_D))
            compiled = len(self.looked_up)
            return {grid: lambda *args: self.direct.append((compiled, grid, *args))}

        return launch


@pytest.fixture
def kernel():
    return StubKernel()


@pytest.fixture
def launch(kernel):
    @prepared
    def prepare(n):
        return Launch(kernel, 3, n, B_D=64)

    return lambda x, batch, n: prepare(n)(2, x, numbers=(batch,))


def specialization(x, batch, n) -> list:
    """What Triton compiles for, by its own function."""
    pointer, number = (native_specialize_impl(CUDABackend, v, False, True, True) for v in (x, n))
    return [pointer, native_specialize_impl(CUDABackend, batch, False, False, True), number]


def pointers() -> list:
    memory = torch.zeros(64, dtype=torch.uint8)
    assert memory.data_ptr() % 16 == 0
    shifted = [memory[first : first + 16] for first in (0, 4, 8, 16, 32)]
    dtypes = torch.float32, torch.float16, torch.bfloat16, torch.int32
    return [None, *(x.view(dtype) for x in shifted for dtype in dtypes)]


X = torch.zeros(16)
CASES = {
    "numbers": [(X, 1, n) for n in NUMBERS],
    "pointers": [(x, 1, 5) for x in pointers()],
    "not specialised": [(X, n, 5) for n in NUMBERS if type(n) is int],
}


@pytest.mark.parametrize("kind", CASES)
def test_no_kernel_that_was_compiled_for_other_arguments(kind, launch, kernel):
    compiled_for = []
    for args in CASES[kind] * 2:
        looked_up = len(kernel.looked_up)
        launch(*args)
        if len(kernel.looked_up) > looked_up:
            compiled_for.append(specialization(*args))
        else:
            compiled = kernel.direct[-1][0]
            assert compiled_for[compiled - 1] == specialization(*args)
    specializations = [specialization(*args) for args in CASES[kind]]
    assert any(a != b for a, b in itertools.pairwise(specializations))


def test_looked_up_once(launch, kernel):
    for rows in (16, 32):  # another pointer of the same kind
        launch(torch.zeros(rows), 7, 5)
    assert len(kernel.looked_up) == 1
    address = kernel.direct[0][2]
    assert kernel.direct == [(1, (2, 3, 1), address, 7, 5, 64)]
    assert type(address) is int
    forget()
    launch(torch.zeros(16), 7, 5)
    assert len(kernel.looked_up) == 2


def test_other_configs_are_launched_anew(launch, kernel):
    launch(X, 7, 5)
    with tuned.choosing(lambda *args: {}):
        launch(X, 7, 5)
    launch(X, 7, 5)
    assert len(kernel.looked_up) == 3


class RecordingDriver(StubDriver):
    """Records what a launcher of Triton's is given, tensors as their addresses."""

    def __init__(self):
        self.launches = []

    def launcher_cls(self, source, metadata):
        def launch(*args):
            *grid, _, _, _, _, enter, exit_ = args[:9]
            kernel_args = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args[9:]]
            self.launches.append((grid, metadata.name, enter, exit_, kernel_args))

        return launch


@pytest.fixture
def launches(monkeypatch):
    recording = RecordingDriver()
    monkeypatch.setattr(driver, "_active", recording)
    forget()
    yield recording.launches
    forget()


def calls() -> dict:
    x, weight = torch.randn(6, 32), torch.randn(32)
    heads, bounds = x.view(6, 2, 16), torch.tensor([0, 2, 6], dtype=torch.int32)
    cos = torch.randn(6, 16)[:, :8]
    attend = heads, heads, heads, bounds, bounds, 0.25, True
    return {
        "layer norm": (add_layer_norm.add_layer_norm, (x, x, weight, weight, 1e-5)),
        "layer norm without bias": (add_layer_norm.add_layer_norm, (x, x, weight, None, 1e-5)),
        "rms norm": (add_rms_norm.add_rms_norm, (x, x, weight, 1e-5)),
        "rms norm of heads": (add_rms_norm.add_rms_norm, (heads, None, weight[:16], 1e-5)),
        "rope": (rope.rope_, (heads, cos, cos)),
        "silu": (silu_mul.silu_mul, (x, x)),
        "attention": (varlen_attention.varlen_attention, (*attend, None)),
        "attention in a window": (varlen_attention.varlen_attention, (*attend, 1)),
    }


@pytest.mark.parametrize("name", calls())
def test_the_arguments_are_those_of_tritons_look_up(name, launches, monkeypatch):
    launcher, args = calls()[name]
    made = {}  # the same memory for the results of each call
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda x, *shape: made.setdefault(shape, torch.empty(*shape))
    )
    looked_up = []
    by_look_up = Launch.by_look_up
    monkeypatch.setattr(
        Launch, "by_look_up", lambda *a, **k: looked_up.append(a) or by_look_up(*a, **k)
    )
    for _ in range(3):
        launcher(*args)
    assert len(looked_up) == 1
    first, second, third = launches
    assert first == second == third
    assert first[0][0] > 0

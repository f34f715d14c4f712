"""Calls of ops to tune kernels with: made, checked and timed on this GPU."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator

import torch
import triton
from triton.testing import do_bench

from benchmarks.gpu.search import Rejected
from benchmarks.harness.timing import DEVICE, seconds
from benchmarks.kernels.machine_code import kernel_modules, replaced, tunables_of
from embedfuse import testing, use_backend
from embedfuse.registry import OPS, Op
from embedfuse.triton_kernels import info_nce_fused, maxsim, tuned

DTYPES = (torch.float32, torch.bfloat16)


class OpCall:
    """op(*args) on Triton."""

    def __init__(self, op: Op, args: tuple):
        self.op, self.args = op, args

    def __call__(self):
        with use_backend("triton"):
            return self.op(*self.args)

    @functools.cached_property
    def references(self):
        return testing.references(self.op, self.args)

    def check(self) -> None:
        """AssertionError where values are outside the bound of embedfuse.testing."""
        with testing.poisoned_empty():
            outputs = self()
        testing.assert_within_bounds(self.op, self.args, "triton", outputs, self.references)


def header(chip: str) -> dict:
    return {
        "chip": chip,
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "a rehearsal",
        "triton": triton.__version__,
        "torch": torch.__version__,
    }


def calls(device: str, kernels: list[str]) -> Iterator[OpCall]:
    """The calls of all modules with these kernels; one at a time, because their tensors are large."""
    for module in kernel_modules():
        if not set(tunables_of(module)) & set(kernels):
            continue
        for dtype in DTYPES:
            for name, args in module.tuning_calls(device, dtype):
                yield OpCall(OPS[name], args)


HEADLINE = [info_nce_fused.STATISTICS.name, info_nce_fused.GRADIENT.name, maxsim.TUNABLE.name]


def headline_calls(device: str, full: bool) -> Iterator[OpCall]:
    """Calls of `HEADLINE` as in the rows of targets.py, one at a time.

    Args:
        device: Of their tensors.
        full: Whether at full size; else so small that any processor runs them. The same kernels are compiled.
    """
    sizes = ((4096, 16_384, 1024), (16_384, 16_384, 768)) if full else ((64, 512, 64),)
    counts = (1000, 128) if full else (8, 8)
    for name, args in itertools.chain(
        maxsim.op_calls(device, torch.bfloat16, (128, 1024), *counts),
        info_nce_fused.op_calls(device, torch.bfloat16, sizes),
    ):
        yield OpCall(OPS[name], args)


def attempt(call: OpCall, tunable: tuned.Tunable, config: dict) -> float:
    """Median microseconds of the call with this config; the L2 cache is emptied before each repetition.

    Raises:
        Rejected: The config spills, fails or gives values outside the bound.
    """

    def choose(asking, dtype, shape):
        return config if asking is tunable else asking.default_config(dtype, **shape)

    with tuned.choosing(choose):
        try:
            with compile_recorders() as recorders:
                call.check()
            compiled = [kernel for recorder in recorders for kernel in recorder.compiled]
            if any(kernel is not None and kernel.n_spills for kernel in compiled):
                raise Rejected("spill")
            return microseconds(call)
        except AssertionError as error:
            raise Rejected("wrong") from error
        except torch.AcceleratorError:  # the device is lost
            raise
        except (triton.TritonError, RuntimeError) as error:
            raise Rejected(type(error).__name__) from error


def microseconds(call: Callable) -> float:
    if DEVICE == "cpu":  # a rehearsal, in Triton's interpreter
        return 1e6 * seconds(call, 1)[0]
    return 1e3 * do_bench(call, return_mode="median")


class CompileRecorder:
    """Replaces a kernel: launches it, and records the compiled kernels; None of one that is interpreted."""

    def __init__(self, kernel: triton.JITFunction):
        self.kernel, self.compiled = kernel, []

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.compiled.append(self.kernel[grid](*args, **kwargs))

        return launch


@contextlib.contextmanager
def compile_recorders() -> Iterator[list[CompileRecorder]]:
    """Inside the block every Triton kernel is replaced by its CompileRecorder."""
    with contextlib.ExitStack() as stack:
        modules = [
            stack.enter_context(replaced(module, CompileRecorder)) for module in kernel_modules()
        ]
        yield [recorder for recorders in modules for recorder in recorders]

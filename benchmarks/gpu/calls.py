"""Calls of ops for `embedfuse bench tune`: made, checked and timed on the GPU at hand."""

import contextlib
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from embedfuse.triton_kernels import tuned
from triton.testing import do_bench

from benchmarks.gpu.tune import Rejected
from benchmarks.kernels.machine_code import kernel_modules, replaced, tunables_of
from embedfuse import use_backend
from embedfuse.registry import OPS, Op

# The bound that every version of an op is held to lies with the tests.
sys.path.append(str(Path(__file__).parents[2] / "tests"))
from embedfuse import testing

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
        """AssertionError where values lie outside the bound."""
        with testing.poisoned_empty():
            outputs = self()
        testing.assert_within_bounds(self.op, self.args, "triton", outputs, self.references)


def header(chip: str) -> dict:
    return {
        "chip": chip,
        "device": torch.cuda.get_device_name(),
        "triton": triton.__version__,
        "torch": torch.__version__,
    }


def calls(device: str, kernels: list[str]) -> Iterator[OpCall]:
    """Of the modules that hold these kernels; one at a time, since their tensors are large."""
    for module in kernel_modules():
        if not set(tunables_of(module)) & set(kernels):
            continue
        for dtype in DTYPES:
            for name, args in module.tuning_calls(device, dtype):
                yield OpCall(OPS[name], args)


def attempt(call: OpCall, tunable: tuned.Tunable, config: dict) -> float:
    """Median microseconds of the call with this config, the L2 cache emptied before each; or Rejected."""

    def choose(asking, dtype, shape):
        return config if asking is tunable else asking.default_config(dtype, **shape)

    with tuned.choosing(choose):
        try:
            with watched() as watchers:
                call.check()
            if any(compiled.n_spills for watcher in watchers for compiled in watcher.compiled):
                raise Rejected("spill")
            return 1e3 * do_bench(call, return_mode="median")
        except AssertionError as error:
            raise Rejected("wrong") from error
        except torch.AcceleratorError:  # the device is lost
            raise
        except (triton.TritonError, RuntimeError) as error:
            raise Rejected(type(error).__name__) from error


class Watcher:
    """Stands for a kernel: launches it, and keeps what it was compiled to."""

    def __init__(self, kernel: triton.JITFunction):
        self.kernel, self.compiled = kernel, []

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.compiled.append(self.kernel[grid](*args, **kwargs))

        return launch


@contextlib.contextmanager
def watched() -> Iterator[list[Watcher]]:
    with contextlib.ExitStack() as stack:
        wrapped = [stack.enter_context(replaced(module, Watcher)) for module in kernel_modules()]
        yield [watcher for watchers in wrapped for watcher in watchers]

"""Triton's view of an H100 whose launches do nothing: kernels are compiled and cached without a GPU."""

import contextlib
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import embedfuse
from benchmarks.kernels.machine_code import kernel_modules
from embedfuse import native
from embedfuse.ops.info_nce import tiles
from embedfuse.registry import Implementation


class StubDriver:
    """What Triton asks of a driver."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232448},
        load_binary=lambda name, kernel, shared, device: (object(), 0, 0, 0, 1024),
        unload_module=lambda module: None,
    )

    def launcher_cls(self, source, metadata) -> Callable:
        return lambda *args: None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Inside the block ops on CPU tensors run their Triton launchers, compiled and not interpreted."""
    kernel_modules()  # Triton decides when they are imported whether it interprets them
    with (
        mock.patch.dict(os.environ, TRITON_INTERPRET="1"),
        mock.patch.object(driver, "_active", StubDriver()),
        embedfuse.use_backend("triton"),
    ):
        yield


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Inside the block ops on CPU tensors compile what they would for tensors on a GPU, and launch nothing.

    Kernels must not have been imported under TRITON_INTERPRET=1. What an op has chosen inside stays chosen.
    """
    with (
        mock.patch.object(driver, "_active", StubDriver()),
        mock.patch.object(Implementation, "devices", return_value=("cpu",)),
        mock.patch.object(native, "require_gpu", return_value=None),
        # On the CPU info_nce widens what tensor cores take as it is, and torch has no such products.
        mock.patch.object(tiles, "gemm_input", lambda x: x),
        mock.patch.object(tiles, "add_product"),
        embedfuse.use_backend("triton"),
    ):
        yield

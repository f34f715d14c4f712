"""The launches of the Triton launchers, compiled to machine code for a chip, without a GPU.

Every kernel module lists launcher calls on the meta device (`aot_calls`). They are recorded where the kernel
is launched, so signature, constants and warps are those that the launcher chooses.
"""

import contextlib
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from embedfuse.triton_kernels import launch as prepared
from embedfuse.triton_kernels import tuned

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.int8: "*i8",
}


@dataclass(frozen=True, eq=False)
class Launch:
    """kernel[grid](*args, **kwargs)"""

    kernel: triton.JITFunction
    args: tuple
    kwargs: dict

    def __str__(self) -> str:
        """Kernel, dtype and shape of the first tensor, config: "pool_normalize-bf16-4x100x384-last-…"."""
        shape = "x".join(map(str, self.args[0].shape))
        config = map(str, self.config().values())
        return "-".join([self.name(), self.dtype(), shape, *config])

    def name(self) -> str:
        return self.kernel.__name__.removesuffix("_kernel")

    def dtype(self) -> str:
        return TYPES[self.args[0].dtype][1:]

    def config(self) -> dict:
        """Constants and compile options."""
        constants = {p.name for p in self.kernel.params if p.is_constexpr}
        arguments = set(self.kernel.arg_names) - constants
        return {key: value for key, value in self.kwargs.items() if key not in arguments}

    def source(self) -> tuple[ASTSource, dict]:
        """What Triton's launcher would compile for these arguments, and the compile options."""
        kernel = self.kernel
        values = dict(zip(kernel.arg_names, self.args, strict=False)) | self.kwargs
        options = {key: values.pop(key) for key in list(values) if key not in kernel.arg_names}
        signature, constants, attributes = {}, {}, {}
        for parameter in kernel.params:
            name, value = parameter.name, values[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[name], constants[name] = "constexpr", value
                continue
            if isinstance(value, torch.Tensor):
                signature[name], number = TYPES[value.dtype], value.data_ptr()
            elif value == 1 and not parameter.do_not_specialize:
                signature[name], constants[name] = "constexpr", value
                continue
            elif isinstance(value, float):
                signature[name] = "fp32"
                continue
            else:
                signature[name], number = "i32" if -(2**31) <= value < 2**31 else "i64", value
            if number % 16 == 0 and not parameter.do_not_specialize:
                attributes[(parameter.num,)] = [["tt.divisibility", 16]]
        return ASTSource(kernel, signature, constants, attributes), options

    def compile(self, chip: str) -> CompiledKernel:
        source, options = self.source()
        target = GPUTarget("cuda", int(chip.removeprefix("sm_")), 32)
        return triton.compile(source, target=target, options=options)


def resources(compiled: CompiledKernel) -> dict[str, int]:
    """Registers of a thread, bytes of the stack that registers spill to, and bytes of shared memory."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(compiled.asm["cubin"])
        command = [CUOBJDUMP, "-res-usage", path]
        usage = subprocess.run(command, capture_output=True, text=True, check=True)
    found = dict(re.findall(r"\b(REG|STACK):(\d+)", usage.stdout))
    return {
        "registers": int(found["REG"]),
        "spilled": int(found["STACK"]),
        "shared": compiled.metadata.shared,
    }


class LaunchRecorder:
    """Replaces a kernel and records the launches."""

    def __init__(self, kernel: triton.JITFunction):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append(Launch(self.kernel, args, kwargs))


def kernels_of(module: ModuleType) -> dict[str, triton.JITFunction]:
    return {key: value for key, value in vars(module).items() if key.endswith("_kernel")}


def tunables_of(module: ModuleType) -> list[str]:
    return [value.name for value in vars(module).values() if isinstance(value, tuned.Tunable)]


def kernel_modules() -> list[ModuleType]:
    return [module for module in tuned.import_kernels() if kernels_of(module)]


@contextlib.contextmanager
def replaced(module: ModuleType, wrap: Callable) -> Iterator[list]:
    """Inside the block wrap(kernel) replaces each kernel of the module; yields the replacements."""
    wrapped = {key: wrap(kernel) for key, kernel in kernels_of(module).items()}
    prepared.forget()
    try:
        with mock.patch.multiple(module, **wrapped):
            yield list(wrapped.values())
    finally:
        prepared.forget()


def recorded_launches(module: ModuleType) -> list[Launch]:
    with replaced(module, LaunchRecorder) as recorders:
        for launcher, args in module.aot_calls():
            launcher(*args)
    for recorder in recorders:
        assert recorder.launches, f"aot_calls launches no {recorder.kernel.__name__}"
    return [launch for recorder in recorders for launch in recorder.launches]


def launches(module: ModuleType, chip: str) -> list[Launch]:
    """With the default configs, and with each config tuned for this chip wherever it may be chosen."""
    result = recorded_launches(module)
    names = tunables_of(module)
    for entry in tuned.entries_of(chip):
        if entry["kernel"] in names:
            result += launches_with(module, entry)
    return result


def launches_with(module: ModuleType, entry: dict) -> list[Launch]:
    """The launches of aot_calls for which this entry's config may be chosen."""

    def choose(tunable, dtype, shape):
        if tuned.allows(tunable, entry, dtype, shape):
            return entry["config"]
        return tunable.default_config(dtype, **shape)

    def has_config(launch):
        # Keys that are no arguments of the kernel, e.g. the number of programs, stay in the launcher.
        return all(launch.kwargs.get(key, value) == value for key, value in entry["config"].items())

    with tuned.choosing(choose):
        return list(filter(has_config, recorded_launches(module)))

"""Compiles what the Triton launchers launch, to machine code for each chip, without a GPU.

Every file in triton_kernels/ lists launcher calls on the meta device (`aot_calls`); the calls are recorded
at the kernel, so signature, constants and warps are the launcher's own.
"""

import importlib
import itertools
import re
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from embedfuse.registry import triton_interprets

if triton_interprets():
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)

# Shared memory a block may use, from the CUDA programming guide's table of compute capabilities.
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
MODULES = sorted(p.stem for p in (Path(__file__).parents[2] / "triton_kernels").glob("[!_]*.py"))
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.int8: "*i8",
}


class Recorder:
    """Stands for a kernel: kernel[grid](*args, **kwargs) is noted."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


def recorded_launches(name: str) -> list[tuple]:
    module = importlib.import_module(f"embedfuse.triton_kernels.{name}")
    kernels = [key for key in vars(module) if key.endswith("_kernel")]
    with pytest.MonkeyPatch.context() as patch:
        recorders = [Recorder(getattr(module, key)) for key in kernels]
        for key, recorder in zip(kernels, recorders, strict=True):
            patch.setattr(module, key, recorder)
        for launcher, args in module.aot_calls():
            launcher(*args)
    for recorder in recorders:
        assert recorder.launches, f"aot_calls launches no {recorder.kernel.__name__}"
    return list(itertools.chain.from_iterable(r.launches for r in recorders))


def source_of(kernel, args, kwargs) -> tuple[ASTSource, dict]:
    """What Triton's launcher would compile for these arguments, and the compile options."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
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


def aligned(x: torch.Tensor) -> bool:
    """Every row starts at a multiple of 16 bytes."""
    return all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers and bytes of stack; the stack is where spilled registers go."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    usage = subprocess.run([CUOBJDUMP, "-res-usage", path], capture_output=True, text=True)
    assert usage.returncode == 0, usage.stderr
    found = dict(re.findall(r"\b(REG|STACK):(\d+)", usage.stdout))
    return {key: int(value) for key, value in found.items()}


LAUNCHES = [(name, *launch) for name in MODULES for launch in recorded_launches(name)]


def label(name, kernel, args, kwargs) -> str:
    """Shapes of the first tensor and the constants: "pool_normalize-bf16-4x100x384-last-…"."""
    first = args[0]
    shape = "x".join(map(str, first.shape))
    constants = [str(kwargs[p.name]) for p in kernel.params if p.is_constexpr and p.name in kwargs]
    return "-".join([name, TYPES[first.dtype][1:], shape, *constants])


@pytest.mark.parametrize("launch", LAUNCHES, ids=[label(*launch) for launch in LAUNCHES])
@pytest.mark.parametrize("arch", SHARED_BYTES, ids=lambda arch: f"sm_{arch}")
def test_compiles_without_spills_and_narrow_loads(arch, launch, tmp_path):
    source, options = source_of(*launch[1:])
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    assert compiled.metadata.shared <= SHARED_BYTES[arch]
    used = resources(compiled.asm["cubin"], tmp_path)
    assert 0 < used["REG"] <= 255
    assert used["STACK"] == 0, f"{used['STACK']} bytes of registers spilled"
    if aligned(launch[2][0]):
        # Triton falls back to loads of one element, in silence, when it cannot follow an address.
        assert not re.search(r"ld\.global[.\w:]*\.b16", compiled.asm["ptx"])

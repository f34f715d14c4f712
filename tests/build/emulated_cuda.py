"""The CUDA module on the host: csrc/cuda compiled by c++ on cuda_emulated.h, and ops that run by it.

    python -m tests.build.emulated_cuda MODULE STEP

runs every STEP-th sample of the ops, for the sanitizers of test_cuda_emulated.py.
"""

import contextlib
import ctypes
import importlib.util
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pybind11
import pytest
import torch

import embedfuse.ops  # noqa: F401 - registers them
from embedfuse import native, registry, testing, use_backend

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
HEADERS = ("cuda_runtime_api.h", "cuda_fp16.h", "cuda_bf16.h")
LAUNCH = re.compile(r"(\w+(?:<\w+>)?)\s*<<<(.*?)>>>", re.DOTALL)
DYNAMIC = re.compile(r"extern __shared__ (\w+) (\w+)\[\];")
OPS = [op for op in registry.OPS.values() if "cuda" in [i.backend for i in op.implementations]]
# Exported for ctypes: the launches since the last call, a line each.
LOG = """
extern "C" __attribute__((visibility("default"))) const char* emulated_launches() {
  static std::string taken;
  taken.swap(emulated::launches);
  emulated::launches.clear();
  return taken.c_str();
}
"""


def on_the_host(text: str) -> str:
    """A .cu file as C++: the two things of CUDA's that no header can give."""
    text = LAUNCH.sub(r'emulated::launch("\1", \1, \2)', text)
    return DYNAMIC.sub(r"\1* \2 = emulated::dynamic_shared<\1>();", text)


def build(folder: Path, *flags: str) -> Path:
    """The extension module `_cuda`, in the folder."""
    for name in HEADERS:
        (folder / name).write_text('#include "cuda_emulated.h"\n')
    sources = []
    for file in sorted((CSRC / "cuda").glob("*.cu")):
        sources.append(folder / f"{file.stem}.cpp")
        sources[-1].write_text(on_the_host(file.read_text()))
    with sources[-1].open("a") as last:
        last.write(LOG)
    python = pybind11.get_include(), sysconfig.get_path("include")
    includes = [f"-I{path}" for path in (folder, HERE, CSRC / "include", CSRC, *python)]
    command = ["c++", "-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", *includes]
    bindings, module = folder / "bindings.o", folder / "_cuda.so"
    # What pybind11 makes of the bindings takes long to optimise or instrument.
    _run(*command, "-O0", "-c", CSRC / "bindings/cuda_module.cpp", "-o", bindings)
    _run(*command, "-O1", "-shared", *flags, *sources, bindings, "-o", module)
    return module


def _run(*command) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_cuda", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launches(path: Path) -> list[list[str]]:
    """Those of the module since the last call: kernel, blocks, threads, bytes of dynamic shared memory."""
    function = ctypes.CDLL(str(path)).emulated_launches
    function.restype = ctypes.c_char_p
    return [line.split() for line in function().decode().splitlines()]


@contextlib.contextmanager
def on_cpu_tensors(module: ModuleType) -> Iterator[None]:
    """Inside the block the backend "cuda" is forced, and runs on tensors of the CPU by this module."""
    devices = registry.Implementation.devices

    def devices_here(self):
        return ("cpu",) if self.backend == "cuda" else devices(self)

    with pytest.MonkeyPatch.context() as patch, use_backend("cuda"):
        patch.setattr(native, "cuda", lambda: module)
        patch.setattr(registry.Implementation, "devices", devices_here)
        patch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
        patch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
        for op in registry.OPS.values():
            patch.setattr(op, "_chosen", {})
        yield


def check_samples(op: registry.Op, dtype: torch.dtype, step: int = 1) -> None:
    """Beside the reference every step-th sample; others in other dtypes."""
    first = testing.DTYPES.index(dtype) % step
    for args in op.make_samples("cpu", dtype, "test")[first::step]:
        testing.assert_close_to_reference(op, args, "cuda")


def main() -> None:
    module, step = Path(sys.argv[1]), int(sys.argv[2])
    with on_cpu_tensors(load(module)):
        for op in OPS:
            for dtype in testing.DTYPES:
                check_samples(op, dtype, step)


if __name__ == "__main__":
    main()

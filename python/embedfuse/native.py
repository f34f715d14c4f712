"""The compiled modules: loaded once, with torch's thread pool, or the reason why one is missing."""

import ctypes
import functools
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from embedfuse import config

# Codes shared with csrc/include/embedfuse/dtype.h.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Unavailable(Exception):
    """A backend cannot run on this machine. The message is the reason."""


def build_notes() -> dict[str, str]:
    """Module -> what setup.py recorded about its build; empty if this copy was not built."""
    path = Path(__file__).parent / "_build.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _load(module: str, backend: str) -> ModuleType:
    try:
        return importlib.import_module(f"embedfuse.{module}")
    except ImportError as error:
        note = build_notes().get(backend, "this copy of embedfuse was not built")
        raise Unavailable(f"embedfuse.{module} does not load: {note} ({error})") from error


@functools.cache
def _load_cpu() -> ModuleType:
    module = _load("_cpu", "cpp")
    # torch exports its parallel_for since 2.10. With it our kernels respect torch.set_num_threads and need
    # no second OpenMP runtime.
    try:
        lib = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        pool = (lib.torch_parallel_for, lib.torch_get_num_threads)
    except (OSError, AttributeError) as error:
        raise Unavailable(f"torch {torch.__version__} shows no thread pool: {error}") from error
    module.set_thread_pool(*(ctypes.cast(function, ctypes.c_void_p).value for function in pool))
    return module


@functools.cache
def cpu() -> ModuleType:
    """embedfuse._cpu, with the instruction set that EMBEDFUSE_CPU_ISA selects.

    Raises:
        Unavailable: It was not built, or torch has no thread pool for it.
        ValueError: The processor does not have that instruction set.
    """
    module = _load_cpu()
    isa = config.read("EMBEDFUSE_CPU_ISA")
    supported = module.supported_isas()
    if isa and isa not in supported:
        # It was requested by name, so not Unavailable, which makes the registry choose another backend.
        raise ValueError(f"EMBEDFUSE_CPU_ISA={isa}: this processor runs {', '.join(supported)}")
    module.select_isa(isa or supported[0])
    return module


@functools.cache
def cuda() -> ModuleType:
    """embedfuse._cuda.

    Raises:
        Unavailable: It was not built, or there is no GPU.
    """
    require_gpu()
    return _load("_cuda", "cuda")


def require_gpu() -> None:
    """Raise Unavailable, with the reason, if torch sees no GPU."""
    if torch.version.cuda is None:
        raise Unavailable(f"torch {torch.__version__} is built without CUDA")
    if not torch.cuda.is_available():
        raise Unavailable("no CUDA device is visible")


@functools.cache
def comparison() -> Callable[..., bool]:
    """Whether modules, tables and slots are as they were: csrc/bindings/watch.h, or the same in Python."""
    try:
        return cpu().unchanged
    except Unavailable:
        return _unchanged


@functools.cache
def layouts() -> Callable[[list[Tensor]], object]:
    """Address, dtype, shape and strides of each tensor, to be compared (csrc/bindings/layouts.h)."""
    try:
        return functools.partial(cpu().layouts, Tensor.__dlpack_c_exchange_api__)
    except Unavailable:
        return _layouts


def _layouts(tensors: list[Tensor]) -> list[tuple]:
    return [_layout(tensor) for tensor in tensors]


def _layout(x: Tensor) -> tuple:
    if x.is_meta or x.layout is not torch.strided:
        return (id(x),)
    return x.data_ptr(), x.device, x.dtype, x.shape, x.stride()


def _unchanged(objects, classes, dicts, lengths, owners, keys, values) -> bool:
    return (
        tuple(map(type, objects)) == classes
        and tuple(map(len, dicts)) == lengths
        and all(
            key in owner and owner[key] is value
            for owner, key, value in zip(owners, keys, values, strict=True)
        )
    )

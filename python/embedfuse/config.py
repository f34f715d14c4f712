"""Every environment variable that embedfuse reads, and the one place that reads them."""

import os
from dataclasses import dataclass

BACKENDS = ("reference", "cpp", "triton", "cuda")
CPU_ISAS = ("amx", "avx512_bf16", "avx512", "avx2", "baseline")


@dataclass(frozen=True)
class Variable:
    meaning: str
    accepted: tuple[str, ...] | None = None
    default: str = "chosen automatically"


VARIABLES = {
    "EMBEDFUSE_BACKEND": Variable("backend of every op; one that cannot run raises", BACKENDS),
    "EMBEDFUSE_CPU_ISA": Variable(
        "instruction set of the C++ kernels", CPU_ISAS, "the best there is"
    ),
    "EMBEDFUSE_GRAPHS": Variable("0 runs small batches without CUDA graphs", ("0", "1"), "1"),
    "EMBEDFUSE_BUILD_CPP": Variable("at build: 0 leaves the C++ kernels out", ("0", "1"), "1"),
    "EMBEDFUSE_BUILD_CUDA": Variable(
        "at build: 1 fails without nvcc, 0 leaves the CUDA kernels out",
        ("0", "1"),
        "if nvcc is found",
    ),
    "EMBEDFUSE_CUDA_ARCHS": Variable("at build: compute capabilities", None, "80;90;100"),
}


def read(name: str) -> str | None:
    """The variable's value; None when unset or empty. ValueError for a value that is not accepted."""
    value = os.environ.get(name) or None
    accepted = VARIABLES[name].accepted
    if value is not None and accepted and value not in accepted:
        raise ValueError(f"{name}={value!r}: accepted are {', '.join(accepted)}")
    return value

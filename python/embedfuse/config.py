"""The environment variables that embedfuse reads: VARIABLES, by name."""

import os
from dataclasses import dataclass

BACKENDS = ("reference", "cpp", "triton", "cuda")
CPU_ISAS = ("amx", "avx512_bf16", "avx512", "avx2", "baseline")


@dataclass(frozen=True)
class Variable:
    """An environment variable.

    Attributes:
        meaning: what it does, in one line.
        accepted: its values; None: any text that `meaning` describes.
        default: what applies if it is unset or empty, as text for people.
    """

    meaning: str
    accepted: tuple[str, ...] | None
    default: str


VARIABLES = {
    "EMBEDFUSE_BACKEND": Variable(
        "backend of every op; an op that it cannot run raises BackendError",
        BACKENDS,
        "the fastest that can run each op",
    ),
    "EMBEDFUSE_CPU_ISA": Variable(
        "instruction set of the C++ kernels", CPU_ISAS, "the best that the processor has"
    ),
    "EMBEDFUSE_GRAPHS": Variable(
        "1 runs small batches on a GPU as CUDA graphs, 0 does not", ("0", "1"), "0"
    ),
    "EMBEDFUSE_BUILD_CPP": Variable(
        "when building: 1 builds the C++ kernels, 0 leaves them out", ("0", "1"), "1"
    ),
    "EMBEDFUSE_BUILD_CUDA": Variable(
        "when building: 1 requires nvcc and builds the CUDA kernels, 0 leaves them out",
        ("0", "1"),
        "built if nvcc is found",
    ),
    "EMBEDFUSE_CUDA_ARCHS": Variable(
        "when building: compute capabilities of the CUDA kernels, separated by semicolons",
        None,
        "80;90;100",
    ),
}
"""Every environment variable, by name."""


def read(name: str) -> str | None:
    """The value of a variable.

    Args:
        name: of a variable in VARIABLES.

    Returns:
        Its value; None if it is unset or empty.

    Raises:
        KeyError: VARIABLES has no such name.
        ValueError: A value that is not accepted.
    """
    value = os.environ.get(name) or None
    accepted = VARIABLES[name].accepted
    if value is not None and accepted and value not in accepted:
        raise ValueError(f"{name}={value!r}: accepted are {', '.join(accepted)}")
    return value

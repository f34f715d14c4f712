"""Compiles what the Triton launchers launch, to machine code for each chip, without a GPU."""

import importlib
import re

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.kernels.machine_code import (
    kernel_modules,
    launches,
    recorded_launches,
    resources,
)
from benchmarks.kernels.occupancy import CHIPS
from embedfuse.registry import triton_interprets

if triton_interprets():
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)


def aligned(x: torch.Tensor) -> bool:
    """Every row starts at a multiple of 16 bytes."""
    return all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])


def distinct_launches() -> list:
    """(launch, chip) of all that compiles differently: Triton sees divisibility, and no shapes.

    On a launch's first chip in every run, on the others marked slow.
    """
    found = {}
    for chip in sorted(CHIPS, key=lambda chip: CHIPS[chip].block_shared):
        for module in kernel_modules():
            for launch in launches(module, chip):
                source, options = launch.source()
                code = source.signature, source.constants, source.attrs, options
                key = launch.name(), repr(code), aligned(launch.args[0])
                found.setdefault(key, {}).setdefault(chip, launch)
    return [
        pytest.param(launch, chip, id=f"{launch}-{chip}", marks=[pytest.mark.slow] if i else [])
        for launch_of in found.values()
        for i, (chip, launch) in enumerate(launch_of.items())
    ]


def test_what_info_nce_allocates_is_aligned():
    """Of one row too. Another alignment is another program, which would be compiled in a user's call."""
    module = importlib.import_module("embedfuse.triton_kernels.info_nce_fused")
    for launch in recorded_launches(module):
        starts = [t.storage_offset() * t.element_size() for t in tensors_of(launch)]
        assert not any(start % 16 for start in starts), launch


def tensors_of(launch) -> list[torch.Tensor]:
    return [t for t in launch.args if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize(("launch", "chip"), distinct_launches())
def test_compiles_without_spills_and_narrow_loads(launch, chip):
    compiled = launch.compile(chip)
    used = resources(compiled)
    assert used["shared"] <= CHIPS[chip].block_shared
    assert 0 < used["registers"] <= 255
    assert used["spilled"] == 0, f"{used['spilled']} bytes of registers spilled"
    if aligned(launch.args[0]):
        # Triton falls back to loads of one element, in silence, when it cannot follow an address.
        assert not re.search(r"ld\.global[.\w:]*\.b16", compiled.asm["ptx"])

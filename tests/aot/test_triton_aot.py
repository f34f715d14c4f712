"""Compiles what the Triton launchers launch, to machine code for each chip, without a GPU."""

import re

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.kernels.machine_code import kernel_modules, launches, resources
from benchmarks.kernels.occupancy import CHIPS
from embedfuse.registry import triton_interprets

if triton_interprets():
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)


def aligned(x: torch.Tensor) -> bool:
    """Every row starts at a multiple of 16 bytes."""
    return all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])


def different_launches() -> list:
    """One of those that Triton compiles to the same code: it sees types and divisibility, not shapes."""
    found = {}
    for chip in CHIPS:
        for module in kernel_modules():
            for launch in launches(module, chip):
                source, options = launch.source()
                code = source.signature, source.constants, source.attrs, options
                code = chip, launch.name(), repr(code), aligned(launch.args[0])
                found.setdefault(code, pytest.param(chip, launch, id=f"{chip}-{launch}"))
    return list(found.values())


@pytest.mark.parametrize(("chip", "launch"), different_launches())
def test_compiles_without_spills_and_narrow_loads(chip, launch):
    compiled = launch.compile(chip)
    used = resources(compiled)
    assert used["shared"] <= CHIPS[chip].block_shared
    assert 0 < used["registers"] <= 255
    assert used["spilled"] == 0, f"{used['spilled']} bytes of registers spilled"
    if aligned(launch.args[0]):
        # Triton falls back to loads of one element, in silence, when it cannot follow an address.
        assert not re.search(r"ld\.global[.\w:]*\.b16", compiled.asm["ptx"])

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
    """(launch, its chips): one of those that Triton compiles to the same code, as it sees types and
    divisibility and no shapes. Of the chips the one with the least shared memory comes first."""
    found = {}
    for chip in sorted(CHIPS, key=lambda chip: CHIPS[chip].block_shared):
        for module in kernel_modules():
            for launch in launches(module, chip):
                source, options = launch.source()
                code = source.signature, source.constants, source.attrs, options
                code = launch.name(), repr(code), aligned(launch.args[0])
                found.setdefault(code, (launch, []))[1].append(chip)
    return [pytest.param(launch, chips, id=str(launch)) for launch, chips in found.values()]


def takes_little(compiled, used: dict, chip: str) -> bool:
    """Whether other chips need no look. Without a product of matrices a kernel is the same for all of them up
    to the last compiler, which takes up to 37 registers more (benchmarks/results/aot.json)."""
    half = used["registers"] <= 128 and used["shared"] <= CHIPS[chip].block_shared // 2
    return half and "tt.dot" not in compiled.asm["ttir"]


@pytest.mark.parametrize(("launch", "chips"), different_launches())
def test_compiles_without_spills_and_narrow_loads(launch, chips):
    for chip in chips:
        compiled = launch.compile(chip)
        used = resources(compiled)
        assert used["shared"] <= CHIPS[chip].block_shared, chip
        assert 0 < used["registers"] <= 255, chip
        assert used["spilled"] == 0, f"{chip}: {used['spilled']} bytes of registers spilled"
        if aligned(launch.args[0]):
            # Triton falls back to loads of one element, in silence, when it cannot follow an address.
            assert not re.search(r"ld\.global[.\w:]*\.b16", compiled.asm["ptx"]), chip
        if takes_little(compiled, used, chip):
            break

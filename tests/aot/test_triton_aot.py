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
    """(launch, its chips) by kernel and config, without those that Triton compiles to the same code: it sees
    divisibility and no shapes. Both 16-bit types take the same registers (benchmarks/results/aot.json)."""
    found = {}
    for chip in sorted(CHIPS, key=lambda chip: CHIPS[chip].block_shared):
        for module in kernel_modules():
            for launch in launches(module, chip):
                source, options = launch.source()
                code = source.signature, source.constants, source.attrs, options
                code = repr(code).replace("fp16", "bf16"), aligned(launch.args[0])
                config = launch.name(), launch.dtype().replace("fp16", "bf16"), str(launch.config())
                found.setdefault(config, {}).setdefault(code, (launch, []))[1].append(chip)
    groups = [list(group.values()) for group in found.values()]
    return [pytest.param(group, id=str(group[0][0])) for group in groups]


def compile_and_check(launch, chip: str) -> tuple[int, bool]:
    """Registers, and whether other chips need no look: they take at most 37 more where there is no product of
    matrices (benchmarks/results/aot.json)."""
    compiled = launch.compile(chip)
    used = resources(compiled)
    assert used["shared"] <= CHIPS[chip].block_shared, f"{launch} on {chip}"
    assert 0 < used["registers"] <= 255, f"{launch} on {chip}"
    assert used["spilled"] == 0, f"{launch} on {chip}: {used['spilled']} bytes of registers spilled"
    if aligned(launch.args[0]):
        # Triton falls back to loads of one element, in silence, when it cannot follow an address.
        assert not re.search(r"ld\.global[.\w:]*\.b16", compiled.asm["ptx"]), f"{launch} on {chip}"
    half = used["registers"] <= 128 and used["shared"] <= CHIPS[chip].block_shared // 2
    return used["registers"], half and "tt.dot" not in compiled.asm["ttir"]


@pytest.mark.parametrize("group", different_launches())
def test_compiles_without_spills_and_narrow_loads(group):
    """All on their first chip; on the others the one that takes most."""
    found = [(*compile_and_check(launch, chips[0]), launch, chips) for launch, chips in group]
    _, little, launch, chips = max(found, key=lambda one: one[0])
    for chip in () if little else chips[1:]:
        compile_and_check(launch, chip)

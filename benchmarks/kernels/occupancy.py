"""How many blocks of a kernel a multiprocessor holds at once: arithmetic, not a measurement.

Limits from the CUDA programming guide's table of compute capabilities; granularities from NVIDIA's
cuda_occupancy.h, with which tests/aot/test_occupancy.py compares.
"""

from dataclasses import dataclass

REGISTERS, PARTS = 65536, 4  # of a multiprocessor, in equal parts, each for some of its warps


@dataclass(frozen=True)
class Chip:
    """Bytes of shared memory of a multiprocessor and of a block, warps and blocks of a multiprocessor."""

    shared: int
    block_shared: int
    warps: int = 64
    blocks: int = 32


CHIPS = {
    "sm_80": Chip(shared=164 * 1024, block_shared=163 * 1024),
    "sm_90": Chip(shared=228 * 1024, block_shared=227 * 1024),
    "sm_100": Chip(shared=228 * 1024, block_shared=227 * 1024),
}


def resident_blocks(chip: Chip, registers: int, shared: int, warps: int) -> int:
    """Of blocks with so many registers per thread, bytes of shared memory, and warps; 0: does not run."""
    registers_per_warp = round_up(32 * registers, 256)
    # A launch is refused by what it would take if each part held as many of its warps.
    if registers_per_warp * round_up(warps, PARTS) > REGISTERS or shared > chip.block_shared:
        return 0
    resident_warps = REGISTERS // PARTS // registers_per_warp * PARTS
    # The system takes 1 KiB of each block.
    by_shared = chip.shared // round_up(shared + 1024, 128)
    return min(resident_warps // warps, by_shared, chip.warps // warps, chip.blocks)


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit

"""How many blocks of a kernel fit on a multiprocessor at once: computed, not measured.

The limits are in the CUDA programming guide's table of compute capabilities, the granularities in NVIDIA's
cuda_occupancy.h, with which tests/benchmarks/test_occupancy.py compares.
"""

from dataclasses import dataclass

REGISTERS, PARTS = 65536, 4  # of a multiprocessor; each part serves a quarter of the warps


@dataclass(frozen=True)
class Chip:
    """Limits of a multiprocessor and of a block.

    Attributes:
        shared: Bytes of shared memory of a multiprocessor.
        block_shared: Bytes of shared memory that a block may use.
        warps: Resident warps of a multiprocessor.
        blocks: Resident blocks of a multiprocessor.
    """

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
    """Blocks that fit on a multiprocessor; 0 where such a block cannot run.

    Args:
        chip: Limits of the chip.
        registers: Registers of a thread.
        shared: Bytes of shared memory of a block.
        warps: Warps of a block.
    """
    registers_per_warp = round_up(32 * registers, 256)
    # A launch is refused if the registers do not suffice for the warps rounded up to equal parts.
    if registers_per_warp * round_up(warps, PARTS) > REGISTERS or shared > chip.block_shared:
        return 0
    resident_warps = REGISTERS // PARTS // registers_per_warp * PARTS
    # The system reserves 1 KiB for each block.
    by_shared = chip.shared // round_up(shared + 1024, 128)
    return min(resident_warps // warps, by_shared, chip.warps // warps, chip.blocks)


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit

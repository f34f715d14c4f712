"""Instruction sets under which an op has code of its own."""

from embedfuse import config

COMPILED_ONCE = ("sparse_scatter", "sparse_dense", "lexical_scores")  # csrc/cpu/lexical.cpp
WITH_TILES = ("maxsim",)  # csrc/cpu/maxsim_amx.h; other ops run the best of the others on AMX


def isas_of(op: str) -> tuple[str | None, ...]:
    """(None,) for one that is the same under all."""
    if op in COMPILED_ONCE:
        return (None,)
    return tuple(isa for isa in config.CPU_ISAS if isa != "amx" or op in WITH_TILES)

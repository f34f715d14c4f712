"""A rehearsal of `make gpu` on a machine without a GPU: the same code on the CPU, at small sizes."""

import os

REHEARSAL = os.environ.get("EMBEDFUSE_REHEARSAL") == "1"


def size(full, small):
    """`full`, or `small` in a rehearsal: numbers, or whole settings."""
    return small if REHEARSAL else full

"""Checks of sparse_scatter on long sequences, for any backend and device."""

import torch

from embedfuse import ops


def long_sequences(lengths: list[int], device: str) -> tuple:
    """Arguments of the op: normal weights, and ids of which each stands several times in a text."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    tokens = int(ends[-1])
    weights = torch.randn(tokens, generator=generator)
    ids = torch.randint(2000, (tokens,), generator=generator)
    return weights.to(device), ids.to(device), ends.to(device, torch.int32), []


def check_one_id(args: tuple, lengths: list[int]):
    """A text of one id alone: a single entry, its largest weight."""
    weights, ids, ends, _ = args
    got = ops.sparse_scatter(weights, torch.full_like(ids, 17), cu_seqlens=ends)
    largest = [part.max() for part in weights.split(lengths) if len(part) and part.max() > 0]
    assert torch.equal(got.weights, torch.stack(largest))
    assert got.token_ids.eq(17).all()

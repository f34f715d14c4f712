"""Token vectors for the tests of late interaction."""

import torch
from torch import Tensor

QUERIES, DOCUMENTS = [5, 1, 9, 3], [7, 12, 1, 4]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def texts(lengths: list[int], dtype=torch.float32, seed: int = 0, dim: int = 24) -> list[Tensor]:
    """(tokens, dim) each. Seeds 0 and 1 have only negative similarities with each other, so that a zero
    vector shows in a maximum; other seeds are normally distributed."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(length, dim) for length in lengths]
    if seed > 1:
        made = [torch.randn(shape, generator=generator) for shape in shapes]
    else:
        made = [(torch.rand(shape, generator=generator) + 0.05) * (-1) ** seed for shape in shapes]
    return [x.div(dim**0.5).to(dtype) for x in made]


def padded(rows: list[Tensor], side: str = "right", fill: float = 0.0) -> tuple[Tensor, Tensor]:
    """(texts, tokens, dim) and its bool mask; one column more than the longest text."""
    width = max(map(len, rows)) + 1
    x = rows[0].new_full((len(rows), width, rows[0].shape[1]), fill)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(len(row)) if side == "right" else slice(width - len(row), None)
        x[i, place], mask[i, place] = row, True
    return x, mask


def holed(rows: list[Tensor], seed: int = 0, fill: float = 0.5) -> tuple[Tensor, Tensor]:
    """As padded, with one token in three masked, but the first token of no text."""
    x, mask = padded(rows, fill=fill)
    drop = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)) < 1 / 3
    drop[:, 0] = False
    return x, mask & ~drop

"""Checks of pool_normalize for any backend and device: NaN around the mask, offsets that need 64 bits."""

import torch
from torch import Tensor

from embedfuse import ops, testing
from embedfuse.ops.pool_normalize import OP, POOLINGS

# Sequences, rows and columns: 2^32 elements and some more.
LARGE_SHAPE = (8, 2**17 + 1, 4096)
LARGE_CASES = [
    (layout, pooling)
    for layout in ("one sequence", "eight sequences", "packed")
    for pooling in POOLINGS
] + [("no mask", "last"), ("both ends", "mean")]
# Which of the three sequences NaN reaches, in the first token of one and the last of another.
REACHED = {
    "cls": [True, False, False],
    "last": [False, True, False],
    "mean": [True, True, False],
    "weighted_mean": [True, True, False],
}
assert tuple(REACHED) == POOLINGS


def check_nan(backend: str, device: str, dtype: torch.dtype, pooling: str):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 1100, 70, generator=generator).to(device, dtype)
    # Kernels scan the mask in blocks: tokens with holes far behind, tokens in front, and none.
    keep = torch.zeros(3, 1100, dtype=torch.bool, device=device)
    keep[0, 1050:1090:3] = True
    keep[1, [2, 3, 7]] = True
    rows[~keep] = float("nan")
    args = (rows, None, keep, pooling, True, dtype)
    out, norm = testing.assert_close_to_reference(OP, args, backend)
    assert out.isfinite().all()
    assert not out[2].any()
    assert norm[2] == 0
    # One column is enough: the norm carries it to the others.
    rows[0, 1050, 5] = rows[1, 7, 69] = float("nan")
    out, norm = testing.assert_close_to_reference(OP, args, backend)
    assert out.isnan().all(1).tolist() == REACHED[pooling]
    assert norm.isnan().tolist() == REACHED[pooling]


def check_large_offsets(large: Tensor, layout: str, pooling: str):
    """large: LARGE_SHAPE; its last rows are overwritten and pooled.

    As one sequence, the offset of a row passes 2^31; as eight, that of a sequence; packed, that of its start.
    """
    tokens, device = 7, large.device
    rows = large.view(-1, large.shape[-1])
    values = torch.randn(tokens, rows.shape[-1], device=device).to(rows.dtype)
    rows[-tokens:] = values
    options = {"pooling": pooling, "out_dtype": torch.float32}
    if layout == "packed":
        ends = [0, len(rows) - tokens, len(rows)]
        ends = torch.tensor(ends, device=device, dtype=torch.int32)
        got = ops.pool_normalize(rows, cu_seqlens=ends, **options)
    elif layout == "no mask":
        got = ops.pool_normalize(rows[None], **options)
    else:
        mask = torch.arange(len(rows), device=device) >= len(rows) - tokens
        if layout == "both ends":  # the direction of the mean stays
            rows[0], mask[0] = 0, True
        padded = large if layout == "eight sequences" else rows[None]
        mask = mask.view(padded.shape[:2])
        got = ops.pool_normalize(padded, attention_mask=mask, **options)
    row = torch.arange(tokens, device=device)
    weights = {
        "cls": row == 0,
        "last": row == tokens - 1,
        "mean": row >= 0,
        "weighted_mean": row + 1,
    }
    exact = torch.nn.functional.normalize(weights[pooling].double() @ values.double(), dim=0)
    torch.testing.assert_close(got[-1].double(), exact, rtol=0, atol=1e-6)

"""Padded texts as spans of rows of one matrix, so that a kernel needs no mask."""

import torch
from torch import Tensor

from embedfuse.ops.checks import check_device, check_shape


def padded_spans(
    name: str, x: Tensor, mask: Tensor | None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Rows (rows, dim) of x (texts, length, dim), without a copy unless the mask has holes or x cannot be
    viewed as a matrix; spans (texts, 2) int64, first row and row after the last; (texts,) bool, whether the
    mask leaves any row out, or None; and scale, (texts, length) or (texts, 1), by rows."""
    texts, length, _ = x.shape
    if scale is not None:
        scale = scale.expand(texts, length)
    if mask is None:
        rows, pitch = _rows(x)
        if pitch == length > 0:
            spans = neighbours(torch.arange(0, texts * length + 1, length, device=x.device))
        else:
            first = torch.arange(texts, device=x.device) * pitch
            spans = torch.stack((first, first + length), 1)
        return rows, spans, None, _scale_rows(scale, rows, pitch)
    check_shape(f"{name}_mask", mask, x.shape[:2])
    check_device(f"{name}_mask", mask, name, x)
    keep = mask != 0
    tokens = keep.sum(1)
    padded = tokens < length
    place = torch.arange(length, device=x.device).expand(texts, length)
    # Texts without tokens end where they start.
    none = torch.zeros(texts, 1, dtype=torch.int64, device=x.device)
    last = torch.cat((torch.where(keep, place + 1, 0), none), 1).amax(1)
    first = torch.cat((torch.where(keep, place, length), none + length), 1).amin(1).minimum(last)
    if torch.compiler.is_compiling():  # no shape may depend on values
        order = (~keep).long().argsort(dim=1, stable=True)
        x = x.gather(1, order[..., None].expand_as(x))
        scale = None if scale is None else scale.gather(1, order)
        first, last = tokens - tokens, tokens
    elif (last - first != tokens).any():
        last = tokens.cumsum(0)
        spans = torch.stack((last - tokens, last), 1)
        return x[keep], spans, padded, None if scale is None else scale[keep]
    rows, pitch = _rows(x)
    start = torch.arange(texts, device=x.device) * pitch
    spans = torch.stack((start + first, start + last), 1)
    return rows, spans, padded, _scale_rows(scale, rows, pitch)


def neighbours(ends: Tensor) -> Tensor:
    """Spans (texts, 2) of texts that lie end to end, a view of the int64 `ends` (texts + 1,)."""
    return ends.contiguous().as_strided((len(ends) - 1, 2), (1, 1))


def _scale_rows(scale: Tensor | None, rows: Tensor, pitch: int) -> Tensor | None:
    if scale is None:
        return None
    if pitch > scale.shape[1]:
        scale = torch.nn.functional.pad(scale, (0, pitch - scale.shape[1]))
    return scale.flatten()[: len(rows)]


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """A matrix whose row i * pitch + t is x[i, t]."""
    texts, length, dim = x.shape
    step = x.stride(1)
    whole = x.stride(2) == 1 and 0 < dim <= step and x.stride(0) % step == 0
    pitch = x.stride(0) // step if whole else 0
    if x.numel() == 0 or pitch <= length:
        return x.reshape(texts * length, dim), length
    # Columns or tokens of a wider tensor, as x[:, 1:]; no kernel reads the rows between the texts.
    return x.as_strided(((texts - 1) * pitch + length, dim), (step, 1)), pitch

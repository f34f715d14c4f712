"""Checks of arguments that several ops share. Errors name the argument, what came and what is accepted."""

import numpy as np
import torch
from torch import Tensor, nn

from embedfuse import native
from embedfuse.registry import Op

FLOATS = (*native.DTYPES, torch.float64)
_READABLE = (Tensor, nn.Parameter)


def as_tensor(x) -> Tensor:
    """A tensor as it is, and an array's memory, copied where strides are negative.

    Neither goes to torch's default device, as by torch.as_tensor.
    """
    if isinstance(x, Tensor):
        return x
    if isinstance(x, np.ndarray):
        return torch.from_numpy(x.copy() if min(x.strides, default=0) < 0 else x)
    return torch.as_tensor(x)  # an array of another library, which may lie on a GPU


def is_readable(x: Tensor) -> bool:
    """Whether checks may read values: that would wait for a GPU, and under torch.compile there are none."""
    return x.is_cpu and not torch.compiler.is_compiling()


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records a call on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def is_dense(x: Tensor) -> bool:
    """Whether a kernel may read x by its address: strided, no subclass, no lazy minus sign or zeros."""
    lazy = x.is_neg() or x._is_zerotensor()
    return type(x) in _READABLE and x.layout is torch.strided and not lazy


def kernel_takes(op: Op, first: Tensor, *others: Tensor | None) -> bool:
    """Whether op has a kernel for these tensors that is faster than torch.

    A kernel reads memory by its address: dense tensors of one dtype and device, no subclasses of torch.Tensor
    (quantised weights, say). The first tensor decides the device and dtype; those that are None are skipped.
    """
    # A loop, not all(): a small linear layer is called every few tens of microseconds.
    dtype, device = first.dtype, first.device
    for t in (first, *others):
        if t is not None and not (is_dense(t) and t.dtype is dtype and t.device == device):
            return False
    return op.accelerates(first)


def check_tensors(**arguments: Tensor | None) -> None:
    """TypeError for an argument that is neither a tensor nor None."""
    for name, x in arguments.items():
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(f"{name}: {type(x).__name__}; accepted are tensors")


def check_floating(name: str, dtype: torch.dtype, error: type[Exception] = ValueError) -> None:
    """`error` for a dtype that no kernel and no reference computes in."""
    if dtype not in FLOATS:
        raise error(f"{name}: {dtype}; accepted are float16, bfloat16, float32 and float64")


def check_shape(name: str, x: Tensor | None, shape: tuple, of: str | None = None) -> None:
    """ValueError for another shape; of: the argument whose shape is accepted."""
    if x is not None and x.shape != shape:
        accepted = f"that of {of}, {tuple(shape)}" if of else tuple(shape)
        raise ValueError(f"{name}: shape {tuple(x.shape)}; accepted is {accepted}")


def check_device(name: str, x: Tensor | None, of: str, like: Tensor) -> None:
    """ValueError for another device than that of `like`, the argument `of`."""
    if x is not None and x.device != like.device:
        raise ValueError(f"{name}: on {x.device}; accepted is the device of {of}, {like.device}")


def check_like(name: str, x: Tensor | None, of: str, like: Tensor) -> None:
    """ValueError for another dtype or device than those of `like`, the argument `of`."""
    if x is not None and (x.dtype, x.device) != (like.dtype, like.device):
        raise ValueError(
            f"{name}: {x.dtype} on {x.device}; accepted is that of {of}, {like.dtype} on {like.device}"
        )


def check_cu_seqlens(name: str, cu_seqlens: Tensor) -> None:
    """ValueError for another dtype or shape than int32 (batch + 1,)."""
    check_tensors(**{name: cu_seqlens})
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        raise ValueError(
            f"{name}: {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}; "
            "accepted is int32 (batch + 1,)"
        )


def check_cu_seqlens_values(name: str, cu_seqlens: Tensor, tokens: int) -> None:
    """ValueError for values that do not bound `tokens` tokens, where values may be read."""
    if not is_readable(cu_seqlens):
        return
    falls = bool((cu_seqlens.diff() < 0).any())
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens or falls:
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        raise ValueError(
            f"{name}: must start at 0, never fall, and end at the number of tokens, {tokens}; "
            f"starts at {first}, ends at {last}" + (", falls" if falls else "")
        )


def check_tokens(
    name: str,
    x: Tensor,
    cu_seqlens: Tensor | None,
    attention_mask: Tensor | None,
    columns: str = "",
) -> None:
    """Errors unless x is (batch, length), with a mask or none, or (tokens,) with cu_seqlens.

    columns: the name of a further dimension.
    """
    check_tensors(cu_seqlens=cu_seqlens, attention_mask=attention_mask)
    shape, further = tuple(x.shape), f", {columns}" if columns else ""
    if len(shape) != (2 if cu_seqlens is None else 1) + bool(columns):
        raise ValueError(
            f"{name}: shape {shape}; accepted are (batch, length{further}), or (tokens{further or ','}) "
            "together with cu_seqlens"
        )
    check_device("cu_seqlens", cu_seqlens, name, x)
    check_device("attention_mask", attention_mask, name, x)
    if cu_seqlens is None:
        return check_shape("attention_mask", attention_mask, shape[:2])
    if attention_mask is not None:
        raise ValueError(
            "attention_mask: not accepted together with cu_seqlens, which already bounds tokens"
        )
    check_cu_seqlens("cu_seqlens", cu_seqlens)

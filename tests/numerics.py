"""The bound every fast version is held to: at most twice plain torch's own error, plus a floor.

    |backend - ref64|max <= 2 |ref - ref64|max + FLOOR[dtype] * |ref64|max

ref64 is the op's reference on the same inputs widened to fp64, ref the reference in the op's own dtype.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from embedfuse.registry import Op, use_backend

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# By dtype of the output: one step of the 16-bit formats just under 1, some sixteen of fp32.
FLOOR = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def backends(op: Op, device: str) -> list[str]:
    """Backends that this op has for tensors on such a device, whether or not they load here."""
    return [i.backend for i in op.implementations if device in i.devices()]


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """torch.empty and its kin give NaN (integers: the largest), so what a kernel leaves out shows."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def run(op: Op, args: tuple, function=None):
    """function(*args), by default the op's own; of one that writes its first argument, that, copied."""
    function = function or op
    if not op.schema.startswith(f"{op.name}(Tensor(a!)"):
        return function(*args)
    first = args[0].clone()
    function(first, *args[1:])
    return first


def assert_close_to_reference(op: Op, args: tuple, backend: str, scale: float | None = None):
    """Run op(*args) on `backend` and hold every output to the bound above.

    scale: what FLOOR is relative to instead of |ref64|max, where outputs cancel (a loss near zero).
    Returns the backend's outputs as a tuple, for further checks.
    """
    with use_backend(backend), poisoned_empty():
        got = run(op, args)
    return assert_within_bounds(op, backend, got, references(op, args), scale)


def references(op: Op, args: tuple) -> tuple[tuple, tuple]:
    """Outputs of the reference in the op's own dtype, and in fp64."""
    exact = run(op, tuple(map(_widen, args)), op._reference)
    return _tuple(run(op, args, op._reference)), _tuple(exact)


def assert_within_bounds(op: Op, backend: str, got, references, scale: float | None = None):
    """Hold what the op gave on `backend` to its references(op, args); as assert_close_to_reference."""
    got = _tuple(got)
    assert len(got) == len(references[0])
    for index, outputs in enumerate(zip(got, *references, strict=True)):
        _assert_within_bound(f"{op.name}[{backend}] output {index}", *outputs, scale)
    return got


def _assert_within_bound(name: str, got: Tensor, own: Tensor, exact: Tensor, scale: float | None):
    assert (got.dtype, got.shape) == (own.dtype, own.shape), name
    if not got.is_floating_point():
        assert torch.equal(got, exact), name
        return
    assert torch.equal(got.isnan(), exact.isnan()), f"{name}: NaN stands elsewhere"
    error, own_error = _error(got, exact), _error(own, exact)
    assert own_error < float("inf"), f"{name}: plain torch overflows {got.dtype} on this sample"
    scale = scale or _largest(exact.nan_to_num(0))
    bound = 2 * own_error + FLOOR[got.dtype] * scale
    assert error <= bound, f"{name}: error {error:.3g}, allowed {bound:.3g}, torch {own_error:.3g}"


def _error(got: Tensor, exact: Tensor) -> float:
    difference = got.double() - exact.double()
    # Equal infinities differ by NaN; NaN against NaN was checked before.
    return _largest(torch.where((got == exact) | exact.isnan(), 0, difference))


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _widen(arg):
    if isinstance(arg, list):
        return [_widen(part) for part in arg]
    if isinstance(arg, Tensor) and arg.is_floating_point():
        return arg.double()
    return torch.float64 if isinstance(arg, torch.dtype) and arg.is_floating_point else arg


def _tuple(outputs) -> tuple:
    return outputs if isinstance(outputs, tuple) else (outputs,)

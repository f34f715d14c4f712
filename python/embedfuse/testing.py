"""Numerical checks of ops: at most twice the error of plain torch is allowed, plus a floor.

    |value - exact| <= 2 |torch - exact| + FLOOR[dtype] * |exact|

`exact` is the reference in fp64, `torch` the reference in the dtype of the value, both on the same inputs.
The bound applies to the root mean square, which hardly depends on chance, and to the largest element, which
one wrong number changes. The floor is for references that happen to round to the exact value; for sums of
tensor cores it grows with the number of products (`floor_of`).
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize as normalize_rows

from embedfuse.ops.maxsim.op import EPS, listed_pairs
from embedfuse.registry import Op, use_backend

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# By dtype of the output: one step of the 16-bit formats just below 1, about sixteen of fp32.
FLOOR = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def floor_of(first: Tensor, tensor_cores: bool) -> float:
    """The floor of fp32 results, by an op's first argument (..., depth).

    Tensor cores add 16-bit products, eight (sm_80) or more at a time, and cut off what is below the 24 bits
    of the sum: up to 2^-24 of it each time, always towards zero.

    Args:
        first: The argument.
        tensor_cores: Whether products of it may be added up by them.
    """
    floor = FLOOR[torch.float32]
    if not tensor_cores or first.dtype not in (torch.float16, torch.bfloat16) or not first.dim():
        return floor
    return floor + first.shape[-1] / 8 * 2**-24


def backends(op: Op, device: str) -> list[str]:
    """Names of the backends that an op has for tensors on a device.

    Args:
        op: An op of the registry.
        device: "cpu" or "cuda".

    Returns:
        The backends except "reference", in order of preference, also those that do not load on this machine.
    """
    return [i.backend for i in op.implementations if device in i.devices()]


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Inside the block torch.empty and similar functions fill with NaN, integers with the largest value.

    Elements that a kernel does not write are then seen.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def run(op: Op, args: tuple, function=None):
    """Call an op on arguments that are left unchanged.

    Args:
        op: An op of the registry.
        args: The arguments.
        function: Called instead of the op.

    Returns:
        The outputs. For an op that writes its first argument: a copy of that argument, written.
    """
    function = function or op
    if not op.schema.startswith(f"{op.name}(Tensor(a!)"):
        return function(*args)
    first = args[0].clone()
    function(first, *args[1:])
    return first


def assert_close_to_reference(
    op: Op, args: tuple, backend: str, scale: float | None = None
) -> tuple:
    """Run an op on a backend and compare every output with the reference.

    Args:
        op: An op of the registry.
        args: The arguments, floating-point tensors in the dtype under test.
        backend: "cpp", "triton" or "cuda".
        scale: What FLOOR is relative to, instead of the size of the exact value. For outputs that cancel,
            such as a loss near zero.

    Returns:
        The outputs of the backend.

    Raises:
        AssertionError: An output is outside the bound, has another dtype or shape, or NaN elsewhere.
        BackendError: The backend cannot run this call.
    """
    with use_backend(backend), poisoned_empty():
        outputs = run(op, args)
    return assert_within_bounds(op, args, backend, outputs, references(op, args), scale)


def references(op: Op, args: tuple) -> tuple[tuple, tuple]:
    """Outputs of the reference of an op: in the dtype of the arguments, and in fp64."""
    exact = run(op, tuple(map(_widen, args)), op._reference)
    return _tuple(run(op, args, op._reference)), _tuple(exact)


def assert_within_bounds(
    op: Op,
    args: tuple,
    backend: str,
    outputs,
    references: tuple[tuple, tuple],
    scale: float | None = None,
) -> tuple:
    """Compare outputs that a backend has given with the reference.

    Args:
        op: An op of the registry.
        args: The arguments of the call.
        backend: Its name, for messages.
        outputs: What the call returned.
        references: What `references(op, args)` returns.
        scale: As in `assert_close_to_reference`.

    Returns:
        The outputs as a tuple.

    Raises:
        AssertionError: As in `assert_close_to_reference`.
    """
    outputs, floors = _tuple(outputs), FLOOR | {torch.float32: floor_of(args[0], args[0].is_cuda)}
    assert len(outputs) == len(references[0])
    for index, (value, in_torch, exact) in enumerate(zip(outputs, *references, strict=True)):
        name = f"{op.name}[{backend}] output {index}"
        assert (value.dtype, value.shape) == (in_torch.dtype, in_torch.shape), name
        if value.is_floating_point():
            floor = floors[value.dtype]
            assert_as_good(value, in_torch, exact, scale=scale, name=name, floor=floor)
        elif op.name == "maxsim" and value.numel():
            chosen = [_chosen_products(args, argmax) for argmax in (value, in_torch, exact)]
            floor = floors[torch.float32]
            assert_as_good(chosen[0].float(), chosen[1].float(), chosen[2], name=name, floor=floor)
        else:
            assert torch.equal(value, exact), name
    return outputs


def _chosen_products(args: tuple, argmax: Tensor) -> Tensor:
    """The products, in fp64, at the argmax of maxsim; 0 where there is none.

    The products are compared, not the argmax: of two that are equal in fp32 either may be chosen.
    """
    query, query_spans, documents, document_spans, scale, _, pairs, normalize, width = args
    query, document = query.double(), torch.cat(documents).double()
    document = document if scale is None else document * scale[:, None].double()
    if normalize:
        query, document = (normalize_rows(x, dim=1, eps=EPS) for x in (query, document))
    pairs = listed_pairs(query_spans, document_spans, pairs)
    lengths = document_spans.diff(dim=1)[pairs[:, 1]]
    assert ((argmax >= -1) & (argmax < lengths.clamp_min(0))).all(), "argmax leaves its document"
    i_q = query_spans[pairs[:, 0], :1] + torch.arange(width, device=query.device)
    i_d = document_spans[pairs[:, 1], :1] + argmax
    found = argmax >= 0
    products = query.new_zeros(argmax.shape)
    products[found] = (query[i_q[found]] * document[i_d[found]]).sum(1)
    return products


def assert_as_good(
    value: Tensor,
    in_torch: Tensor,
    exact: Tensor,
    *,
    scale: float | None = None,
    name: str = "value",
    floor: float | None = None,
) -> None:
    """Compare a result with that of plain torch in the same dtype and with the exact one.

    Args:
        value: The result, of any shape.
        in_torch: The result of plain torch, of the same shape and dtype.
        exact: The result in fp64, of the same shape.
        scale: What FLOOR is relative to, instead of the size of `exact`. For values that cancel.
        name: What the message calls the result.
        floor: In place of FLOOR of the dtype.

    Raises:
        AssertionError: The error is above the bound of this module, or the dtype, the shape or the places of
            NaN differ.
    """
    assert (value.dtype, value.shape) == (in_torch.dtype, in_torch.shape), name
    value, in_torch, exact = value.detach(), in_torch.detach(), exact.detach().double()
    assert torch.equal(value.isnan(), exact.isnan()), f"{name}: NaN at other places"
    errors, torch_errors = _difference(value, exact), _difference(in_torch, exact)
    assert torch_errors.isfinite().all(), f"{name}: plain torch overflows {value.dtype} here"
    size = exact.nan_to_num(0, 0, 0)
    floor = FLOOR[value.dtype] if floor is None else floor
    for measure in (_rms, _largest):
        error, torch_error = measure(errors), measure(torch_errors)
        bound = 2 * torch_error + floor * (scale or measure(size))
        assert error <= bound, (
            f"{name}: {measure.__name__[1:]} error {error:.3g}, allowed {bound:.3g}, torch {torch_error:.3g}"
        )


def _difference(value: Tensor, exact: Tensor) -> Tensor:
    # Equal infinities differ by NaN; places of NaN were compared before.
    return torch.where((value == exact) | exact.isnan(), 0, value.double() - exact)


def _rms(x: Tensor) -> float:
    # Divided by the largest, so that squares do not overflow.
    largest = _largest(x)
    return largest * (x / largest).square().mean().sqrt().item() if largest > 0 else 0.0


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

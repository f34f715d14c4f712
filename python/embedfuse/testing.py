"""The error bound that every fast version must meet: at most twice the error of plain torch, plus a floor.

    |got - ref64| <= 2 |ref - ref64| + FLOOR[dtype] * |ref64|

It is checked for the root mean square, which hardly depends on chance, and for the largest value, which a
single wrong number changes. ref is the reference in the dtype of the inputs, ref64 the reference on the same
inputs widened to fp64. The floor is needed where the reference happens to round to the exact value.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize as normalize_rows

from embedfuse.ops.maxsim.op import EPS, listed_pairs
from embedfuse.registry import Op, use_backend

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# By dtype of the output: one rounding step of the 16-bit formats just below 1, about sixteen of fp32.
FLOOR = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def backends(op: Op, device: str) -> list[str]:
    """Backends that an op has for tensors on a device, whether or not they load on this machine."""
    return [i.backend for i in op.implementations if device in i.devices()]


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Make torch.empty and the like return NaN (integers: the largest), which a kernel has to overwrite."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def run(op: Op, args: tuple, function=None):
    """function(*args), by default op(*args). An op that works in place gets a copy, which is returned."""
    function = function or op
    if not op.schema.startswith(f"{op.name}(Tensor(a!)"):
        return function(*args)
    first = args[0].clone()
    function(first, *args[1:])
    return first


def assert_close_to_reference(
    op: Op, args: tuple, backend: str, scale: float | None = None
) -> tuple:
    """Run op(*args) on a backend and check every output against the bound above.

    Args:
        op: the op.
        args: its arguments.
        backend: name of the backend.
        scale: what FLOOR is relative to, instead of the size of ref64, if outputs cancel (a loss near zero).

    Returns:
        The outputs as a tuple.
    """
    with use_backend(backend), poisoned_empty():
        got = run(op, args)
    return assert_within_bounds(op, args, backend, got, references(op, args), scale)


def references(op: Op, args: tuple) -> tuple[tuple, tuple]:
    """Outputs of the reference in the dtype of args, and in fp64."""
    ref64 = run(op, tuple(map(_widen, args)), op._reference)
    return _tuple(run(op, args, op._reference)), _tuple(ref64)


def assert_within_bounds(op: Op, args: tuple, backend: str, got, references, scale=None):
    """Check the outputs of op(*args) on a backend against references(op, args), by the bound above."""
    got = _tuple(got)
    assert len(got) == len(references[0])
    for index, (x, ref, ref64) in enumerate(zip(got, *references, strict=True)):
        name = f"{op.name}[{backend}] output {index}"
        assert (x.dtype, x.shape) == (ref.dtype, ref.shape), name
        if x.is_floating_point():
            assert_as_good(x, ref, ref64, scale=scale, name=name)
        elif op.name == "maxsim" and x.numel():
            chosen = [_chosen_products(args, argmax) for argmax in (x, ref, ref64)]
            assert_as_good(chosen[0].float(), chosen[1].float(), chosen[2], name=name)
        else:
            assert torch.equal(x, ref64), name
    return got


def _chosen_products(args: tuple, argmax: Tensor) -> Tensor:
    """The products in fp64 at maxsim's argmax; 0 where there is none.

    These are checked instead of the argmax, because fp32 may choose either of two nearly equal products.
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
    got: Tensor, ref: Tensor, ref64: Tensor, *, scale: float | None = None, name: str = "value"
):
    """Check a value against the bound above.

    Args:
        got: the value.
        ref: the result of plain torch in the same dtype.
        ref64: the result in fp64.
        scale: what FLOOR is relative to, instead of the size of ref64, if that cancels.
        name: of the value, in errors.
    """
    assert (got.dtype, got.shape) == (ref.dtype, ref.shape), name
    got, ref, ref64 = got.detach(), ref.detach(), ref64.detach().double()
    assert torch.equal(got.isnan(), ref64.isnan()), f"{name}: NaN in other places"
    errors, torch_errors = _difference(got, ref64), _difference(ref, ref64)
    assert torch_errors.isfinite().all(), (
        f"{name}: plain torch overflows {got.dtype} on this sample"
    )
    size = ref64.nan_to_num(0, 0, 0)
    for measure in (_rms, _largest):
        error, torch_error = measure(errors), measure(torch_errors)
        bound = 2 * torch_error + FLOOR[got.dtype] * (scale or measure(size))
        assert error <= bound, (
            f"{name}: {measure.__name__[1:]} error {error:.3g}, allowed {bound:.3g}, torch {torch_error:.3g}"
        )


def _difference(got: Tensor, ref64: Tensor) -> Tensor:
    # The difference of equal infinities would be NaN. That both are NaN in the same places was checked.
    return torch.where((got == ref64) | ref64.isnan(), 0, got.double() - ref64)


def _rms(x: Tensor) -> float:
    # Scaled, so that no square overflows.
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

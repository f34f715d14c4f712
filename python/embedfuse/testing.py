"""The bound every fast version is held to: at most twice the error of plain torch, plus a floor.

    |got - ref64| <= 2 |ref - ref64| + FLOOR[dtype] * |ref64|

in the root mean square, which hardly depends on chance, and in the largest, which one wrong number moves.
ref64 is the reference on the same inputs widened to fp64, ref the reference in the dtype of the inputs. The
floor is for references that happen to round to the right value.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize as normalize_rows

from embedfuse.ops.maxsim.op import EPS, listed_pairs
from embedfuse.registry import Op, use_backend

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# By dtype of the output: one step of the 16-bit formats just under 1, some sixteen of fp32.
FLOOR = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def backends(op: Op, device: str) -> list[str]:
    """Backends that this op has for tensors on such a device, whether or not they load here."""
    return [i.backend for i in op.implementations if device in i.devices()]


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """torch.empty gives NaN (integers: the largest), so that what a kernel does not write is noticed."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def run(op: Op, args: tuple, function=None):
    """function(*args), by default op(*args); of an op that writes its first argument, a written copy."""
    function = function or op
    if not op.schema.startswith(f"{op.name}(Tensor(a!)"):
        return function(*args)
    first = args[0].clone()
    function(first, *args[1:])
    return first


def assert_close_to_reference(op: Op, args: tuple, backend: str, scale: float | None = None):
    """Run op(*args) on `backend` and hold every output to the bound above.

    scale: what FLOOR is relative to instead of the size of ref64, where outputs cancel (a loss near zero).
    Returns the backend's outputs as a tuple, for further checks.
    """
    with use_backend(backend), poisoned_empty():
        got = run(op, args)
    return assert_within_bounds(op, args, backend, got, references(op, args), scale)


def references(op: Op, args: tuple) -> tuple[tuple, tuple]:
    """Outputs of the reference in the dtype of args, and in fp64."""
    ref64 = run(op, tuple(map(_widen, args)), op._reference)
    return _tuple(run(op, args, op._reference)), _tuple(ref64)


def assert_within_bounds(op: Op, args: tuple, backend: str, got, references, scale=None):
    """Hold what op(*args) gave on `backend` to its references(op, args); as assert_close_to_reference."""
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
    """In fp64 the products at maxsim's argmax, 0 for none.

    An argmax is held to the bound by these: of products that fp32 cannot tell apart either may be chosen.
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
    """Hold `got` to the bound above, where plain torch gives `ref`, and in fp64 `ref64`.

    scale: what FLOOR is relative to instead of the size of `ref64`, where that cancels.
    """
    assert (got.dtype, got.shape) == (ref.dtype, ref.shape), name
    got, ref, ref64 = got.detach(), ref.detach(), ref64.detach().double()
    assert torch.equal(got.isnan(), ref64.isnan()), f"{name}: NaN stands elsewhere"
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
    # Equal infinities differ by NaN; NaN against NaN was checked before.
    return torch.where((got == ref64) | ref64.isnan(), 0, got.double() - ref64)


def _rms(x: Tensor) -> float:
    # Scaled, so that no square leaves the range.
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

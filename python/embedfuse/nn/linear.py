"""Linear layers of a tower: a module's own weights, read by the fastest GEMM for the shape."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedfuse.ops.linear import OP as LINEAR
from embedfuse.ops.linear import most_rows


def is_plain(x: Tensor) -> bool:
    """No gradient is recorded and no autocast is on: any kernel may stand in for torch's."""
    return not (torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type))


def linear(module: nn.Module, x: Tensor, plain: bool) -> Tensor:
    """module(x); a Linear that is not exactly nn.Linear (LoRA, quantised) runs as the module it is."""
    if type(module) is not nn.Linear:
        return module(x)
    return matmul(x, module.weight, module.bias, plain)


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None, plain: bool) -> Tensor:
    if (
        plain
        and x.is_cpu
        and x.shape[0] <= most_rows(x.dtype)
        and _fits(x, weight, bias)
        and LINEAR.accelerates(x)
    ):
        return LINEAR(x, weight, bias)
    return F.linear(x, weight, bias)


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel may read these; torch has its own words for what does not fit."""
    return all(
        type(p) in (Tensor, nn.Parameter) and (p.dtype, p.device) == (x.dtype, x.device)
        for p in (weight, weight if bias is None else bias)
    ) and (x.shape[1:] == weight.shape[1:] and (bias is None or bias.shape == weight.shape[:1]))


class FusedLinear:
    """Linear layers of one input as one GEMM, without a copy.

    `fuse` makes their weights neighbours in one storage, so values, names and memory stay as they
    were. Each call looks whether they still are; .to(), load_state_dict(assign=True) or deepcopy
    part them, and then the layers run one by one. Nothing is cached, so nothing can be stale.
    """

    def __init__(self, linears: tuple[nn.Module, ...]):
        self.linears = linears

    def fuse(self) -> bool:
        """Move the weights into one storage. False, and nothing done, if these layers forbid it."""
        weights = [getattr(m, "weight", None) for m in self.linears]
        biases = [getattr(m, "bias", None) for m in self.linears]
        without_bias = all(b is None for b in biases)
        if any(type(m) is not nn.Linear for m in self.linears) or not _can_join(weights):
            return False
        if not without_bias and not _can_join(biases):
            return False
        for parameters in [weights] if without_bias else [weights, biases]:
            if joined(parameters) is None:
                _join(parameters)
        return True

    def part(self) -> None:
        """Give each parameter of a fused layer a storage of its own again."""
        # Under inference mode the new storage could never be trained.
        with torch.inference_mode(False), torch.no_grad():
            for module in self.linears:
                for p in module.parameters(recurse=False):
                    if type(p) is nn.Parameter and p.untyped_storage().nbytes() != p.nbytes:
                        p.data = p.data.clone()

    def __call__(self, x: Tensor, plain: bool) -> tuple[Tensor, ...]:
        # Gradients have to reach each parameter, so the joined weights serve inference only.
        if torch.is_grad_enabled() or any(type(m) is not nn.Linear for m in self.linears):
            return tuple(linear(m, x, plain) for m in self.linears)
        weight = joined([m.weight for m in self.linears])
        bias = None
        if weight is not None and self.linears[0].bias is not None:
            bias = joined([m.bias for m in self.linears])
            weight = None if bias is None else weight
        if weight is None:
            return tuple(linear(m, x, plain) for m in self.linears)
        return matmul(x, weight, bias, plain).split([m.out_features for m in self.linears], dim=-1)


def joined(parameters: list[nn.Parameter]) -> Tensor | None:
    """The parameters as one tensor, where they lie behind one another in one storage."""
    if any(type(p) is not nn.Parameter for p in parameters):
        return None
    first = parameters[0].data
    storage, place = first.untyped_storage().data_ptr(), first.data_ptr()
    rows = 0
    for p in parameters:
        apart = p.data_ptr() != place or p.untyped_storage().data_ptr() != storage
        if apart or p.dtype != first.dtype or not p.is_contiguous():
            return None
        place += p.nbytes
        rows += p.shape[0]
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def _can_join(parameters: list) -> bool:
    first = parameters[0]
    if len({id(p) for p in parameters}) != len(parameters) or joined(parameters) is not None:
        return joined(parameters) is not None
    return all(
        type(p) is nn.Parameter
        and (p.dtype, p.device, p.shape[1:]) == (first.dtype, first.device, first.shape[1:])
        and not p.is_meta
        and p.is_contiguous()
        and p.untyped_storage().nbytes() == p.nbytes  # a part of a flat buffer has to stay there
        and not (p.is_cpu and p.is_shared())  # another process may hold it
        for p in parameters
    )


def _join(parameters: list[nn.Parameter]) -> None:
    with torch.inference_mode(False), torch.no_grad():
        storage = torch.cat([p.data for p in parameters])
        for p, view in zip(parameters, storage.split([len(p) for p in parameters]), strict=True):
            p.data = view

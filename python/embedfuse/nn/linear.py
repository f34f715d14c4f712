"""Linear layers of a tower: the modules' weights, read where they are by the fastest GEMM for the shape."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedfuse.ops.checks import kernel_takes
from embedfuse.ops.linear import OP as LINEAR
from embedfuse.ops.linear import most_rows


def is_inference(x: Tensor) -> bool:
    """Whether no gradient is recorded and autocast is off: a kernel may then replace torch's operators."""
    return not (torch.is_grad_enabled() or autocasts(x))


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on where x is; torch asks no such thing of the meta device."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def linear(module: nn.Module, x: Tensor, inference: bool) -> Tensor:
    """module(x). Subclasses and replacements of nn.Linear (LoRA, quantised) are called as modules."""
    if type(module) is not nn.Linear:
        return module(x)
    if inference and linear_takes(x, module):
        return LINEAR(x, [module.weight], [module.bias])
    if module.weight.layout is torch.sparse_coo:  # which torch takes with the model's shapes alone
        return F.linear(x[None], module.weight, module.bias)[0]
    return F.linear(x, module.weight, module.bias)


def linear_gelu(module: nn.Linear, x: Tensor) -> Tensor:
    """GELU of module(x), in inference."""
    if linear_takes(x, module):
        return LINEAR(x, [module.weight], [module.bias], True)
    # In place: the tensor is ours.
    return torch.ops.aten.gelu_(linear(module, x, inference=False))


def linears(modules: tuple[nn.Module, ...], x: Tensor, inference: bool) -> tuple[Tensor, ...]:
    """module(x) for each module, computed by one kernel call if the kernel can read all of them."""
    fusible = inference and all(type(m) is nn.Linear for m in modules)
    if not (fusible and linear_takes(x, *modules)):
        return tuple(linear(m, x, inference) for m in modules)
    weights, biases = [m.weight for m in modules], [m.bias for m in modules]
    return LINEAR(x, weights, biases).split([len(weight) for weight in weights], dim=-1)


def linear_takes(x: Tensor, *modules: nn.Linear) -> bool:
    """Whether our kernel is fast for x and can read the modules' weights.

    If the shapes do not fit, torch runs, so that the error is torch's.
    """
    if not x.is_cpu or x.shape[0] > most_rows(x.dtype):
        return False
    parameters = [(m.weight, m.bias) for m in modules]  # once: nn.Module looks them up slowly
    return all(_fits(x, *p) for p in parameters) and kernel_takes(LINEAR, x, *sum(parameters, ()))


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return x.shape[1:] == weight.shape[1:] and (bias is None or bias.shape == weight.shape[:1])

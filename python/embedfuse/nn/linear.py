"""Linear layers of a tower: modules' own weights, read by the fastest GEMM for the shape."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedfuse.ops.checks import kernel_takes
from embedfuse.ops.linear import OP as LINEAR
from embedfuse.ops.linear import most_rows


def is_plain(x: Tensor) -> bool:
    """No gradient is recorded and no autocast is on: any kernel may stand in for torch's."""
    return not (torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type))


def linear(module: nn.Module, x: Tensor, plain: bool) -> Tensor:
    """module(x); a Linear that is not exactly nn.Linear (LoRA, quantised) runs as the module it is."""
    if type(module) is not nn.Linear:
        return module(x)
    if plain and linear_takes(x, module):
        return LINEAR(x, [module.weight], [module.bias])
    return F.linear(x, module.weight, module.bias)


def linears(modules: tuple[nn.Module, ...], x: Tensor, plain: bool) -> tuple[Tensor, ...]:
    """Each module's result on x, in one call where the kernel takes them all."""
    together = plain and all(type(m) is nn.Linear for m in modules)
    if not (together and linear_takes(x, *modules)):
        return tuple(linear(m, x, plain) for m in modules)
    weights, biases = [m.weight for m in modules], [m.bias for m in modules]
    return LINEAR(x, weights, biases).split([len(weight) for weight in weights], dim=-1)


def linear_takes(x: Tensor, *modules: nn.Linear) -> bool:
    """Whether our kernel is the faster for x and may read what the modules hold; torch raises what does not
    fit."""
    if not x.is_cpu or x.shape[0] > most_rows(x.dtype):
        return False
    parameters = [(m.weight, m.bias) for m in modules]  # once: nn.Module looks them up slowly
    return all(_fits(x, *p) for p in parameters) and kernel_takes(LINEAR, x, *sum(parameters, ()))


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return x.shape[1:] == weight.shape[1:] and (bias is None or bias.shape == weight.shape[:1])

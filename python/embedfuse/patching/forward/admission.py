"""Which calls of a patched model run packed: the reasons that lie in the call, whatever the family."""

import contextlib
import contextvars
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

# Arguments that the packed forward reads.
_READ = {"input_ids", "attention_mask", "token_type_ids", "position_ids", "return_dict"}
# Arguments that it takes as long as they ask for nothing.
_FLAGS = {"output_attentions", "output_hidden_states", "use_cache"}

# A refusal that is not reported, because the caller asked for the original forward.
UNREPORTED = ""

_refuse_all = contextvars.ContextVar("embedfuse_refuse_all", default=None)


@contextlib.contextmanager
def on_original(reason: str = UNREPORTED) -> Iterator[None]:
    """Inside, patched models refuse every call for this reason, and so run on their original forward."""
    token = _refuse_all.set(reason)
    try:
        yield
    finally:
        _refuse_all.reset(token)


def call_refusal(model: nn.Module, call: dict) -> str | None:
    """Why a call with these arguments of `forward` has to run on the original forward."""
    if (reason := _refuse_all.get()) is not None:
        return reason
    for name, value in call.items():
        if value is None or name in _READ or name in model.head_arguments:
            continue
        if name not in _FLAGS or value:
            return f"called with {name}"
    for name in _FLAGS - {"use_cache"}:
        if call.get(name) is None and getattr(model.config, name, False):
            return f"config.{name} is set"
    input_ids = call.get("input_ids")
    if type(input_ids) is not Tensor:
        return f"input_ids is a {type(input_ids).__name__}"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "the call is inside a transform of torch.func"
    if forward_ad._current_level >= 0:
        return "the call is inside forward-mode differentiation"
    if torch.is_grad_enabled() and model.config._attn_implementation == "eager":
        return "eager attention with gradients, which can be differentiated twice"
    if input_ids.is_cuda and torch.cuda.is_current_stream_capturing():
        return "the call is captured into a CUDA graph"
    mask = call.get("attention_mask")
    if mask is not None and not isinstance(mask, Tensor):
        return f"attention_mask is a {type(mask).__name__}"
    if mask is not None and mask.dim() != 2:
        return f"attention_mask has {mask.dim()} dimensions"
    return None

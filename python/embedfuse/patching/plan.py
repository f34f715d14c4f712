"""Plan: a model's layers as the packed tower sees them, and whether they still are what they were."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules import module as torch_module

from embedfuse.nn.decoder import DecoderLayer
from embedfuse.nn.encoder import EncoderLayer

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)
# transformers' own hooks that the packed path may pass over: the first records only while a call with
# output_hidden_states runs, and that one goes to the original; the second (gradient checkpointing,
# PEFT) sits on the word embeddings, which the packed path calls as the module that they are.
_HARMLESS = ("output_capturing_hook", "make_inputs_require_grads")


# All compute softmax(q k^T scale) v; a name registered by somebody else may compute anything.
_ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


def not_stock(model: nn.Module, modules: Iterable[tuple[str, nn.Module]]) -> str | None:
    """The first of these (path, module) whose class is not of the model's own file, or its attention."""
    if model.config._attn_implementation not in _ATTENTIONS:
        return f"attention {model.config._attn_implementation!r} is not one of transformers' own"
    stock = model.original.__module__
    for path, module in modules:
        kind = type(module)
        if kind.__module__ != stock:
            return f"{path} is a {kind.__module__}.{kind.__qualname__}, not one of {stock}"
    return None


@dataclass
class Plan:
    """layers, or `refusal`: why this model's own forward has to run."""

    model: nn.Module
    layers: list[EncoderLayer] | list[DecoderLayer] = field(default_factory=list)
    refusal: str | None = None
    watched: list[tuple[dict, str, nn.Module, str]] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)  # the model and all inside

    def __post_init__(self):
        for prefix, parent in self.model.named_modules():
            for name, child in parent._modules.items():
                if child is not None:
                    path = f"{prefix}.{name}" if prefix else name
                    self.watched.append((parent._modules, name, child, path))
        self.modules += [self.model, *(child for _, _, child, _ in self.watched)]

    def is_current(self) -> bool:
        """Whether every inner module is still the object that the plan was made from."""
        return all(parent.get(name) is child for parent, name, child, _ in self.watched)

    def foreign(self) -> str | None:
        """The first inner module of which nobody knows what its result hangs on beside its parameters."""
        for _, _, child, path in self.watched:
            kind = type(child)
            if kind.__module__ not in (
                self.model.original.__module__,
                "transformers.activations",
            ) and (not kind.__module__.startswith("torch.nn.modules.")):
                return f"{path} is a {kind.__module__}.{kind.__qualname__}"
        return None

    def bypassed(self) -> str | None:
        """The first thing on a module that the packed path would not run."""
        if "forward" in self.model.__dict__:
            return "the model has a forward of its own (offloaded, compiled or wrapped)"
        if any(getattr(torch_module, name) for name in _GLOBAL_HOOKS):
            return "a hook on all modules"
        for _, _, child, path in self.watched:
            state = child.__dict__
            if has_own_forward(child):
                return f"{path} has a forward of its own (offloaded, compiled or wrapped)"
            for name in _HOOKS:
                hooks = state.get(name)
                if hooks and not all(map(_is_harmless, hooks.values())):
                    return f"{path} has a hook"
        return None


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module runs more than its class's forward."""
    return has_own_forward(module) or any(module.__dict__.get(name) for name in _HOOKS)


def has_own_forward(module: nn.Module) -> bool:
    """Whether somebody put another forward on this very module (accelerate does, to offload)."""
    forward = module.__dict__.get("forward")
    # transformers 5.0 leaves the class's own forward behind as an attribute.
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def _is_harmless(hook) -> bool:
    ours = getattr(hook, "__module__", "").startswith("transformers.")
    return ours and hook.__qualname__.rsplit(".", 1)[-1] in _HARMLESS

"""Plan: a model's layers as the packed tower sees them, and whether they still are what they were."""

from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules import module as torch_module

from embedfuse.nn.encoder import EncoderLayer

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")
# transformers leaves these on every layer once output_hidden_states was used; they record only
# while such a call runs, and that one goes to the original forward.
_HARMLESS = "transformers.utils.output_capturing"


@dataclass
class Plan:
    """layers, or `refusal`: why this model's own forward has to run."""

    layers: list[EncoderLayer] = field(default_factory=list)
    refusal: str | None = None
    watched: list[tuple[dict, str, nn.Module, str]] = field(default_factory=list)

    def watch(self, model: nn.Module) -> None:
        for prefix, parent in model.named_modules():
            for name, child in parent._modules.items():
                if child is not None:
                    path = f"{prefix}.{name}" if prefix else name
                    self.watched.append((parent._modules, name, child, path))

    def is_current(self) -> bool:
        """Whether every inner module is still the object that the plan was made from."""
        return all(parent.get(name) is child for parent, name, child, _ in self.watched)

    def bypassed(self) -> str | None:
        """The first thing on an inner module that the packed path would not run."""
        for name in _GLOBAL_HOOKS:
            if getattr(torch_module, name):
                return "a hook on all modules"
        for _, _, child, path in self.watched:
            state = child.__dict__
            if "forward" in state:
                return f"{path} has a forward of its own (offloaded, or wrapped by another library)"
            for name in _HOOKS:
                hooks = state[name]
                if hooks and any(_HARMLESS != getattr(h, "__module__", "") for h in hooks.values()):
                    return f"{path} has a hook"
        return None


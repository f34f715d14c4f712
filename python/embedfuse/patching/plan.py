"""Plan: a model's layers as the packed tower sees them, or why its own forward has to run."""

import sys
from collections.abc import Iterable
from types import FunctionType

from torch import Tensor, nn

from embedfuse.nn.decoder import DecoderLayer
from embedfuse.nn.encoder import EncoderLayer
from embedfuse.patching.watch import GLOBAL_HOOKS, HOOKS, Watch, tables_of

# transformers' own hooks that the packed path may pass over: the first records only while a call with
# output_hidden_states runs, and that one goes to the original; the second (gradient checkpointing,
# PEFT) sits on the word embeddings, which the packed path calls as the module that they are.
_HARMLESS = ("output_capturing_hook", "make_inputs_require_grads")
# All compute softmax(q k^T scale) v; a name registered by somebody else may compute anything.
_ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_STOCK = {"transformers", "torch", *sys.stdlib_module_names}


class Plan:
    """layers, or `refusal`: why this model's own forward has to run.

    modules: the model and all inside. foreign: path and module of those inside that are neither of the
    model's own file nor torch's; where they stand for a layer they are called as the modules that they are.
    """

    def __init__(self, model: nn.Module, buffers: tuple[Tensor, ...]):
        self.model = model
        self.watch = Watch(model, model.original, buffers)  # before anything is read
        self.layers: list[EncoderLayer] | list[DecoderLayer] = []
        self.refusal = obstacle(model)
        named = list(model.named_modules())
        self.modules = [module for _, module in named]
        own = (model.original.__module__, "transformers.activations")
        self.foreign = [
            (path, module)
            for path, module in named[1:]
            if (kind := type(module).__module__) not in own
            and not kind.startswith("torch.nn.modules.")
        ]

    @property
    def foreign_kinds(self) -> tuple[tuple[str, type], ...]:
        """Path and class of modules and of weights that may compute anything."""
        weights = self.model.named_parameters()
        other = [(path, weight) for path, weight in weights if type(weight) is not nn.Parameter]
        return tuple((path, type(thing)) for path, thing in (*self.foreign, *other))

    def one_of_each_kind(self) -> dict[nn.Module, str]:
        """The first foreign module of each class, and its path; of nested ones the outer."""
        found: dict[type, tuple[nn.Module, str]] = {}
        outer = "\0"
        for path, module in self.foreign:
            if not path.startswith(outer):
                outer = f"{path}."
                found.setdefault(type(module), (module, path))
        return dict(found.values())

    def suspect(self) -> str:
        """For errors: what inside may compute another thing for packed tokens than for padded ones."""
        for path, kind in self.foreign_kinds:
            return f"; {path} is a {name_of(kind)}, which may mix rows or round by the batch"
        return ""

    def is_current(self) -> bool:
        """Whether the model still is as it was when the plan was made."""
        return not self.watch.changed()


def obstacle(model: nn.Module) -> str | None:
    """The first thing about the model that the packed path would not run, whatever its family."""
    if "forward" in model.__dict__:
        return "the model has a forward of its own (offloaded, compiled or wrapped)"
    if any(GLOBAL_HOOKS):
        return "a hook on all modules"
    for path, module in model.named_modules():
        if path and (reason := _obstacle_of(module)):
            return f"{path} {reason}"
        if vars(module.__dict__.get("config", model.config)) != vars(model.config):
            return f"{path} has a config of its own"
    kinds = {model.original, *(type(m) for m in model.modules() if m is not model)}
    for kind in kinds:
        if _is_stock(kind.__module__) and not _is_stock_function(kind.forward):
            return f"{kind.__name__}.forward was replaced by {name_of(kind.forward)}"
    names, *attentions = tables_of(model.original)
    for name, function in names.items():
        if isinstance(function, FunctionType) and not _is_stock_function(function):
            return f"{model.original.__module__}.{name} was replaced by {name_of(function)}"
    chosen = model.config._attn_implementation
    if chosen not in _ATTENTIONS:
        return f"attention {chosen!r} is not one of transformers' own"
    for table in attentions:
        if chosen in table and not _is_stock_function(table[chosen]):
            return f"attention {chosen!r} was replaced by {name_of(table[chosen])}"
    return None


def not_stock(model: nn.Module, modules: Iterable[tuple[str, nn.Module]]) -> str | None:
    """The first of these (path, module) whose class is not of the model's own file."""
    stock = model.original.__module__
    for path, module in modules:
        kind = type(module)
        if kind.__module__ != stock:
            return f"{path} is a {name_of(kind)}, not one of {stock}"
    return None


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module runs more than its class's forward."""
    return has_own_forward(module) or any(module.__dict__.get(name) for name in HOOKS)


def has_own_forward(module: nn.Module) -> bool:
    """Whether somebody put another forward on this very module (accelerate does, to offload)."""
    forward = module.__dict__.get("forward")
    # transformers 5.0 leaves the class's own forward behind as an attribute.
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def _obstacle_of(module: nn.Module) -> str | None:
    if has_own_forward(module):
        return "has a forward of its own (offloaded, compiled or wrapped)"
    hooks = (hook for name in HOOKS for hook in module.__dict__[name].values())
    return None if all(map(_is_harmless, hooks)) else "has a hook"


def _is_harmless(hook) -> bool:
    ours = getattr(hook, "__module__", "").startswith("transformers.")
    return ours and hook.__qualname__.rsplit(".", 1)[-1] in _HARMLESS


def _is_stock(module: str) -> bool:
    return module.split(".")[0] in _STOCK


def _is_stock_function(function) -> bool:
    """Whether a function and all that it wraps come from transformers, torch or Python."""
    while function is not None:
        if not _is_stock(getattr(function, "__globals__", {}).get("__name__", "torch")):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def name_of(thing: type | FunctionType) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"

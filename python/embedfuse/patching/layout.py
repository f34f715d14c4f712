"""Layout: a model's layers as the packed forward reads them, or why the original forward has to run."""

import sys
import weakref
from collections.abc import Iterable
from types import BuiltinFunctionType, FunctionType, ModuleType

from torch import Tensor, nn

from embedfuse.nn.decoder import DecoderLayer
from embedfuse.nn.encoder import EncoderLayer
from embedfuse.nn.programs import Programs
from embedfuse.patching.watch import (
    GLOBAL_HOOKS,
    HOOKS,
    ROW_BY_ROW,
    TORCH_FUNCTIONS,
    F,
    Watch,
    differ,
    methods_of,
    tables_of,
)

# Hooks of transformers that the packed forward may ignore: the first only records in calls with
# output_hidden_states, which run on the original forward; the second (gradient checkpointing, PEFT) is
# registered on the word embeddings, which the packed forward calls as a module.
_HARMLESS = ("output_capturing_hook", "make_inputs_require_grads")
# All compute softmax(q k^T scale) v; a name that others registered may compute anything.
_ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_STOCK = {"transformers", "torch", "huggingface_hub", *sys.stdlib_module_names}


class Layout:
    """What the packed forward needs to know of a model, as it was when the layout was made.

    Attributes:
        layers: The layers to run.
        programs: What runs the layers on the CPU in one call.
        refusal: Why the original forward has to run instead; None where the layers may.
        modules: All modules inside the model.
        custom_modules: Path and module of those that are neither of the model's modelling file nor known
            layers of torch and transformers: adapters, quantised layers. They are called as modules.
        loose_tensors: Whether a module has a tensor that is no parameter and no buffer.
        custom_kinds: Path and class of these, and of weights of another class than Parameter.
    """

    def __init__(self, model: nn.Module, buffers: tuple[Tensor, ...]):
        self._model = weakref.ref(model)  # the model refers to the layout
        # First, so that no later change is missed.
        self.watch = Watch(model, model.original, buffers)
        self.layers: list[EncoderLayer] | list[DecoderLayer] = []
        self.programs: Programs | None = None
        self.refusal = obstacle(model)
        named = list(model.named_modules())[1:]
        self.modules = [module for _, module in named]
        self.loose_tensors = any(
            isinstance(value, Tensor) for module in self.modules for value in vars(module).values()
        )
        known = (model.original.__module__, "transformers.activations")
        self.custom_modules = [
            (path, module)
            for path, module in named
            if type(module).__module__ not in known and type(module) not in ROW_BY_ROW
        ]
        weights = [(n, p) for n, p in model.named_parameters() if type(p) is not nn.Parameter]
        custom = (*self.custom_modules, *weights)
        self.custom_kinds = tuple((path, type(thing)) for path, thing in custom)

    def is_of(self, model: nn.Module) -> bool:
        """Whether the layout was made of this model, not of the one that this is a copy of."""
        return self._model() is model

    def is_current(self, model: nn.Module) -> bool:
        """Whether the model is still as it was when the layout was made."""
        return not self.watch.changed(model)

    def one_of_each_kind(self) -> dict[nn.Module, str]:
        """The first custom module of each class, and its path; of nested ones the outer."""
        found: dict[type, tuple[nn.Module, str]] = {}
        outer = "\0"
        for path, module in self.custom_modules:
            if not path.startswith(outer):
                outer = f"{path}."
                found.setdefault(type(module), (module, path))
        return dict(found.values())

    def suspect(self) -> str:
        """For errors: what inside may compute something else for packed tokens than for padded ones."""
        for path, kind in self.custom_kinds:
            return f"; {path} is a {name_of(kind)}, which may mix rows or round by the batch"
        return ""


def obstacle(model: nn.Module) -> str | None:
    """The first thing in the model that the packed forward would not run, whatever the family."""
    if any(GLOBAL_HOOKS):
        return "a hook on all modules"
    inner = [(path, module) for path, module in model.named_modules() if path]
    for path, module in inner:
        if reason := _obstacle_of(module):
            return f"{path} {reason}"
        if type(module).__module__ == model.original.__module__:
            config = vars(module).get("config", model.config)
            if differ([vars(config)], [vars(model.config)]):
                return f"{path} has a config of its own"
            for name, value in vars(module).items():
                if callable(value) and hasattr(type(module), name) and name != "forward":
                    return f"{path} has a {name} of its own"
    if reason := _replaced_method(model.original, {type(module) for _, module in inner}):
        return reason
    return _replaced_function(model)


def _replaced_method(original: type, kinds: set[type]) -> str | None:
    if name_of(nn.Module.__call__) != "torch.nn.modules.module.Module._wrapped_call_impl":
        return f"torch.nn.Module.__call__ was replaced by {name_of(nn.Module.__call__)}"
    for kind in {original, *kinds}:
        if _is_stock(kind.__module__):
            for name, method in methods_of(kind, original).items():
                if not _is_as_written(method, kind):
                    return f"{kind.__name__}.{name} was replaced by {name_of(method)}"
    return None


def _replaced_function(model: nn.Module) -> str | None:
    chosen = model.config._attn_implementation
    if chosen not in _ATTENTIONS:
        return f"attention {chosen!r} is not one of transformers' own"
    (file, names), *registries = tables_of(model.original)
    for name, value in names.items():
        if _is_code(value) and not _is_stock_function(value, name, file):
            return f"{file}.{name} was replaced by {name_of(value)}"
    for registry, table in registries:
        if chosen in table and not _is_stock_function(table[chosen]):
            return f"{registry}[{chosen!r}] was replaced by {name_of(table[chosen])}"
    for name, function in TORCH_FUNCTIONS.items():
        if vars(F)[name] is not function or not _is_stock_function(function):
            return f"torch.nn.functional.{name} was replaced by {name_of(vars(F)[name])}"
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
    return has_own_forward(module) or any(vars(module).get(name) for name in HOOKS)


def has_own_forward(module: nn.Module) -> bool:
    """Whether this module object has another forward than its class (accelerate sets one, to offload)."""
    forward = vars(module).get("forward")
    if forward is None:
        return False
    # transformers 5.0, and tools that undo theirs, leave the class's forward behind as an attribute.
    same = getattr(forward, "__func__", module) is getattr(type(module), "forward", None)
    return not (same and forward.__self__ is module)


def defined_in(library: str, method) -> bool:
    """Whether a function was defined in this library, which a wrapper cannot pretend."""
    return getattr(method, "__globals__", {}).get("__name__", "").split(".")[0] == library


def replaced(thing, library: str, *methods: str) -> str | None:
    """The first of these methods that is not the library's own, on the object or on its class."""
    for name in methods:
        if name in vars(thing) or not defined_in(library, getattr(type(thing), name, None)):
            return name
    return None


def _obstacle_of(module: nn.Module) -> str | None:
    if has_own_forward(module):
        return "has a forward of its own (offloaded, compiled or wrapped)"
    hooks = (hook for name in HOOKS for hook in vars(module).get(name, {}).values())
    return None if all(map(_is_harmless, hooks)) else "has a hook"


def _is_harmless(hook) -> bool:
    stock = getattr(hook, "__module__", "").startswith("transformers.")
    return stock and hook.__qualname__.rsplit(".", 1)[-1] in _HARMLESS


def _is_stock(module: str) -> bool:
    return module.split(".")[0] in _STOCK


# typing_extensions: Python 3.10 has no typing.Unpack.
_NO_CODE = ("transformers", "typing", "typing_extensions", "collections")


def _is_code(value) -> bool:
    """Whether a value of a modelling file is code that a forward may call."""
    if not callable(value) or isinstance(value, (type, ModuleType)):
        return False
    kind = type(value).__module__.split(".")[0]
    return isinstance(value, FunctionType) or kind not in _NO_CODE


def _is_stock_function(function, name: str | None = None, file: str | None = None) -> bool:
    """Whether a function and all that it wraps come from transformers, torch or Python.

    name, file: Where the function was found, in a modelling file; functions of models have to be from there.
    """
    if isinstance(function, BuiltinFunctionType):
        return True
    if not isinstance(function, FunctionType) or name not in (None, function.__name__):
        return False
    model = function.__module__.startswith("transformers.models.")
    if file is not None and model and function.__module__ != file:
        return False
    while function is not None:
        if not _is_stock(getattr(function, "__globals__", {}).get("__name__", "")):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def _is_as_written(method, kind: type) -> bool:
    """Whether a method is the one that was written in its class."""
    if isinstance(method, property):
        return True
    method = getattr(method, "__func__", method)  # of a staticmethod or classmethod
    if isinstance(method, type):
        return True
    inside = getattr(method, "__qualname__", "").startswith(f"{kind.__name__}.")
    return inside and method.__module__ == kind.__module__ and _is_stock_function(method)


def name_of(thing) -> str:
    thing = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{thing.__module__}.{thing.__qualname__}"

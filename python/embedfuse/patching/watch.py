"""Watch: what the forward of a model depends on, and whether any of it has changed."""

import sys
from collections.abc import Iterable, Iterator

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from embedfuse.native import comparison

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = tuple(getattr(torch_module, f"_global{name}") for name in HOOKS)
# The packed forward computes these itself; people replace them (SageAttention's README does).
TORCH_FUNCTIONS = {
    name: vars(F)[name]
    for name in (
        "linear",
        "layer_norm",
        "scaled_dot_product_attention",
        "embedding",
        "gelu",
        "silu",
    )
}
# torch's layers that compute each row from that row alone; its other modules may not.
ROW_BY_ROW = (
    *(nn.Linear, nn.LayerNorm, nn.Dropout, nn.Embedding, nn.ModuleList, nn.Identity),
    *(nn.GELU, nn.SiLU, nn.ReLU, nn.Tanh, nn.Sigmoid),
)


class Watch:
    """What a model's forward depends on, apart from its input and the values of its parameters.

    Watched are

    - the values of the config;
    - of every module inside: its class, children and hooks, and whether it has a forward of its own;
    - of modules of the modelling file: their settings, and the methods of their classes;
    - the names of that file, the tables where it looks up attention and masks, and the functions of torch
      that it calls;
    - the buffers that are asked for.

    All of these are watched whether they are read or not, so that no family can forget one. Not watched is
    what every call reads anyway: settings of torch's layers, parameters, and the training flag. A hook that
    is written into a table by hand, without a handle, is not seen.
    """

    def __init__(self, model: nn.Module, original: type, buffers: tuple[Tensor, ...] = ()):
        inner = list(model.modules())[1:]
        stock = [m for m in inner if type(m).__module__ == original.__module__]
        # No reference to the model itself, which would keep itself alive.
        self._of_model = len(vars(model)), dict(_settings(vars(model)))
        self._handles, self._inner = RemovableHandle.next_id, inner
        self._hooks = self._hook_tables()
        self._hooked = [(table, list(table.values())) for table in self._hooks if table]
        names = [table for _, table in tables_of(original)]
        children = [t for m in (model, *inner) if type(t := m._modules) is dict]
        tables = [*map(vars, inner), *filter(None, children), *names]
        slots = [
            *((vars(m), name, value) for m in stock for name, value in _settings(vars(m))),
            *((vars(m), "forward", vars(m)["forward"]) for m in inner if "forward" in vars(m)),
            *_slots((*children, *(m._buffers for m in (model, *stock)), *names)),
            *((vars(F), name, vars(F)[name]) for name in TORCH_FUNCTIONS),
        ]
        owners, keys, values = zip(*slots, strict=True)
        classes, sizes = tuple(map(type, inner)), tuple(map(len, tables))
        self._objects = tuple(inner), classes, tuple(tables), sizes, owners, keys, values
        self._classes = [vars(kind) for kind in {original, *map(type, stock)}]
        self._class_sizes = list(map(len, self._classes))
        self._methods = [
            (vars(kind), name)
            for kind in (original, nn.Module, *dict.fromkeys(classes))
            for name in methods_of(kind, original)
        ]
        self._code = [table[name] for table, name in self._methods]
        configs = [c for m in (model, *stock) if hasattr(c := vars(m).get("config"), "__dict__")]
        self._configs = [
            vars(c) for c in dict(zip(map(id, configs), configs, strict=True)).values()
        ]
        self._values = list(map(_copied, self._configs))
        self._buffers = [buffer for buffer in buffers if not buffer.is_inference()]
        self._versions = [buffer._version for buffer in self._buffers]

    def changed(self, model: nn.Module) -> bool:
        """Whether the model, from which this was made, is another now."""
        attributes, (size, settings) = vars(model), self._of_model
        return (
            len(attributes) != size
            or any(attributes.get(name, self) is not value for name, value in settings.items())
            or not comparison()(*self._objects)
            or differ(self._configs, self._values)
            or [table.get(name) for table, name in self._methods] != self._code
            or list(map(len, self._classes)) != self._class_sizes
            or [buffer._version for buffer in self._buffers] != self._versions
            or self._hooks_changed()
        )

    def _hooks_changed(self) -> bool:
        # Each new hook gets a handle with the next number: without new numbers there are no new hooks.
        handles = RemovableHandle.next_id
        if handles != self._handles:
            tables = self._hook_tables()
            if any(now is not then for now, then in zip(tables, self._hooks, strict=True)):
                return True
            if sum(map(len, tables)) != sum(len(hooks) for _, hooks in self._hooked):
                return True
            self._handles = handles  # the new hooks are on other models
        return any(list(table.values()) != hooks for table, hooks in self._hooked)

    def _hook_tables(self) -> list[dict]:
        return [
            *GLOBAL_HOOKS,
            *(vars(m).get(name, _NO_HOOKS) for m in self._inner for name in HOOKS),
        ]


_NO_HOOKS: dict = {}


def tables_of(original: type) -> list[tuple[str, dict]]:
    """Where a modelling file looks names up: its own names, attention functions, masks."""
    names = vars(sys.modules[original.__module__])
    found = [(original.__module__, names)]
    masks = sys.modules.get("transformers.masking_utils")  # imported with any model
    masks = getattr(masks, "ALL_MASK_ATTENTION_FUNCTIONS", None)
    for registry in (names.get("ALL_ATTENTION_FUNCTIONS"), masks):
        if hasattr(registry, "_global_mapping"):
            kind = type(registry).__name__
            found += ((kind, registry._global_mapping), (kind, registry._local_mapping))
    return found


def methods_of(kind: type, original: type) -> dict[str, object]:
    """The methods of a class that the packed forward replaces: all of a class of the modelling file, the
    forward of known layers, none of custom modules, which are called."""
    if kind is nn.Module:
        return {"__call__": vars(kind)["__call__"]}
    if kind.__module__ == original.__module__:
        return {n: m for n, m in vars(kind).items() if callable(m) or isinstance(m, _WRAPPED)}
    known = kind in ROW_BY_ROW or kind.__module__ == "transformers.activations"
    return {"forward": vars(kind)["forward"]} if known and "forward" in vars(kind) else {}


_WRAPPED = (staticmethod, classmethod, property)


def differ(values: list[dict], others: list[dict]) -> bool:
    try:
        return values != others
    except (RuntimeError, ValueError):  # tensors and arrays do not compare to one bool
        return True


def _settings(attributes: dict) -> Iterator[tuple[str, object]]:
    """The attributes that say how a module computes."""
    for name, value in attributes.items():
        if not name.startswith("_") and name != "training":
            yield name, value


def _slots(tables: Iterable[dict]) -> Iterator[tuple[dict, str, object]]:
    for table in tables:
        if type(table) is dict:
            for name, value in table.items():
                yield table, name, value


def _copied(value):
    """Containers are copied, because edits in place count too; their other values are not."""
    if type(value) is dict:
        return {name: _copied(item) for name, item in value.items()}
    return [_copied(item) for item in value] if type(value) is list else value

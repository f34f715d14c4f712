"""Watch: what the forward of a model depends on, and whether all of it still is what it was."""

import copy
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from embedfuse import native

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = tuple(getattr(torch_module, f"_global{name}") for name in HOOKS)


class Watch:
    """What a model's forward depends on, beside its input and the values of its parameters.

    Watched are the values of the config; of every module inside its class, its children, its hooks and
    whether it has a forward of its own; the settings of modules of the modelling file; the forwards of their
    classes; the functions of that file, and those that it finds attention in; and the buffers that are
    asked for. All of these, read or not, so that no family can forget one. What a tower looks at in every
    call is not watched: settings of torch's own layers, parameters, and the training flag.
    """

    def __init__(self, model: nn.Module, original: type, buffers: tuple[Tensor, ...] = ()):
        modules = list(model.modules())
        self._handles = RemovableHandle.next_id
        self._hooks = [*GLOBAL_HOOKS, *(m.__dict__[name] for m in modules for name in HOOKS)]
        self._hooked = [(table, list(table.values())) for table in self._hooks if table]
        own = [m for m in modules if type(m).__module__ == original.__module__]
        tables = [
            *(m.__dict__ for m in modules),
            *(m._modules for m in modules if m._modules),
            *tables_of(original),
        ]
        slots = [
            *_slots((m.__dict__ for m in (model, *own)), _is_setting),
            *_slots(m._modules for m in modules),
            *_slots(m._buffers for m in own),
            *_slots(tables_of(original), lambda _, value: isinstance(value, FunctionType)),
        ]
        owners, keys, values = zip(*slots, strict=True)
        classes, sizes = tuple(map(type, modules)), tuple(map(len, tables))
        self._objects = tuple(modules), classes, tuple(tables), sizes, owners, keys, values
        self._kinds = [original, *set(classes[1:])]
        self._forwards = [kind.forward for kind in self._kinds]
        configs = {id(c): c for m in modules if hasattr(c := m.__dict__.get("config"), "__dict__")}
        self._configs = [vars(config) for config in configs.values()]
        self._settings = list(map(_copied, self._configs))
        self._buffers = [buffer for buffer in buffers if not buffer.is_inference()]
        self._versions = [buffer._version for buffer in self._buffers]

    def changed(self) -> bool:
        return (
            not _comparison()(*self._objects)
            or self._configs != self._settings
            or [kind.forward for kind in self._kinds] != self._forwards
            or [buffer._version for buffer in self._buffers] != self._versions
            or self._hooks_changed()
        )

    def _hooks_changed(self) -> bool:
        # torch gives each hook a handle with the next number: without new numbers there are no new hooks.
        handles = RemovableHandle.next_id
        if handles != self._handles:
            if sum(map(len, self._hooks)) != sum(len(hooks) for _, hooks in self._hooked):
                return True
            self._handles = handles  # of hooks elsewhere
        return any(list(table.values()) != hooks for table, hooks in self._hooked)


def _is_setting(name: str, value) -> bool:
    """Whether a module's attribute of this name says how it computes."""
    return not name.startswith("_") and name != "training"


def _slots(
    tables: Iterable[dict], chosen: Callable[[str, object], bool] = lambda name, value: True
) -> Iterator[tuple[dict, str, object]]:
    for table in tables:
        for name, value in table.items():
            if chosen(name, value):
                yield table, name, value


def tables_of(original: type) -> list[dict]:
    """Names of the modelling file and of the attention functions that it chooses from."""
    names = vars(sys.modules[original.__module__])
    attentions = names.get("ALL_ATTENTION_FUNCTIONS")
    if attentions is None:
        return [names]
    return [names, attentions._global_mapping, attentions._local_mapping]


def _copied(settings: dict) -> dict:
    """Containers are copied, because edits in place count too."""
    containers = (list, dict, set)
    return {
        name: copy.deepcopy(value) if isinstance(value, containers) else value
        for name, value in settings.items()
    }


@functools.cache
def _comparison() -> Callable[..., bool]:
    try:
        return native.cpu().unchanged
    except native.Unavailable:
        return _unchanged


def _unchanged(objects, classes, dicts, lengths, owners, keys, values) -> bool:
    """As csrc/bindings/watch.h."""
    return (
        tuple(map(type, objects)) == classes
        and tuple(map(len, dicts)) == lengths
        and all(
            key in owner and owner[key] is value
            for owner, key, value in zip(owners, keys, values, strict=True)
        )
    )

"""The modules and tensors inside a module, and what changes them, without a walk at each call."""

from collections.abc import Callable

from torch import Tensor, nn

from embedfuse.native import comparison, layouts


class ModuleTree:
    """The modules inside a module, as they were: to see that they still are takes a tenth of a walk.

    Attributes:
        modules: All inside.
        tensors: Their parameters and buffers, and those of the module itself.
    """

    def __init__(self, module: nn.Module):
        # No reference to the module itself, which would keep itself alive.
        self._children = module._modules
        self.modules = list(module.modules())[1:]
        members = [(m._modules, m._parameters, m._buffers) for m in (module, *self.modules)]
        tables = [table for tables in members for table in tables]
        slots = [(table, *item) for table in tables for item in table.items()]
        owners, keys, values = zip(*slots, strict=True) if slots else ((), (), ())
        self._as_it_was = (), (), tuple(tables), tuple(map(len, tables)), owners, keys, values
        self.tensors = [
            tensor
            for _, *own in members
            for table in own
            for tensor in table.values()
            if tensor is not None
        ]

    def is_of(self, module: nn.Module) -> bool:
        """Whether these are the modules and tensors of this module, as it is now."""
        return module._modules is self._children and comparison()(*self._as_it_was)


def first_parameter(module: nn.Module) -> nn.Parameter | None:
    """As next(module.parameters(), None), which takes ten times as long."""
    for parameter in module._parameters.values():
        if parameter is not None:
            return parameter
    for inner in module._modules.values():
        if inner is not None and (found := first_parameter(inner)) is not None:
            return found
    return None


def telling_changes(
    fn: Callable[[Tensor], Tensor], changed: Callable[[], None]
) -> Callable[[Tensor], Tensor]:
    """fn, which nn.Module._apply gives every tensor; changed() is called for each that it moves or writes.

    Libraries call to(device) before every batch, which nearly always changes none.
    """

    def told(tensor: Tensor) -> Tensor:
        before = _state(tensor)
        found = fn(tensor)
        if found is not tensor or before is None or _state(tensor) != before:
            changed()
        return found

    return told


def _state(tensor: Tensor) -> tuple | None:
    """Where a tensor is and how often it was written; None where torch does not count that."""
    return None if tensor.is_inference() else (layouts()([tensor]), tensor._version)

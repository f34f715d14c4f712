"""Objects that hold a transformers model: patched together with it."""

import weakref
from abc import abstractmethod

from torch import nn

from embedfuse.patching.families import patched_class_of
from embedfuse.patching.report import Report
from embedfuse.patching.swap import Options, Patched

# In PatchState.cache: the model that install found; the holder may hold another since.
_HELD = "held"


class PatchedWrapper(Patched):
    """Mixin of a patched object that holds a transformers model and has it patched too.

    A holder of a model that was patched before leaves it patched when it is put back.
    """

    @classmethod
    @abstractmethod
    def held(cls, model) -> nn.Module:
        """The transformers model inside. TypeError for what cannot be patched."""

    @classmethod
    @abstractmethod
    def wrap(cls, model, report: Report, options: Options) -> None:
        """swap_in `model`, whose held model is patched, and compare its results before and after."""

    @classmethod
    def install(cls, model, options: Options) -> Report:
        inner = cls.held(model)
        patched_before = isinstance(inner, Patched)
        if patched_before:
            inner.check_options(options)
            report = inner._embedfuse.report
        else:
            report = patched_class_of(inner).install(inner, options)
        try:
            cls.wrap(model, report, options)
        except BaseException:
            if isinstance(model, Patched):
                model.swap_out()
            if not patched_before:
                inner.uninstall()
            raise
        report.original_calls.clear()  # those of the comparison
        model._embedfuse.patched_before = patched_before
        model._embedfuse.cache[_HELD] = weakref.ref(inner)
        return report

    def uninstall(self) -> None:
        held = self._embedfuse.cache.get(_HELD, self.held_now)  # a copy has no cache
        inner = held()
        if isinstance(inner, Patched) and not self._embedfuse.patched_before:
            inner.uninstall()
        self.swap_out()

    def held_now(self) -> nn.Module | None:
        """The model inside; None where it has become one that cannot be patched."""
        try:
            return self.held(self)
        except TypeError:
            return None


def is_of(library: str, method) -> bool:
    """Whether a function is the library's own: no wrapper can copy where it was defined."""
    return getattr(method, "__globals__", {}).get("__name__", "").split(".")[0] == library


def replaced(thing, library: str, *methods: str) -> str | None:
    """The first of these methods that is not the library's own, on the object or on its class."""
    for name in methods:
        if name in vars(thing) or not is_of(library, getattr(type(thing), name, None)):
            return name
    return None

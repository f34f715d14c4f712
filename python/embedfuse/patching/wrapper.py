"""PatchedWrapper: an object of another library around a transformers model, patched together with it."""

import weakref
from abc import abstractmethod
from dataclasses import dataclass, field

from torch import nn

from embedfuse.patching.families import patched_class_of
from embedfuse.patching.report import Report
from embedfuse.patching.swap import Options, Patched, PatchState
from embedfuse.patching.tree import ModuleTree


@dataclass(eq=False)
class WrapperState(PatchState):
    """What a patched wrapper carries too.

    inner: the model that was patched with it; another may have taken its place since. inner_was_patched:
    whether it already was. cache: what an integration builds once for each object.
    """

    inner: weakref.ref | None = None
    inner_was_patched: bool = False
    cache: dict = field(default_factory=dict)


class PatchedWrapper(Patched):
    """Mixin of a patched object around a transformers model, which is patched too.

    A model that was patched before the wrapper stays patched when the wrapper is unpatched.
    """

    state_class = WrapperState
    _embedfuse: WrapperState

    @classmethod
    @abstractmethod
    def inner_model(cls, model) -> nn.Module:
        """The transformers model inside. TypeError for one that cannot be patched."""

    @classmethod
    @abstractmethod
    def wrap(cls, model, report: Report, options: Options) -> None:
        """swap_in `model`, whose inner model is patched, and compare its results before and after."""

    @classmethod
    def install(cls, model, options: Options) -> Report:
        inner = cls.inner_model(model)
        was_patched = isinstance(inner, Patched)
        if was_patched:
            inner.check_options(options)
            report = inner._embedfuse.report
        else:
            report = patched_class_of(inner).install(inner, options)
        try:
            cls.wrap(model, report, options)
        except BaseException:
            if isinstance(model, Patched):
                model.swap_out()
            if not was_patched:
                inner.uninstall()
            raise
        report.original_calls.clear()  # those of the comparison
        model._embedfuse.inner_was_patched = was_patched
        model._embedfuse.inner = weakref.ref(inner)
        return report

    def uninstall(self) -> None:
        state = self._embedfuse
        # A copy's state does not know its inner model.
        inner = self.inner_model_or_none() if state.inner is None else state.inner()
        if isinstance(inner, Patched) and not state.inner_was_patched:
            inner.uninstall()
        self.swap_out()

    def tree_of(self, module: nn.Module) -> ModuleTree:
        """The modules inside `module`: this object, or the module that it wraps."""
        cache = self._embedfuse.cache
        tree = cache.get("tree")
        if tree is None or not tree.is_of(module):
            tree = cache["tree"] = ModuleTree(module)
        return tree

    def inner_model_or_none(self) -> nn.Module | None:
        """The model inside now; None where it is one that cannot be patched."""
        try:
            return self.inner_model(self)
        except TypeError:
            return None

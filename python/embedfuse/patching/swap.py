"""How a live object becomes a patched one: its class is swapped for a subclass of the same name.

A recipe declares `class BertModel(PackedEncoder, modeling_bert.BertModel)`. Name and module are those
of the original, so whatever goes by them (save_pretrained, transformers' own registries) goes on as
before, like hooks, parameters and isinstance. Undoing it is swapping back.
"""

import copyreg
import functools
import threading
from abc import ABCMeta, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from embedfuse.nn.graphs import GraphCache
from embedfuse.nn.prefixes import PrefixCache
from embedfuse.patching.families import patched_class
from embedfuse.patching.layout import Layout
from embedfuse.patching.report import Report

REUSES = ("off", "batch", "stream")


@dataclass(frozen=True)
class Options:
    """What `patch` was asked for; its docstring has the meanings."""

    attention: str | None = None
    reuse_prefixes: str = "batch"

    def __post_init__(self):
        if self.attention not in (None, "bidirectional"):
            raise ValueError(
                f"attention={self.attention!r}: accepted are None, the model's own, and 'bidirectional'"
            )
        if self.reuse_prefixes not in REUSES:
            raise ValueError(
                f"reuse_prefixes={self.reuse_prefixes!r}: accepted are {', '.join(REUSES)}"
            )
        if self.attention == "bidirectional" and self.reuse_prefixes == "stream":
            raise ValueError(
                "reuse_prefixes='stream' with attention='bidirectional', where no prefix has states of its "
                "own; accepted are off and batch"
            )


class PatchedType(ABCMeta):
    """Class of the patched classes: called, one makes a plain object of its original."""

    def __call__(cls, *args, **kwargs):
        return cls.original(*args, **kwargs)


class Patched(metaclass=PatchedType):
    """Mixin of every patched object. `original` is the class that it had."""

    original: type
    _embedfuse: "PatchState"

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "original" in cls.__dict__:
            cls.__module__ = cls.original.__module__

    def __reduce_ex__(self, protocol):
        # Pickle and deepcopy would look for this class under the original's name.
        _, _, *state = super().__reduce_ex__(max(protocol, 2))
        return (_new_patched, (self.original,), *state)

    @classmethod
    @abstractmethod
    def install(cls, model, options: Options) -> Report:
        """Patch `model`, check it, and put everything back if the check fails."""

    @abstractmethod
    def uninstall(self) -> None:
        """Put back what install changed."""

    def check_options(self, options: Options) -> None:
        """Raise ValueError where others are asked for than those that this was patched with."""
        if options not in (Options(), self._embedfuse.options):
            raise ValueError(
                f"model: patched before with {self._embedfuse.options}, now {options}; unpatch it first"
            )

    @classmethod
    def tower(cls, model) -> nn.Module:
        """The model without a head whose states `embed` pools. TypeError where there is none."""
        raise TypeError(
            f"model: {type(model).__name__}; accepted are transformers models without a head, and PEFT "
            "models on one"
        )

    @classmethod
    def swap_in(cls, model, report: Report, options: Options) -> None:
        model._embedfuse = PatchState(report, options)
        model.__class__ = cls

    def swap_out(self) -> None:
        if "original" not in type(self).__dict__:
            raise ValueError(
                f"model: its class is {type(self).__qualname__} now; undo first what changed it since it "
                "was patched"
            )
        self.__class__ = self.original
        del self._embedfuse


def outlives_patch(method: Callable) -> Callable:
    """A patched class's method that tools may have kept, as accelerate keeps `model.forward` when it wraps
    it: once the object is put back, it is the original's."""

    @functools.wraps(method)
    def call(self, *args, **kwargs):
        if not isinstance(self, Patched):
            return getattr(type(self), method.__name__)(self, *args, **kwargs)
        return method(self, *args, **kwargs)

    return call


def _new_patched(original: type) -> Patched:
    model = original.__new__(original)
    model.__class__ = patched_class(original)
    return model


def _reduced_class(cls: PatchedType):
    # Under its name stands the original.
    return (patched_class, (cls.original,)) if "original" in cls.__dict__ else cls.__qualname__


copyreg.pickle(PatchedType, _reduced_class)


class PatchState:
    """What a patched model carries. Copies and pickles take report and options, no layout, cache or graph."""

    def __init__(self, report: Report, options: Options):
        self.report = report
        self.options = options
        self.layout: Layout | None = None
        # Classes of foreign modules that the self-check has passed with, and failed with, for what reason.
        self.trusted: tuple = ()
        self.distrusted: dict[tuple, str] = {}
        self.prefixes = PrefixCache()
        self.graphs = GraphCache()
        self.cache: dict = {}  # what an integration builds once per object
        self.patched_before = False  # of a holder: whether the model inside was
        self.lock = threading.RLock()  # the self-check of a new layout runs the model

    def __getstate__(self):
        return {"report": self.report.without_calls(), "options": self.options}

    def __setstate__(self, state):
        self.__init__(**state)

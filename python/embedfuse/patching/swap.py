"""How a live object is patched: its class is swapped for a subclass of the same name.

A patched class is `class BertModel(PackedEncoder, modeling_bert.BertModel)`. Name and module are those of
the original, so code that reads them (save_pretrained, transformers' registries) works as before, and so do
hooks, parameters and isinstance. To unpatch is to swap the class back.
"""

import copyreg
import functools
from abc import ABCMeta, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass

from torch import nn

from embedfuse.patching.families import patched_class
from embedfuse.patching.report import Report

REUSES = ("off", "batch", "stream")


@dataclass(frozen=True)
class Options:
    """The options of `patch`; its docstring has the meanings."""

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

    def unlike(self, other: "Options") -> str:
        """The options that have another value in `other`, as they stand in a call of `patch`."""
        mine, theirs = asdict(self), asdict(other)
        return ", ".join(f"{name}={mine[name]!r}" for name in mine if mine[name] != theirs[name])


@dataclass(eq=False)
class PatchState:
    """What every patched object carries. Copies and pickles get report and options, and nothing else."""

    report: Report
    options: Options

    def __getstate__(self):
        return {"report": self.report.without_calls(), "options": self.options}

    def __setstate__(self, state):
        self.__init__(**state)


class PatchedType(ABCMeta):
    """Class of the patched classes: to call one makes an object of its original."""

    def __call__(cls, *args, **kwargs):
        return cls.original(*args, **kwargs)


class Patched(metaclass=PatchedType):
    """Mixin of every patched object. original: the class that it had."""

    original: type
    state_class: type[PatchState] = PatchState
    _embedfuse: PatchState

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "original" in cls.__dict__:
            cls.__module__ = cls.original.__module__

    def __reduce_ex__(self, protocol):
        # Pickle and deepcopy look a class up by its name, which is the original's.
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
        """Raise ValueError for other options than those that this was patched with."""
        before = self._embedfuse.options
        if options not in (Options(), before):
            raise ValueError(
                f"{options.unlike(before)}: this {type(self).__name__} was patched with "
                f"{before.unlike(options)}; to change that, call embedfuse.unpatch on it and patch it again"
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
        model._embedfuse = cls.state_class(report, options)
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
    """Make a patched class's method the original's once the object is unpatched.

    Tools may have kept the method, as accelerate keeps `model.forward` when it wraps it.
    """

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
    # By its name the original would be found.
    return (patched_class, (cls.original,)) if "original" in cls.__dict__ else cls.__qualname__


copyreg.pickle(PatchedType, _reduced_class)

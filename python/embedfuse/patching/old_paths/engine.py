"""Old path of embedfuse.patching.swap, for models that 0.1 pickled."""

import functools

from embedfuse.deprecation import warn_moved
from embedfuse.patching import swap
from embedfuse.patching.swap import Options  # noqa: F401

warn_moved(__name__, "embedfuse.patching.swap")


class PatchState:
    """The state of every patched object in 0.1: report and options."""


def _new_patched(original: type) -> swap.Patched:
    model = swap._new_patched(original)
    # On the object, so that pickle calls it in place of the class's.
    vars(model)["__setstate__"] = functools.partial(_set_state, model)
    return model


def _set_state(model: swap.Patched, state: dict) -> None:
    del vars(model)["__setstate__"]
    old = state["_embedfuse"]
    state["_embedfuse"] = model.state_class(old.report, old.options)
    if hasattr(model, "__setstate__"):  # modules have one
        model.__setstate__(state)
    else:
        vars(model).update(state)

"""Stamp: which weights a kept result belongs to, and what was written into them."""

import functools
import itertools
import weakref

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from embedfuse.native import layouts

_steps = itertools.count()
_last_step = -1


@functools.cache
def _count_steps() -> None:
    def count(*args) -> None:
        global _last_step
        _last_step = next(_steps)

    register_optimizer_step_post_hook(count)


class Stamp:
    """Equal for the same objects at the same addresses, written as often.

    Fused optimisers write without counting, so the steps of all optimisers count, from the first stamp on.
    """

    def __init__(self, tensors: list[Tensor]):
        _count_steps()
        self._tensors = [weakref.ref(t) for t in tensors]
        self._state = layouts()(tensors), [t._version for t in tensors], _last_step

    def __eq__(self, other) -> bool:
        if not isinstance(other, Stamp) or self._state != other._state:
            return False
        pairs = zip(self._tensors, other._tensors, strict=True)
        return all(a() is not None and a() is b() for a, b in pairs)

    __hash__ = None  # type: ignore[assignment]

"""Launches without Triton's look-up, which takes ten times as long as handing the kernel to the driver.

Triton compiles a kernel for the dtypes of its arguments, for pointers and integers that are multiples of 16,
and for integers that are 1, and looks all of that up in each call. Here the integers of a launch are given
once (`prepared` compares them exactly), so that a call compares its pointers alone.
"""

import functools
from collections.abc import Callable, Sequence

from torch import Tensor

_caches: list[Callable] = []


def prepared(function: Callable) -> Callable:
    """The function of a launcher that makes its Launch from the device, the dtype and all numbers.

    Called again with the same values, of the same types, it gives the same Launch.
    """
    cached = functools.lru_cache(maxsize=4096, typed=True)(function)
    _caches.append(cached.cache_clear)
    return cached


def forget() -> None:
    """Make every Launch anew: the kernels or their configs are others."""
    for clear in _caches:
        clear()


def kinds(tensors: Sequence[Tensor | None], addresses: Sequence[int | None]) -> tuple:
    """What Triton compiles for of these pointers."""
    return tuple(
        [
            None if tensor is None else (tensor.dtype, address % 16)
            for tensor, address in zip(tensors, addresses, strict=True)
        ]
    )


class Launch:
    """A kernel with all arguments but its pointers, and integers that it does not specialise on.

    Args:
        kernel: made by triton.jit. Its parameters are the pointers, those integers, `fixed`, and constants.
        columns: programs along the grid's second axis.
        fixed: arguments that stay the same.
        options: the constants, and options of the compiler, by name.
    """

    def __init__(self, kernel, columns: int, *fixed, **options):
        self.kernel, self.columns, self.fixed, self.options = kernel, columns, fixed, options
        self._direct: dict[tuple, Callable] = {}

    def __call__(self, rows: int, *tensors: Tensor | None, numbers: tuple[int, ...] = ()) -> None:
        """Launch `rows` times `columns` programs on the current device, which is that of the tensors."""
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        key = (kinds(tensors, addresses), widths(numbers))
        direct = self._direct.get(key)
        if direct is not None:
            direct((rows, self.columns, 1), *addresses, *numbers)
            return
        direct = self.by_look_up(rows, *tensors, numbers=numbers)
        if direct is not None:
            self._direct[key] = direct

    def by_look_up(
        self, rows: int, *tensors: Tensor | None, numbers: tuple[int, ...] = ()
    ) -> Callable | None:
        """Launch by Triton's own look-up.

        Returns:
            What launches on pointers of the same `kinds` and numbers of the same `widths` without it, called
            with the grid, addresses and numbers. None where Triton compiles nothing, as in its interpreter.
        """
        grid = rows, self.columns, 1
        compiled = self.kernel[grid](*tensors, *numbers, *self.fixed, **self.options)
        if compiled is None:
            return None
        names = self.kernel.arg_names[len(tensors) + len(numbers) + len(self.fixed) :]
        rest = *self.fixed, *(self.options[name] for name in names)

        def direct(grid: tuple[int, int, int], *arguments: int | None) -> None:
            compiled[grid](*arguments, *rest)

        return direct


def widths(numbers: tuple[int, ...]) -> tuple[int, ...]:
    """0 and -1 for 32 bits, anything else for 64."""
    return tuple([number >> 31 for number in numbers])

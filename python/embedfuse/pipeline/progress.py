"""A progress bar, where one is asked for."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from tqdm.std import tqdm


@contextlib.contextmanager
def progress(
    kind: type[tqdm], shown: bool, total: int | None, **options: Any
) -> Iterator[Callable[[int], object]]:
    """The `update` of a new bar. Where none is shown none is made: that takes as long as tokenising a query.

    Args:
        kind: tqdm's class.
        shown: whether to show the bar.
        total: how many steps there will be; None if unknown.
        options: further arguments of `kind`.
    """
    if not shown:
        yield lambda steps: None
        return
    with kind(total=total, **options) as bar:
        yield bar.update

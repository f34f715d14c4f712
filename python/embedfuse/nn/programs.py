"""The programs of a tower: which one a call takes, recorded when it is first needed."""

from collections.abc import Callable

import torch
from torch import Tensor

from embedfuse.nn.program import Program, Unfit, runs_triton
from embedfuse.ops.linear import most_rows
from embedfuse.ops.varlen_attention import OP as VARLEN
from embedfuse.registry import forced_backend, nothing_looks


class Programs:
    """The programs of a tower, recorded when a call first needs one.

    Args:
        record: makes the calls of a program, given it and whether only picked rows are wanted; raises Unfit.
        tell: is told of each program that is made why it does not hold the layers, or None.
    """

    def __init__(self, record: Callable[[Program, bool], None], tell: Callable[[str | None], None]):
        self._record, self._tell = record, tell
        self._recorded: dict[tuple, Program] = {}

    def for_call(self, weight: Tensor, tokens: int, picked: bool) -> Program | None:
        """The program for so many tokens, by a weight of the model; None where the ops or modules run."""
        if not kernels_run(weight, tokens):
            return None
        key = weight.dtype, weight.device, picked, forced_backend()
        program = self._recorded.get(key)
        if program is None or not program.is_current():
            # Those of another dtype or pooling would keep the old weights alive.
            current = {k: p for k, p in self._recorded.items() if p.is_current()}
            program = current[key] = self._make(*key[:3])
            self._recorded = current
        return program if program.refusal is None else None

    def _make(self, dtype: torch.dtype, device: torch.device, picked: bool) -> Program:
        program = Program(dtype, device)
        try:
            self._record(program, picked)
        except Unfit as unfit:
            program.refusal = str(unfit)
        self._tell(program.refusal)
        program.finish()
        return program


def kernels_run(weight: Tensor, tokens: int) -> bool:
    """Whether every op of a tower would run its kernel, unseen by torch's dispatcher.

    Modes of torch (a FLOP counter, fake tensors) look at each op, so they get them.
    """
    if runs_triton(weight.device):
        runs = VARLEN.accelerates(weight) and forced_backend() in (None, "triton")
    else:
        fits = weight.is_cpu and tokens <= most_rows(weight.dtype)
        runs = fits and forced_backend() in (None, "cpp")
    return (
        runs
        and tokens > 0
        and nothing_looks()
        and not torch.is_autocast_enabled(weight.device.type)
    )

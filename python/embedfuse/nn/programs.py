"""The programs of a tower: which one a call takes, recorded when it is first needed."""

from collections.abc import Callable

import torch
from torch import Tensor

from embedfuse.nn.linear import autocasts
from embedfuse.nn.program import Program, Unfit, runs_triton
from embedfuse.ops.linear import most_rows
from embedfuse.ops.varlen_attention import OP as VARLEN
from embedfuse.registry import forced_backend, nothing_looks, profiles


class Programs:
    """The programs of a tower, recorded when a call first needs one.

    Args:
        record: makes the calls of a program, given it and whether only picked rows are wanted; raises Unfit.
        tell: is told at each call why no program runs, or None where one does.
    """

    def __init__(self, record: Callable[[Program, bool], None], tell: Callable[[str | None], None]):
        self._record, self._tell = record, tell
        self._recorded: dict[tuple, Program] = {}

    def for_call(self, weight: Tensor, tokens: int, picked: bool) -> Program | None:
        """The program for so many tokens, by a weight of the model; None where the ops or modules run."""
        if not kernels_run(weight, tokens):
            if reason := kernels_refusal(weight):
                self._tell(reason)
            return None
        key = weight.dtype, weight.device, picked, forced_backend()
        program = self._recorded.get(key)
        if program is None or not program.is_current():
            # Those of another dtype or pooling would keep the old weights alive.
            current = {k: p for k, p in self._recorded.items() if p.is_current()}
            program = current[key] = self._make(*key[:3])
            self._recorded = current
        self._tell(program.refusal)
        return program if program.refusal is None else None

    def _make(self, dtype: torch.dtype, device: torch.device, picked: bool) -> Program:
        program = Program(dtype, device)
        try:
            self._record(program, picked)
        except Unfit as unfit:
            program.refusal = str(unfit)
        program.finish()
        return program


def kernels_refusal(weight: Tensor) -> str | None:
    """Why the ops of a tower do not run their kernels on such weights; None if they do."""
    device, forced = weight.device.type, forced_backend()
    on_triton = runs_triton(weight.device)
    if autocasts(weight):
        return f"autocast is on for {device}"
    if forced not in (None, "triton" if on_triton else "cpp"):
        return f"backend {forced!r} was asked for"
    # most_rows knows it sooner.
    if not (VARLEN.accelerates(weight) if on_triton else weight.is_cpu and most_rows(weight.dtype)):
        return f"no kernel for {weight.dtype} on {device} that is faster than torch"
    return None


def kernels_run(weight: Tensor, tokens: int) -> bool:
    """Whether every op of a tower would run its kernel, unseen by torch's dispatcher.

    Modes of torch (a FLOP counter, fake tensors) look at each op, so they get them; so does a profiler, which
    sees the launches on a GPU but not into a native call.
    """
    unseen = nothing_looks() and (runs_triton(weight.device) or not profiles())
    fits = runs_triton(weight.device) or tokens <= most_rows(weight.dtype)
    return fits and tokens > 0 and unseen and kernels_refusal(weight) is None

"""Report: what patching did to a model, and which calls ran on the original code."""

import logging
from collections import Counter
from dataclasses import dataclass, field, replace

logger = logging.getLogger("embedfuse")


class PatchError(RuntimeError):
    """The model could not be patched, or the patched forward disagreed. The model is as before."""


@dataclass
class Report:
    """What patching did to a model, what it could not do and why, and what that costs.

    Attributes:
        model: Class of the patched model.
        fused: What runs fused.
        refused: Parts that stay on the original code, and why: "forward", where every call runs on the
            original forward, or "pooling", where the modules of a SentenceTransformer run one by one.
        repaired: What gave wrong vectors before, and why; the vectors are not those of the unpatched model.
        unrepaired: What may give wrong vectors and could not be repaired, and why.
        deviations: max |patched row - original row| / max |original row| of each output in the self-check.
        layers: Whether inference runs all layers as one call, or why op by op, which takes the host longer.
        graphs: How many CUDA graphs run small batches, or why there are none.
        memory_bytes: Parameter memory after patching minus before.
        original_calls: How many calls ran on the original code since patching, by reason.
    """

    model: str
    fused: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    repaired: dict[str, str] = field(default_factory=dict)
    unrepaired: dict[str, str] = field(default_factory=dict)
    deviations: dict[str, float] = field(default_factory=dict)
    layers: str = "no inference has come"
    graphs: str = "none: no batch has come"
    memory_bytes: int = 0
    original_calls: Counter = field(default_factory=Counter)

    def original(self, reason: str) -> None:
        """Count a call that runs on the original code; log it the first time."""
        if reason not in self.original_calls:
            logger.warning("%s: this call runs on the original code: %s", self.model, reason)
        self.original_calls[reason] += 1

    def one_call(self, refusal: str | None) -> None:
        """Whether inference runs the layers as one call: None, or why not."""
        self.layers = "one call" if refusal is None else f"op by op: {refusal}"

    def without_calls(self) -> "Report":
        """As before any call: a copy counts its own, and a hash of the model does not change by calls."""
        return replace(self, original_calls=Counter(), layers=Report.layers, graphs=Report.graphs)

    def __setstate__(self, state):
        vars(self).update({"unrepaired": {}, **state})  # reports of 0.1 have no unrepaired

    def __str__(self) -> str:
        lines = [f"{self.model}: patched"]
        lines += [f"  fused         {what}" for what in self.fused]
        lines += [f"  not fused     {what}: {why}" for what, why in self.refused.items()]
        lines += [f"  repaired      {what}: {why}" for what, why in self.repaired.items()]
        lines += [f"  not repaired  {what}: {why}" for what, why in self.unrepaired.items()]
        lines += [
            f"  checked       {name}: largest deviation {value:.1e} of its longest row"
            for name, value in self.deviations.items()
        ]
        lines.append(f"  layers        {self.layers}")
        lines.append(f"  CUDA graphs   {self.graphs}")
        lines.append(f"  memory        {self.memory_bytes:+,} bytes")
        lines += [
            f"  {n} {'call' if n == 1 else 'calls'} on the original code: {reason}"
            for reason, n in self.original_calls.items()
        ]
        return "\n".join(lines)

"""What patching did to a model, and what it left to the original code."""

import logging
from collections import Counter
from dataclasses import dataclass, field, replace

logger = logging.getLogger("embedfuse")


class PatchError(RuntimeError):
    """The model could not be patched, or the patched forward disagreed; the model is as before."""


@dataclass
class Report:
    """What was fused, what was refused and why, and what it costs.

    repaired: what gave wrong vectors before, and why; these are not the vectors of the unpatched model.
    deviations: largest |patched row - original row| / largest |original row| of each output on the probe.
    graphs: how many CUDA graphs serve small batches, or why none does.
    memory_bytes: parameter memory after patching minus before.
    original_calls: calls served by the original forward since patching, by reason.
    """

    model: str
    fused: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    repaired: dict[str, str] = field(default_factory=dict)
    deviations: dict[str, float] = field(default_factory=dict)
    graphs: str = "none: no batch has come"
    memory_bytes: int = 0
    original_calls: Counter = field(default_factory=Counter)

    def original(self, reason: str) -> None:
        """Count a call that goes to the original forward; say so the first time."""
        if reason not in self.original_calls:
            logger.warning("%s: the original forward serves this call: %s", self.model, reason)
        self.original_calls[reason] += 1

    def without_calls(self) -> "Report":
        """As before any call: a copy counts its own, and a hash of the model stays what it is."""
        return replace(self, original_calls=Counter(), graphs=Report.graphs)

    def __str__(self) -> str:
        lines = [f"{self.model}: patched"]
        lines += [f"  fused    {what}" for what in self.fused]
        lines += [f"  refused  {what}: {why}" for what, why in self.refused.items()]
        lines += [f"  repaired {what}: {why}" for what, why in self.repaired.items()]
        lines += [
            f"  checked  {name}: largest deviation {value:.1e} of its longest row"
            for name, value in self.deviations.items()
        ]
        lines.append(f"  graphs   {self.graphs}")
        lines.append(f"  memory   {self.memory_bytes:+,} bytes")
        lines += [
            f"  original forward served {n} calls: {reason}"
            for reason, n in self.original_calls.items()
        ]
        return "\n".join(lines)

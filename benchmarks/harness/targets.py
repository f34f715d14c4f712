"""Targets of whole models and kernels on one H100, and the limits of that GPU.

Absolute numbers apply to this GPU only: reports of other devices leave the targets out.
"""

from dataclasses import dataclass

DEVICE = "H100"
RATES = ("tokens/s", "docs/s", "x")  # higher is better; of times lower is


@dataclass(frozen=True)
class Target:
    """One row.

    Attributes:
        unit: Of `floor` and `target`.
        floor: The limit: the operations over the measured matrix rate (798 TFLOP/s in bf16) or the bytes
            over the bandwidth (3.0 TB/s), whichever takes longer.
        target: What this project wants to reach.
        published: The best figure found elsewhere.
    """

    unit: str
    floor: float | None
    target: float
    published: str = ""

    def reached(self, value: float) -> float:
        """Share of the target; from 1 on it is met."""
        return value / self.target if self.unit in RATES else self.target / value


TARGETS = {
    # Whole models.
    "BGE-M3, 512-token docs": Target("docs/s", 2388, 1750, "vLLM about 2,970, length not stated"),
    "BGE-M3, 512-token docs, all three outputs on the host": Target("docs/s", 1780, 1600),
    "BGE-M3, 10-500-token docs": Target("docs/s", 5900, 5300),
    "BGE-M3, one 32-token query on the GPU": Target("ms", 0.20, 0.6),
    "BGE-M3, one 32-token query end to end": Target("ms", 0.20, 1.0, "m3serve on A10G/T4 17-19"),
    "E5-mistral-7B, 512-token docs": Target("tokens/s", 58_500, 52_000, "BEI 47,500, vLLM 36,600"),
    "E5-mistral-7B, 512-token docs, FP8": Target("tokens/s", 93_000, 84_000, "BEI 77,100"),
    "E5-mistral-7B, one 32-token query on the GPU": Target("ms", 4.65, 5.3),
    "E5-mistral-7B, one 32-token query on the GPU, FP8": Target("ms", 2.33, 2.9),
    "E5-mistral-7B, 64 queries with a 27-token instruction": Target("x", 2.7, 2.3, "RadixMLP 1.4-1.6"),
    "BERT-base, 512-token docs": Target("tokens/s", 4.2e6, 2.6e6, "Arctic Inference on H200 1,640,000"),
    # Kernels.
    "MaxSim 1x32, 1,000x300, d=128, bf16": Target("µs", 25.6, 36, "late-interaction-kernels 63"),
    "MaxSim 1x32, 10,000x300, d=128, bf16": Target("µs", 256, 256, "late-interaction-kernels 245"),
    "MaxSim 1x32, 10,000x300, d=128, int8": Target("µs", 128, 150),
    "MaxSim 1x32, 1,000x300, d=1024, bf16": Target("µs", 205, 260),
    "MaxSim 128x32, 128x300, d=128, bf16, forward": Target("µs", 50, 90, "late-interaction-kernels 213"),
    "MaxSim 128x32, 128x300, d=128, bf16, forward + backward": Target(
        "µs", 100, 220, "late-interaction-kernels about 580"
    ),
    "InfoNCE 4,096 x 131,072, d=1024, bf16": Target("ms", 4.1, 6.9, "Liger on H200 10.8"),
    "InfoNCE 65,536 x 65,536, d=768, bf16": Target("ms", 33.1, 45),
    "InfoNCE 8,192 x 1,048,576, d=1024, bf16": Target("ms", 66, 110),
    "InfoNCE 8,192 x 1,048,576, d=1024, bf16, frozen": Target("ms", 44, 58),
    "SigLIP 65,536 x 65,536, d=768, bf16": Target("ms", 33.1, 45, "siglip-kernel 48.8"),
    "sparse scatter 32x512, V=250,002, dense": Target("µs", 5.3, 12, "FlagEmbedding about 8,000"),
    "sparse scatter 32x512, V=250,002, CSR": Target("µs", None, 8),
    "pool + normalize 64x512x4096, last, bf16": Target("µs", None, 5),
}  # fmt: skip


def of(device: str) -> dict[str, Target]:
    """Target of each row, by the name of the device; empty for devices without targets."""
    return TARGETS if DEVICE in device else {}

"""The first stage: puts the package in place, says what this machine has, and measures its ceilings.

python -m benchmarks.gpu.machine FOLDER    # writes machine.txt and doctor.json there
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu import modules
from benchmarks.gpu.run import NO_GPU
from benchmarks.harness.rehearsal import REHEARSAL

ASKED = ("driver_version", "clocks.sm", "clocks.max.sm", "power.limit", "temperature.gpu")


def main() -> int:
    lines, path = [], Path(sys.argv[1])

    def show(line: str) -> None:
        lines.append(line)
        (path / "machine.txt").write_text("".join(f"- {line}\n" for line in lines))

    if reason := unusable():  # first: to build for no GPU takes longer than this stage has
        show(f"no GPU: {reason}")
        if not REHEARSAL:
            return NO_GPU
    for line in modules.put_in_place():
        show(line)
    from embedfuse.cli import doctor  # of the package that is in place now

    facts = doctor.collect()
    (path / "doctor.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(doctor.as_text(facts), flush=True)
    show(f"versions: {', '.join(f'{name} {v}' for name, v in facts['versions'].items())}")
    show(f"GPU: {facts['gpu']}")
    show(f"nvidia-smi, {', '.join(ASKED)}: {nvidia_smi()}")
    for line in ceilings():
        show(line)
    return 0


def nvidia_smi() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "absent"
    command = [tool, f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def unusable() -> str | None:
    import torch

    from embedfuse import native

    try:
        native.require_gpu()
        torch.ones(1, device="cuda").add(1).item()
    except (native.Unavailable, RuntimeError) as error:
        return str(error)
    return None


def ceilings() -> list[str]:
    import torch

    from benchmarks.harness import peaks
    from benchmarks.harness.timing import DEVICE

    found = peaks.measure(DEVICE)
    rates = (
        f"{str(dtype)[6:]} GEMM {rate / 1e12:.4g} TFLOP/s" for dtype, rate in found.flops.items()
    )
    return [f"torch {torch.__version__}, CUDA {torch.version.cuda}",
            f"ceilings: copy {found.bandwidth / 1e12:.4g} TB/s, {', '.join(rates)}"]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())

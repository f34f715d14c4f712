"""`embedfuse bench report`, `aot` and `tune` of 0.1, which work in a clone until 0.3."""

import subprocess
import sys
from collections.abc import Sequence

MOVED = ("report", "aot", "tune")


def run_moved(argv: Sequence[str]) -> int:
    new = f"python -m benchmarks {argv[0]}"
    print(
        f"embedfuse bench {argv[0]} has moved to {new}; the old command is removed in 0.3",
        file=sys.stderr,
    )
    return subprocess.call([sys.executable, "-m", "benchmarks", *argv])

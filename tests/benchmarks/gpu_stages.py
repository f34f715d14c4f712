"""Stages that stand for those of `make gpu`: sound, hanging, crashing and red ones."""

import sys

from benchmarks.gpu.stages import Stage

HANG = """
import pathlib, subprocess, sys
child = subprocess.Popen(["sleep", "60"])
pathlib.Path(sys.argv[1], "pid").write_text(str(child.pid))
child.wait()
"""


def stage(name: str, share: float | None, *codes: str) -> Stage:
    def commands(work, seconds):
        return [[sys.executable, "-c", code, str(work)] for code in codes]

    return Stage(name, share, commands, lambda work: f"table of {name}")


WRITE = "import sys, pathlib; pathlib.Path(sys.argv[1], 'written.txt').write_text('figures')"
PLAN = [
    stage("sound", 0.2, WRITE),
    stage("hangs", 0.1, HANG, "raise SystemExit('never')"),
    stage("crashes", 0.2, "import os; os._exit(11)"),
    stage("red", 0.2, "raise SystemExit(1)"),
    stage("last", None, "print('still here')"),
]

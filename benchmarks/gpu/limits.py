"""Commands that end in time: at its limit a command is killed with everything that it started."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
KILLED = -signal.SIGKILL


def run_limited(command: list[str], log: Path, seconds: float, environment: dict[str, str]) -> int:
    """Run a command, its output appended to `log`.

    Args:
        command: Program and arguments.
        log: File of its output.
        seconds: After these it is killed.
        environment: Variables, in addition to those of this process.

    Returns:
        Its exit status; KILLED at the limit.
    """
    with log.open("a") as output:
        output.write(f"$ {' '.join(command)}\n")
        output.flush()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        try:
            return process.wait(max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            return KILLED
        finally:
            kill(process)  # also what a command that ended has left running


def kill(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        print(f"process {process.pid} does not end: it waits in the driver", flush=True)


def end_on_signals() -> None:
    """On SIGTERM raise SystemExit, so that what runs is killed and what is open is written."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

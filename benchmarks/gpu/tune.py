"""Times the candidates of each tunable Triton kernel on this GPU, and stores the best of each shape.

    python -m benchmarks tune                                    # triton_kernels/configs/<chip>.json
    python -m benchmarks tune --kernel pool_normalize --budget 300
    python -m benchmarks tune --headline --budget 80    # the kernels that headline rows wait for, as in them

Each kernel module lists candidates (a tuned.Tunable) and the calls to tune for (`tuning_calls`). A config
that spills, does not fit the chip or gives values outside the bound of embedfuse.testing is not timed.
Launchers read the results; they never time anything.
"""

import itertools
import os
import sys
import time
from pathlib import Path

import torch

from benchmarks.gpu.search import search
from benchmarks.harness.rehearsal import REHEARSAL, size
from benchmarks.harness.timing import DEVICE
from embedfuse.triton_kernels import tuned

FOLDER = Path(__file__).parents[2] / "triton_kernels" / "configs"


def add_arguments(parser) -> None:
    parser.add_argument(
        "--kernel", nargs="+", metavar="NAME", help="default: all that can be tuned"
    )
    parser.add_argument(
        "--headline", action="store_true", help="MaxSim and InfoNCE as in the headline rows"
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of <chip>.json")
    parser.add_argument(
        "--budget", type=float, default=1800, help="seconds in all, divided among the calls"
    )


COMPILING = 0.4  # of the budget


def run(args) -> int:
    if not torch.cuda.is_available() and not REHEARSAL:
        print(
            "python -m benchmarks tune: times kernels on a GPU, and torch sees none",
            file=sys.stderr,
        )
        return 1
    if REHEARSAL:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
    from benchmarks.gpu.calls import HEADLINE, attempt, calls, header, headline_calls
    from benchmarks.gpu.precompile import precompile

    end = time.monotonic() + args.budget
    tuned.import_kernels()
    if unknown := set(args.kernel or ()) - set(tuned.TUNABLES):
        known = ", ".join(tuned.TUNABLES)
        print(f"--kernel {', '.join(unknown)}: accepted are {known}", file=sys.stderr)
        return 1
    kernels = args.kernel or (HEADLINE if args.headline else list(tuned.TUNABLES))
    chip = (
        "sm_90" if REHEARSAL else tuned.chip_of(torch.device("cuda", torch.cuda.current_device()))
    )
    path = args.out / f"{chip}.json"
    document = opened(path, header(path.stem))
    if args.headline:
        print(precompile(COMPILING * args.budget, most=size(None, 2)), file=sys.stderr)
        step = size(1, 4)  # a rehearsal takes a few
        count = len(range(0, sum(1 for _ in headline_calls("meta", full=False)), step))
        chosen = itertools.islice(headline_calls(DEVICE, full=not REHEARSAL), 0, None, step)
    else:
        count = sum(1 for _ in calls("meta", kernels))
        chosen = calls("cuda", kernels)
    failed = search(chosen, count, kernels, attempt, path, document, end - time.monotonic())
    return 1 if failed else 0


def opened(path: Path, header: dict) -> dict:
    """The stored document, or a new one; SystemExit where it was tuned on something else."""
    if not path.exists():
        return {**header, "configs": []}
    document = tuned.load(path)
    before = {key: document[key] for key in header}
    if before != header:
        raise SystemExit(f"{path}: tuned on {before}, this is {header}; remove it or give --out")
    return document

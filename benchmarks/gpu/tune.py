"""Times the candidates of each tunable Triton kernel on the GPU at hand; stores the best of each shape.

    embedfuse bench tune                                   # triton_kernels/configs/<chip>.json
    embedfuse bench tune --kernel pool_normalize --budget 300

Beside each kernel stand its candidates (a tuned.Tunable) and the calls to tune for (`tuning_calls`). What
spills, takes more than the chip has, or gives values outside the bound of the tests is not timed. Launchers
look the results up; they never time anything.
"""

import collections
import functools
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from embedfuse.triton_kernels import tuned
from embedfuse.triton_kernels.tuned import Tunable

from benchmarks.harness.files import write_json

FOLDER = Path(__file__).parents[2] / "triton_kernels" / "configs"


class Rejected(Exception):
    """Why a config cannot be used for a call."""


def add_arguments(parser) -> None:
    parser.add_argument(
        "--kernel", nargs="+", metavar="NAME", help="default: all that can be tuned"
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of <chip>.json")
    parser.add_argument(
        "--budget", type=float, default=1800, help="seconds in all, shared out among the calls"
    )


def run(args) -> int:
    if not torch.cuda.is_available():
        print("embedfuse bench tune: times kernels on a GPU, and torch sees none", file=sys.stderr)
        return 1
    from benchmarks.gpu.run import calls as gpu_calls

    tuned.import_kernels()
    if unknown := set(args.kernel or ()) - set(tuned.TUNABLES):
        known = ", ".join(tuned.TUNABLES)
        print(f"--kernel {', '.join(unknown)}: there are {known}", file=sys.stderr)
        return 1
    kernels = args.kernel or list(tuned.TUNABLES)
    path = args.out / f"{tuned.chip_of(torch.device('cuda', torch.cuda.current_device()))}.json"
    document = opened(path, gpu_calls.header(path.stem))
    calls = gpu_calls.calls("cuda", kernels)
    count = sum(1 for _ in gpu_calls.calls("meta", kernels))
    failed = tune(calls, count, kernels, gpu_calls.attempt, path, document, args.budget)
    return 1 if failed else 0


def opened(path: Path, header: dict) -> dict:
    """What is stored there, to be added to; SystemExit where it was tuned on something else."""
    if not path.exists():
        return {**header, "configs": []}
    document = tuned.load(path)
    before = {key: document[key] for key in header}
    if before != header:
        raise SystemExit(f"{path}: tuned on {before}, this is {header}; remove it or give --out")
    return document


def tune(
    calls: Iterable[Callable],
    count: int,
    kernels: list[str],
    attempt: Callable,
    path: Path,
    document: dict,
    budget: float,
) -> int:
    """Adds to the document, and saves, the best config of each shape that the `count` calls ask one for.

    attempt(call, tunable, config): microseconds, or raises Rejected. Returns how many defaults were rejected.
    """
    end, done, failed = time.monotonic() + budget, set(), 0
    for index, call in enumerate(calls):
        for tunable, dtype, shape in asked(call):
            if tunable.name not in kernels or key(tunable.name, dtype, shape) in done:
                continue
            done.add(key(tunable.name, dtype, shape))
            until = time.monotonic() + (end - time.monotonic()) / (count - index)
            name = f"[{index + 1}/{count}] {tunable.name} {dtype} {shape}"
            measure = functools.partial(attempt, call, tunable)
            try:
                entry, tally = best(tunable, dtype, shape, measure, until)
            except Rejected as reason:
                failed += 1
                print(f"{name}: its default fails: {reason}: {reason.__cause__}", file=sys.stderr)
                continue
            add(document, entry)
            write_json(path, document, "configs")
            us, default_us = entry["us"], entry["default_us"]
            print(f"{name}: {us} us, default {default_us} us; {tally}", file=sys.stderr)
    return failed


def asked(call: Callable) -> list[tuple[Tunable, str, dict]]:
    """(tunable, dtype, shape) of what the call asks a config for, the first time that it asks for each."""
    found = {}

    def note(tunable, dtype, shape):
        found.setdefault(tunable, (tunable, tuned.DTYPES[dtype], shape))
        return tunable.default_config(dtype, **shape)

    with tuned.choosing(note):
        call()
    return list(found.values())


def best(
    tunable: Tunable, dtype: str, shape: dict, attempt: Callable, until: float
) -> tuple[dict, str]:
    """The entry to store, and a word on how it was found. The default is timed whatever the time is."""
    default, *others = tunable.space(getattr(torch, dtype), shape)
    default_us = attempt(default)
    us, config, rejected = default_us, default, collections.Counter()
    tried = 0
    for other in others:
        if time.monotonic() >= until:
            break
        tried += 1
        try:
            other_us = attempt(other)
        except Rejected as reason:
            rejected[str(reason)] += 1
            continue
        if other_us < us:
            us, config = other_us, other
    entry = {"kernel": tunable.name, "dtype": dtype, "shape": shape, "config": config}
    entry |= {"us": round(us, 2), "default_us": round(default_us, 2)}
    reasons = "".join(f", {count} {reason}" for reason, count in rejected.items())
    return entry, f"{tried} of {len(others)} others tried{reasons}"


def add(document: dict, entry: dict) -> None:
    """In place of what is stored for the same kernel, dtype and shape."""
    mine = entry_key(entry)
    others = [other for other in document["configs"] if entry_key(other) != mine]
    document["configs"] = sorted([*others, entry], key=entry_key)


def entry_key(entry: dict) -> tuple:
    return key(entry["kernel"], entry["dtype"], entry["shape"])


def key(kernel: str, dtype: str, shape: dict) -> tuple:
    # Sizes before all else, so that entries are stored in their order.
    items = sorted(
        (k, (type(v) is not int, v if type(v) is int else str(v))) for k, v in shape.items()
    )
    return kernel, dtype, tuple(items)

"""The search for the fastest config of each shape; how a config is timed is passed in."""

import collections
import functools
import random
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from benchmarks.harness.files import write_json
from embedfuse.triton_kernels import tuned
from embedfuse.triton_kernels.tuned import Tunable


class Rejected(Exception):
    """Why a config cannot be used for a call."""


def search(
    calls: Iterable[Callable],
    count: int,
    kernels: list[str],
    attempt: Callable,
    path: Path,
    document: dict,
    budget: float,
) -> int:
    """Find the best config of each shape that the calls ask for, and save it at once.

    Args:
        calls: The calls to tune for.
        count: Their number.
        kernels: Names of the tunables to search.
        attempt: (call, tunable, config) -> microseconds; raises Rejected.
        path: File to save to.
        document: Content of the file; entries are added to it.
        budget: Seconds for all calls; those that remain are divided among the calls that remain.

    Returns:
        The number of default configs that were rejected.
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
                print(f"{name}: default fails: {reason}: {reason.__cause__}", file=sys.stderr)
                continue
            add(document, entry)
            write_json(path, document, "configs")
            us, default_us = entry["us"], entry["default_us"]
            print(f"{name}: {us} us, default {default_us} us; {tally}", file=sys.stderr)
    return failed


def asked(call: Callable) -> list[tuple[Tunable, str, dict]]:
    """(tunable, dtype, shape) of the first config that the call asks for, by tunable."""
    first = {}

    def note(tunable, dtype, shape):
        first.setdefault(tunable, (tunable, tuned.DTYPES[dtype], shape))
        return tunable.default_config(dtype, **shape)

    with tuned.choosing(note):
        call()
    return list(first.values())


def best(
    tunable: Tunable, dtype: str, shape: dict, attempt: Callable, until: float
) -> tuple[dict, str]:
    """The entry to store, and a summary of the search. The default is timed even after `until`."""
    default, *others = ordered(tunable, getattr(torch, dtype), shape)
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


def ordered(tunable: Tunable, dtype: torch.dtype, shape: dict) -> list[dict]:
    """All configs, the default first; the others shuffled, so that a part of them is a sample of all."""
    default, *others = tunable.space(dtype, shape)
    random.Random(0).shuffle(others)
    return [default, *others]


def add(document: dict, entry: dict) -> None:
    """Replaces the stored entry of the same kernel, dtype and shape."""
    new = entry_key(entry)
    others = [other for other in document["configs"] if entry_key(other) != new]
    document["configs"] = sorted([*others, entry], key=entry_key)


def entry_key(entry: dict) -> tuple:
    return key(entry["kernel"], entry["dtype"], entry["shape"])


def key(kernel: str, dtype: str, shape: dict) -> tuple:
    # Integers sort as numbers and before all other values.
    items = sorted(
        (k, (type(v) is not int, v if type(v) is int else str(v))) for k, v in shape.items()
    )
    return kernel, dtype, tuple(items)

"""A kernel's row of a report: embedfuse and its peers, checked, then timed interleaved on a GPU."""

import statistics
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.harness.peaks import Peaks
from benchmarks.harness.record import lost_context, one_line
from benchmarks.harness.targets import TARGETS
from benchmarks.harness.timing import DEVICE, seconds, time_once
from benchmarks.peers.gpu import Peer
from embedfuse.registry import Cost

GROUPS = 3
ROUNDS = 20
SECONDS = 0.25  # of a group; a call that takes longer is timed once


def figures(
    peaks: Peaks,
    flush: Callable,
    row: str,
    ours: Callable,
    cost: Cost,
    peers: dict[str, Peer],
    start: Callable,
    check: Callable,
) -> dict:
    """The figures of a row.

    Args:
        peaks: Limits of this GPU.
        flush: Empties the caches.
        row: A key of `TARGETS`.
        ours: The call of embedfuse.
        cost: What the call must move and compute.
        peers: The peers by name.
        start: From the function of a peer to a call without arguments.
        check: Raises for values that are not those of the row.
    """
    calls, entries = ready(peers, start, check)
    measured = time_interleaved({"embedfuse": ours, **calls}, flush)
    mine = measured.pop("embedfuse")
    for name, theirs in measured.items():
        entries[name] |= theirs | {"speedup": theirs["seconds"] / mine["seconds"]}
    scale = {"µs": 1e6, "ms": 1e3}[TARGETS[row].unit]
    return {
        **mine,
        "wall_seconds": time_once(ours)[0],
        "kernel": row,
        "rows": {row: {"value": mine["seconds"] * scale, "unit": TARGETS[row].unit}},
        "gb_per_s": cost.bytes / mine["seconds"] / 1e9,
        "tflop_per_s": cost.flops / mine["seconds"] / 1e12,
        "percent_of_peak": 100 * peaks.floor(cost, torch.bfloat16) / mine["seconds"],
        "peak_gb_per_s": peaks.bandwidth / 1e9,
        "peak_tflop_per_s": peaks.flops[torch.bfloat16] / 1e12,
        "peers": entries,
    }


def ready(peers: dict[str, Peer], start: Callable, check: Callable) -> tuple[dict, dict]:
    """Calls of the peers whose values pass `check`, and an entry for every peer: its version or a reason."""
    calls, entries = {}, {}
    for name, peer in peers.items():
        try:
            versions = [version(package) for package in peer.packages]
            call = start(peer.function)
            check(call())  # also compiles it
        except PackageNotFoundError as error:
            entries[name] = {"reason": f"not installed: {error.name}"}
        except Exception as error:  # a peer may raise anything; the others are still measured
            if lost := lost_context():
                raise RuntimeError(f"{name} lost the GPU's context: {lost}") from error
            entries[name] = {"reason": one_line(error)}
        else:
            calls[name], entries[name] = call, {"version": " ".join(versions[:1])}
    return calls, entries


def time_interleaved(calls: dict[str, Callable], flush: Callable) -> dict[str, dict]:
    """Median seconds of each call, and the bytes that it allocates at its peak."""
    result = {name: first(call, flush) for name, call in calls.items()}
    times = {name: [entry["seconds"]] for name, entry in result.items()}
    for _ in range(GROUPS):
        for name, call in calls.items():
            if (once := times[name][0]) < SECONDS:
                repeats = max(1, min(ROUNDS, int(SECONDS / once)))
                times[name] += seconds(call, repeats, before=flush)
    return {name: result[name] | {"seconds": statistics.median(times[name])} for name in calls}


def first(call: Callable, flush: Callable) -> dict:
    if DEVICE == "cpu":
        return {"seconds": seconds(call, 1, before=flush)[0], "bytes": 0}
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    once = seconds(call, 1, before=flush)[0]
    return {"seconds": once, "bytes": torch.cuda.max_memory_allocated() - before}

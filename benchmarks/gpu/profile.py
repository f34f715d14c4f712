"""Where the time of one BGE-M3 batch, one query and one InfoNCE step goes, by torch's profiler.

python -m benchmarks.gpu.profile FOLDER    # writes profile-*.md and the whole tables as profile-*.log there
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from benchmarks.gpu.checks import gradients
from benchmarks.gpu.summary import table
from benchmarks.harness.rehearsal import size
from benchmarks.harness.timing import DEVICE, time_once
from benchmarks.models import workloads
from benchmarks.models.pairs import ModelPair
from benchmarks.peers import losses

MOST = 12  # lines
HEADER = ("kernel or call", "calls", "us on the device", "us on the host")


def bge_m3() -> dict[str, Callable[[], object]]:
    models = ModelPair("BGE-M3", DEVICE)
    docs, query = (
        workloads.token_ids(lengths, models.padding, DEVICE)
        for lengths in ([size(workloads.LONGEST, 48)] * size(64, 4), [32])
    )
    return {
        "bge-m3": functools.partial(models.embed, docs),
        "bge-m3-query": functools.partial(models.embed_unpadded, query),
    }


def info_nce() -> dict[str, Callable[[], object]]:
    shape = size(4096, 32), size(131_072, 64), size(1024, 64)
    sides = losses.embeddings(*shape, torch.bfloat16, DEVICE)
    return {"info_nce": functools.partial(gradients, losses.ours, *sides)}


def main() -> int:
    folder = Path(sys.argv[1])
    for make in (info_nce, bge_m3):
        for name, call in make().items():
            for _ in range(3):  # compiles, and captures graphs
                call()
            wall, gpu = time_once(call)
            profiler = profiled(call)
            (folder / f"profile-{name}.md").write_text(described(name, wall, gpu, profiler))
            averages = profiler.key_averages()
            (folder / f"profile-{name}.log").write_text(averages.table(max_name_column_width=90))
    return 0


def profiled(call: Callable) -> torch.profiler.profile:
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (DEVICE == "cuda")
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    return profiler


def described(name: str, wall: float, gpu: float | None, profiler) -> str:
    """The calls that take most of the device, and what takes most of the host."""
    # The time of a kernel is also that of the call which launched it, and counts once.
    on_device, on_host = [], []
    for event in profiler.key_averages():
        (on_host if event.device_type == DeviceType.CPU else on_device).append(event)
    on_device.sort(key=lambda e: e.self_device_time_total, reverse=True)
    on_host.sort(key=lambda e: e.self_cpu_time_total, reverse=True)
    kernels = sum(e.self_device_time_total for e in on_device) / 1e3
    host = sum(e.self_cpu_time_total for e in on_host) / 1e3
    between = "" if gpu is None else f", between events {gpu * 1e3:.3f} ms"
    head = f"{name}: wall {wall * 1e3:.3f} ms{between}; "
    head += f"profiled: kernels {kernels:.3f} ms, host {host:.3f} ms"
    cells = (
        (e.key[:70].replace("|", "/"), str(e.count), f"{e.self_device_time_total:.0f}",
         f"{e.self_cpu_time_total:.0f}")
        for e in (*on_device[:MOST], *on_host[:MOST])
    )  # fmt: skip
    return f"{head}\n\n{table(HEADER, cells)}\n"


if __name__ == "__main__":
    sys.exit(main())

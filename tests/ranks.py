"""Work in several processes that form a torch.distributed group (gloo)."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed, multiprocessing

SECONDS = 120  # before everything is killed; a few seconds are needed


def run(size: int, work: Callable, folder: Path) -> list:
    """work(rank, size), a function of a module, in `size` processes; what each returns, by rank."""
    context = multiprocessing.spawn(_rank, (size, work, folder), size, join=False)
    deadline = time.monotonic() + SECONDS
    try:
        while not context.join(1):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{size} ranks of {work.__name__} were not done in {SECONDS} s")
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]


def _rank(rank: int, size: int, work: Callable, folder: Path) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"  # no port that another process could take
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    try:
        torch.save(work(rank, size), folder / f"{rank}.pt")
        distributed.barrier()
    finally:
        distributed.destroy_process_group()

from pathlib import Path

import pytest
import torch

from benchmarks.harness import peaks as peaks_of
from benchmarks.harness.rehearsal import size
from benchmarks.harness.timing import DEVICE


def pytest_addoption(parser):
    for model in ("--bge-m3", "--e5-mistral"):
        parser.addoption(model, help="checkpoint folder; default: one is written for the run")
    parser.addoption(
        "--configs", type=Path, help="folder of tuned configs, instead of the stored ones"
    )


def pytest_configure(config):
    if folder := config.getoption("--configs", None):
        from embedfuse.triton_kernels import tuned

        tuned.FOLDER = folder
        for path in folder.glob("*.json"):
            tuned.load(path)  # now, for its errors


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Comparisons with other libraries run last: these may compile for minutes or crash the process."""
    items.sort(key=lambda item: "other_libraries" in item.name)


@pytest.fixture(scope="session")
def device() -> str:
    return DEVICE


@pytest.fixture(scope="session")
def peaks(device) -> peaks_of.Peaks:
    return peaks_of.measure(device)


@pytest.fixture(scope="session")
def flush(device):
    """A call that removes the inputs of a kernel from the caches."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0
    # On a GPU also long enough (0.1 ms) to hide the launch of the call that is timed after it.
    buffer = torch.ones(max(2 * cache, size(2**28, 2**20)) // 4, device=device)

    def run() -> None:
        # Read on the CPU: written data would go to memory while the kernel is timed.
        buffer.sum() if device == "cpu" else buffer.zero_()

    return run

import pytest
import torch

from benchmarks.harness import peaks as peaks_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_addoption(parser):
    for model in ("--bge-m3", "--e5-mistral"):
        parser.addoption(model, help="checkpoint folder; default: one is written for the run")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """What is ours comes first: others may compile for minutes, or take the process down."""
    items.sort(key=lambda item: "beside_others" in item.name)


@pytest.fixture(scope="session")
def device() -> str:
    return DEVICE


@pytest.fixture(scope="session")
def peaks(device) -> peaks_of.Peaks:
    return peaks_of.measure(device)


@pytest.fixture(scope="session")
def flush(device):
    """Call that leaves nothing of a kernel's inputs in the caches."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0
    # On a GPU also long enough (0.1 ms) to hide the launch of what is timed after it.
    buffer = torch.ones(max(2 * cache, 2**28) // 4, device=device)

    def run() -> None:
        # On the CPU read: what was written would go to memory while the kernel is timed.
        buffer.sum() if device == "cpu" else buffer.zero_()

    return run

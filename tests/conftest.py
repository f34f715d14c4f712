import pytest
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    built = "with CUDA" if torch.version.cuda else "without CUDA"
    skip = pytest.mark.skip(
        reason=f"needs an NVIDIA GPU: torch {torch.__version__}, built {built}, sees none"
    )
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)

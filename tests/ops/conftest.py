import pytest
import torch

import embedfuse
from embedfuse import native


@pytest.fixture
def cpu_module():
    """embedfuse._cpu; its instruction set is put back after the test."""
    try:
        module = native.cpu()
    except native.Unavailable as reason:
        pytest.skip(str(reason))
    before = module.selected_isa()
    yield module
    module.select_isa(before)


@pytest.fixture
def use_isa(cpu_module):
    def use(name: str) -> None:
        if name not in cpu_module.supported_isas():
            pytest.skip(f"this processor does not run {name}")
        cpu_module.select_isa(name)

    return use


@pytest.fixture(params=["reference", "cpp"])
def backend(request):
    """Both backends that take CPU tensors, forced in turn."""
    if request.param == "cpp":
        request.getfixturevalue("cpu_module")
    with embedfuse.use_backend(request.param):
        yield request.param


@pytest.fixture(params=["cpp"])
def kernel(request):
    """A backend that is held to the reference, forced; in Triton's interpreter "triton"."""
    if request.param == "cpp":
        request.getfixturevalue("cpu_module")
    with embedfuse.use_backend(request.param):
        yield request.param


@pytest.fixture(params=["cpp"])  # a parameter, so that it is part of the test's name
def cpp(request, cpu_module):
    """The C++ backend, forced, for what it alone has: registers, tiles, threads."""
    with embedfuse.use_backend("cpp"):
        yield request.param


@pytest.fixture
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)

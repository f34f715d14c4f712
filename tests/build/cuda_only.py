"""pytest plugin: tests of ops that take a backend run on the CUDA kernels of EMULATED_CUDA alone."""

import os
from pathlib import Path

import pytest

from tests.build import emulated_cuda


@pytest.fixture(autouse=True)
def emulated():
    """On the host."""
    with emulated_cuda.on_cpu_tensors(emulated_cuda.load(Path(os.environ["EMULATED_CUDA"]))):
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        # A mark, since pytest lets marks replace the fixture's own parameters.
        only = pytest.mark.parametrize("backend", ["cuda"], indirect=True)
        metafunc.definition.add_marker(only)

"""pytest plugin: tests that take a `backend` fixture run on the backend "triton" alone."""

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        # A mark, since pytest lets marks replace the fixture's own parameters.
        only = pytest.mark.parametrize("backend", ["triton"], indirect=True)
        metafunc.definition.add_marker(only)

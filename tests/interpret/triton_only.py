"""pytest plugin: of the tests of ops those that take a backend, on "triton" alone.

The others run no Triton kernel, so they find nothing here that they do not find outside the interpreter.
"""

import pytest

BACKENDS = ("backend", "kernel")  # fixtures of tests/ops/conftest.py


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc):
    for name in BACKENDS:
        if name in metafunc.fixturenames:
            # A mark, since pytest lets marks replace the fixture's own parameters.
            only = pytest.mark.parametrize(name, ["triton"], indirect=True)
            metafunc.definition.add_marker(only)


def pytest_collection_modifyitems(config, items):
    kept = [
        item
        for item in items
        if item.path.parent.name == "interpret" or not set(BACKENDS).isdisjoint(item.fixturenames)
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept

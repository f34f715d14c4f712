"""pytest plugin: of the tests of ops those that take a `backend` fixture, on the backend "triton" alone.

The others run no Triton kernel, so they find nothing here that they do not find outside the interpreter.
"""

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        # A mark, since pytest lets marks replace the fixture's own parameters.
        only = pytest.mark.parametrize("backend", ["triton"], indirect=True)
        metafunc.definition.add_marker(only)


def pytest_collection_modifyitems(config, items):
    kept = [
        item
        for item in items
        if item.path.parent.name == "interpret" or "backend" in item.fixturenames
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept

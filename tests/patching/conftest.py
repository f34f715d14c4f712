import pytest

from tests.patching.encoders import FAMILIES, make_model


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def model(family):
    return make_model(family)

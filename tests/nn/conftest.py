import pytest

from embedfuse import native


@pytest.fixture
def cpp():
    try:
        isa = native.cpu().selected_isa()
    except native.Unavailable as reason:
        pytest.skip(str(reason))
    if isa == "baseline":
        pytest.skip("towers run on torch there")

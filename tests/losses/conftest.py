import pytest

import embedfuse
from embedfuse import native


@pytest.fixture(params=["reference", "cpp"])
def backend(request):
    """Both backends that take CPU tensors, forced in turn."""
    if request.param == "cpp":
        try:
            native.cpu()
        except native.Unavailable as reason:
            pytest.skip(str(reason))
    with embedfuse.use_backend(request.param):
        yield request.param

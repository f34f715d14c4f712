import pytest

from embedfuse.nn import decoder
from tests.patching.encoders import FAMILIES, make_model


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def model(family):
    return make_model(family)


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """Tokens of every run through the layers."""
    counts, run = [], decoder.decode_step

    def counting(layers, norm, x, *args, **kwargs):
        counts.append(len(x))
        return run(layers, norm, x, *args, **kwargs)

    monkeypatch.setattr(decoder, "decode_step", counting)
    return counts

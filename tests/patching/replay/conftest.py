import pytest

from tests.patching.replay.models import pair_of
from tests.recorded_graphs import RecordedGraphs


@pytest.fixture(autouse=True)
def graphs_are_on(monkeypatch):
    monkeypatch.setenv("EMBEDFUSE_GRAPHS", "1")
    RecordedGraphs.made.clear()


@pytest.fixture(params=["bert", "mistral"])
def pair(request):
    return pair_of(request.param)

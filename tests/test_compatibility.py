"""Which releases work together: what doctor says, and the error of an import that fails."""

import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from embedfuse import compatibility
from embedfuse.cli import doctor
from embedfuse.patching import families

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
FLAG = "FlagEmbedding <=1.4.2 with transformers >=5.0,<5.24"
NEWER = (
    "no, transformers is 5.24.0: it imports transformers.modeling_attn_mask_utils, which is gone"
)


@pytest.fixture
def installed(monkeypatch):
    versions = {"FlagEmbedding": "1.4.2", "transformers": "5.24.0"}
    monkeypatch.setattr(compatibility, "version", versions.get)
    return versions


def test_doctor_says_what_goes_together(installed):
    assert doctor.collect()["versions that go together"][FLAG] == NEWER
    installed["transformers"] = "5.23.0"
    found = doctor.collect()["versions that go together"]
    assert found[FLAG] == "yes"
    assert found["pylate <=1.6.0 with sentence-transformers <6"] == "pylate is not installed"
    installed["FlagEmbedding"] = "1.5"
    assert doctor.collect()["versions that go together"][FLAG] == "FlagEmbedding is 1.5: not tried"


def test_the_extra_installs_releases_that_go_together():
    """Otherwise the newest transformers comes with it, which FlagEmbedding cannot import."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    (pair,) = (pair for pair in compatibility.PAIRS if pair.package == "FlagEmbedding")
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    requirements = map(Requirement, project["optional-dependencies"]["flag-embedding"])
    (found,) = (r.specifier for r in requirements if r.name == pair.other)
    assert str(found) in pair.needed.split(",")


def test_an_import_that_fails_inside_the_library_says_which_releases_clash(installed, monkeypatch):
    original = type(
        "M3Embedder", (), {"__module__": "FlagEmbedding.inference.embedder.encoder_only.m3"}
    )
    monkeypatch.delitem(sys.modules, "embedfuse.integrations.flag_embedding.m3", raising=False)
    monkeypatch.setitem(sys.modules, "FlagEmbedding.inference.embedder.encoder_only", None)
    with pytest.raises(ImportError) as error:
        families.patched_class(original)
    assert str(error.value).endswith(f". Accepted is {FLAG}: {NEWER}")
    assert isinstance(error.value.__cause__, ImportError)
    installed["transformers"] = "5.23.0"  # not the reason then
    with pytest.raises(ImportError, match=r"halted; None in sys.modules$"):
        families.patched_class(original)


def test_the_drop_in_losses_say_it_too(installed, monkeypatch):
    monkeypatch.delitem(sys.modules, "embedfuse.integrations.flag_embedding.losses", raising=False)
    monkeypatch.setitem(sys.modules, "FlagEmbedding.abc.finetune.embedder", None)
    with pytest.raises(ImportError, match=r"Accepted is FlagEmbedding <=1\.4\.2 with transformers"):
        __import__("embedfuse.integrations.flag_embedding.losses")

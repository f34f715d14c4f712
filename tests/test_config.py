"""The table of environment variables has all that the code reads, and other values are refused."""

import re
from pathlib import Path

import pytest

from embedfuse import config, native

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", config.VARIABLES)
def test_unset_and_empty_are_none(name, monkeypatch):
    monkeypatch.delenv(name, raising=False)
    assert config.read(name) is None
    monkeypatch.setenv(name, "")
    assert config.read(name) is None


@pytest.mark.parametrize("name", config.VARIABLES)
def test_accepted_values_are_returned_and_others_refused(name, monkeypatch):
    accepted = config.VARIABLES[name].accepted
    for value in accepted or ("anything",):
        monkeypatch.setenv(name, value)
        assert config.read(name) == value
    if accepted:
        monkeypatch.setenv(name, "no")
        with pytest.raises(ValueError, match=f"{name}='no': accepted are {', '.join(accepted)}"):
            config.read(name)


def test_a_variable_outside_the_table_cannot_be_read():
    with pytest.raises(KeyError):
        config.read("EMBEDFUSE_NO_SUCH_THING")


def test_table_holds_every_variable_that_the_source_names():
    files = [ROOT / "setup.py", *ROOT.glob("python/**/*.py"), *ROOT.glob("triton_kernels/*.py")]
    named = {
        name for file in files for name in re.findall(r"\bEMBEDFUSE_[A-Z0-9_]+\b", file.read_text())
    }
    assert named == set(config.VARIABLES)


def test_every_instruction_set_of_the_build_can_be_asked_for():
    try:
        module = native.cpu()
    except native.Unavailable as reason:
        pytest.skip(str(reason))
    assert set(module.supported_isas()) <= set(config.CPU_ISAS)
    assert config.CPU_ISAS[-1] == module.supported_isas()[-1] == "baseline"

"""Exponentials, logarithms, divisions and norms at the ends of their range."""

import pytest

import embedfuse
from embedfuse import config
from range_checks import CHECKS


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("isa", config.CPU_ISAS)
def test_cpp(name, isa, use_isa):
    use_isa(isa)
    with embedfuse.use_backend("cpp"):
        CHECKS[name]()


@pytest.mark.parametrize("name", CHECKS)
def test_reference(name):
    with embedfuse.use_backend("reference"):
        CHECKS[name]()

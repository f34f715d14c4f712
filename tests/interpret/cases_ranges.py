"""Exponentials, logarithms, divisions and norms of the Triton versions at the ends of their range."""

import pytest

from embedfuse.registry import use_backend
from tests.range_checks import CHECKS


@pytest.mark.parametrize("name", CHECKS)
def test_range(name):
    with use_backend("triton"):
        CHECKS[name]()

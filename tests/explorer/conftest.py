"""The model of the explorer's tests, and its second moments."""

from __future__ import annotations

import pytest
from kept import bundled

import pmet_lens as pl


@pytest.fixture(scope="module")
def model():
    return bundled("world")


@pytest.fixture(scope="session")
def moments():
    """Of all sites PMET can write, so that no test computes them twice."""
    return pl.second_moments(bundled("world"), pl.texts(), n_tokens=3000)

"""Two landed and built months, made once; a test that changes files copies them first."""

from __future__ import annotations

import shutil

import pytest

from airflow_mlops.examples.flights import features, source


@pytest.fixture(scope="session")
def _two_months(tmp_path_factory):
    root = tmp_path_factory.mktemp("flights")
    for month in ("2013-01", "2013-02"):
        source.land(str(root), month)
        features.build(str(root), month)
    return root


@pytest.fixture
def built(_two_months):
    """Root with January and February landed and built; read only."""
    return str(_two_months)


@pytest.fixture
def landed(_two_months, tmp_path):
    """The test's own copy of the raw files of January and February."""
    shutil.copytree(_two_months / "raw", tmp_path / "raw")
    return str(tmp_path)

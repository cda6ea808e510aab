"""Parts of a dataset profiled where they are: what travels there, and what comes back."""

from __future__ import annotations

import json
import pickle
import sys

import numpy as np
import pandas as pd
import pytest

from airflow_mlops.drift import Profile
from airflow_mlops.drift.profile import Plan, merged
from airflow_mlops.drift.sources import open_source


@pytest.fixture
def frame():
    rng = np.random.default_rng(11)
    return pd.DataFrame({"x": rng.normal(size=3_000), "c": [f"c{i}" for i in rng.integers(0, 3_000, 3_000)]})


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_parts_pickled_and_profiled_elsewhere_merge_to_the_same_bits(frame, tmp_path, monkeypatch, suffix):
    monkeypatch.setattr("airflow_mlops.drift.sources._UNIT_ROWS", 300)
    for i in range(3):
        part = frame.iloc[i * 1_000 : (i + 1) * 1_000]
        if suffix == "csv":
            part.to_csv(tmp_path / f"{i}.csv", index=False)
        else:
            part.to_parquet(tmp_path / f"{i}.parquet", index=False, row_group_size=100)
    units = open_source(str(tmp_path))
    plan = Plan.of(units, None, (), None)
    sent = [pickle.loads(pickle.dumps((plan, unit))) for unit in units]
    received = [json.loads(json.dumps(there.profile(unit).to_json())) for there, unit in sent]
    assert len(received) == (3 if suffix == "csv" else 12)
    result = merged(Profile.from_json(value) for value in reversed(received))
    assert result is not None and result.digest == Profile.of(str(tmp_path)).digest
    assert result.rows == 3_000 and result.columns["c"].distinct == Profile.of(frame).columns["c"].distinct


def test_importing_the_distributed_profile_does_not_import_ray():
    import subprocess

    code = "import sys, airflow_mlops.drift.distributed as d; assert d.profile_on_ray; print('ray' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"

"""Parts of a dataset profiled where they are: what travels there, and what comes back."""

from __future__ import annotations

import json
import pickle
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from airflow_mlops.drift import Profile
from airflow_mlops.drift.distributed import profile_on_ray
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


def test_a_part_that_ends_its_worker_is_not_tried_for_ever(frame, tmp_path, monkeypatch):
    """Ray Data's own default is to try for ever: of what it is asked, by a stand-in for it."""
    asked = []

    class Rows(list):
        def map(self, function, **options):
            asked.append(options)
            return Rows(map(function, self))

        def iter_rows(self):
            return iter(self)

    data = SimpleNamespace(from_items=lambda items, override_num_blocks: Rows(items))
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(data=data))
    monkeypatch.setitem(sys.modules, "ray.data", data)
    frame.to_parquet(tmp_path / "x.parquet")
    assert profile_on_ray(str(tmp_path), num_cpus=2).digest == Profile.of(frame).digest
    assert asked == [{"num_cpus": 2, "max_retries": 3}]

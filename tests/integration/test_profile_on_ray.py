"""The profile of a dataset by Ray Data on a real Ray: the bits of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from airflow_mlops.drift import Profile

pytestmark = pytest.mark.ray

COLUMNS = ["late", "x", "id", "when"]
# A process of its own: Ray does not leave the one it was in as it was.
SCRIPT = """
import json, sys
import ray
from airflow_mlops.drift.distributed import profile_on_ray
from airflow_mlops.exceptions import DataError

folder, columns = sys.argv[1], sys.argv[2].split(",")
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
profile = profile_on_ray(folder, categorical=["late"], columns=columns)
damaged = f"{folder}/2.parquet"
with open(damaged, "r+b") as file:
    file.seek(4)
    file.write(bytes(2_996))
try:
    profile_on_ray(folder, columns=["x"])
    problem = None
except DataError as error:
    problem = str(error)
print("found", json.dumps([profile.digest, list(profile.columns), problem]))
"""


def test_ray_gives_the_same_bits_and_names_what_it_cannot_read(tmp_path):
    rng = np.random.default_rng(5)
    for i in range(4):
        size = 5_000 + i
        frame = pd.DataFrame({"x": rng.normal(i, 1, size), "id": [f"u{n}" for n in rng.integers(0, 9_000, size)]})
        frame["when"] = pd.Timestamp("2013-01-01", tz="UTC") + pd.to_timedelta(rng.integers(0, 999, size), "h")
        frame["late"] = rng.integers(0, 2, size)
        frame.to_parquet(tmp_path / f"{i}.parquet", index=False, row_group_size=900)
    here = Profile.of(str(tmp_path), categorical=["late"], columns=COLUMNS)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), ",".join(COLUMNS)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    digest, names, problem = json.loads(done.stdout.rpartition("found ")[2])
    assert digest == here.digest and names == COLUMNS
    assert problem.startswith("cannot read ") and "2.parquet" in problem

"""The profile of a dataset by Ray Data on a real Ray: the bits of one process."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from airflow_mlops.drift import Profile
from airflow_mlops.drift.distributed import profile_on_ray
from airflow_mlops.exceptions import DataError

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def ray_two_cpus():
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_ray_gives_the_same_bits_and_names_what_it_cannot_read(ray_two_cpus, tmp_path):
    rng = np.random.default_rng(5)
    for i in range(4):
        size = 5_000 + i
        frame = pd.DataFrame({"x": rng.normal(i, 1, size), "id": [f"u{n}" for n in rng.integers(0, 9_000, size)]})
        frame["when"] = pd.Timestamp("2013-01-01", tz="UTC") + pd.to_timedelta(rng.integers(0, 999, size), "h")
        frame["late"] = rng.integers(0, 2, size)
        frame.to_parquet(tmp_path / f"{i}.parquet", index=False, row_group_size=900)
    arguments = {"categorical": ["late"], "columns": ["late", "x", "id", "when"]}
    profile = profile_on_ray(str(tmp_path), **arguments)
    assert profile.digest == Profile.of(str(tmp_path), **arguments).digest
    assert list(profile.columns) == arguments["columns"]
    content = bytearray((tmp_path / "2.parquet").read_bytes())
    content[4:3_000] = bytes(2_996)
    (tmp_path / "2.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read .*2\.parquet"):
        profile_on_ray(str(tmp_path), columns=["x"])

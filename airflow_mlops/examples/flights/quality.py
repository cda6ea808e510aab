"""The contract of a landed month, checked before anything is built on it."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd
import pyarrow as pa

from airflow_mlops.examples.flights import source
from airflow_mlops.exceptions import DataError

#: A month of New York's flights has 25,000 to 29,000 rows.
ROWS = (15_000, 60_000)
#: Every day has at least this share of the month's median day.
MIN_DAY_SHARE = 0.25
#: Largest share of missing values by column; columns not named may have none.
MAX_MISSING = {"tailnum": 0.10, "dep_delay": 0.25, "arr_delay": 0.25}
#: Smallest and largest believable value by column (minutes; miles for the distance).
RANGES = {
    "sched_duration": (20, 24 * 60 - 1),
    "distance": (1, 6000),
    "dep_delay": (-120, 3 * 24 * 60),
    "arr_delay": (-240, 3 * 24 * 60),
}
#: Smallest share of the month's hours and origins that has a weather observation.
MIN_WEATHER = 0.90

_Check = tuple[str, bool, str]


def check(root: str, month: str) -> dict[str, Any]:
    """Check the landed ``month`` against the contract.

    :param root: the project's folder or URI
    :param month: ``YYYY-MM``
    :return: ``{"month", "rows", "passed": True, "checks": [{"name", "ok", "detail"}]}``
    :raises DataError: a check failed; names each, what was found and how to fix it
    """
    window = source.month_window(month)
    flights = source.read_raw(root, "flights", month)
    weather = source.read_raw(root, "weather", month)
    planes = source.read_raw(root, "planes")
    checks = [
        _schema("flights", flights, source.FLIGHTS_SCHEMA),
        _schema("weather", weather, source.WEATHER_SCHEMA),
        _schema("planes", planes, source.PLANES_SCHEMA),
    ]
    # The other checks read the columns, so they wait for the schema to hold.
    if all(ok for _, ok, _ in checks):
        frame = flights.to_pandas()
        checks += [
            _rows(frame),
            _days(frame, month),
            _members("carrier", frame, source.CARRIERS),
            _members("origin", frame, source.ORIGINS),
            _duplicates(frame),
            _missing(frame),
            *_ranges(frame),
            _times(frame, window),
            _weather(weather.to_pandas(), window),
        ]
    failed = [(name, detail) for name, ok, detail in checks if not ok]
    if failed:
        raise DataError(
            f"the data of {month} breaks its contract: "
            + "; ".join(f"{name}: {detail}" for name, detail in failed)
            + f". Correct the source, delete {source.raw_uri(root, 'flights', month)} (or the file named) "
            "and land the month again"
        )
    return {
        "month": month,
        "rows": flights.num_rows,
        "passed": True,
        "checks": [{"name": name, "ok": ok, "detail": detail} for name, ok, detail in checks],
    }


def _schema(name: str, table: pa.Table, expected: pa.Schema) -> _Check:
    found = {field.name: str(field.type) for field in table.schema}
    wanted = {field.name: str(field.type) for field in expected}
    wrong = {
        column: {"found": found.get(column), "expected": wanted.get(column)}
        for column in sorted(found.keys() | wanted.keys())
        if found.get(column) != wanted.get(column)
    }
    return f"{name} schema", not wrong, f"columns differ: {json.dumps(wrong)}" if wrong else f"{len(wanted)} columns"


def _rows(frame: pd.DataFrame) -> _Check:
    low, high = ROWS
    return "rows", low <= len(frame) <= high, f"{len(frame)} rows, expected {low} to {high}"


def _days(frame: pd.DataFrame, month: str) -> _Check:
    days = pd.period_range(pd.Period(month, "M").start_time, pd.Period(month, "M").end_time, freq="D")
    counts = (frame["sched_dep"] - source.LEAD).dt.tz_convert(source.HOME_ZONE).dt.strftime("%Y-%m-%d").value_counts()
    found = pd.Series([counts.get(str(day), 0) for day in days], index=[str(day) for day in days])
    thin = found[found < max(1.0, MIN_DAY_SHARE * found.median())]
    detail = f"{len(days) - len(thin)} of {len(days)} days complete"
    if len(thin):
        detail += f"; missing or nearly empty: {', '.join(thin.index[:5])}{' ...' if len(thin) > 5 else ''}"
    return "days", thin.empty, detail


def _members(column: str, frame: pd.DataFrame, known: tuple[str, ...]) -> _Check:
    unknown = sorted(set(frame[column].dropna()) - set(known))
    detail = f"unknown {column} {unknown}, known are {list(known)}; if new, add it to source.{column.upper()}S"
    return column, not unknown, detail if unknown else f"all of {len(known)} known"


def _duplicates(frame: pd.DataFrame) -> _Check:
    count = int(frame.duplicated(["carrier", "flight", "origin", "dest", "sched_dep"]).sum())
    return "duplicates", count == 0, f"{count} flights appear twice (carrier, flight, origin, dest, sched_dep)"


def _missing(frame: pd.DataFrame) -> _Check:
    shares = frame.isna().mean()
    wrong = {name: round(float(share), 3) for name, share in shares.items() if share > MAX_MISSING.get(str(name), 0.0)}
    return (
        "missing",
        not wrong,
        f"too many missing values: {wrong}, allowed {MAX_MISSING}" if wrong else "within limits",
    )


def _ranges(frame: pd.DataFrame) -> list[_Check]:
    checks = []
    for column, (low, high) in RANGES.items():
        values = frame[column].dropna()
        count = int((~values.between(low, high)).sum())
        found = f"{values.min():g} to {values.max():g}" if len(values) else "no values"
        checks.append((f"{column} range", len(values) > 0 and not count, f"{found}, {count} outside {low} to {high}"))
    return checks


def _times(frame: pd.DataFrame, window: Any) -> _Check:
    predicted = frame["sched_dep"] - source.LEAD
    outside = int((~((predicted >= window.start) & (predicted < window.end))).sum())
    early = int((frame["known_at"] <= predicted).sum())
    return (
        "times",
        outside == 0 and early == 0,
        f"{outside} flights outside {window}, {early} with an outcome known before the prediction",
    )


def _weather(frame: pd.DataFrame, window: Any) -> _Check:
    hours = (window.end - window.start).total_seconds() / 3600
    share = len(frame.drop_duplicates(["origin", "observed_at"])) / (hours * len(source.ORIGINS))
    return "weather", share >= MIN_WEATHER, f"{share:.1%} of hours and origins observed, expected {MIN_WEATHER:.0%}"

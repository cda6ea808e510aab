"""Feature tables and labelled entities of one month, every value stamped with the time it was known.

Recent delays are rolling statistics over flights that had *landed* before an hour, one row for each entity and hour;
``known_at`` of a row is that hour, so a join as of the prediction time cannot see a flight that was still in the air.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from airflow_mlops import storage
from airflow_mlops.examples.flights import LABEL
from airflow_mlops.examples.flights.months import months_before
from airflow_mlops.examples.flights.source import (
    CARRIERS,
    FIRST_MONTH,
    HOME_ZONE,
    LEAD,
    ORIGINS,
    WEATHER_VALUES,
    month_window,
    read_raw,
    write_parquet,
)
from airflow_mlops.exceptions import DataError

#: A flight is late when it arrives more than this many minutes after its schedule.
LATE_MINUTES = 15
HORIZONS_HOURS = (3, 24, 168, 720)
#: Views of recent delays: name -> join keys.
DELAY_VIEWS: dict[str, tuple[str, ...]] = {
    "carrier_delays": ("carrier",),
    "origin_delays": ("origin",),
    "dest_delays": ("dest",),
    "carrier_origin_delays": ("carrier", "origin"),
}
WEATHER_FEATURES = WEATHER_VALUES
PLANE_FEATURES = ("plane_age", "engines", "seats")
#: Known from the timetable when a prediction is asked for.
REQUEST_FIELDS = ("sched_minute", "weekday", "distance", "sched_duration")
#: What the on-demand view makes of the request fields; other names, so that no join has two columns of one name.
REQUEST_FEATURES = (
    "dep_minute",
    "dep_weekday",
    "dep_weekend",
    "dep_sin",
    "dep_cos",
    "route_miles",
    "route_minutes",
    "route_speed",
)
ENTITY_KEYS = ("carrier", "origin", "dest", "tailnum")
#: Stands for a tail number that the timetable does not give; no plane of the registry has it.
UNKNOWN_TAILNUM = "UNKNOWN"

_HOUR = pd.Timedelta(hours=1)
# 720 hours reach over a February into the month before it.
_HISTORY_MONTHS = 2


def delay_features(view: str) -> tuple[str, ...]:
    """The feature columns of one view of recent delays."""
    prefix = view.removesuffix("_delays")
    rolled = tuple(
        f"{prefix}_{statistic}_{hours}h" for hours in HORIZONS_HOURS for statistic in ("late_rate", "delay", "flights")
    )
    codes = {"carrier_delays": ("carrier_code",), "origin_delays": ("origin_code",)}.get(view, ())
    return (*rolled, f"{prefix}_lost_24h", *codes)


def feature_names() -> list[str]:
    """Every model feature, in the order of the views."""
    delays = [name for view in DELAY_VIEWS for name in delay_features(view)]
    return [*delays, *WEATHER_FEATURES, *PLANE_FEATURES, *REQUEST_FEATURES]


def build(root: str, month: str, *, first_month: str = FIRST_MONTH) -> dict[str, Any]:
    """Write the feature tables and the entities of a landed ``month`` below ``root``.

    Earlier months give the history that the rolling statistics need.

    :param root: the project's folder or URI
    :param month: ``YYYY-MM``
    :param first_month: where history starts: months before it are not expected to be there
    :return: ``{"month", "views": {view: {"uri", "rows"}}, "entities": {"uri", "rows", "lost"}}``, where ``lost``
        counts cancelled and diverted flights, which have no label
    :raises DataError: this month or an earlier one that is needed was not landed
    """
    window = month_window(month)
    flights = read_raw(root, "flights", month).to_pandas()
    history = [
        read_raw(root, "flights", earlier).to_pandas() for earlier in months_before(month, _HISTORY_MONTHS, first_month)
    ]
    past = pd.concat([*history, flights], ignore_index=True)
    hours = pd.date_range(window.start, window.end, freq="h", inclusive="left", unit="us")

    tables = {view: delays(past, hours, view) for view in DELAY_VIEWS}
    tables["weather"] = weather(read_raw(root, "weather", month).to_pandas())
    tables["planes"] = planes(read_raw(root, "planes").to_pandas(), pd.Timestamp(window.start))
    views = {}
    for view, frame in tables.items():
        views[view] = {
            "uri": _write(storage.join(root, "features", view, f"{month}.parquet"), frame),
            "rows": len(frame),
        }

    labelled = entities(flights)
    uri = _write(storage.join(root, "entities", "flights", f"{month}.parquet"), labelled)
    return {
        "month": month,
        "views": views,
        "entities": {"uri": uri, "rows": len(labelled), "lost": len(flights) - len(labelled)},
    }


def delays(flights: pd.DataFrame, hours: pd.DatetimeIndex, view: str) -> pd.DataFrame:
    """Rolling statistics at each of ``hours`` over the flights with ``hour - horizon <= known_at < hour``.

    Late rate and mean arrival delay (minutes, early counts as negative) are over flights that arrived and NaN when
    there were none; ``lost`` is the share cancelled or diverted in a day.

    :param flights: raw flights, at least 720 hours back from the first of ``hours``
    :return: one row for each hour and each entity of which a flight's outcome was known by then, sorted by both
    """
    keys = DELAY_VIEWS[view]
    groups = flights.groupby(list(keys), sort=True)
    names = groups.size().index.to_frame(index=False)
    code = groups.ngroup().to_numpy()
    known = _micros(flights["known_at"])
    grid = _micros(pd.Series(hours))
    origin = min(int(known.min()), int(grid[0]) - HORIZONS_HOURS[-1] * 3_600_000_000)
    # One sorted axis for all entities: each gets a stretch of time longer than any look-back.
    stretch = max(int(known.max()), int(grid[-1])) - origin + 1
    axis = code * stretch + (known - origin)
    order = np.argsort(axis, kind="stable")
    axis = axis[order]
    late = flights["arr_delay"].to_numpy()[order]
    arrived = ~np.isnan(late)
    # Whole minutes: differences of these sums are exact, so a later flight cannot leak in by rounding.
    sums = {
        "all": _cumulated(np.ones(len(axis))),
        "arrived": _cumulated(arrived),
        "late": _cumulated(arrived & (late > LATE_MINUTES)),
        "delay": _cumulated(np.where(arrived, late, 0.0)),
    }
    at = np.arange(len(names))[None, :] * stretch + (grid - origin)[:, None]
    stop = np.searchsorted(axis, at.ravel(), side="left")
    first = np.searchsorted(axis, np.tile(np.arange(len(names)) * stretch, len(hours)), side="left")
    columns: dict[str, Any] = {key: np.tile(names[key].to_numpy(), len(hours)) for key in keys}
    columns["known_at"] = np.repeat(hours, len(names))
    prefix = view.removesuffix("_delays")
    for horizon in HORIZONS_HOURS:
        start = np.searchsorted(axis, (at - horizon * 3_600_000_000).ravel(), side="left")
        total = {name: sums[name][stop] - sums[name][start] for name in sums}
        columns[f"{prefix}_late_rate_{horizon}h"] = _ratio(total["late"], total["arrived"])
        columns[f"{prefix}_delay_{horizon}h"] = _ratio(total["delay"], total["arrived"])
        columns[f"{prefix}_flights_{horizon}h"] = total["arrived"]
        if horizon == 24:
            columns[f"{prefix}_lost_24h"] = _ratio(total["all"] - total["arrived"], total["all"])
    # Whether an entity is listed must not depend on a flight that lands later.
    frame = pd.DataFrame(columns)[stop > first].reset_index(drop=True)
    if view == "carrier_delays":
        frame["carrier_code"] = _codes(frame["carrier"], CARRIERS)
    if view == "origin_delays":
        frame["origin_code"] = _codes(frame["origin"], ORIGINS)
    return frame[[*keys, "known_at", *delay_features(view)]]


def weather(raw: pd.DataFrame) -> pd.DataFrame:
    """Observations by origin, usable from the hour they were published."""
    return raw.sort_values(["known_at", "origin"])[["origin", "known_at", "observed_at", *WEATHER_FEATURES]]


def planes(raw: pd.DataFrame, known_at: pd.Timestamp) -> pd.DataFrame:
    """The registry as read at ``known_at``; a snapshot each month keeps every window complete in itself."""
    return raw.assign(
        known_at=known_at,
        plane_age=(known_at.year - raw["year"]).astype("float64"),
        engines=raw["engines"].astype("float64"),
        seats=raw["seats"].astype("float64"),
    )[["tailnum", "known_at", *PLANE_FEATURES]]


def entities(flights: pd.DataFrame) -> pd.DataFrame:
    """The rows to predict: keys, prediction time, request fields and the label of every flight that arrived."""
    arrived = flights[flights["arr_delay"].notna()]
    local = arrived["sched_dep"].dt.tz_convert(HOME_ZONE)
    return pd.DataFrame(
        {
            "carrier": arrived["carrier"],
            "origin": arrived["origin"],
            "dest": arrived["dest"],
            "tailnum": arrived["tailnum"].fillna(UNKNOWN_TAILNUM),
            "event_timestamp": arrived["sched_dep"] - LEAD,
            "sched_minute": (local.dt.hour * 60 + local.dt.minute).astype("int64"),
            "weekday": local.dt.weekday.astype("int64"),
            "distance": arrived["distance"],
            "sched_duration": arrived["sched_duration"],
            LABEL: (arrived["arr_delay"] > LATE_MINUTES).astype("int8"),
            "label_known_at": arrived["known_at"],
        }
    ).reset_index(drop=True)


def calendar(request: pd.DataFrame) -> pd.DataFrame:
    """The on-demand features: what the timetable alone says. The calendar month is left out on purpose.

    :param request: the columns :data:`REQUEST_FIELDS`
    :return: the columns :data:`REQUEST_FEATURES`, float64
    """
    minute, weekday, miles, minutes = (request[name].astype("float64") for name in REQUEST_FIELDS)
    angle = minute * (2 * np.pi / (24 * 60))
    return pd.DataFrame(
        {
            "dep_minute": minute,
            "dep_weekday": weekday,
            "dep_weekend": (weekday >= 5).astype("float64"),
            "dep_sin": np.sin(angle),
            "dep_cos": np.cos(angle),
            "route_miles": miles,
            "route_minutes": minutes,
            "route_speed": miles / minutes * 60,
        }
    )


def _write(uri: str, frame: pd.DataFrame) -> str:
    table = pa.Table.from_pandas(frame, preserve_index=False)
    micros = pa.timestamp("us", tz="UTC")
    schema = pa.schema([(f.name, micros if pa.types.is_timestamp(f.type) else f.type) for f in table.schema])
    return write_parquet(uri, table.cast(schema))


def _micros(times: pd.Series) -> np.ndarray:
    return times.dt.tz_convert("UTC").dt.tz_localize(None).to_numpy().astype("datetime64[us]").astype("int64")


def _cumulated(values: np.ndarray) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(values, dtype="float64")])


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)


def _codes(values: pd.Series, vocabulary: Sequence[str]) -> pd.Series:
    codes = values.map({name: float(code) for code, name in enumerate(vocabulary)})
    if codes.isna().any():
        unknown = sorted(set(values[codes.isna()]))
        raise DataError(
            f"unknown {values.name} {unknown}; expected one of {list(vocabulary)}. Add it there if it is new."
        )
    return codes

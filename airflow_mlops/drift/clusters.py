"""Rows by clusters of days: what a :class:`airflow_mlops.drift.sequential.LossTest` keeps of them.

A cluster is so many days in a row in one time zone, counted from 1970-01-01, and is named by the ISO date of its first.
"""

from __future__ import annotations

import datetime as dt
import math
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd

from airflow_mlops.drift.harm import as_floats
from airflow_mlops.exceptions import DataError

_EPOCH = dt.date(1970, 1, 1).toordinal()


def sums_by_cluster(
    times: Any,
    losses: Any,
    *,
    days: int,
    zone: str,
    bound: float,
    span: tuple[dt.datetime, dt.datetime] | None = None,
) -> dict[str, tuple[int, int, float]]:
    """Cluster -> rows, rows with a loss, and the sum of their losses, clipped at ``bound``.

    :param times: of the rows, with a time zone
    :param losses: by row, missing where not known
    :param days: in a cluster
    :param zone: time zone in which a day begins
    :param span: rows before its start, or not before its end, are passed over
    :raises DataError: lengths differ, a time is missing or has no zone, or a loss is minus infinity
    """
    values = as_floats(losses)
    stamps = pd.Series(times).reset_index(drop=True)
    if len(stamps) != len(values):
        raise DataError(f"times and losses have {len(stamps)} and {len(values)} rows; they must be of equal length")
    if not len(stamps):
        return {}
    if not isinstance(stamps.dtype, pd.DatetimeTZDtype):
        raise DataError(f"times are {stamps.dtype}; expected timestamps with one time zone, for example UTC")
    if stamps.isna().any():
        raise DataError(f"{int(stamps.isna().sum())} of {len(stamps)} rows have no time; every row needs one")
    if (values == -math.inf).any():
        raise DataError("a loss is minus infinity; expected losses that are finite, or plus infinity to be clipped")
    if span is not None:
        inside = ((stamps >= span[0]) & (stamps < span[1])).to_numpy()
        stamps, values = stamps[inside].reset_index(drop=True), values[inside]
    local = stamps.dt.tz_convert(zone).dt.tz_localize(None)
    day = local.to_numpy("datetime64[D]").astype("int64")
    first = day // days * days
    # In steps of 2**-30, sums up to 2**22 are exact, so the order in which rows and batches come leaves no trace.
    values = np.round(np.minimum(values, bound) * 2**30) / 2**30
    starts, code = np.unique(first, return_inverse=True)
    known = ~np.isnan(values)
    rows = np.bincount(code)
    labelled = np.bincount(code, known).astype(int)
    sums = np.bincount(code, np.where(known, values, 0.0))
    keys = [dt.date.fromordinal(_EPOCH + int(start)).isoformat() for start in starts]
    return dict(zip(keys, zip(rows.tolist(), labelled.tolist(), sums.tolist())))


def cluster_of(day: str, days: int) -> str:
    """The cluster that a day, an ISO date, is in."""
    ordinal = dt.date.fromisoformat(day).toordinal() - _EPOCH
    return dt.date.fromordinal(_EPOCH + ordinal // days * days).isoformat()


def day_of(when: dt.datetime, zone: str) -> dt.datetime:
    """When the day of ``when`` began, in UTC."""
    return end_of(when.astimezone(ZoneInfo(zone)).date().isoformat(), 0, zone)


def end_of(cluster: str, days: int, zone: str) -> dt.datetime:
    """When a cluster is over, in UTC."""
    after = dt.date.fromisoformat(cluster) + dt.timedelta(days=days)
    return dt.datetime(after.year, after.month, after.day, tzinfo=ZoneInfo(zone)).astimezone(dt.timezone.utc)

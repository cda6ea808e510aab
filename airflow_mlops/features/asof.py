"""The point-in-time join: for each entity row the newest feature row that was there at its time.

Feast's local stores join on the key first and filter the times afterwards, which holds every pair of entity row
and feature row in memory. An as-of join over sorted times (:func:`pandas.merge_asof`) needs one pass and one
position for each entity row; the values are then gathered column by column from Arrow.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from airflow_mlops.exceptions import DataError

_INSTANT = pa.timestamp("ns", "UTC")


@dataclass(frozen=True)
class Match:
    """Which feature row belongs to each entity row.

    :param position: int64, one for each entity row: row of the feature table, -1 where none was there in time
    :param leaks: matches newer than their entity row; the join makes none, this is counted from its result
    :param late: matches created after the time of their entity row (a value corrected or landed later)
    """

    position: np.ndarray
    leaks: int
    late: int


def instants(column: pa.ChunkedArray, name: str, *, naive_is_utc: bool) -> np.ndarray:
    """Timestamps as int64 nanoseconds since 1970 UTC; null is the smallest int64.

    :param naive_is_utc: take timestamps without a zone as UTC instead of refusing them
    :raises DataError: not a timestamp, naive where that is refused, or outside the years 1678 to 2261
    """
    if pa.types.is_date(column.type):
        column = column.cast(pa.timestamp("s"))
    if not pa.types.is_timestamp(column.type):
        raise DataError(f"column {name!r} is {column.type}; expected timestamps")
    if column.type.tz is None and not naive_is_utc:
        raise DataError(
            f"column {name!r} holds timestamps without a time zone, so which feature values were known is a guess; "
            "write them in UTC, for example with pandas' dt.tz_localize('UTC')"
        )
    try:
        if column.type.tz is None:
            column = column.cast(pa.timestamp("ns")).cast(_INSTANT)
        values = column.cast(_INSTANT).cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise DataError(f"column {name!r} holds times that nanoseconds cannot express: {error}") from error
    return pc.fill_null(values, _NEVER).to_numpy()


_NEVER = np.iinfo(np.int64).min


def join_codes(left: list[pa.ChunkedArray], right: list[pa.ChunkedArray], names: list[str], rows: tuple[int, int]):
    """Integer codes, equal exactly where all join keys are equal; -1 where a key is null.

    :param left: key columns of the entity rows, in the order of ``names``
    :param right: key columns of the feature rows
    :param rows: number of rows on the two sides, needed where a view has no join key
    :returns: two int64 arrays
    :raises DataError: the two sides' types cannot be compared
    """
    codes = np.zeros(sum(rows), dtype=np.int64)
    for entity, source, name in zip(left, right, names):
        try:
            both = pa.chunked_array([*_plain(entity, source.type).chunks, *_plain(source, source.type).chunks])
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise DataError(
                f"join key {name!r} is {entity.type} in the entity rows and {source.type} in the feature table; "
                f"write both with one type ({error})"
            ) from error
        encoded = both.combine_chunks().dictionary_encode()
        if isinstance(encoded, pa.ChunkedArray):
            encoded = encoded.combine_chunks()
        one = pc.fill_null(encoded.indices.cast(pa.int64()), -1).to_numpy(zero_copy_only=False)
        codes = np.where((codes < 0) | (one < 0), -1, codes * max(len(encoded.dictionary), 1) + one)
        # Compacted after every key, so that the product of many keys cannot overflow.
        known = codes >= 0
        codes[known] = pd.factorize(codes[known])[0]
    return codes[: rows[0]], codes[rows[0] :]


def _plain(column: pa.ChunkedArray, target: pa.DataType) -> pa.ChunkedArray:
    if pa.types.is_dictionary(target):
        target = target.value_type
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column if column.type == target else column.cast(target)


def match_asof(
    entity_codes: np.ndarray,
    entity_times: np.ndarray,
    source_codes: np.ndarray,
    source_times: np.ndarray,
    *,
    ttl: dt.timedelta | None = None,
    created: np.ndarray | None = None,
    known_only: bool = False,
) -> Match:
    """The newest feature row of the same key at or before each entity row's time.

    Of rows with one event time the one created last wins, of those the last in the table. A feature row is too
    old when it lies more than ``ttl`` before the entity row; exactly ``ttl`` still counts, as in Feast.

    :param entity_codes: int64 codes of :func:`join_codes`
    :param entity_times: int64 nanoseconds UTC
    :param source_codes: codes of the feature rows
    :param source_times: event times of the feature rows; the smallest int64 (null) never matches
    :param ttl: None or zero for no limit
    :param created: when each feature row was written, int64 nanoseconds
    :param known_only: use only feature rows created by the entity row's time (needs ``created``)
    """
    usable = np.flatnonzero((source_codes >= 0) & (source_times != _NEVER))
    if created is not None and known_only:
        usable = usable[created[usable] != _NEVER]
    tie = created if created is not None else np.zeros(len(source_times), dtype=np.int64)
    known = np.maximum(source_times, tie) if known_only and created is not None else source_times
    order = usable[np.lexsort((usable, tie[usable], source_times[usable], known[usable]))]
    if known_only and created is not None:
        order = order[_not_superseded(source_codes[order], source_times[order], tie[order])]

    position = np.full(len(entity_times), -1, dtype=np.int64)
    rows = np.flatnonzero(entity_codes >= 0)
    rows = rows[np.argsort(entity_times[rows], kind="stable")]
    if len(rows) and len(order):
        left = pd.DataFrame({"at": entity_times[rows], "key": entity_codes[rows]})
        right = pd.DataFrame({"at": known[order], "key": source_codes[order], "row": order})
        found = pd.merge_asof(left, right, on="at", by="key")["row"].fillna(-1).to_numpy(dtype=np.int64)
        if ttl:
            # Compared as a difference: the entity time less a ttl of centuries could overflow.
            limit = int(ttl / dt.timedelta(microseconds=1)) * 1000
            age = entity_times[rows] - source_times[found]
            found = np.where((found >= 0) & (age > limit), -1, found)
        position[rows] = found
    return Match(position, *_check(position, entity_times, source_times, created))


def _not_superseded(codes: np.ndarray, times: np.ndarray, created: np.ndarray) -> np.ndarray:
    """Which rows, in the order they became known, are newer in event time than all known before for their key."""
    rank = np.empty(len(codes), dtype=np.int64)
    rank[np.lexsort((np.arange(len(codes)), created, times))] = np.arange(len(codes))
    return rank == pd.Series(rank).groupby(codes).cummax().to_numpy()


def _check(
    position: np.ndarray, entity_times: np.ndarray, source_times: np.ndarray, created: np.ndarray | None
) -> tuple[int, int]:
    hit = position >= 0
    at = entity_times[hit]
    leaks = int((source_times[position[hit]] > at).sum())
    late = int((created[position[hit]] > at).sum()) if created is not None else 0
    return leaks, late

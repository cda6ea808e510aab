"""From Arrow arrays of one column, batch by batch, to a :class:`Column`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from airflow_mlops.drift import exact
from airflow_mlops.drift.column import Column, pick
from airflow_mlops.drift.histogram import Bins
from airflow_mlops.drift.names import add_names
from airflow_mlops.exceptions import DataError

_WIDTH = 1 << 16
# Whole numbers up to here are exact as floats.
_EXACT = 1 << 53
_UNITS = {"s": 1e9, "ms": 1e6, "us": 1e3, "ns": 1.0}


def kind_of(field: pa.Field, categorical: bool) -> tuple[str, str]:
    """The kind of a column and its type as text.

    :raises DataError: a nested column, or one of bytes
    """
    type_, types = _plain_type(field.type), pa.types
    if types.is_null(type_):
        return "empty", str(type_)
    if types.is_timestamp(type_) or types.is_date(type_):
        return "time", str(type_)
    text = types.is_string(type_) or types.is_large_string(type_) or types.is_string_view(type_)
    number = types.is_integer(type_) or types.is_floating(type_) or types.is_decimal(type_)
    number = number or types.is_time(type_) or types.is_duration(type_)
    if types.is_boolean(type_) or text or (categorical and number):
        return "categorical", str(type_)
    if number:
        return "numeric", str(type_)
    raise DataError(
        f"column {field.name} has type {field.type}: a profile takes numbers, text, booleans and times. "
        "Leave it out with columns=, or derive such a column from it."
    )


def _plain_type(type_: Any) -> Any:
    while True:
        if pa.types.is_dictionary(type_) or pa.types.is_run_end_encoded(type_):
            type_ = type_.value_type
        elif isinstance(type_, pa.BaseExtensionType):
            type_ = type_.storage_type
        else:
            return type_


class Accumulator:
    """Counts one column.

    :param kind: as :func:`kind_of` tells
    :param type_: the type as text
    """

    def __init__(self, kind: str, type_: str) -> None:
        self._column = Column(kind, type_)
        self._numbers = _Numbers(self._column) if kind == "numeric" else None

    def add(self, values: pa.Array) -> None:
        """Count ``values``."""
        column = self._column
        column.rows += len(values)
        values = _plain(values, keep_dictionary=column.kind == "categorical")
        if self._numbers is not None:
            column.missing += values.null_count
            self._numbers.add(_as_numbers(values))
        elif column.kind == "categorical":
            column.missing += add_names(column.categories, values)
        elif column.kind == "time":
            _add_times(column, values)
        else:
            column.missing += len(values)

    def finish(self) -> Column:
        """The column with all that was added."""
        if self._numbers is not None:
            self._numbers.finish()
            self._numbers = _Numbers(self._column)
        return self._column


def _plain(values: Any, *, keep_dictionary: bool) -> Any:
    """The values themselves: neither extension nor run-end encoded, nor a dictionary unless it is to be kept."""
    while True:
        if isinstance(values.type, pa.BaseExtensionType):
            values = values.storage
        elif pa.types.is_run_end_encoded(values.type):
            values = pc.run_end_decode(values)
        elif pa.types.is_dictionary(values.type) and not keep_dictionary:
            values = values.dictionary_decode()
        else:
            return values


def _as_numbers(values: Any) -> np.ndarray:
    """Numbers without nulls: int64, or float64 where that does not hold them; durations in nanoseconds."""
    type_, types = values.type, pa.types
    if values.null_count:
        values = values.drop_null()
    if types.is_time(type_) or types.is_duration(type_):
        whole = values.cast(pa.int32() if types.is_time32(type_) else pa.int64()).to_numpy(zero_copy_only=False)
        # One unit for all files, whatever they were written in.
        return whole * (_UNITS[type_.unit] / (1.0 if types.is_duration(type_) else _UNITS["us"]))
    if types.is_integer(type_) and not types.is_uint64(type_):
        return values.to_numpy(zero_copy_only=False).astype(np.int64, copy=False)
    return values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)


class _Numbers:
    """Counts numbers: those of a small range of whole numbers in an array, the others as floats."""

    def __init__(self, column: Column) -> None:
        self._column, self._bins = column, Bins()
        assert column.sketch is not None
        self._distinct = column.sketch
        self._low, self._whole = 0, np.zeros(0, np.int64)

    def add(self, values: np.ndarray) -> None:
        """Count int64 or float64 ``values``, slice by slice so that a slice stays in the processor's cache."""
        count = self._integers if values.dtype == np.int64 else self._floats
        for start in range(0, len(values), exact.SLICE):
            count(values[start : start + exact.SLICE])

    def _integers(self, values: np.ndarray) -> None:
        if not self._in_array(values, int(values.min()), int(values.max())):
            self._finite(values.astype(np.float64))

    def _floats(self, values: np.ndarray) -> None:
        with np.errstate(invalid="ignore"):
            lowest, highest = float(values.min()), float(values.max())
        if not np.isfinite([lowest, highest]).all():  # NaN passes through both
            nan, finite = np.isnan(values), np.isfinite(values)
            missing = int(np.count_nonzero(nan))
            self._column.missing += missing
            self._column.infinite += len(values) - missing - int(np.count_nonzero(finite))
            values = values[finite]
            if not len(values):
                return
            lowest, highest = float(values.min()), float(values.max())
        if highest - lowest < _WIDTH and max(-lowest, highest) < _EXACT and _are_whole(values[:64]):
            whole = values.astype(np.int64)
            if (whole == values).all() and self._in_array(whole, int(lowest), int(highest)):
                return
        self._finite(values)

    def _in_array(self, values: np.ndarray, lowest: int, highest: int) -> bool:
        """Count whole numbers in the array, if they are within its range; the first ones decide where it lies."""
        spread = highest - lowest + 1
        if spread > _WIDTH or lowest <= -_EXACT or highest >= _EXACT:
            return False
        if not len(self._whole):
            self._low, self._whole = lowest - (_WIDTH - spread) // 2, np.zeros(_WIDTH, np.int64)
        start = lowest - self._low
        if start < 0 or start + spread > _WIDTH:
            return False
        self._whole[start : start + spread] += np.bincount(values - lowest, minlength=spread)
        return True

    def _finite(self, values: np.ndarray) -> None:
        column = self._column
        lowest, highest = float(values.min()), float(values.max())
        column.minimum, column.maximum = pick(min, column.minimum, lowest), pick(max, column.maximum, highest)
        total, squares = exact.sums(values)
        column.total += total
        column.squares += squares
        # Both zeros are one number.
        bits = (values + 0.0 if lowest <= 0 <= highest else values).view(np.int64)
        self._distinct.add(bits)
        self._bins.add(bits, lowest, highest)

    def finish(self) -> None:
        """Hand all that was counted to the column."""
        column, used = self._column, np.flatnonzero(self._whole)
        if len(used):
            counts = self._whole[used]
            rows, first, second = int(counts.sum()), int(used @ counts), int((used * used) @ counts)
            column.total += self._low * rows + first
            column.squares += self._low**2 * rows + 2 * self._low * first + second
            values = (used + self._low).astype(np.float64)
            column.minimum = pick(min, column.minimum, float(values[0]))
            column.maximum = pick(max, column.maximum, float(values[-1]))
            self._distinct.add(values.view(np.int64))
            self._bins.add_counts(values, counts)
        column.histogram.merge(self._bins.finish())


def _are_whole(values: np.ndarray) -> bool:
    return bool((np.rint(values) == values).all())


def _add_times(column: Column, values: Any) -> None:
    column.missing += values.null_count
    if values.null_count == len(values):
        return
    instants = values.cast(pa.timestamp("us", getattr(values.type, "tz", None)), safe=False).cast(pa.int64())
    numbers = instants.drop_null().to_numpy(zero_copy_only=False)
    assert column.sketch is not None
    for start in range(0, len(numbers), exact.SLICE):
        column.sketch.add(numbers[start : start + exact.SLICE])
    for name, choose in (("minimum", min), ("maximum", max)):
        bound = str(np.datetime64(int(getattr(numbers, choose.__name__)()), "us"))
        setattr(column, name, pick(choose, getattr(column, name), bound))

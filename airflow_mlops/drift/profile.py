"""A small summary of a dataset, made in one pass, from which drift can be told without the data.

Memory does not grow with the number of rows. Profiles of parts merge to the same bits in any order.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from airflow_mlops import storage
from airflow_mlops.drift.categories import Categories
from airflow_mlops.drift.histogram import Histogram
from airflow_mlops.exceptions import DataError, InvalidInputError

VERSION = 1
_BATCH_ROWS = 131_072


@dataclass
class Column:
    """What is kept of one column.

    :param kind: ``numeric``, ``categorical``, ``time`` or ``empty`` (no value ever seen, type unknown)
    :param type: the Arrow type last seen, for messages
    :param rows: number of rows
    :param missing: nulls and NaN
    :param infinite: positive and negative infinities (numeric); part of no moment and of no bin
    :param minimum: smallest finite value; ISO 8601 for times
    :param maximum: largest finite value
    """

    kind: str
    type: str
    rows: int = 0
    missing: int = 0
    infinite: int = 0
    minimum: float | str | None = None
    maximum: float | str | None = None
    # Exact sums of the batches' sums: floats added in another order would give other last bits.
    total: Fraction = Fraction(0)
    squares: Fraction = Fraction(0)
    histogram: Histogram = field(default_factory=Histogram)
    categories: Categories = field(default_factory=Categories)

    @property
    def count(self) -> int:
        """Values that a distribution is made of: neither missing nor infinite."""
        return self.rows - self.missing - self.infinite

    @property
    def mean(self) -> float | None:
        """Mean of the finite values of a numeric column."""
        return float(self.total / self.count) if self.kind == "numeric" and self.count else None

    @property
    def std(self) -> float | None:
        """Population standard deviation of the finite values of a numeric column."""
        if self.kind != "numeric" or not self.count:
            return None
        variance = max(self.squares / self.count - (self.total / self.count) ** 2, Fraction(0))
        # Its root can fit a float where the variance itself does not.
        half = (variance.numerator.bit_length() - variance.denominator.bit_length()) // 2
        return math.ldexp(math.sqrt(variance / Fraction(4) ** half), half)

    def merge(self, other: Column) -> None:
        """Add what ``other`` saw of the same column."""
        if self.kind == "empty":
            self.kind, self.type = other.kind, other.type
        self.type = min(self.type, other.type) if other.kind != "empty" else self.type
        self.rows += other.rows
        self.missing += other.missing
        self.infinite += other.infinite
        self.minimum = _pick(min, self.minimum, other.minimum)
        self.maximum = _pick(max, self.maximum, other.maximum)
        self.total += other.total
        self.squares += other.squares
        self.histogram.merge(other.histogram)
        self.categories.merge(other.categories)

    def to_json(self) -> dict[str, Any]:
        """The column as JSON."""
        value: dict[str, Any] = {"kind": self.kind, "type": self.type, "rows": self.rows, "missing": self.missing}
        if self.kind in ("numeric", "time"):
            value |= {"minimum": self.minimum, "maximum": self.maximum}
        if self.kind == "numeric":
            value |= {"infinite": self.infinite, "mean": self.mean, "std": self.std, **self.histogram.to_json()}
            value |= {"total": _exact(self.total), "squares": _exact(self.squares)}
        if self.kind == "categorical":
            value |= self.categories.to_json()
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Column:
        """The inverse of :meth:`to_json`."""
        column = cls(str(value["kind"]), str(value["type"]), int(value["rows"]), int(value["missing"]))
        if column.kind not in ("numeric", "categorical", "time", "empty"):
            raise ValueError(f"unknown kind of column {column.kind!r}")
        if column.kind in ("numeric", "time"):
            column.minimum, column.maximum = value["minimum"], value["maximum"]
        if column.kind == "numeric":
            column.infinite = int(value["infinite"])
            column.total, column.squares = _fraction(value["total"]), _fraction(value["squares"])
            column.histogram = Histogram.from_json(value)
            if column.histogram.total != column.count:
                raise ValueError("the bins do not add up to the rows")
        if column.kind == "categorical":
            column.categories = Categories.from_json(value)
            if column.categories.total != column.count:
                raise ValueError("the categories do not add up to the rows")
        return column


@dataclass
class Profile:
    """A summary of a dataset by column.

    :param rows: number of rows
    :param columns: column name to :class:`Column`, in the data's order
    """

    rows: int
    columns: dict[str, Column]

    @classmethod
    def of(
        cls,
        source: Any,
        *,
        columns: Sequence[str] | None = None,
        categorical: Sequence[str] = (),
        label: str | None = None,
    ) -> Profile:
        """Read ``source`` once.

        :param source: a Parquet file, directory or glob (path or URI), several of them, a ``pyarrow.Table`` or a
            ``pandas.DataFrame``
        :param columns: the columns to profile; all when not given
        :param categorical: numeric columns whose numbers are names; text and booleans are categories anyway
        :param label: a column to leave out when ``columns`` is not given
        :raises DataError: no such file, an unreadable file, no rows, a column asked for that is not there, or a
            nested column
        """
        schema, rows = _open(source, columns)
        names = list(columns) if columns is not None else [name for name in schema.names if name != label]
        absent = [name for name in names if name not in schema.names]
        if absent:
            raise DataError(
                f"column(s) {', '.join(absent)} asked for but not in the data, which has {', '.join(schema.names)}"
            )
        profile = cls(0, {name: Column(*_kind(schema.field(name), name in categorical)) for name in names})
        for batch in rows:
            profile.rows += batch.num_rows
            for name, column in profile.columns.items():
                _add(column, batch.column(batch.schema.get_field_index(name)))
        if not profile.rows:
            raise DataError(
                f"{_describe(source)} has no rows; a profile needs data. Check the window that was asked for."
            )
        return profile

    def merge(self, other: Profile) -> Profile:
        """A new profile of both datasets together.

        :raises DataError: the two have different columns, or a column is of another kind in the other
        """
        if set(self.columns) != set(other.columns):
            raise DataError(
                "profiles of different columns cannot be merged; only in one of them: "
                + ", ".join(sorted(set(self.columns) ^ set(other.columns)))
            )
        merged = Profile.from_json(self.to_json())
        for name, column in merged.columns.items():
            added = Column.from_json(other.columns[name].to_json())
            if "empty" not in (column.kind, added.kind) and column.kind != added.kind:
                raise DataError(f"column {name} is {column.kind} in one profile and {added.kind} in the other")
            column.merge(added)
        merged.rows += other.rows
        return merged

    @property
    def digest(self) -> str:
        """A hash of the content, equal for profiles of equal data: a key for caches."""
        body = json.dumps(self._body(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(body.encode()).hexdigest()

    def _body(self) -> dict[str, Any]:
        return {"rows": self.rows, "columns": {name: column.to_json() for name, column in self.columns.items()}}

    def to_json(self) -> dict[str, Any]:
        """The profile as JSON: versioned, a few kilobytes per column."""
        return {"profile_version": VERSION, "digest": self.digest, **self._body()}

    @classmethod
    def from_json(cls, value: Any) -> Profile:
        """The inverse of :meth:`to_json`; nothing in ``value`` is ever executed.

        :raises InvalidInputError: not a profile, a profile of a newer version, or one that was damaged
        """
        if not isinstance(value, dict) or not isinstance(value.get("profile_version"), int):
            raise InvalidInputError("this is not a drift profile; expected JSON written by Profile.to_json()")
        if value["profile_version"] > VERSION:
            raise InvalidInputError(
                f"the profile has version {value['profile_version']}, this airflow-mlops reads up to {VERSION}: "
                "upgrade airflow-mlops here, or build the profile again with this version"
            )
        try:
            columns = {str(name): Column.from_json(column) for name, column in value["columns"].items()}
            profile = cls(int(value["rows"]), columns)
            damaged = profile.digest != value["digest"]
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InvalidInputError(f"the profile is damaged ({error!r}); build it again") from error
        if damaged:
            raise InvalidInputError("the profile is damaged (its content does not match its digest); build it again")
        return profile


def column_names(source: Any) -> list[str]:
    """The columns of ``source``, which is as :meth:`Profile.of` takes it; :class:`DataError` when it is not there."""
    return list(_open(source, None)[0].names)


def batches(source: Any, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The rows of ``source`` as record batches, the given columns of it at least."""
    return _open(source, columns)[1]


def _pick(choose: Any, first: Any, second: Any) -> Any:
    return second if first is None else first if second is None else choose(first, second)


def _exact(value: Fraction) -> list[Any]:
    """A sum of floats as a hexadecimal numerator and a power of two, exact."""
    return [f"{value.numerator:x}", value.denominator.bit_length() - 1]


def _fraction(value: list[Any]) -> Fraction:
    return Fraction(int(value[0], 16), 1 << min(int(value[1]), 4096))


def _describe(source: Any) -> str:
    return str(source) if isinstance(source, (str, list, tuple)) else f"the {type(source).__name__}"


def _open(source: Any, columns: Sequence[str] | None) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """The schema of ``source`` and its rows as record batches."""
    if isinstance(source, pa.Table):
        table = source
    elif hasattr(source, "iloc"):
        wanted = source if columns is None else source[[name for name in columns if name in source.columns]]
        try:
            table = pa.Table.from_pandas(wanted, preserve_index=False)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DataError(
                f"a column mixes types that Arrow cannot hold together: {error}. Cast it to one type."
            ) from error
    else:
        return _open_files(source, columns)
    return table.schema, iter(table.to_batches(_BATCH_ROWS))


def _open_files(source: Any, columns: Sequence[str] | None) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    import fsspec
    import pyarrow.dataset as ds

    uris = [str(uri) for uri in source] if isinstance(source, (list, tuple)) else [str(source)]
    paths: list[str] = []
    for uri in uris:
        fs, path = fsspec.core.url_to_fs(storage.local_path(uri) if storage.is_local(uri) else uri)
        if any(mark in path for mark in "*?["):
            paths += fs.glob(path)
        elif fs.isdir(path):
            paths += [name for name in fs.find(path) if name.endswith((".parquet", ".pq"))]
        elif fs.exists(path):
            paths.append(path)
    if not paths:
        raise DataError(f"no Parquet file at {', '.join(uris)}; check the path and that the data has landed")
    try:
        # The schema over all files: a column that only later files have must not be lost.
        schema = pa.unify_schemas(
            [ds.dataset(path, filesystem=fs, format="parquet").schema for path in sorted(paths)],
            promote_options="permissive",
        )
        dataset = ds.dataset(sorted(paths), filesystem=fs, format="parquet", schema=schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OSError) as error:
        raise DataError(f"cannot read {', '.join(uris)} as Parquet: {error}") from error

    def read() -> Iterator[pa.RecordBatch]:
        wanted = None if columns is None else [name for name in columns if name in schema.names]
        try:
            # One thread: the order of batches decides the last bit of their sums.
            yield from dataset.to_batches(columns=wanted, batch_size=_BATCH_ROWS, use_threads=False)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"cannot read {', '.join(uris)}: {error}") from error

    return schema, read()


def _kind(field_: pa.Field, categorical: bool) -> tuple[str, str]:
    type_ = field_.type.value_type if pa.types.is_dictionary(field_.type) else field_.type
    types = pa.types
    if types.is_nested(type_) or types.is_binary(type_) or types.is_large_binary(type_):
        raise DataError(
            f"column {field_.name} has type {type_}: a profile takes numbers, text, booleans and times. "
            "Leave it out with columns=, or derive such a column from it."
        )
    if types.is_null(type_):
        return "empty", str(type_)
    if types.is_timestamp(type_) or types.is_date(type_):
        return "time", str(type_)
    if categorical or types.is_boolean(type_) or types.is_string(type_) or types.is_large_string(type_):
        return "categorical", str(type_)
    if types.is_string_view(type_):
        return "categorical", str(type_)
    return "numeric", str(type_)


def _add(column: Column, values: pa.Array) -> None:
    column.rows += len(values)
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode() if column.kind != "categorical" else values
    if column.kind == "numeric":
        _add_numbers(column, values)
    elif column.kind == "categorical":
        _add_categories(column, values)
    elif column.kind == "time":
        _add_times(column, values)
    else:
        column.missing += len(values)


def _add_numbers(column: Column, values: pa.Array) -> None:
    if values.null_count:
        column.missing += values.null_count
        values = values.drop_null()
    if pa.types.is_time(values.type) or pa.types.is_duration(values.type):
        values = values.cast(pa.int32() if pa.types.is_time32(values.type) else pa.int64())
    numbers = values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    finite = np.isfinite(numbers)
    if not finite.all():
        nan = int(np.isnan(numbers).sum())
        column.missing += nan
        column.infinite += len(numbers) - int(finite.sum()) - nan
        numbers = numbers[finite]
    if not len(numbers):
        return
    column.minimum = _pick(min, column.minimum, float(numbers.min()))
    column.maximum = _pick(max, column.maximum, float(numbers.max()))
    # Centred first, so that the variance of large numbers does not cancel; scaled, so that it does not overflow.
    scale = max(abs(float(numbers.min())), abs(float(numbers.max()))) if abs(float(numbers.max())) > 1e100 else 1.0
    scaled = numbers / scale if scale != 1.0 else numbers
    centre = float(scaled.mean())
    deviations = scaled - centre
    size, centre_, scale_ = len(numbers), Fraction(centre), Fraction(scale)
    column.total += size * centre_ * scale_
    column.squares += (Fraction(float(np.dot(deviations, deviations))) + size * centre_**2) * scale_**2
    column.histogram.add(numbers)


def _add_categories(column: Column, values: pa.Array) -> None:
    if pa.types.is_string_view(values.type):
        values = values.cast(pa.large_string())  # counting views loses their nulls
    counted = pc.value_counts(values)
    names, counts = counted.field("values"), counted.field("counts").to_pylist()
    if pa.types.is_dictionary(names.type):
        names = names.dictionary_decode()
    merged: dict[str, int] = {}
    for name, count in zip(names.to_pylist(), counts):
        if name is None or name != name:
            column.missing += count
        else:
            text = category_name(name)
            merged[text] = merged.get(text, 0) + count
    column.categories.add(merged.items())


def category_name(value: Any) -> str:
    """A category's name: 1 and 1.0 are one category, since a missing value turns whole numbers into floats."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _add_times(column: Column, values: pa.Array) -> None:
    column.missing += values.null_count
    if values.null_count == len(values):
        return
    bounds = pc.min_max(values.cast(pa.timestamp("us", getattr(values.type, "tz", None)), safe=False))
    low, high = (bounds[key].cast(pa.int64()).as_py() for key in ("min", "max"))
    column.minimum = _pick(min, column.minimum, str(np.datetime64(low, "us")))
    column.maximum = _pick(max, column.maximum, str(np.datetime64(high, "us")))

"""Datasets as units of work: some row groups, a file or a slice of a table, which give their columns as Arrow arrays.

A unit is read in bounded memory: local Parquet column by column, everything else batch by batch.
"""

from __future__ import annotations

import contextlib
import gzip
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from airflow_mlops import storage
from airflow_mlops.exceptions import DataError, ExternalSystemError

_UNIT_ROWS = 1 << 20
# More for each value than this are the values themselves and not their places in a dictionary.
_INDEX_BYTES = 8
_BATCH_ROWS = 1 << 16
_PARQUET, _CSV = (".parquet", ".pq"), (".csv", ".csv.gz", ".tsv", ".tsv.gz")
PARQUET = "parquet"
_READ_ERRORS = (pa.ArrowException, OSError, EOFError, zlib.error)


class Unit(ABC):
    """A part of a dataset that is read by itself."""

    #: How errors call it.
    name: str
    schema: pa.Schema
    rows: int | None = None

    @abstractmethod
    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The rows, the given columns of them."""

    def arrays(self, columns: Sequence[str]) -> Iterator[tuple[str, pa.Array]]:
        """Pairs of a column's name and some of its values, in any order; the given columns, all of them present."""
        for batch in self.batches(columns):
            for name in columns:
                yield name, batch.column(batch.schema.get_field_index(name))


@dataclass
class TableUnit(Unit):
    """Some rows of a ``pyarrow.Table``."""

    table: pa.Table
    name: str = "the table"

    def __post_init__(self) -> None:
        self.schema, self.rows = self.table.schema, self.table.num_rows

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        return iter(self.table.select(list(columns)).to_batches(_BATCH_ROWS))

    def arrays(self, columns: Sequence[str]) -> Iterator[tuple[str, pa.Array]]:
        for name in columns:
            for chunk in self.table.column(name).chunks:
                yield name, chunk


@dataclass
class StreamUnit(Unit):
    """Record batches that come from elsewhere, once: a ``pyarrow.dataset.Dataset`` or a ``RecordBatchReader``."""

    source: Any
    name: str = "the dataset"

    def __post_init__(self) -> None:
        self.schema = self.source.schema

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        with reading(self.name):
            if hasattr(self.source, "to_batches"):
                yield from self.source.to_batches(columns=list(columns), batch_size=_BATCH_ROWS, use_threads=False)
            else:
                yield from (batch.select(list(columns)) for batch in self.source)


@dataclass(frozen=True)
class ParquetUnit(Unit):
    """Row groups ``first`` to ``last`` (exclusive) of one Parquet file. It pickles: other machines can read it.

    :param uri: where the file is; with a protocol unless it is local
    """

    uri: str
    schema: pa.Schema
    first: int
    last: int
    rows: int

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.uri

    @classmethod
    def of(cls, uri: str) -> list[ParquetUnit]:
        """The units of the file at ``uri``, each of about a million rows or of one row group."""
        with reading(uri), _parquet(uri) as file:
            schema, metadata = file.schema_arrow.remove_metadata(), file.metadata
            sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        units, first, rows = [], 0, 0
        for last, size in enumerate(sizes):
            if rows and rows + size > _UNIT_ROWS:
                units.append(cls(uri, schema, first, last, rows))
                first, rows = last, 0
            rows += size
        return [*units, cls(uri, schema, first, len(sizes), rows)]

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        with reading(self.uri), _parquet(self.uri) as file:
            yield from self._read(file, columns, _BATCH_ROWS)

    def arrays(self, columns: Sequence[str]) -> Iterator[tuple[str, pa.Array]]:
        if not storage.is_local(self.uri):  # one request for all columns, not one for each
            yield from super().arrays(columns)
            return
        with reading(self.uri), _parquet(self.uri) as file:
            dictionaries = self._dictionaries(file.metadata, columns)
        with reading(self.uri), _parquet(self.uri, dictionaries) as file:
            for name in columns:
                for batch in self._read(file, [name], _UNIT_ROWS):
                    yield name, batch.column(0)

    def _dictionaries(self, metadata: Any, columns: Sequence[str]) -> list[str]:
        """The columns of text of which the file holds every value but once: to read them as such costs less."""
        texts = {name for name in columns if pa.types.is_string(self.schema.field(name).type)}
        if not texts or self.first == self.last:
            return []
        group = metadata.row_group(self.first)
        chunks = (group.column(i) for i in range(group.num_columns))
        small = {c.path_in_schema for c in chunks if c.total_uncompressed_size < _INDEX_BYTES * c.num_values}
        return sorted(texts & small)

    def _read(self, file: Any, columns: Sequence[str], rows: int) -> Iterator[pa.RecordBatch]:
        groups = range(self.first, self.last)
        return file.iter_batches(rows, row_groups=groups, columns=list(columns), use_threads=False)


@dataclass(frozen=True)
class CsvUnit(Unit):
    """One CSV file (TSV where it is named so), whose columns' types are those of all its rows. It pickles."""

    uri: str
    schema: pa.Schema

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.uri

    @classmethod
    def of(cls, uri: str, columns: Sequence[str] | None) -> CsvUnit:
        """The file at ``uri``; it is read once to learn the types.

        :raises DataError: not a CSV, or a column of times some of which have a zone
        """
        types: dict[str, pa.DataType] = {}
        with reading(uri):
            while True:
                with _csv(uri, types, None) as reader:
                    try:
                        for _ in reader:
                            pass
                    except pa.ArrowInvalid as error:
                        if not (where := re.search(r"CSV column #(\d+): .*conversion error", str(error))):
                            raise
                        field = reader.schema.field(int(where[1]))
                        wanted = columns is None or field.name in columns
                        types[field.name] = _wider(field, str(error), uri) if wanted else pa.string()
                    else:
                        return cls(uri, reader.schema)

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        with reading(self.uri), _csv(self.uri, {f.name: f.type for f in self.schema}, columns) as reader:
            yield from reader


def open_source(source: Any, columns: Sequence[str] | None = None) -> list[Unit]:
    """The units of ``source``, which is as :meth:`airflow_mlops.drift.Profile.of` takes it.

    :raises DataError: nothing there, an unreadable file, or a frame that Arrow cannot hold
    :raises ExternalSystemError: the store of the files cannot be reached
    """
    if isinstance(source, pa.RecordBatch):
        source = pa.Table.from_batches([source])
    if hasattr(source, "iloc"):
        source = _from_pandas(source, columns)
    if isinstance(source, pa.Table):
        return [TableUnit(source.slice(i, _UNIT_ROWS)) for i in range(0, max(source.num_rows, 1), _UNIT_ROWS)]
    if isinstance(source, pa.RecordBatchReader) or hasattr(source, "to_batches"):
        return [StreamUnit(source)]
    units: list[Unit] = []
    for uri in list_uris(source):
        if form_of(uri) != PARQUET:
            units.append(CsvUnit.of(uri, columns))
        else:
            units += ParquetUnit.of(uri)
    return units


def form_of(uri: str) -> str:
    """As what a file is read, by its name: :data:`PARQUET`, or the ending of a CSV (``.csv``, ``.tsv.gz`` and such)."""
    return next((ending for ending in _CSV if uri.lower().endswith(ending)), PARQUET)


def list_uris(source: Any) -> list[str]:
    """The files of a path, URI, directory or glob, or of a list of them, sorted.

    :raises DataError: none there, or a directory with both Parquet and CSV files
    :raises ExternalSystemError: the store cannot be reached
    """
    given = [str(uri) for uri in source] if isinstance(source, (list, tuple)) else [str(source)]
    found: set[str] = set()
    for uri in given:
        fs, path = storage.fresh_filesystem(uri)
        with storage.remote_errors(uri):
            paths = _paths(fs, path)
        if not paths:
            raise DataError(f"no Parquet or CSV file at {uri}; check the path and that the data has landed")
        found |= {path if storage.is_local(uri) else fs.unstrip_protocol(path) for path in paths}
    return sorted(found)


def _paths(fs: Any, path: str) -> list[str]:
    if any(mark in path for mark in "*?["):
        return [name for name, entry in fs.glob(path, detail=True).items() if entry["type"] != "directory"]
    if fs.isdir(path):
        return _data_files(fs.find(path), path)
    return [path] if fs.exists(path) else []


def _data_files(paths: list[str], folder: str) -> list[str]:
    """The Parquet or CSV files in ``folder``; not those that jobs hide behind a dot or an underscore."""
    visible = [path for path in paths if not any(part[:1] in "._" for part in path[len(folder) :].split("/") if part)]
    parquet = [path for path in visible if path.lower().endswith(_PARQUET)]
    csv = [path for path in visible if path.lower().endswith(_CSV)]
    if parquet and csv:
        raise DataError(f"{folder} has Parquet and CSV files; name those that are meant, as in {folder}/*.parquet")
    return parquet or csv


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Errors of reading name what was read: its content, or the store where it is."""
    with storage.remote_errors(name):
        try:
            yield
        except _READ_ERRORS as error:
            if isinstance(error, FileNotFoundError):
                raise ExternalSystemError(f"{name} is gone since it was listed; a retry looks for it again") from error
            if not storage.is_local(name) and _of_store(error):
                raise
            said = " ".join(str(error).split()).rstrip(".")
            raise DataError(f"cannot read {name}: {said}. Write it again, or leave it out of the window.") from error


def _of_store(error: BaseException) -> bool:
    """Whether ``error`` comes of a store and not of the content, of which Arrow says no more than OSError."""
    return isinstance(error, OSError) and not (
        isinstance(error, gzip.BadGzipFile) or (type(error) is OSError and error.errno is None)
    )


def _parquet(uri: str, dictionaries: Sequence[str] = ()) -> Any:
    import pyarrow.parquet as pq

    if storage.is_local(uri):
        path = storage.local_path(uri)
        return pq.ParquetFile(path, read_dictionary=list(dictionaries), page_checksum_verification=True)
    fs, path = storage.filesystem(uri)
    # Not by pyarrow's FSSpecHandler, to which a store that is away is one without the file.
    file = pa.PythonFile(fs.open(path, "rb"), mode="r")
    return pq.ParquetFile(file, pre_buffer=True, page_checksum_verification=True)


@contextlib.contextmanager
def _csv(uri: str, types: dict[str, pa.DataType], columns: Sequence[str] | None) -> Iterator[Any]:
    import fsspec
    from pyarrow import csv

    options = csv.ConvertOptions(column_types=types, strings_can_be_null=True, include_columns=columns or None)
    parse = csv.ParseOptions(delimiter="\t" if form_of(uri).startswith(".tsv") else ",", newlines_in_values=True)
    with fsspec.open(uri, "rb", compression="infer") as file:
        reading = csv.ReadOptions(block_size=1 << 22, use_threads=False)
        with csv.open_csv(file, read_options=reading, parse_options=parse, convert_options=options) as reader:
            yield reader


def _wider(field: pa.Field, message: str, uri: str) -> pa.DataType:
    """The next type to try for a CSV column, some value of which does not fit its type."""
    types = pa.types
    if "zone offset" in message:
        raise DataError(
            f"column {field.name} of {uri} has times with and without a zone: {message}. Write all of them in UTC."
        )
    if types.is_null(field.type) or types.is_int64(field.type):
        return pa.float64()
    if types.is_date(field.type):
        return pa.timestamp("us")
    if types.is_timestamp(field.type) and field.type.unit != "ns":
        return pa.timestamp("ns", field.type.tz)
    return pa.time64("ns") if types.is_time32(field.type) else pa.string()


def _from_pandas(frame: Any, columns: Sequence[str] | None) -> pa.Table:
    wanted = frame.columns if columns is None else [name for name in frame.columns if str(name) in columns]
    names = [str(name) for name in wanted]
    check_unique(names)
    arrays = []
    for name, given in zip(names, wanted):
        series = frame[given]
        if hasattr(series, "sparse"):
            series = series.sparse.to_dense()
        plain = isinstance(series.dtype, np.dtype) and series.dtype.kind in "fiu"
        try:
            # NaN needs no bitmap here: it is counted as missing anyway.
            array = pa.array(series.to_numpy(), from_pandas=False) if plain else pa.Array.from_pandas(series)
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise DataError(
                f"column {name} mixes types, or has one that Arrow cannot hold: {error}. Cast it to one type."
            ) from error
        if series.dtype == object and pa.types.is_timestamp(array.type):
            zones = {str(getattr(value, "tzinfo", None)) for value in series[series.notna()]}
            if len(zones) > 1:
                raise DataError(
                    f"column {name} mixes times of the zones {', '.join(sorted(zones))}; convert all to UTC"
                )
        arrays.append(array)
    return pa.table(arrays, names=names) if arrays else pa.table({})


def check_unique(names: Sequence[str]) -> None:
    """:raises DataError: a column comes twice"""
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise DataError(f"column(s) {', '.join(twice)} come more than once in the data; rename them")

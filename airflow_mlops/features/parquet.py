"""Reading a folder or file of Parquet by time range, whatever its files agree on."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.fs

from airflow_mlops.exceptions import DataError, ExternalSystemError
from airflow_mlops.storage import is_local, local_path


def open_dataset(uri: str, what: str, storage_options: dict[str, Any] | None = None) -> ds.Dataset:
    """The Parquet file at ``uri``, or every ``*.parquet`` file below it in the order of their names.

    A column that is empty in one file and typed in another takes the type that holds both.

    :param uri: local path or URI, a file or a folder
    :param what: how an error calls it
    :raises DataError: nothing is there, no Parquet file is, or the files' types contradict each other
    :raises ExternalSystemError: the store cannot be read
    """
    filesystem, path = _filesystem(uri, storage_options or {})
    try:
        info = filesystem.get_file_info(path)
        if info.type == pyarrow.fs.FileType.NotFound:
            raise DataError(f"{what}: nothing is at {uri}; expected a Parquet file or a folder of them")
        files = [path] if info.type == pyarrow.fs.FileType.File else _below(filesystem, path)
        if not files:
            raise DataError(f"{what}: {uri} holds no *.parquet file; write the data there before this task runs")
        dataset = ds.dataset(files, format="parquet", filesystem=filesystem)
        schemas = [fragment.physical_schema.remove_metadata() for fragment in dataset.get_fragments()]
        return dataset.replace_schema(pa.unify_schemas(schemas, promote_options="permissive"))
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"{what}: the files at {uri} cannot be read as one Parquet table: {error}") from error
    except OSError as error:
        raise ExternalSystemError(f"{what}: cannot read {uri}: {error}. Check the permissions there.") from error


def _filesystem(uri: str, storage_options: dict[str, Any]) -> tuple[pyarrow.fs.FileSystem, str]:
    if is_local(uri):
        return pyarrow.fs.LocalFileSystem(), local_path(uri)
    import fsspec

    fs, path = fsspec.core.url_to_fs(uri, **storage_options)
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs)), path


def _below(filesystem: pyarrow.fs.FileSystem, folder: str) -> list[str]:
    found = filesystem.get_file_info(pyarrow.fs.FileSelector(folder, recursive=True))
    return sorted(
        info.path
        for info in found
        if info.type == pyarrow.fs.FileType.File
        and info.path.endswith(".parquet")
        and not any(part.startswith((".", "_")) for part in info.path.removeprefix(folder).split("/"))
    )


def between(
    column: str, kind: pa.DataType, start: dt.datetime | None, end: dt.datetime, *, closed: bool
) -> ds.Expression:
    """A filter for ``start <= column < end`` (``<= end`` when ``closed``) that Parquet's row groups can answer.

    :param kind: the column's type; a naive timestamp is compared as UTC
    """
    if pa.types.is_timestamp(kind):
        start, end = (_literal(value, kind) for value in (start, end))
    field = pc.field(column)
    until = field <= end if closed else field < end
    return until if start is None else (field >= start) & until


def _literal(value: dt.datetime | None, kind: pa.TimestampType) -> Any:
    if value is None:
        return None
    exact = pa.scalar(value.astimezone(dt.timezone.utc), pa.timestamp("us", "UTC"))
    return exact if kind.tz is not None else exact.cast(pa.timestamp("us"))

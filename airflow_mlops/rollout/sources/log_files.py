"""Growing folders of Parquet files, each row read once: what is new since the last look, and nothing else."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airflow_mlops.exceptions import DataError, ExternalSystemError, MlopsError

if TYPE_CHECKING:
    import pyarrow as pa

TIME_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
#: Seconds by which the clocks of writer, store and reader may differ.
CLOCKS = 60.0
_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


@dataclass
class _File:
    """How far a file has been read: rows up to the time ``mark``, or its first ``rows`` where rows have no time."""

    size: int
    written: float
    mark: float = -math.inf
    rows: int = 0
    done: bool = False


class LogFiles:
    """The Parquet files of a dataset that others write to.

    A file is complete when it appears, or grows only at its end; it is not rewritten into others meanwhile. What is
    remembered of each file is dropped once it has been read to its end and nothing has been written for ``grace``.

    :param path: folder (searched at every depth), file or pattern, local or at any URI that fsspec knows; with
        ``strftime`` codes only the hours (UTC) that can hold something new are listed
    :param time: column with the rows' times; None: rows have none and count as soon as they appear
    :param time_unit: of a time column that is a number
    :param grace: seconds that a file may come after others that were written later
    :param open_seconds: so long may a file be unreadable because it is still being written
    """

    def __init__(
        self, path: str, time: str | None, *, time_unit: str = "s", grace: float = 3600.0, open_seconds: float = 30.0
    ) -> None:
        self.path, self.time = path, time
        self._unit, self._grace, self._open = TIME_UNITS[time_unit], grace, open_seconds
        self._files: dict[str, _File] = {}
        self._written_before = -math.inf

    def new_rows(self, columns: Sequence[str], start: float, upto: float, now: float) -> Iterator[tuple[str, pa.Table]]:
        """File by file the rows of ``[start, upto]`` that no earlier call gave; a file counts as read when the
        next one is asked for.

        :raises DataError: a file is no Parquet or lacks a column; names the file
        :raises ExternalSystemError: the files cannot be listed or read
        """
        # What was written before the start holds nothing after it, but for clocks that differ.
        self._written_before = max(self._written_before, start - CLOCKS)
        for uri, size, written in self._list(start, now):
            known = self._files.get(uri)
            if known is None:
                if written < self._written_before:
                    continue
                known = self._files[uri] = _File(size, written)
            elif known.done and (known.size, known.written) == (size, written):
                continue
            known.size, known.written, known.done = size, written, False
            table, rows, done = self._read(uri, known, columns, start, upto, now)
            if table is not None and table.num_rows:
                yield uri, table
            known.mark, known.rows, known.done = max(known.mark, upto), rows, done
        self._forget(now)

    def _forget(self, now: float) -> None:
        self._written_before = max(self._written_before, now - self._grace)
        old = [uri for uri, file in self._files.items() if file.done and file.written < self._written_before]
        for uri in old:
            del self._files[uri]

    def _list(self, start: float, now: float) -> list[tuple[str, int, float]]:
        import fsspec

        try:
            filesystem, _ = fsspec.core.url_to_fs(self.path)
            # A listing remembered from before would hide what others have written since.
            filesystem.invalidate_cache()
            entries: dict[str, Any] = {}
            for pattern in self._patterns(max(start, self._written_before - self._grace), now):
                entries |= filesystem.glob(fsspec.core.url_to_fs(pattern)[1], detail=True)
        except Exception as error:
            raise ExternalSystemError(f"cannot list {self.path}: {type(error).__name__}: {error}") from error
        found = []
        for name, entry in entries.items():
            if entry.get("type") == "file" and not name.rsplit("/", 1)[-1].startswith((".", "_")):
                uri = filesystem.unstrip_protocol(name)
                found.append((uri, int(entry.get("size") or 0), _written(entry)))
        return sorted(found, key=lambda file: (file[2], file[0]))

    def _patterns(self, since: float, now: float) -> list[str]:
        path = self.path
        if not any(sign in path for sign in "*?[") and not path.endswith((".parquet", ".pq")):
            path = f"{path.rstrip('/')}/**/*.parquet"
        if "%" not in path:
            return [path]
        hours = range(int(since // 3600), int(now // 3600) + 1)
        moments = (dt.datetime.fromtimestamp(hour * 3600, dt.timezone.utc) for hour in hours)
        return list(dict.fromkeys(moment.strftime(path) for moment in moments))

    def _read(
        self, uri: str, known: _File, columns: Sequence[str], start: float, upto: float, now: float
    ) -> tuple[pa.Table | None, int, bool]:
        """New rows, rows there are, and whether all of them are read now."""
        import fsspec
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            filesystem, path = fsspec.core.url_to_fs(uri)
            with filesystem.open(path, "rb") as stream:
                file = pq.ParquetFile(stream)
                self._check_columns(uri, file.schema_arrow, columns)
                if self.time is None:
                    table = file.read(columns=list(columns)).slice(known.rows)
                    return table, file.metadata.num_rows, True
                return self._between(uri, file, columns, max(known.mark, math.nextafter(start, -math.inf)), upto)
        except FileNotFoundError:
            return None, known.rows, True
        except MlopsError:
            raise
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, ValueError, EOFError) as error:
            if now - known.written < self._open:
                return None, known.rows, False
            if isinstance(error, OSError) and not isinstance(error, pa.ArrowInvalid) and error.errno is not None:
                raise ExternalSystemError(f"cannot read {uri}: {type(error).__name__}: {error}") from error
            raise DataError(
                f"{uri} is no readable Parquet file ({_line(error)}); remove it, or have its writer write under a name "
                "that begins with a dot and rename"
            ) from error
        except Exception as error:
            raise ExternalSystemError(f"cannot read {uri}: {type(error).__name__}: {_line(error)}") from error

    def _check_columns(self, uri: str, schema: pa.Schema, columns: Sequence[str]) -> None:
        missing = [name for name in columns if name not in schema.names]
        if missing:
            raise DataError(f"{uri} has no column {', '.join(missing)}; it has {', '.join(schema.names)}")

    def _between(
        self, uri: str, file: Any, columns: Sequence[str], after: float, upto: float
    ) -> tuple[pa.Table | None, int, bool]:
        import pyarrow as pa

        assert self.time is not None
        leaves = [file.metadata.schema.column(index).path for index in range(file.metadata.num_columns)]
        position = leaves.index(self.time)
        tables, done = [], True
        for group in range(file.metadata.num_row_groups):
            statistics = file.metadata.row_group(group).column(position).statistics
            if statistics is not None and statistics.has_min_max and not statistics.null_count:
                low, high = self._instant(statistics.min), self._instant(statistics.max)
                if high is not None and high <= after:
                    continue
                if low is not None and low > upto:
                    done = False
                    continue
            table = file.read_row_group(group, columns=list(columns))
            times = self._seconds(uri, table.column(self.time))
            done = done and bool((times <= upto).all())
            tables.append(table.filter(pa.array((times > after) & (times <= upto))))
        return (pa.concat_tables(tables) if tables else None), file.metadata.num_rows, done

    def _instant(self, value: Any) -> float | None:
        """A statistic of the time column in Unix seconds; None for what must be read to be known."""
        if isinstance(value, dt.datetime):
            return (value if value.tzinfo else value.replace(tzinfo=dt.timezone.utc)).timestamp()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return value * self._unit
        return None

    def _seconds(self, uri: str, column: pa.ChunkedArray) -> Any:
        """The time column in Unix seconds; times without a zone are UTC."""
        import numpy as np
        import pyarrow as pa

        kind = column.type
        if column.null_count:
            raise DataError(f"{uri} has {column.null_count} rows without {self.time}")
        if pa.types.is_timestamp(kind):
            return column.cast(pa.int64()).to_numpy() / _PER_SECOND[kind.unit]
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            raise DataError(f"{uri} has the time column {self.time} of type {kind}; expected timestamps or numbers")
        seconds = column.to_numpy().astype(float) * self._unit
        if not np.isfinite(seconds).all():
            raise DataError(f"{uri} has rows whose {self.time} is not finite")
        return seconds


def _written(entry: dict[str, Any]) -> float:
    """When a file was written, as its filesystem tells."""
    for name in ("mtime", "LastModified", "last_modified", "updated", "created"):
        value = entry.get(name)
        if isinstance(value, dt.datetime):
            return (value if value.tzinfo else value.replace(tzinfo=dt.timezone.utc)).timestamp()
        if isinstance(value, int | float):
            return float(value)
    return math.inf


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."

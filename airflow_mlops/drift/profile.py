"""A small summary of a dataset, made in one pass, from which drift can be told without the data.

Memory does not grow with the number of rows. A profile is the same to the last bit whatever order the rows came in and
however they were spread over files, batches, threads or machines: sums are exact, bins and sketches do not depend on
order. KLL of ``datasketches`` is not used, because merging it in another order gives other quantiles.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from airflow_mlops.drift.accumulate import Accumulator, kind_of
from airflow_mlops.drift.column import Column, check_mergeable
from airflow_mlops.drift.sources import Unit, check_unique, open_source
from airflow_mlops.exceptions import DataError, InvalidInputError

VERSION = 2


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
        threads: int = 1,
    ) -> Profile:
        """Read ``source`` once (CSV twice: first for the types of its columns).

        :param source: a Parquet or CSV file, directory or glob (path or URI), several of them, a ``pyarrow`` Table,
            RecordBatch, RecordBatchReader or Dataset, or a ``pandas.DataFrame``. In a directory, names that begin
            with a dot or an underscore are left out; keys in the names of partitions are no columns.
        :param columns: the columns to profile; all when not given
        :param categorical: numeric columns whose numbers are names; text and booleans are categories anyway
        :param label: a column to leave out when ``columns`` is not given
        :param threads: parts of the data (a million rows, or a row group) read at the same time; more need more
            memory and give the same bits
        :raises DataError: no such file, an unreadable file, no rows, a column asked for that is not there, that comes
            twice or changes its type from file to file, times in different zones, or a nested column
        """
        units = open_source(source, columns)
        plan = Plan.of(units, columns, categorical, label)
        profile = merged((plan.profile(unit) for unit in units) if threads < 2 else _in_threads(plan, units, threads))
        return plan.checked(profile, source)

    def merge(self, other: Profile) -> Profile:
        """A new profile of both datasets together.

        :raises DataError: the two have different columns, a column is of another kind in the other, or is of times
            in another zone
        """
        if set(self.columns) != set(other.columns):
            raise DataError(
                "profiles of different columns cannot be merged; only in one of them: "
                + ", ".join(sorted(set(self.columns) ^ set(other.columns)))
            )
        result = Profile.from_json(self.to_json())
        result.absorb(Profile.from_json(other.to_json()))
        return result

    def absorb(self, other: Profile) -> None:
        """Add ``other``, which has the same columns and is not used again, to this profile."""
        self.rows += other.rows
        for name, column in self.columns.items():
            column.merge(other.columns[name], name)

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


@dataclass(frozen=True)
class Plan:
    """What to profile of a dataset; it pickles, so that parts of the data can be profiled elsewhere.

    :param kinds: column to its kind and type
    :param categorical: numeric columns whose numbers are names
    """

    kinds: dict[str, tuple[str, str]]
    categorical: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, units: Sequence[Unit], columns: Sequence[str] | None, categorical: Sequence[str], label: str | None
    ) -> Plan:
        """The plan for all ``units``, from their schemas.

        :raises DataError: a column is absent, comes twice, is nested, or differs from unit to unit
        """
        seen: dict[str, tuple[tuple[str, str], str]] = {}
        present = list(dict.fromkeys(name for unit in units for name in unit.schema.names))
        names = list(columns) if columns is not None else [name for name in present if name != label]
        if absent := [name for name in names if name not in present]:
            raise DataError(
                f"column(s) {', '.join(absent)} asked for but not in the data, which has {', '.join(present)}"
            )
        known: pa.Schema | None = None
        for unit in units:
            if known is not None and unit.schema.equals(known):
                continue
            known = unit.schema
            check_unique([name for name in known.names if name in names])
            for name in names:
                if name in known.names:
                    kind = kind_of(known.field(name), name in categorical)
                    before, where = seen.setdefault(name, (kind, unit.name))
                    check_mergeable(name, before, kind, f"in {where}, and", f"in {unit.name}")
                    if before[0] == "empty" != kind[0]:
                        seen[name] = (kind, unit.name)
        return cls({name: seen[name][0] for name in names}, tuple(categorical))

    def profile(self, unit: Unit) -> Profile:
        """The profile of one unit; a column that it lacks is missing in all its rows."""
        own = [name for name in self.kinds if name in unit.schema.names]
        counting = {name: Accumulator(*kind_of(unit.schema.field(name), name in self.categorical)) for name in own}
        read = 0
        for name, values in unit.arrays(own):
            counting[name].add(values)
            read += len(values) if name == own[0] else 0
        found = {name: column.finish() for name, column in counting.items()}
        rows = read if own else unit.rows or 0
        return Profile(rows, {name: found.get(name) or Column("empty", "null", rows, rows) for name in self.kinds})

    def checked(self, profile: Profile | None, source: Any) -> Profile:
        """``profile``, unless it is of no rows."""
        if profile is None or not profile.rows:
            raise DataError(
                f"{_describe(source)} has no rows; a profile needs data. Check the window that was asked for."
            )
        return profile


def merged(profiles: Iterable[Profile]) -> Profile | None:
    """All ``profiles`` as one, None when there are none; the first is changed."""
    result: Profile | None = None
    for profile in profiles:
        if result is None:
            result = profile
        else:
            result.absorb(profile)
    return result


def _in_threads(plan: Plan, units: Sequence[Unit], threads: int) -> Iterator[Profile]:
    """The profiles of the units as they get ready; never more units in memory than threads."""
    with ThreadPoolExecutor(threads, thread_name_prefix="profile") as pool:
        running: set[Future[Profile]] = set()
        waiting = iter(units)
        try:
            for unit in waiting:
                running.add(pool.submit(plan.profile, unit))
                if len(running) >= threads:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        finally:
            for future in running:
                future.cancel()


def column_names(source: Any) -> list[str]:
    """The columns of ``source``, which is as :meth:`Profile.of` takes it; :class:`DataError` when it is not there."""
    return list(dict.fromkeys(name for unit in open_source(source) for name in unit.schema.names))


def batches(source: Any, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The rows of ``source`` as record batches of the given columns, as far as the data have them."""
    for unit in open_source(source, columns):
        yield from unit.batches([name for name in columns if name in unit.schema.names])


def _describe(source: Any) -> str:
    return str(source) if isinstance(source, (str, list, tuple)) else f"the {type(source).__name__}"

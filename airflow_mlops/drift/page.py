"""Evidently's report on a sample, for people to look at. The verdict never comes from it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from airflow_mlops import storage
from airflow_mlops.drift.profile import Column, Profile, batches

ROWS = 5000


def sample(source: Any, profile: Profile, rows: int = ROWS) -> pd.DataFrame:
    """At most ``rows`` rows of ``source``, the same ones every time; ``profile`` is that of the same source."""
    chosen = np.arange(profile.rows)
    if profile.rows > rows:
        chosen = np.sort(np.random.default_rng(0).choice(profile.rows, rows, replace=False))
    kept, offset = [], 0
    for batch in batches(source, list(profile.columns)):
        first, last = np.searchsorted(chosen, [offset, offset + batch.num_rows])
        kept.append(batch.take(pa.array(chosen[first:last] - offset)))
        offset += batch.num_rows
    return together(kept).select(list(profile.columns)).to_pandas()


def resample(profile: Profile, rows: int = ROWS) -> pd.DataFrame:
    """``rows`` rows with each column's distribution as profiled, columns independent of each other.

    Stands for data that are not at hand; right for any report that looks at one column at a time. Columns whose
    distribution a profile does not hold (times, and categories too many to keep their names) are left out.
    """
    rows = min(rows, profile.rows)
    rng = np.random.default_rng(0)
    frame = {}
    for name, column in profile.columns.items():
        values = _values(column, rows)
        if values is not None:
            frame[name] = values[rng.permutation(rows)]
    return pd.DataFrame(frame, index=range(rows))


def _values(column: Column, rows: int) -> np.ndarray | None:
    filled = round(rows * column.count / max(column.rows, 1))
    ranks = (np.arange(filled) + 0.5) / max(filled, 1)
    if column.kind == "numeric" and filled:
        values = column.histogram.quantiles(ranks, float(column.minimum or 0.0), float(column.maximum or 0.0))
        return np.r_[values, np.full(rows - filled, np.nan)]
    if column.kind == "categorical" and filled and not column.categories.hashed:
        names = sorted(column.categories.names)
        cumulative = np.cumsum([column.categories.names[name] for name in names])
        chosen = np.array(names, object)[np.searchsorted(cumulative, ranks * cumulative[-1])]
        return np.r_[chosen, np.full(rows - filled, "(missing)", object)]
    return None


def write_page(uri: str, reference: Profile, current: Profile, source: Any, rows: int = ROWS) -> list[str]:
    """Write Evidently's data drift preset on samples as one HTML file.

    :param uri: where to
    :param reference: profile of the reference; its rows are drawn from it, see :func:`resample`
    :param current: profile of ``source``
    :param source: the current data, as :meth:`Profile.of` takes them
    :param rows: at most so many rows of each side
    :return: columns left out because Evidently cannot compare them: absent or of another type on one side, without
        a value, times, categories too many to name; nothing is written when none is left
    """
    from evidently import DataDefinition, Dataset, Report
    from evidently.presets import DataDriftPreset

    drawn, seen = resample(reference, rows), sample(source, current, rows)
    numeric = [str(name) for name in drawn if comparable(name, "numeric", reference, current)]
    categorical = [str(name) for name in drawn if comparable(name, "categorical", reference, current)]
    for name in numeric:
        seen[name] = numbers(seen[name])
    numeric = [name for name in numeric if seen[name].notna().any() and drawn[name].notna().any()]
    for name in categorical:
        seen[name] = names(seen[name], "(missing)")
    left_out = sorted((set(reference.columns) | set(current.columns)) - set(numeric) - set(categorical))
    if not numeric and not categorical:
        return left_out
    definition = DataDefinition(numerical_columns=numeric, categorical_columns=categorical)
    used = numeric + categorical
    snapshot = Report([DataDriftPreset(num_method="wasserstein", cat_method="jensenshannon")]).run(
        Dataset.from_pandas(seen[used], definition), Dataset.from_pandas(drawn[used], definition)
    )
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "page.html")
        snapshot.save_html(path)
        with open(path, "rb") as file:
            storage.write_bytes(uri, file.read())
    return left_out


def comparable(name: Any, kind: str, reference: Profile, current: Profile) -> bool:
    """Whether a column is of ``kind`` on both sides."""
    return name in current.columns and reference.columns[name].kind == current.columns[name].kind == kind


def numbers(values: pd.Series) -> pd.Series:
    """A column of any numeric type as Evidently takes it; infinities as missing."""
    return pd.to_numeric(values).astype("float64").replace([np.inf, -np.inf], np.nan)


def names(values: pd.Series, missing: str | None) -> pd.Series:
    """Names as a profile writes them, and ``missing`` for missing ones."""
    return values.astype(object).map(lambda value: missing if pd.isna(value) else _name(value)).astype(object)


def _name(value: Any) -> str:
    # 1 and 1.0 are one category: a missing value turns whole numbers into floats.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def together(found: Iterable[pa.RecordBatch]) -> pa.Table:
    """Batches of files whose types or columns differ as one table."""
    return pa.concat_tables([pa.Table.from_batches([batch]) for batch in found], promote_options="permissive")

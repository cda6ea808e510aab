"""Evidently's own drift preset and tests as the verdict, for those who want its exact numbers.

It reads both sides whole into memory, corrects for neither the number of columns nor the size of the sample, and says
nothing about columns that it cannot compare; those keep the verdict of :func:`airflow_mlops.drift.compare.compare`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from airflow_mlops.drift.page import comparable, names, numbers, together
from airflow_mlops.drift.profile import Profile, batches, column_names
from airflow_mlops.drift.report import ColumnDrift, DriftReport
from airflow_mlops.exceptions import DataError, InvalidInputError

_FIXED = ("columns", "include_tests")


@dataclass(frozen=True)
class PresetReport:
    """What Evidently found.

    :param report: our report, with Evidently's distance, method and test in each column that it compared, and the
        verdict of its test of the dataset
    :param drifted: whether its test of the dataset failed
    :param share: of drifted columns among those it compared
    :param limit: share from which on the test fails
    """

    report: DriftReport
    drifted: bool
    share: float
    limit: float


def judge(
    reference: Any, current: Any, profiles: tuple[Profile, Profile], ours: DriftReport, options: Mapping[str, Any]
) -> PresetReport:
    """Run ``DataDriftPreset`` with its tests on all rows.

    Columns that are broken, or move with the calendar, are left out and keep what ``ours`` says of them.

    :param reference: the data the model was trained on, as :meth:`Profile.of` takes them
    :param current: the window to judge
    :param profiles: of the reference and of the current data
    :param ours: the comparison of the two profiles
    :param options: further arguments of the preset: ``drift_share``, ``num_method``, ``num_threshold``, ...
    :raises DataError: the reference lacks a column, or no column is left
    :raises InvalidInputError: the preset does not take the options
    """
    out = {column.name for column in ours.columns if column.status in ("broken", "calendar")}
    out |= set(ours.policy.calendar_columns)
    kinds = {
        kind: [name for name in profiles[0].columns if name not in out and comparable(name, kind, *profiles)]
        for kind in ("numeric", "categorical")
    }
    used = [name for group in kinds.values() for name in group]
    if not used:
        raise DataError(f"Evidently can compare none of the columns {', '.join(profiles[0].columns)}")
    if absent := [name for name in used if name not in column_names(reference)]:
        raise DataError(
            f"the reference data {reference} lack {', '.join(absent)}, which the champion's profile has; "
            "point reference_uri at the data that the champion was trained on"
        )
    snapshot = _run(_frame(reference, kinds), _frame(current, kinds), kinds, options)
    metrics = snapshot.dict()["metrics"]
    found = {metric["config"]["column"]: metric for metric in metrics if "column" in metric["config"]}
    tests = {test.metric_config.params.get("column"): test for test in snapshot.tests_results}
    columns = [
        _with_theirs(column, found[column.name], tests[column.name]) if column.name in found else column
        for column in ours.columns
    ]
    columns.sort(key=lambda column: _ORDER.index(column.status))
    (counted,) = (metric for metric in metrics if "drift_share" in metric["config"])
    failed = tests[None].status.value != "SUCCESS"
    reasons = [f"Evidently: {tests[None].description}"]
    reasons += [f"{column.name}: {column.reason}" for column in columns if column.status in ("broken", "drift")]
    verdict = "drift" if failed or any(column.status == "broken" for column in columns) else "stable"
    if min(ours.rows) < ours.policy.min_rows:
        verdict, failed = "not_enough_data", False
        reasons = [f"{min(ours.rows)} rows, at least {ours.policy.min_rows} needed", *reasons]
    report = replace(ours, verdict=verdict, reasons=tuple(reasons), columns=tuple(columns))
    return PresetReport(report, failed, float(counted["value"]["share"]), float(counted["config"]["drift_share"]))


_ORDER = ("broken", "drift", "calendar", "not_enough_data", "stable")


def _frame(source: Any, kinds: Mapping[str, list[str]]) -> pd.DataFrame:
    """All rows of the columns in ``kinds``, of types that Evidently does not pass over."""
    used = [name for group in kinds.values() for name in group]
    frame = together(batches(source, used)).select(used).to_pandas()
    for name in kinds["numeric"]:
        frame[name] = numbers(frame[name])
    for name in kinds["categorical"]:
        frame[name] = names(frame[name], None)
    return frame


def _run(
    reference: pd.DataFrame, current: pd.DataFrame, kinds: Mapping[str, list[str]], options: Mapping[str, Any]
) -> Any:
    from evidently import DataDefinition, Dataset, Report
    from evidently.legacy.calculations.stattests.registry import StatTestNotFoundError
    from evidently.presets import DataDriftPreset

    if fixed := [name for name in _FIXED if name in options]:
        raise InvalidInputError(f"engine_options has {', '.join(fixed)}, which the sensor sets; leave it out")
    definition = DataDefinition(numerical_columns=kinds["numeric"], categorical_columns=kinds["categorical"])
    try:
        report = Report([DataDriftPreset(**options)], include_tests=True)
        return report.run(Dataset.from_pandas(current, definition), Dataset.from_pandas(reference, definition))
    except (TypeError, ValueError, StatTestNotFoundError) as error:
        raise InvalidInputError(f"Evidently's DataDriftPreset({dict(options)}) fails: {error}") from error


def _with_theirs(column: ColumnDrift, metric: Mapping[str, Any], test: Any) -> ColumnDrift:
    value = float(metric["value"])
    status = "stable" if test.status.value == "SUCCESS" else "drift"
    method = str(metric["config"]["method"])
    p_value = value if "p_value" in method else None
    return replace(
        column, status=status, method=method, distance=value, effect=None, psi=None, p_value=p_value, adjusted_p=None,
        reason=test.description,
    )  # fmt: skip

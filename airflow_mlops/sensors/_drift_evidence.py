"""What the champion's scores and losses say on a window, with labels and without."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airflow_mlops import storage
from airflow_mlops.exceptions import DataError, InvalidInputError
from airflow_mlops.sensors._drift import Found, number, policy_of, tagged_json
from airflow_mlops.sensors._drift_state import change
from airflow_mlops.shell import log_table

if TYPE_CHECKING:
    from airflow_mlops.drift import HarmReport, LossReference
    from airflow_mlops.drift.performance import PerformanceEstimate
    from airflow_mlops.drift.sequential import LossVerdict
    from airflow_mlops.hooks.mlflow import MlflowHook
    from airflow_mlops.windows import Window


@dataclass(frozen=True)
class Evidence:
    """What was found; None where it was not asked for.

    :param harm: the window's losses against those that the champion was accepted on
    :param estimate: the performance to expect of the window's scores
    :param sequential: the losses of all windows since the champion serves
    """

    harm: HarmReport | None = None
    estimate: PerformanceEstimate | None = None
    sequential: LossVerdict | None = None

    @property
    def harmful(self) -> bool:
        """Whether labels have shown harm."""
        return any(found is not None and found.verdict == "harm" for found in (self.harm, self.sequential))

    @property
    def reasons(self) -> list[str]:
        """Why, in words."""
        found = list(self.harm.reasons if self.harm else ())
        return found + [
            f"over all windows, {reason}" for reason in (self.sequential.reasons if self.sequential else ())
        ]

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON."""
        parts = {"harm": self.harm, "estimate": self.estimate, "sequential": self.sequential}
        return {name: part.to_json() if part else None for name, part in parts.items()}

    def log(self, log: Any) -> None:
        """Show it in the task's log."""
        if self.harm:
            log.info("Harm: %s (%s)\n%s", self.harm.verdict, "; ".join(self.harm.reasons), harm_table(self.harm))
        if self.estimate:
            log.info("Without labels: %s\n%s", self.estimate.verdict, _estimate_table(self.estimate))
        if self.sequential:
            log.info("Over all windows: %s (%s)", self.sequential.verdict, "; ".join(self.sequential.reasons))


def evidence_of(
    context: Mapping[str, Any],
    hook: MlflowHook,
    champion: Any,
    window: Window | None,
    *,
    current_uri: str,
    predictions_uri: str | None,
    columns: tuple[str, str],
    scores_column: str | None,
    harm_policy: Any,
    loss_test: Mapping[str, Any] | None,
    state_dir: str,
) -> Evidence:
    """Judge what there is; the parameters are those of the sensor.

    :param columns: of the label and of the prediction
    """
    from airflow_mlops.drift import HarmPolicy, LossReference, assess_harm

    estimate = None
    if scores_column is not None:
        estimate = _estimate(hook, champion, predictions_uri or current_uri, scores_column)
    if loss_test is not None and predictions_uri is None:
        raise InvalidInputError("loss_test needs predictions_uri, with the labels and the champion's predictions")
    if predictions_uri is None:
        return Evidence(estimate=estimate)
    reference = LossReference.from_json(tagged_json(hook, champion, "mlops.loss_reference_uri", "loss reference"))
    frame = read_predictions(predictions_uri, list(columns))
    label, probability = (frame[name] for name in columns)
    policy = policy_of(HarmPolicy, harm_policy, "harm_policy")
    harm = assess_harm(reference, label, probability, frame["event_timestamp"].dt.date, policy)
    sequential = None
    if loss_test is not None:
        sequential = _sequential(context, champion, window, reference, frame, columns, loss_test, state_dir)
    return Evidence(harm, estimate, sequential)


def verdict_of(found: Found, evidence: Evidence, retrain_on: Collection[str]) -> tuple[str, bool, list[str]]:
    """The verdict of all together, whether it asks for a training, and why.

    :param retrain_on: what does: ``harm``, ``drift``
    """
    drift, harm = found.report, evidence.harm
    harmful, drifted = evidence.harmful, drift.verdict == "drift"
    reasons = [f"harm: {reason}" for reason in evidence.reasons]
    reasons += [f"drift: {reason}" for reason in drift.reasons]
    retrain = ("harm" in retrain_on and harmful) or ("drift" in retrain_on and drifted and found.drifted)
    lacking = drift.verdict == "not_enough_data" or (harm is not None and harm.verdict == "not_enough_data")
    verdict = "harm" if harmful else "drift" if drifted else "not_enough_data" if lacking else "stable"
    return verdict, retrain, reasons


def _estimate(hook: MlflowHook, champion: Any, uri: str, column: str) -> PerformanceEstimate:
    from airflow_mlops.drift.page import together
    from airflow_mlops.drift.performance import CalibratedEstimate
    from airflow_mlops.drift.profile import batches, column_names

    stored = tagged_json(hook, champion, "mlops.performance_uri", "estimator of performance")
    if column not in (present := column_names(uri)):
        raise DataError(f"{uri} lacks the scores_column {column}; it has {', '.join(present)}")
    # A dataset without a row can have no batch either.
    found = list(batches(uri, [column]))
    scores = together(found).column(column).to_pandas() if found else []
    return CalibratedEstimate.from_json(stored).estimate(scores)


def _sequential(
    context: Mapping[str, Any],
    champion: Any,
    window: Window | None,
    reference: LossReference,
    frame: Any,
    columns: tuple[str, str],
    given: Mapping[str, Any],
    state_dir: str,
) -> LossVerdict:
    """The test over all windows of this champion; a window that is judged again starts from what was before it."""
    from airflow_mlops.drift.hysteresis import span
    from airflow_mlops.drift.limits import number_of
    from airflow_mlops.drift.sequential import LossTest

    if window is None:
        raise InvalidInputError("loss_test goes by windows, and this run has none; give both ends of one")
    fields = dict(given)
    delay = span("label_delay", number_of(fields.pop("label_delay", 0)))
    fresh = LossTest.from_fields(reference.log_loss, fields)
    losses = _log_loss(*(frame[name] for name in columns))
    batch = window.start.isoformat()

    def step(state: Mapping[str, Any] | None) -> tuple[LossVerdict, dict[str, Any]]:
        before = None if state is None else state["before"] if state["batch"] == batch else state["test"]
        test = fresh if before is None else LossTest.from_json(before)
        verdict, after = test.update(frame["event_timestamp"], losses, matured_until=window.end - delay, batch=batch)
        if state is not None and batch < state["batch"]:
            # Its days have been judged; a backfill out of order finds what is known and adds nothing.
            return verdict, dict(state)
        return verdict, {"batch": batch, "before": before, "test": after.to_json()}

    name = re.sub(r"[^\w.+-]", "_", f"{champion.name}-{champion.version}")
    uri = storage.join(state_dir, f"{name}.losses.json")
    return change(context, f"mlops_drift_losses.{name}", uri, step)


def _log_loss(label: Any, probability: Any) -> Any:
    """Log loss by row, missing where the label or the prediction is."""
    import numpy as np

    from airflow_mlops.drift.harm import as_floats, log_losses

    labels = as_floats(label)
    return np.where(np.isnan(labels), np.nan, log_losses(labels, as_floats(probability))[0])


def _estimate_table(report: PerformanceEstimate) -> str:
    rows: list[list[object]] = [
        [name, number(m.value), number(m.low), number(m.high), number(m.reference)]
        for name, m in report.metrics.items()
    ]
    return log_table(["metric", "expected", "low", "high", "reference"], rows)


def read_predictions(uri: str, columns: list[str]) -> Any:
    """The predictions as a ``pandas.DataFrame``; ``event_timestamp`` in UTC."""
    import pandas as pd
    import pyarrow as pa

    from airflow_mlops.drift.profile import batches, column_names

    wanted = ["event_timestamp", *columns]
    absent = [name for name in wanted if name not in (present := column_names(uri))]
    if absent:
        raise DataError(
            f"{uri} lacks {', '.join(absent)}; it has {', '.join(present)}. Set label_column and prediction_column."
        )
    found = list(batches(uri, wanted))
    frame = pa.Table.from_batches(found).to_pandas() if found else pd.DataFrame(columns=wanted)
    frame["event_timestamp"] = pd.to_datetime(frame["event_timestamp"], utc=True)
    return frame


def harm_table(report: HarmReport) -> str:
    rows: list[list[object]] = [
        [
            t.name,
            number(t.reference),
            number(t.current),
            number(t.change),
            t.tolerance,
            number(t.p_value),
            t.harmful,
        ]
        for t in report.tests
    ]
    return log_table(["test", "reference", "current", "change", "tolerance", "p", "harmful"], rows)

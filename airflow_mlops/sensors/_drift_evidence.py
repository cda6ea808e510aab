"""What the champion's scores and losses say on a window, with labels and without."""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airflow_mlops.exceptions import DataError, InvalidInputError
from airflow_mlops.sensors._drift import Found, number, policy_of, tagged_json
from airflow_mlops.sensors._drift_losses import Predictions, losses_over_windows, read_rows
from airflow_mlops.shell import log_table

if TYPE_CHECKING:
    from airflow_mlops.drift import HarmReport
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

    if loss_test is not None and predictions_uri is None:
        raise InvalidInputError("loss_test needs predictions_uri, with the labels and the champion's predictions")
    if loss_test is not None and window is None:
        raise InvalidInputError("loss_test goes by windows, and this run has none; give both ends of one")
    # For the test of the loss the predictions may go back beyond the window; all else is about the window alone.
    ends = (window.start, window.end) if loss_test is not None and window is not None else (None, None)
    estimate = None
    if scores_column is not None:
        estimate = _estimate(hook, champion, predictions_uri or current_uri, scores_column, ends)
    if predictions_uri is None:
        return Evidence(estimate=estimate)
    reference = LossReference.from_json(tagged_json(hook, champion, "mlops.loss_reference_uri", "loss reference"))
    predictions = Predictions(predictions_uri, *columns)
    frame, first = predictions.read(*ends)
    label, probability = (frame[name] for name in columns)
    policy = policy_of(HarmPolicy, harm_policy, "harm_policy")
    harm = assess_harm(reference, label, probability, frame["event_timestamp"].dt.date, policy)
    sequential = None
    if loss_test is not None and window is not None:
        sequential = losses_over_windows(
            context, champion, window, reference, predictions, (frame, first), loss_test, state_dir
        )
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


def _estimate(
    hook: MlflowHook, champion: Any, uri: str, column: str, ends: tuple[dt.datetime | None, dt.datetime | None]
) -> PerformanceEstimate:
    from airflow_mlops.drift.page import together
    from airflow_mlops.drift.performance import CalibratedEstimate
    from airflow_mlops.drift.profile import batches, column_names

    stored = tagged_json(hook, champion, "mlops.performance_uri", "estimator of performance")
    if column not in (present := column_names(uri)):
        raise DataError(f"{uri} lacks the scores_column {column}; it has {', '.join(present)}")
    if ends != (None, None):
        return CalibratedEstimate.from_json(stored).estimate(read_rows(uri, [column], *ends)[0][column])
    # A dataset without a row can have no batch either.
    found = list(batches(uri, [column]))
    scores = together(found).column(column).to_pandas() if found else []
    return CalibratedEstimate.from_json(stored).estimate(scores)


def _estimate_table(report: PerformanceEstimate) -> str:
    rows: list[list[object]] = [
        [name, number(m.value), number(m.low), number(m.high), number(m.reference)]
        for name, m in report.metrics.items()
    ]
    return log_table(["metric", "expected", "low", "high", "reference"], rows)


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

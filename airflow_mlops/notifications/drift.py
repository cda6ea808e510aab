"""Tells people of a drift check that they should know of, through whatever notifier they use."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseNotifier

from airflow_mlops.exceptions import InvalidInputError

if TYPE_CHECKING:
    from airflow.sdk import Context

VERDICTS = ("harm", "drift", "stable", "not_enough_data", "no_champion")


class DriftNotifier(BaseNotifier):
    """Passes the result of a :class:`~airflow_mlops.sensors.drift.DriftSensor` on to another notifier, when it is one
    of the verdicts that are worth a message.

    For the sensor's ``on_success_callback`` and ``on_skipped_callback``. The other notifier's templates know ``drift``,
    the sensor's result, and ``drift_subject`` and ``drift_text``, a line and a few about it::

        tell = DriftNotifier(
            SmtpNotifier(to="ml@example.com", subject="{{ drift_subject }}", html_content="<pre>{{ drift_text }}</pre>")
        )
        DriftSensor(..., on_success_callback=tell, on_skipped_callback=tell)

    :param notifier: any notifier of any provider
    :param verdicts: those to tell of
    :param held_back: tell also where retraining was asked for and held back, whatever the verdict
    """

    def __init__(
        self, notifier: BaseNotifier, *, verdicts: Sequence[str] = ("harm", "drift"), held_back: bool = True
    ) -> None:
        super().__init__()
        self.notifier = notifier
        self.verdicts = verdicts
        self.held_back = held_back

    def notify(self, context: Context) -> None:
        """Render and send, or stay silent."""
        if isinstance(self.verdicts, str) or set(self.verdicts) - set(VERDICTS):
            raise InvalidInputError(f"verdicts is {self.verdicts!r}; expected a list of {', '.join(VERDICTS)}")
        ti = context["ti"]
        result = ti.xcom_pull(task_ids=ti.task_id, map_indexes=ti.map_index)
        if not isinstance(result, Mapping) or "verdict" not in result:
            self.log.warning("the task has no drift verdict to tell of; is this the callback of a DriftSensor?")
            return
        if result["verdict"] not in self.verdicts and not (self.held_back and held_back(result)):
            self.log.info("%s is not worth a message", result["verdict"])
            return
        # A notifier keeps what its templates rendered to, so each message gets one of its own.
        notifier = copy.copy(self.notifier)
        notifier({**context, "drift": result, "drift_subject": subject(result), "drift_text": text(result)})


def held_back(result: Mapping[str, Any]) -> bool:
    """Whether retraining was asked for and held back."""
    return bool((result.get("hysteresis") or {}).get("reason"))


def subject(result: Mapping[str, Any]) -> str:
    """The result in one line."""
    retrain = "retraining" if result["retrain"] else "retraining held back" if held_back(result) else "no retraining"
    window = result.get("window")
    when = f" ({window['start'][:10]} to {window['end'][:10]})" if window else ""
    return f"{result['model']['name']}: {result['verdict'].replace('_', ' ')}, {retrain}{when}"


def text(result: Mapping[str, Any]) -> str:
    """The result in a few lines: reasons, and where to read on."""
    lines = [subject(result), "", *(f"- {reason}" for reason in result["reasons"])]
    places = {"report": "report_uri", "Evidently's page": "html_uri", "MLflow": "mlflow_url"}
    found = [f"{name}: {result[key]}" for name, key in places.items() if result.get(key)]
    return "\n".join([*lines, "", *found] if found else lines)

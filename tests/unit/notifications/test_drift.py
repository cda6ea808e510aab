"""The notifier: which checks are told, and what another notifier's templates see."""

from __future__ import annotations

import pytest
from airflow.sdk import BaseNotifier

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.notifications.drift import DriftNotifier

RESULT = {
    "verdict": "harm",
    "retrain": True,
    "model": {"name": "flights_delay", "version": "3"},
    "window": {"start": "2013-04-01T00:00:00+00:00", "end": "2013-05-01T00:00:00+00:00"},
    "reasons": ["harm: log_loss: +0.1", "drift: temp"],
    "report_uri": "/reports/a.drift.json",
    "html_uri": None,
    "mlflow_url": "https://mlflow/#/experiments/1/runs/a",
    "hysteresis": None,
}
SENT: list = []


class Mail(BaseNotifier):
    template_fields = ("title", "body")

    def __init__(self, title, body):
        super().__init__()
        self.title, self.body = title, body

    def notify(self, context):
        SENT.append((self.title, self.body))


class TaskInstance:
    task_id, map_index = "drift", -1

    def __init__(self, result):
        self.result = result

    def xcom_pull(self, task_ids, map_indexes):
        assert (task_ids, map_indexes) == ("drift", -1)
        return self.result


@pytest.fixture(autouse=True)
def empty():
    SENT.clear()


def tell(result, title="{{ drift_subject }}", body="{{ drift.model.version }}", **kwargs):
    notifier = DriftNotifier(Mail(title, body), **kwargs)
    for told in [result] if not isinstance(result, list) else result:
        notifier({"ti": TaskInstance(told), "dag": None})
    return SENT


def test_harm_is_told_in_the_words_of_the_other_notifiers_templates():
    assert tell(RESULT) == [("flights_delay: harm, retraining (2013-04-01 to 2013-05-01)", "3")]


def test_the_text_has_the_reasons_and_where_to_read_on():
    ((_, body),) = tell(RESULT, body="{{ drift_text }}")
    assert body.splitlines() == [
        "flights_delay: harm, retraining (2013-04-01 to 2013-05-01)",
        "",
        "- harm: log_loss: +0.1",
        "- drift: temp",
        "",
        "report: /reports/a.drift.json",
        "MLflow: https://mlflow/#/experiments/1/runs/a",
    ]


def test_quiet_checks_are_not_told_unless_asked_for():
    quiet = {**RESULT, "verdict": "stable", "retrain": False, "window": None}
    assert tell(quiet) == []
    assert tell(quiet, verdicts=["stable"]) == [("flights_delay: stable, no retraining", "3")]


def test_retraining_that_is_held_back_is_told():
    held = {**RESULT, "verdict": "drift", "retrain": False, "hysteresis": {"reason": "cool-down"}}
    assert tell(held, verdicts=[])[0][0].startswith("flights_delay: drift, retraining held back")
    SENT.clear()
    assert tell(held, verdicts=[], held_back=False) == []


def test_each_message_is_rendered_anew():
    other = {**RESULT, "model": {"name": "other", "version": "9"}}
    assert [version for _, version in tell([RESULT, other])] == ["3", "9"]


def test_a_task_without_a_verdict_is_silent():
    assert tell([None, {"other": 1}]) == []


@pytest.mark.parametrize("verdicts", ["harm", ["harm", "loss"]])
def test_verdicts_that_there_are_not_are_refused(verdicts):
    with pytest.raises(InvalidInputError, match="expected a list of harm"):
        tell(RESULT, verdicts=verdicts)

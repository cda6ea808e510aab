"""The notifier: which rollouts are told, and what another notifier's templates see."""

from __future__ import annotations

import pytest
from airflow.sdk import BaseNotifier

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.notifications.rollout import RolloutNotifier

RESULT = {
    "verdict": "ROLLBACK",
    "model": "churn",
    "version": "8",
    "previous": "7",
    "reasons": ["errors: the canary is worse", "{{ ti.task_id }}"],
    "html_uri": "s3://reports/rollout.html",
    "mlflow_url": "https://mlflow/#/experiments/1/runs/a",
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
    dag_id, task_id, map_index = "release", "canary", -1

    def __init__(self, result):
        self.result = result

    def xcom_pull(self, task_ids, map_indexes):
        assert (task_ids, map_indexes) == ("canary", -1)
        return self.result


@pytest.fixture(autouse=True)
def empty():
    SENT.clear()


def tell(*results, title="{{ rollout_subject }}", body="{{ rollout.version }}", exception=None, **kwargs):
    notifier = RolloutNotifier(Mail(title, body), **kwargs)
    for result in results:
        notifier({"ti": TaskInstance(result), "dag": None, "exception": exception})
    return SENT


def test_a_rollback_is_told_in_the_words_of_the_other_notifiers_templates():
    assert tell(RESULT) == [("churn, version 8 against version 7: rolled back", "8")]


def test_the_text_has_the_reasons_as_they_are_and_where_to_read_on():
    ((_, body),) = tell(RESULT, body="{{ rollout_text }}")
    assert body.splitlines() == [
        "churn, version 8 against version 7: rolled back",
        "",
        "- errors: the canary is worse",
        "- {{ ti.task_id }}",
        "",
        "report: s3://reports/rollout.html",
        "MLflow: https://mlflow/#/experiments/1/runs/a",
    ]


def test_a_promotion_is_told_when_asked_for():
    promoted = {**RESULT, "verdict": "PROMOTE", "previous": None}
    assert tell(promoted) == []
    assert tell(promoted, verdicts=["PROMOTE"]) == [("churn, version 8: promoted", "8")]


def test_a_test_that_ended_is_told():
    assert tell({**RESULT, "verdict": "CONCLUDE"})[0][0].endswith(": test concluded")


def test_a_task_that_failed_before_any_verdict_is_told_unless_it_is_not_to_be():
    failed = RuntimeError("nobody is there")
    ((title, body),) = tell(None, body="{{ rollout_text }}", exception=failed)
    assert title == "release.canary: the rollout failed without a verdict"
    assert body.splitlines() == [title, "", "nobody is there"]
    SENT.clear()
    assert tell(None, exception=failed, failures=False) == []


def test_the_failure_that_a_rollback_ends_with_is_told_once_and_as_a_rollback():
    assert tell(RESULT, exception=RuntimeError("rolled back")) == [
        ("churn, version 8 against version 7: rolled back", "8")
    ]


def test_each_message_is_rendered_anew():
    assert [version for _, version in tell(RESULT, {**RESULT, "version": "9"})] == ["8", "9"]


def test_a_task_without_a_verdict_is_silent():
    assert tell(None, {"other": 1}, {"verdict": "harm"}) == []


@pytest.mark.parametrize("verdicts", ["ROLLBACK", ["ROLLBACK", "HOLD"]])
def test_verdicts_that_there_are_not_are_refused(verdicts):
    with pytest.raises(InvalidInputError, match="expected a list of PROMOTE"):
        tell(RESULT, verdicts=verdicts)
